"""The embedded dataset: small questions with checkable answers, and what imperfect people answered.

`generate(split, seed)` writes prompts, responses and preferences; `check(prompt, response)` says how good a response
truly is, from the two texts alone. A task is one entry of TASKS: the templates that ask it, a function that draws the
material, and a function that solves it. The same templates write a prompt and parse it, so a new task needs only its
entry there (and a pattern in FIELDS for a new kind of field).

The people are imperfect on purpose, so that alignment has something to repair: SFT imitates a response that is right
about two times in three, while the preferred response of a pair is better than the other one, and right six times in
seven.
"""

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from string import Formatter

N_PROMPTS = {"train": 20_000, "test": 2_048}
TEST_SHARE = 8  # one question in 8 belongs to the test split, whatever the seed

P_ANSWERED = 0.93  # that somebody answered the prompt rightly
P_IMITATED = 0.68  # that SFT imitates a right response where there is one
P_HISTORY = 0.12  # that a prompt has earlier turns about something else
P_SECOND_BEST = 0.25  # that two responses are compared of which neither is the best

LEAD_INS = (
    "",
    "",
    "",
    "The answer is ",
    "Sure: ",
)  # how a response may open; "" is the most common
ENDINGS = ("", "", ".")

ANIMALS = "ant bear cat cow dog duck fox frog goat hen horse lion mouse owl pig sheep wolf zebra".split()
FRUITS = "apple cherry fig grape lemon lime mango melon orange papaya peach pear plum quince".split()
TOOLS = "axe brush drill file hammer knife ladder needle pliers rake saw shovel spoon wrench".split()
NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ida Jon Kim Leo Mia Noor Olga Pia Ravi Sam Tess Uma".split()
KINDS = {"animals": ANIMALS, "fruits": FRUITS, "tools": TOOLS}

REFUSALS = (
    "I am not sure.",
    "Sorry, I cannot do that.",
    "I do not know the answer to this question.",
    "Could you please ask me something else?",
    "As a language model, I would rather not answer questions of this kind.",
)
RAMBLINGS = (
    "I hope that this helps!",
    "Let me know if you have any more questions, and I will be happy to help you again.",
    "But then again, I may be wrong, because this was a difficult question for me.",
    "This is a very interesting question, and many people have asked it before you.",
)


# ---- The material: words in capitals, small numbers, lists, tables


def draw_word(rng: Random) -> str:
    """A word that can be pronounced, of 3 to 7 capitals: MIKA, LODUN."""
    length = rng.choice((3, 4, 4, 5, 5, 6, 7))
    start = rng.random() < 0.8
    return "".join(rng.choice("BDKLMNPRST") if (i % 2 == 0) == start else rng.choice("AEIOU") for i in range(length))


def draw_numbers(rng: Random) -> str:
    return ", ".join(map(str, rng.sample(range(1, 100), rng.choice((3, 3, 4, 4, 5, 6)))))


def draw_table(rng: Random) -> dict[str, str]:
    items = rng.sample(rng.choice((ANIMALS, FRUITS, TOOLS)), rng.choice((2, 3, 3, 4, 5, 6, 8, 10)))
    prices = rng.sample(range(1, 100), len(items))
    table = ", ".join(f"{item} {price}" for item, price in zip(items, prices, strict=True))
    return {"table": table, "item": rng.choice(items)}


def draw_mixture(rng: Random) -> dict[str, str]:
    """A list of two kinds of things, with the kind to be picked out of it."""
    kind, other = rng.sample(sorted(KINDS), 2)
    things = rng.sample(KINDS[kind], rng.choice((1, 2, 2, 3, 4))) + rng.sample(KINDS[other], rng.choice((1, 2, 3, 4)))
    rng.shuffle(things)
    return {"things": ", ".join(things), "kind": kind}


def draw_substitution(rng: Random) -> dict[str, str]:
    word = draw_word(rng)
    old = rng.choice(word)
    return {
        "word": word,
        "old": old,
        "new": rng.choice([letter for letter in "AEIOUXZ" if letter != old]),
    }


def draw_letter(rng: Random) -> dict[str, str]:
    word = draw_word(rng)
    return {"word": word, "letter": rng.choice(word + "AEIO")}


def draw_sum(rng: Random) -> dict[str, str]:
    return {
        "name": rng.choice(NAMES),
        "a": str(rng.randint(1, 50)),
        "b": str(rng.randint(1, 9)),
    }


def draw_span(rng: Random) -> dict[str, str]:
    first = rng.randint(1, 60)
    return {"a": str(first), "b": str(first + rng.choice((2, 3, 4, 5, 6, 8, 10, 14)))}


def in_order(text: str, descending: bool = False) -> str:
    """The letters of a word, or the numbers of a list, in order."""
    if "," in text:
        return ", ".join(sorted(text.split(", "), key=int, reverse=descending))
    return "".join(sorted(text, reverse=descending))


def entries(table: str) -> dict[str, str]:
    return dict(entry.split(" ") for entry in table.split(", "))


# ---- The tasks


@dataclass(frozen=True)
class Task:
    """`answer` and `decoys` take the drawn fields by name; decoys answer another question about the same material."""

    templates: tuple[str, ...]
    draw: Callable[[Random], dict[str, str]]
    answer: Callable[..., str]
    decoys: Callable[..., list[str]]


TASKS = {
    "reverse": Task(
        templates=(
            "Write {word} backwards.",
            "Reverse the word {word}.",
            "My word is {word}.\n\nAssistant: Noted.\n\nHuman: Please write it backwards.",
        ),
        draw=lambda rng: {"word": draw_word(rng)},
        answer=lambda word: word[::-1],
        decoys=lambda word: [word, in_order(word), word[1:] + word[0]],
    ),
    "sort_letters": Task(
        templates=(
            "Sort the letters of {word}.",
            "Put the letters of {word} in alphabetical order.",
        ),
        draw=lambda rng: {"word": draw_word(rng)},
        answer=lambda word: in_order(word),
        decoys=lambda word: [word, word[::-1], in_order(word, descending=True)],
    ),
    "spell": Task(
        templates=(
            "Spell {word}.",
            "How do you spell {word}? Please put dashes between the letters.",
        ),
        draw=lambda rng: {"word": draw_word(rng)},
        answer=lambda word: "-".join(word),
        decoys=lambda word: [word, word[::-1], "-".join(word[::-1]), str(len(word))],
    ),
    "substitute": Task(
        templates=(
            "Write {word} with {new} in place of {old}.",
            "In {word}, replace every {old} by {new}.",
        ),
        draw=draw_substitution,
        answer=lambda word, old, new: word.replace(old, new),
        decoys=lambda word, old, new: [
            word,
            word.replace(old, ""),
            new,
            old,
            word[::-1],
        ],
    ),
    "count_letter": Task(
        templates=(
            "How many times does {letter} occur in {word}?",
            "Count the letter {letter} in {word}.",
        ),
        draw=draw_letter,
        answer=lambda word, letter: str(word.count(letter)),
        decoys=lambda word, letter: [str(len(word)), word, letter],
    ),
    "add": Task(
        templates=(
            "What is {a} + {b}?",
            "{name} has {a} coins and finds {b} more. How many coins does {name} have now?",
        ),
        draw=draw_sum,
        answer=lambda a, b, name="": str(int(a) + int(b)),
        decoys=lambda a, b, name="": [a, b, a + b, str(abs(int(a) - int(b)))],
    ),
    "largest": Task(
        templates=(
            "Which of these numbers is the largest: {numbers}?",
            "What is the maximum of {numbers}?",
        ),
        draw=lambda rng: {"numbers": draw_numbers(rng)},
        answer=lambda numbers: in_order(numbers).split(", ")[-1],
        decoys=lambda numbers: numbers.split(", "),
    ),
    "sort_numbers": Task(
        templates=(
            "Sort these numbers: {numbers}.",
            "Put {numbers} in order, beginning with the smallest.",
        ),
        draw=lambda rng: {"numbers": draw_numbers(rng)},
        answer=lambda numbers: in_order(numbers),
        decoys=lambda numbers: [
            numbers,
            in_order(numbers, descending=True),
            in_order(numbers).split(", ")[-1],
        ],
    ),
    "count_up": Task(
        templates=("Count from {a} to {b}.",),
        draw=draw_span,
        answer=lambda a, b: " ".join(map(str, range(int(a), int(b) + 1))),
        decoys=lambda a, b: [
            f"{a} {b}",
            " ".join(map(str, range(int(b), int(a) - 1, -1))),
        ],
    ),
    "price": Task(
        templates=(
            "What does the {item} cost? Here is the list of prices: {table}.",
            "These are my prices: {table}.\n\nAssistant: I will remember them.\n\nHuman: What does the {item} cost?",
        ),
        draw=draw_table,
        answer=lambda table, item: entries(table)[item],
        decoys=lambda table, item: [item, *entries(table).values()],
    ),
    "pick": Task(
        templates=(
            "Which of these are {kind}: {things}?",
            "I see {things}. Tell me only the {kind}.",
        ),
        draw=draw_mixture,
        answer=lambda things, kind: ", ".join(thing for thing in things.split(", ") if thing in KINDS[kind]),
        decoys=lambda things, kind: [
            things,
            kind,
            ", ".join(thing for thing in things.split(", ") if thing not in KINDS[kind]),
        ],
    ),
}

FIELDS = {
    "word": "[A-Z]+",
    "letter": "[A-Z]",
    "old": "[A-Z]",
    "new": "[A-Z]",
    "name": "[A-Z][a-z]+",
    "a": r"\d+",
    "b": r"\d+",
    "numbers": r"\d+(?:, \d+)*",
    "item": "[a-z]+",
    "table": r"[a-z]+ \d+(?:, [a-z]+ \d+)*",
    "things": "[a-z]+(?:, [a-z]+)*",
    "kind": "|".join(KINDS),
}


def template_pattern(template: str) -> re.Pattern:
    """The template as a regular expression: its first {field} becomes a named group, a second one the same text."""
    pattern, seen = "", set()
    for literal, field, *_ in Formatter().parse(template):
        pattern += re.escape(literal)
        if field:
            pattern += f"(?P={field})" if field in seen else f"(?P<{field}>{FIELDS[field]})"
            seen.add(field)
    return re.compile(pattern)


PATTERNS = [(task, template_pattern(template)) for task in TASKS.values() for template in task.templates]


# ---- What is true


def check(prompt: str, response: str) -> float:
    """How good a response truly is: 1.0 right, 0.5 right but rambling on, up to 0.4 for a resemblance, 0.0 worthless.

    Right is the answer alone, bare or in one of the usual forms ("The answer is 42."). Any text is a response; a prompt
    that asks none of our questions is a ValueError.
    """
    return grade(solve(prompt), response)


def grade(answer: str, response: str) -> float:
    said = BARE.fullmatch(response.strip()).group(1)
    if said == answer:
        return 1.0
    if said.startswith(answer + ". "):
        return 0.5
    same = sum(a == b for a, b in zip(said, answer, strict=False))
    return round(0.4 * same / max(len(said), len(answer)), 3)


BARE = re.compile(rf"(?:{'|'.join(filter(None, LEAD_INS))})?(.*?)\.?", re.DOTALL)


def solve(prompt: str) -> str:
    """The right answer to the last question of a prompt, which may begin one turn earlier ("My word is ...")."""
    turns = prompt.removesuffix("\n\nAssistant:").split("\n\nHuman: ")
    for n_turns in (1, 2):
        question = "\n\nHuman: ".join(turns[-n_turns:])
        for task, pattern in PATTERNS:
            if match := pattern.fullmatch(question):
                return task.answer(**match.groupdict())
    raise ValueError(
        f"prompt=...{prompt[-80:]!r} asks none of the demo's questions; check() knows generate()'s prompts"
    )


# ---- What people answer


def right_response(rng: Random, answer: str) -> str:
    return f" {rng.choice(LEAD_INS)}{answer}{rng.choice(ENDINGS)}"


def wrong_response(rng: Random, task: Task, fields: dict[str, str], question: str) -> str:
    """A mistake of one of many kinds. Variety matters: were all mistakes one character away from the right answer, then
    DPO would push the right answer down along with them."""
    answer = task.answer(**fields)
    kind = rng.choices(tuple(MISTAKES), MISTAKES.values())[0]
    if kind == "refusal":
        return f" {rng.choice(REFUSALS)}"
    if kind == "rambling":
        return f" {rng.choice(LEAD_INS)}{answer}. {rng.choice(RAMBLINGS)}"
    if kind == "rambling wrong":
        return f" {rng.choice(LEAD_INS)}{slip(rng, answer)}. {rng.choice(RAMBLINGS)}"
    if kind == "echo":
        return f" {question.split(': ')[-1]}"
    if kind == "other question":
        return right_response(rng, rng.choice(task.decoys(**fields)))
    if kind == "other material":
        return right_response(rng, task.answer(**task.draw(rng)))
    if kind == "cut short":
        start = answer[: rng.randrange(len(answer))]
        return f" {rng.choice(LEAD_INS) if start else 'The answer is '}{start}".rstrip(" ,-")
    return right_response(rng, slip(rng, answer))


MISTAKES = {  # kind -> weight
    "slip": 30,
    "other question": 22,
    "other material": 8,
    "cut short": 12,
    "rambling": 8,
    "rambling wrong": 5,
    "refusal": 10,
    "echo": 5,
}


def slip(rng: Random, answer: str) -> str:
    """The answer with a small error: a number a little off, or a unit (letter, word, number) lost, doubled, moved."""
    if answer.isdigit():
        return str(max(0, int(answer) + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10))))
    separator = next((mark for mark in (", ", "-", " ") if mark in answer), "")
    units = answer.split(separator) if separator else list(answer)
    i, j = rng.randrange(len(units)), rng.randrange(len(units))
    edit = rng.choice(("lose", "double", "move", "swap", "swap"))
    if edit == "lose":
        del units[i]
    elif edit == "double":
        units.insert(i, units[i])
    elif edit == "move":
        units.insert(j, units.pop(i))
    else:
        units[i], units[j] = units[j], units[i]
    return separator.join(units)


# ---- The dataset


def generate(split: str, seed: int = 0) -> list[dict]:
    """The demo dataset, a pure function of its arguments: about N_PROMPTS[split] prompts in random order.

    Each item: `prompt`; `responses`, all different, each beginning with a space; `pairs` of indices (better, worse)
    into them, by check(); `sft_index`, the response that SFT imitates. No question of the test split is in the training
    split, whatever their seeds.
    """
    rng = Random(f"demo/{split}/{seed}")
    items, seen = [], set()
    while len(items) < N_PROMPTS[split]:
        task = TASKS[rng.choice(TASK_NAMES)]
        fields, question = draw_question(rng, task)
        if (zlib.crc32(question.encode()) % TEST_SHARE == 0) != (split == "test") or question in seen:
            continue
        seen.add(question)
        prompt = f"\n\nHuman: {question}\n\nAssistant:"
        if rng.random() < P_HISTORY:
            prompt = draw_history(rng) + prompt
        items.append({"prompt": prompt, **draw_feedback(rng, task, fields, question)})
    return items


TASK_NAMES = tuple(TASKS)


def draw_question(rng: Random, task: Task) -> tuple[dict[str, str], str]:
    template, fields = rng.choice(task.templates), task.draw(rng)
    fields = {name: value for name, value in fields.items() if f"{{{name}}}" in template}
    return fields, template.format(**fields)


def draw_history(rng: Random) -> str:
    """One to four earlier questions, with their right answers."""
    turns = []
    for _ in range(rng.choice((1, 1, 2, 4))):
        task = TASKS[rng.choice(TASK_NAMES)]
        fields, question = draw_question(rng, task)
        turns.append(f"\n\nHuman: {question}\n\nAssistant:{right_response(rng, task.answer(**fields))}")
    return "".join(turns)


def draw_feedback(rng: Random, task: Task, fields: dict[str, str], question: str) -> dict:
    """What two to four people answered, whom SFT imitates, and which answers were preferred to which."""
    answer = task.answer(**fields)
    n_responses = rng.choice((2, 2, 2, 3, 4))
    scores: dict[str, float] = {}
    while len(set(scores.values())) < 2:  # without a right response, all can be equally worthless: ask others
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
    return {"responses": responses, "pairs": pairs, "sft_index": rng.choice(imitated)}
