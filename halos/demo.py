"""The embedded dataset: small questions with checkable answers, and the answers of imperfect people.

`generate(split, seed)` returns prompts, responses and preferences. `check(prompt, response)` returns how good a
response really is, from the two texts alone. A task is one entry of TASKS: the templates of its question, a function
that draws the material, and a function that solves it. The same templates write a prompt and parse it. To add a task,
add an entry to TASKS (and, for a new kind of field, a pattern to FIELDS).

The people are imperfect on purpose, so that alignment has something to repair. SFT imitates a response that is right
about two times in three. The preferred response of a pair is always better than the other one, and right nine times in
ten. Most tasks are small enough for a model of two million parameters to learn in a minute or two: they are about the
letters of a word or the digits of a number, at the end of the prompt. Mistakes vary, and many have a style of their own
(rambling, refusing, stopping early), so SFT learns the tasks in spite of them.
"""

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from string import Formatter

N_PROMPTS = {"train": 24_000, "test": 2_048}
TEST_SHARE = 8  # one question in 8 belongs to the test split, for every seed

# Probabilities:
P_ANSWERED = 0.95  # some response to the prompt is right
P_IMITATED = 0.70  # SFT imitates a right response, if there is one
P_SECOND_BEST = 0.25  # a pair without the best response is kept
P_HISTORY = 0.05  # a prompt has earlier turns, about other questions

LEAD_INS = ("", "", "", "", "", "", "The answer is ", "Sure: ")  # first words of a response; most have no lead-in
ENDINGS = ("", "", ".")
REFUSALS = (
    "I am not sure.",
    "Sorry, I cannot do that.",
    "I do not know the answer to this question.",
    "Could you please ask me something else?",
    "As a language model, I would rather not answer questions of this kind.",
)
RAMBLINGS = (
    "I hope that this helps!",
    "Let me know if you have any more questions.",
    "But then again, I may be wrong.",
    "This is a very interesting question, and many people have asked it before you.",
)


#### MATERIAL: a word in capitals (KAMI), a number (4715), a list of digits (7, 2, 9), a table (fig 3, pear 8)

CONSONANTS, VOWELS = "BDKLMNPRST", "AEIOU"
THINGS = "apple axe bear brush cat cow dog drill fig fox frog hen lemon lion owl pear pig plum saw wolf".split()
NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana".split()


def draw_word(rng: Random) -> str:
    """Draw a pronounceable word of 3 to 6 capitals: MIKA, LODUN."""
    start = rng.random() < 0.8
    return "".join(
        rng.choice(CONSONANTS if (place % 2 == 0) == start else VOWELS)
        for place in range(rng.choice((3, 3, 4, 4, 4, 5, 6)))
    )


def draw_digits(rng: Random) -> list[str]:
    return rng.sample("123456789", rng.choice((3, 3, 4, 4, 5, 6)))


def draw_word_or_number(rng: Random) -> dict[str, str]:
    return {"items": draw_word(rng) if rng.random() < 0.7 else "".join(draw_digits(rng))}


def draw_letter(rng: Random) -> dict[str, str]:
    word = draw_word(rng)
    return {"word": word, "letter": rng.choice(word + "AEIO")}


def draw_sum(rng: Random) -> dict[str, str]:
    return {"name": rng.choice(NAMES), "a": str(rng.randint(1, 50)), "b": str(rng.randint(1, 9))}


def draw_span(rng: Random) -> dict[str, str]:
    first = rng.randint(1, 60)
    return {"a": str(first), "b": str(first + rng.choice((2, 3, 3, 4, 5, 8, 12)))}


def draw_table(rng: Random) -> dict[str, str]:
    things = rng.sample(THINGS, rng.choice((2, 2, 3, 3, 4, 6, 9)))
    prices = rng.sample("123456789", len(things))
    return {"table": ", ".join(map(" ".join, zip(things, prices, strict=True))), "thing": rng.choice(things)}


def in_order(items: str) -> str:
    return "".join(sorted(items))


def price_list(table: str) -> dict[str, str]:
    return dict(entry.split(" ") for entry in table.split(", "))


#### TASKS


@dataclass(frozen=True)
class Task:
    """One kind of question. `answer` and `decoys` take the drawn fields by name.

    Decoys are right answers to another question about the same material.
    """

    share: int  # share of the prompts, relative to the other tasks
    templates: tuple[str, ...]
    draw: Callable[[Random], dict[str, str]]
    answer: Callable[..., str]
    decoys: Callable[..., list[str]]


TASKS = {
    "reverse": Task(
        share=5,
        templates=("Write backwards: {items}", "Reverse: {items}"),
        draw=draw_word_or_number,
        answer=lambda items: items[::-1],
        decoys=lambda items: [items, in_order(items), items[-1]],
    ),
    "sort": Task(
        share=6,
        templates=("Sort: {items}", "Put in order: {items}"),
        draw=draw_word_or_number,
        answer=lambda items: in_order(items),
        decoys=lambda items: [items, items[::-1], in_order(items)[::-1]],
    ),
    "repeat": Task(
        share=3,
        templates=("Repeat: {items}", "Say this after me: {items}"),
        draw=draw_word_or_number,
        answer=lambda items: items,
        decoys=lambda items: [items[::-1], in_order(items), items[0]],
    ),
    "extreme": Task(
        share=4,
        templates=("Which number is the {extreme}? {numbers}",),
        draw=lambda rng: {
            "extreme": rng.choice(("largest", "largest", "smallest")),
            "numbers": ", ".join(draw_digits(rng)),
        },
        answer=lambda extreme, numbers: (max if extreme == "largest" else min)(numbers.split(", ")),
        decoys=lambda extreme, numbers: [*numbers.split(", "), numbers],
    ),
    "end_letter": Task(
        share=2,
        templates=("What is the {end} letter? {word}",),
        draw=lambda rng: {"end": rng.choice(("first", "last")), "word": draw_word(rng)},
        answer=lambda end, word: word[0] if end == "first" else word[-1],
        decoys=lambda end, word: [word, *word],
    ),
    "length": Task(
        share=1,
        templates=("How many letters are here? {word}",),
        draw=lambda rng: {"word": draw_word(rng)},
        answer=lambda word: str(len(word)),
        decoys=lambda word: [word, word[0], word[-1]],
    ),
    "count_letter": Task(
        share=1,
        templates=("How many {letter} are here? {word}",),
        draw=draw_letter,
        answer=lambda letter, word: str(word.count(letter)),
        decoys=lambda letter, word: [str(len(word)), word, letter],
    ),
    "add": Task(
        share=1,
        templates=("What is {a} + {b}?", "{name} has {a} coins and finds {b} more. How many coins are they?"),
        draw=draw_sum,
        answer=lambda a, b, name="": str(int(a) + int(b)),
        decoys=lambda a, b, name="": [a, b, a + b, str(abs(int(a) - int(b)))],
    ),
    "count_up": Task(
        share=1,
        templates=("Count from {a} to {b}.",),
        draw=draw_span,
        answer=lambda a, b: ", ".join(map(str, range(int(a), int(b) + 1))),
        decoys=lambda a, b: [f"{a}, {b}", ", ".join(map(str, range(int(b), int(a) - 1, -1)))],
    ),
    "price": Task(
        share=1,
        templates=(
            "My prices are: {table}. What does the {thing} cost?",
            "My prices are: {table}.\n\nAssistant: I will remember them.\n\nHuman: What does the {thing} cost?",
        ),
        draw=draw_table,
        answer=lambda table, thing: price_list(table)[thing],
        decoys=lambda table, thing: [thing, *price_list(table).values()],
    ),
}
TASK_NAMES = [name for name, task in TASKS.items() for _ in range(task.share)]

FIELDS = {  # field of a template -> regular expression of its values
    "items": r"[A-Z]+|\d+",
    "word": "[A-Z]+",
    "letter": "[A-Z]",
    "numbers": r"\d(?:, \d)+",
    "extreme": "largest|smallest",
    "end": "first|last",
    "name": "[A-Z][a-z]+",
    "a": r"\d+",
    "b": r"\d+",
    "thing": "[a-z]+",
    "table": r"[a-z]+ \d(?:, [a-z]+ \d)*",
}


def template_pattern(template: str) -> re.Pattern:
    """Return the template as a regular expression in which each {field} is a named group."""
    pieces = [
        re.escape(literal) + (f"(?P<{field}>{FIELDS[field]})" if field else "")
        for literal, field, *_ in Formatter().parse(template)
    ]
    return re.compile("".join(pieces))


PATTERNS = [(task, template_pattern(template)) for task in TASKS.values() for template in task.templates]


#### TRUE QUALITY


def check(prompt: str, response: str) -> float:
    """Return how good a response really is, from 0.0 (worthless) to 1.0 (right).

    1.0 means right, 0.5 right but followed by rambling, and up to 0.4 similar to the right answer. A response is right
    if it is the answer alone, bare or in one of the usual forms ("The answer is 42."). Any text may be a response. A
    prompt without one of our questions raises ValueError.
    """
    return grade(solve(prompt), response)


def grade(answer: str, response: str) -> float:
    bare = BARE.fullmatch(response.strip())
    assert bare is not None  # it matches every text
    said = bare.group(1)
    if said == answer:
        return 1.0
    if said.startswith(answer + ". "):
        return 0.5
    same = sum(a == b for a, b in zip(said, answer, strict=False))
    return round(0.4 * same / max(len(said), len(answer)), 3)


BARE = re.compile(rf"(?:{'|'.join(filter(None, LEAD_INS))})?(.*?)\.?", re.DOTALL)


def solve(prompt: str) -> str:
    """Return the right answer to the last question of a prompt. It may begin one turn earlier ("My prices are ...").

    A prompt is as a model without a template reads it, or messages as compare.py shows them ("user: ...").
    """
    prompt = re.sub(r"(?:\A|\n\n)user: ", "\n\nHuman: ", prompt).replace("\n\nassistant: ", "\n\nAssistant: ")
    turns = prompt.removesuffix("\n\nAssistant:").split("\n\nHuman: ")
    for n_turns in (1, 2):
        question = "\n\nHuman: ".join(turns[-n_turns:])
        for task, pattern in PATTERNS:
            if match := pattern.fullmatch(question):
                return task.answer(**match.groupdict())
    raise ValueError(
        f"prompt=...{prompt[-80:]!r} asks none of the demo's questions; check() knows generate()'s prompts"
    )


#### PEOPLE'S RESPONSES

MISTAKES = {  # kind -> weight
    "slip": 14,
    "other question": 14,
    "other material": 4,
    "cut short": 18,
    "rambling": 24,
    "rambling wrong": 3,
    "refusal": 18,
    "echo": 5,
}


def right_response(rng: Random, answer: str) -> str:
    return f" {rng.choice(LEAD_INS)}{answer}{rng.choice(ENDINGS)}"


def wrong_response(rng: Random, task: Task, fields: dict[str, str], question: str) -> str:
    """Draw a mistake of one of many kinds.

    Variety matters: if all mistakes were one character away from the right answer, DPO would push the right answer down
    along with them.
    """
    answer = task.answer(**fields)
    kind = rng.choices(tuple(MISTAKES), tuple(MISTAKES.values()))[0]
    if kind == "refusal":
        return f" {rng.choice(REFUSALS)}"
    if kind == "echo":
        return f" {question}"
    if kind == "rambling":
        return f" {rng.choice(LEAD_INS)}{answer}. {rng.choice(RAMBLINGS)}"
    if kind == "rambling wrong":
        return f" {rng.choice(LEAD_INS)}{slip(rng, answer)}. {rng.choice(RAMBLINGS)}"
    if kind == "cut short":
        start = answer[: rng.randrange(len(answer))]
        return f" {rng.choice(LEAD_INS) if start else 'The answer is '}{start}".rstrip(" ,")
    if kind == "other question":
        return right_response(rng, rng.choice(task.decoys(**fields)))
    if kind == "other material":
        return right_response(rng, task.answer(**draw_question(rng, task)[0]))
    return right_response(rng, slip(rng, answer))


def slip(rng: Random, answer: str) -> str:
    """Return the answer with a small error.

    A number is slightly off; in other answers a letter or digit is lost, doubled, moved or replaced.
    """
    if answer.isdigit():
        return str(max(0, int(answer) + rng.choice((-10, -2, -1, -1, 1, 1, 2, 10))))
    if len(answer) == 1:
        return rng.choice(CONSONANTS + VOWELS)
    separator = ", " if "," in answer else ""
    parts = answer.split(", ") if separator else list(answer)
    i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
    edit = rng.choice(("lose", "double", "move", "replace"))
    if edit == "double":
        parts.insert(i, parts[i])
    elif edit == "replace":
        parts[i] = rng.choice(parts)
    else:
        part = parts.pop(i)
        if edit == "move":
            parts.insert(j, part)
    return separator.join(parts)


#### DATASET


def generate(split: str, seed: int = 0) -> list[dict]:
    """Return the demo dataset, N_PROMPTS[split] items. It is a pure function of its arguments.

    Each item has: `prompt`; `responses`, all different, each beginning with a space; their `scores`, by check();
    `pairs` of indices (better, worse) into them; `sft_index`, the response that SFT imitates. A question of the test
    split is never in the training split, whatever their seeds.
    """
    rng = Random(f"demo/{split}/{seed}")
    items: list[dict] = []
    seen: set[str] = set()
    while len(items) < N_PROMPTS[split]:
        task = TASKS[rng.choice(TASK_NAMES)]
        fields, question = draw_question(rng, task)
        is_test = zlib.crc32(question.encode()) % TEST_SHARE == 0
        if is_test != (split == "test") or question in seen:
            continue
        seen.add(question)
        prompt = f"\n\nHuman: {question}\n\nAssistant:"
        if rng.random() < P_HISTORY:
            prompt = draw_history(rng) + prompt
        items.append({"prompt": prompt, **draw_feedback(rng, task, fields, question)})
    return items


def draw_question(rng: Random, task: Task) -> tuple[dict[str, str], str]:
    template, fields = rng.choice(task.templates), task.draw(rng)
    return fields, template.format(**fields)


def draw_history(rng: Random) -> str:
    """Draw one to four earlier questions with their right answers."""
    turns = []
    for _ in range(rng.choice((1, 1, 2, 4))):
        task = TASKS[rng.choice(TASK_NAMES)]
        fields, question = draw_question(rng, task)
        turns.append(f"\n\nHuman: {question}\n\nAssistant:{right_response(rng, task.answer(**fields))}")
    return "".join(turns)


def draw_feedback(rng: Random, task: Task, fields: dict[str, str], question: str) -> dict:
    """Draw two to four responses, their preference pairs, and the response that SFT imitates."""
    answer = task.answer(**fields)
    n_responses = rng.choice((2, 2, 2, 3, 4))
    scores: dict[str, float] = {}
    while len(set(scores.values())) < 2:  # without a right response, all scores can be equal: then draw again
        scores = {right_response(rng, answer): 1.0} if rng.random() < P_ANSWERED else {}
        while len(scores) < n_responses:
            response = wrong_response(rng, task, fields, question)
            scores[response] = grade(answer, response)
    responses = rng.sample(list(scores), len(scores))
    quality = [scores[response] for response in responses]

    indices = range(len(responses))
    pairs = [(i, j) for i in indices for j in indices if quality[i] > quality[j]]
    pairs = [(i, j) for i, j in pairs if quality[i] == max(quality) or rng.random() < P_SECOND_BEST]
    right = [i for i in indices if quality[i] == 1.0]
    wrong = [i for i in indices if quality[i] < 1.0]
    imitated = right if right and rng.random() < P_IMITATED else wrong
    return {"responses": responses, "scores": quality, "pairs": pairs, "sft_index": rng.choice(imitated)}
