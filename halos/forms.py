"""The forms that rows of data can have, and how a row of each becomes a `Record`: a prompt, responses, and opinions.

A form is a function from a row to a Record. To add one, write the function, and add it to FORMS with the columns that
it is recognised by. `halos/rows.py` reads the values of columns, and `halos/sources.py` the rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from halos.rows import (
    FORMS_IN_WORDS,
    Row,
    Text,
    as_response,
    is_messages,
    label_in,
    messages_in,
    number_in,
    parsed_number,
    prompt_in,
    response_in,
    tools_in,
    with_system,
)
from halos.turns import messages_of_turns, same_but_blanks, split_reply

PAIRINGS = ("all", "best-worst", "adjacent")


@dataclass
class Record:
    """The content of one row: `responses` to a prompt, and what is known of them, by their indices."""

    prompt: Text
    responses: list[Text]
    pairs: list[tuple[int, int]] = field(default_factory=list)  # (better, worse)
    desirable: bool | None = None  # binary feedback on the only response
    scores: list[float] = field(default_factory=list)  # one per response, higher is better; or empty
    imitate: bool = False  # SFT: the only response is to be imitated
    rank: bool = False  # pairs are to be made of the scores
    tools: list[dict] | None = None
    whole: str | None = None  # a text without a prompt, as it was before it was divided


#### FORMS


def pairs(row: Row) -> Record:
    """prompt, chosen, rejected; or the prompt inside both."""
    chosen, rejected = row["chosen"], row["rejected"]
    scores = []
    for names in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
        if row.has(*names):
            scores = [number_in(row, name) for name in names]
    if _is_conversation(chosen) and _is_conversation(rejected):
        prompt, responses = _common_messages(row)
    elif "prompt" not in row and isinstance(chosen, str) and isinstance(rejected, str) and "\n\nAssistant:" in chosen:
        prompt, responses = _common_turns(row, chosen, rejected)
    else:
        prompt, responses = prompt_in(row), [response_in(row, "chosen"), response_in(row, "rejected")]
        given = row["prompt"]
        texts = [text for text in responses if isinstance(text, str)]
        if isinstance(given, str) and given and len(texts) == 2 and all(text.startswith(given) for text in texts):
            responses = [text[len(given) :] for text in texts]
    return Record(prompt, responses, pairs=[(0, 1)], scores=scores)


def _is_conversation(value: object) -> bool:
    """Return True for messages that begin with the prompt, not with a response."""
    return is_messages(value) and value[0].get("role", value[0].get("from")) not in ("assistant", "gpt")  # type: ignore


def _common_messages(row: Row) -> tuple[Text, list[Text]]:
    """Divide two conversations where they part. If `prompt` has messages that both begin with, it ends there."""
    chosen, rejected = messages_in(row, "chosen"), messages_in(row, "rejected")
    given = messages_in(row, "prompt") if is_messages(row.columns.get("prompt")) else []
    row.read.add("prompt")  # as text it repeats the first message
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    if given and len(given) <= n and chosen[: len(given)] == given:
        n = len(given)
    while n and not all(n < len(one) and one[n]["role"] == "assistant" for one in (chosen, rejected)):
        n -= 1
    if not n:
        raise row.error("'chosen' and 'rejected' have no prompt in common that an assistant answers; correct the row")
    return with_system(row, chosen[:n]), [as_response(chosen[n:]), as_response(rejected[n:])]


def _common_turns(row: Row, chosen: str, rejected: str) -> tuple[Text, list[Text]]:
    """Divide two texts of Human / Assistant turns at their last reply."""
    (prompt, good), (other, bad) = split_reply(chosen), split_reply(rejected)
    if prompt is None or other is None or not same_but_blanks(prompt, other):
        raise row.error("'chosen' and 'rejected' have no common turns before the last reply; correct the row")
    as_messages = messages_of_turns(prompt)
    space = " " if isinstance(as_messages, str) else ""
    return as_messages, [space + good.strip(), space + bad.strip()]


def feedback(row: Row) -> Record:
    """prompt, response (or completion), desirable (or label); or messages and a label."""
    label = label_in(row, row.first("desirable", "label"))
    if not row.has("prompt") and row.has(row.first("messages", "conversations")):
        record = messages(row)
        return Record(record.prompt, record.responses, desirable=label, tools=record.tools)
    prompt = prompt_in(row)
    return Record(prompt, [response_in(row, row.first("response", "completion", "output"))], desirable=label)


def messages(row: Row) -> Record:
    """A conversation to imitate: `messages`, or ShareGPT's `conversations`. Every assistant turn is trained on."""
    turns = messages_in(row, row.first("messages", "conversations", "conversation"))
    first = next((i for i, message in enumerate(turns) if message["role"] == "assistant"), 0)
    if not first:
        found = ", ".join(message["role"] for message in turns)
        raise row.error(f"the messages are [{found}]; an assistant message that follows another one is needed")
    return Record(with_system(row, turns[:first]), [as_response(turns[first:])], imitate=True)


def completion(row: Row) -> Record:
    """prompt and completion (or response), to imitate."""
    return Record(prompt_in(row), [response_in(row, row.first("completion", "response"))], imitate=True)


def instruction(row: Row) -> Record:
    """Alpaca's instruction, input and output, to imitate: the first two are one user message."""
    parts = [row["instruction"], row.get("input")]
    if not all(isinstance(part, str | None) for part in parts):
        raise row.wrong("instruction", "text")
    text = "\n\n".join(part for part in parts if part and part.strip())
    prompt = with_system(row, [{"role": "user", "content": text}]) if text else ""
    return Record(prompt, [response_in(row, row.first("output", "response"))], imitate=True)


def text(row: Row) -> Record:
    """A text to imitate. Its first word is the prompt, since nothing predicts the first token of a sequence."""
    whole = row["text"]
    if not isinstance(whole, str):
        raise row.wrong("text", "text")
    before = len(whole) - len(whole.lstrip())
    word = (whole.split(maxsplit=1) or [""])[0]
    end = before + len(word)
    return Record(whole[:end], [whole[end:]], imitate=True, whole=whole)


def ranked(row: Row) -> Record:
    """prompt and several responses with scores (higher is better) or ranks (lower is better)."""
    name = row.first("responses", "completions", "generations", "answers")
    items = row[name]
    if not isinstance(items, list) or not items:
        raise row.wrong(name, "a list of responses")
    if all(isinstance(item, dict) and "role" not in item for item in items):
        responses, scores = _responses_and_scores(row, name, items)
    else:
        responses = [response_in(Row(row.where, {name: item}), name) for item in items]
        scores = _list_of_scores(row)
    if len(scores) != len(responses):
        raise row.error(f"{len(responses)} responses and {len(scores)} scores; give one score to each response")
    return Record(prompt_in(row), responses, scores=scores, rank=True)


TEXT_KEYS = ("response", "answer", "completion", "text", "content", "output")
SCORE_KEYS = ("score", "overall_score", "rating", "reward")


def _responses_and_scores(row: Row, name: str, items: list[dict]) -> tuple[list[Text], list[float]]:
    responses, scores = [], []
    for item in items:
        part = Row(row.where, item)
        key = part.first(*TEXT_KEYS)
        responses.append(response_in(part, key))
        if score := next((key for key in SCORE_KEYS if part.has(key)), None):
            scores.append(number_in(part, score))
        else:
            scores.append(-number_in(part, "rank"))
    return responses, scores


def _list_of_scores(row: Row) -> list[float]:
    ranks = not row.has(row.first("scores", "ratings", "rewards"))
    name = row.first("ranks", "rank") if ranks else row.first("scores", "ratings", "rewards")
    values = row[name] if name in row or not ranks else row["scores"]
    if not isinstance(values, list):
        raise row.wrong(name, "a list of numbers")
    return [parsed_number(row, name, value) * (-1 if ranks else 1) for value in values]


def rated(row: Row) -> Record:
    """prompt, response and its score. All rows of a prompt are ranked together."""
    response = response_in(row, row.first("response", "completion", "output"))
    return Record(prompt_in(row), [response], scores=[number_in(row, row.first(*SCORE_KEYS))], rank=True)


def pairwise_feedback(row: Row) -> Record:
    """The later HALOs' JSON: prompt, output_A, output_B, label (1: A is better), reward_A, reward_B."""
    responses = [response_in(row, "output_A"), response_in(row, "output_B")]
    scores = [number_in(row, name) for name in ("reward_A", "reward_B") if row.has(name)]
    better = 0 if label_in(row, "label") else 1
    return Record(prompt_in(row), responses, pairs=[(better, 1 - better)], scores=scores if len(scores) == 2 else [])


def binary_feedback(row: Row) -> Record:
    """The later HALOs' JSON: prompt, output, label, reward."""
    scores = [number_in(row, "reward")] if row.has("reward") else []
    return Record(prompt_in(row), [response_in(row, "output")], desirable=label_in(row, "label"), scores=scores)


# Name of a form -> (its function, what it is recognised by: one of several sets of columns that hold something).
FORMS: dict[str, tuple[Callable[[Row], Record], tuple[tuple[str, ...], ...]]] = {
    "pairwise_feedback": (pairwise_feedback, (("output_A", "output_B"),)),
    "binary_feedback": (binary_feedback, (("output", "label", "prompt"),)),
    "pairs": (pairs, (("chosen",), ("rejected",))),
    "ranked": (
        ranked,
        tuple((name,) for name in ("responses", "completions", "generations", "answers")),
    ),
    "feedback": (feedback, (("desirable",), ("label",))),
    "rated": (rated, tuple((name, "score") for name in ("response", "completion"))),
    "messages": (messages, (("messages",), ("conversations",), ("conversation",))),
    "completion": (completion, (("completion",), ("response",))),
    "instruction": (instruction, (("instruction",),)),
    "text": (text, (("text",),)),
}


def form_of(row: Row) -> str:
    """Return the name of the form that a row has, by the columns that hold something."""
    for name, (_, recognised) in FORMS.items():
        if any(row.has(*columns) for columns in recognised) and not (name == "text" and row.has("prompt")):
            return name
    row["prompt"]
    raise row.error(
        f"no response (it has: {', '.join(sorted(row.columns))}); a row has {FORMS_IN_WORDS}, or another form of "
        "docs/data.md"
    )


def record_of(row: Row, form: str = "auto") -> Record:
    """Return what a row says. `form` is a name in FORMS, or auto."""
    record = FORMS[form_of(row) if form == "auto" else form][0](row)
    record.tools = record.tools or tools_in(row)
    return record


#### PAIRS OF A RANKING


def pairs_of_scores(scores: list[float], pairing: str, margin: float = 0) -> list[tuple[int, int]]:
    """Return (better, worse) indices whose scores differ by at least `margin`, and by more than 0.

    pairing: all pairs; best-worst: one pair; adjacent: neighbours in the ranking, of which equal scores form none
    """
    order = sorted((i for i in range(len(scores)) if not math.isnan(scores[i])), key=lambda i: -scores[i])
    if pairing == "all":
        candidates = [(better, worse) for place, better in enumerate(order) for worse in order[place + 1 :]]
    elif pairing == "best-worst":
        candidates = [(order[0], order[-1])] if order else []
    else:
        candidates = list(zip(order, order[1:], strict=False))
    return [(i, j) for i, j in candidates if scores[i] - scores[j] >= margin and scores[i] > scores[j]]
