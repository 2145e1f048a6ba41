"""Samples: reading pairs of responses from files, taking a sample of them, and the order in which they are shown.

A row of eval.py has the prompt as the model read it (`prompt`), and the `messages` that it was rendered from, if it was
a conversation. A judge is shown the messages, and rows of two files with the same messages belong together. If a prompt
has several rows, `sample` numbers them.

Which pairs are in a sample, and which response is shown first, are functions of a hash of (seed, prompt, both
responses). They do not depend on the order of the file or of the calls. Change `read_pairs` to read another format.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from halos.datafiles import SUFFIXES, is_message, read_rows
from halos.errors import UserError, did_you_mean

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
HUMAN_LABELS = ("candidate", "baseline", "tie")
PROMPT, MESSAGES, SAMPLE = "prompt", "messages", "sample"  # keys of the rows that eval.py writes
VERDICT_COLUMNS = ("length_candidate", "length_baseline", "preference_candidate")


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with the two responses that are compared.

    row: number of its row in the file, from 1
    prompt: as the judge is shown it
    human: a person's choice: candidate, baseline, tie, or None
    source: prompt (its messages, if it has them), candidate and baseline as the file has them, for training data
    """

    row: int
    prompt: str
    candidate: str
    baseline: str
    human: str | None = None
    source: tuple[Any, ...] = field(default=(), compare=False)


class Row(NamedTuple):
    """A row of a sample file.

    number: from 1
    prompt: text of the prompt's key; messages: text of the row's messages, or None
    sample: number among the rows of its prompt, or None
    responses: one per key
    source: prompt or messages, and the responses, as the file has them
    """

    number: int
    prompt: str
    messages: str | None
    sample: int | None
    responses: tuple[str, ...]
    human: str | None
    source: tuple[Any, ...]

    @property
    def shown(self) -> str:
        """The prompt as the judge is shown it."""
        return self.prompt if self.messages is None else self.messages


#### READING


def read_pairs(
    file: str,
    candidate_key: str,
    baseline_key: str,
    prompt_key: str = "prompt",
    human_key: str | None = None,
    baseline_file: str | None = None,
) -> list[Pair]:
    """Read the pairs of a sample file, in the order of its rows.

    file: .json as eval.py writes it, .jsonl or .parquet
    candidate_key, baseline_key, prompt_key, human_key: keys of a row
    baseline_file: read the baselines from this file; prompts that are in one file only are left out
    If both keys are the same and there is one file, the samples of each prompt are compared with each other.
    Raises UserError if a row lacks a key, a prompt occurs twice, all baselines are empty, or no row has a human label.
    """
    if baseline_file is not None:
        rows = _rows(file, prompt_key, [candidate_key], human_key)
        baselines = _rows(baseline_file, prompt_key, [baseline_key])
        pairs = list(_joined(rows, baselines))
        if not pairs:
            raise UserError(f"{file} and {baseline_file} have no prompt in common; sample both for the same prompts")
        if len(pairs) < max(len(rows), len(baselines)):
            print(f"{len(pairs)} prompts are in both files ({len(rows)} and {len(baselines)}); the others are left out")
    elif candidate_key == baseline_key:
        pairs = list(_neighbours(_rows(file, prompt_key, [candidate_key], human_key)))
        if not pairs:
            raise UserError(
                f"{file}: {candidate_key!r} would be compared with itself, since no prompt has two samples; "
                "sample with --n_per_prompt 2, or compare with another key, as in -bk chosen"
            )
    else:
        rows = _rows(file, prompt_key, [candidate_key, baseline_key], human_key)
        pairs = [_pair_of(row, row) for row in rows]
    _refuse_empty(pairs, baseline_file or file, baseline_key)
    if human_key and not any(pair.human for pair in pairs):
        raise UserError(f"{file}: no row has a label in {human_key!r}; give a key that holds {', '.join(HUMAN_LABELS)}")
    return pairs


def _joined(rows: list[Row], baselines: list[Row]) -> Iterator[Pair]:
    """Pair each row with the baseline of its prompt: the one with the same messages where both have them.

    Two models with different templates read the same messages as different texts. A file with one response per prompt
    is the baseline of every sample.
    """
    by_messages = {(row.messages, row.sample): row for row in baselines if row.messages is not None}
    by_prompt = {(row.prompt, row.sample): row for row in baselines}

    def baseline_of(row: Row) -> Row | None:
        for sample in (row.sample, 0 if row.sample is None else None):
            if row.messages is not None and (found := by_messages.get((row.messages, sample))):
                return found
            found = by_prompt.get((row.prompt, sample))
            if found and (row.messages is None or found.messages is None):
                return found
        return None

    for row in rows:
        if other := baseline_of(row):
            yield _pair_of(row, other)


def _neighbours(rows: list[Row]) -> Iterator[Pair]:
    """Pair the samples of each prompt: the first with the second, the third with the fourth, and so on."""
    waiting: dict[str, Row] = {}
    for row in rows:
        if first := waiting.pop(row.shown, None):
            yield _pair_of(first, row)
        else:
            waiting[row.shown] = row


def _pair_of(row: Row, other: Row) -> Pair:
    """Make a pair of the first response of one row and the last response of another, or of the same row."""
    source = (*row.source[:2], other.source[-1])
    return Pair(row.number, row.shown, row.responses[0], other.responses[-1], row.human, source)


def _rows(file: str, prompt_key: str, keys: list[str], human_key: str | None = None) -> list[Row]:
    """Read every row of a file. keys: of the responses"""
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file; give the samples that eval.py wrote, as in -f samples/NAME.json")
    if not file.endswith(SUFFIXES):
        raise UserError(f"{file}: not a sample file; give one that ends in {', '.join(SUFFIXES)}")
    rows, seen = [], dict[tuple[str, int | None], int]()
    for number, (where, content) in enumerate(_contents(file, ", ".join([prompt_key, *keys])), 1):
        place = f"{where} (row {number})"
        row = _row(place, number, content, prompt_key, keys, human_key)
        first = seen.setdefault((row.shown, row.sample), number)
        if first != number:
            same = prompt_key if row.sample is None else f"{prompt_key} and {SAMPLE}"
            raise UserError(f"{place}: the same {same} as row {first}; keep one of the two")
        rows.append(row)
    return rows


def _contents(file: str, forms: str) -> Iterator[tuple[str, dict]]:
    """Yield `read_rows`, with one line also for JSON that Python itself refuses to decode."""
    try:
        yield from read_rows(file, forms=forms)
    except UserError:
        raise
    except (RecursionError, ValueError) as error:  # nested a thousand deep, or a number of thousands of digits
        raise UserError(f"{file}: cannot be read ({str(error)[:80]}); correct the row") from error


def _row(place: str, number: int, content: dict, prompt_key: str, keys: list[str], human_key: str | None) -> Row:
    """Read one row. Messages are those of `prompt`; a prompt under another key is shown as it is."""
    prompt = _text(place, content, prompt_key)
    has_messages = prompt_key == PROMPT and content.get(MESSAGES) is not None
    sample = content.get(SAMPLE)
    return Row(
        number,
        prompt,
        _conversation(place, content[MESSAGES]) if has_messages else None,
        sample if isinstance(sample, int) and not isinstance(sample, bool) else None,
        tuple(_text(place, content, key) for key in keys),
        _human_label(place, content, human_key) if human_key else None,
        (content[MESSAGES if has_messages else prompt_key], *(content[key] for key in keys)),
    )


def _text(place: str, row: dict, key: str) -> str:
    """Read a text, or write chat messages as one: ROLE: CONTENT, with blank lines between them.

    place: of the row, for errors
    Half a surrogate pair, as in a sample that was cut inside an emoji, cannot be sent. It becomes U+FFFD.
    """
    if key not in row:
        raise UserError(f"{place}: no key {key!r}; {did_you_mean(key, row)}")
    value = row[key]
    if isinstance(value, list) and value and all(map(is_message, value)):
        value = "\n\n".join(f"{message['role']}: {message['content']}" for message in value)
    if not isinstance(value, str):
        raise UserError(f"{place}: {key!r} is {value!r:.40}, not a text; correct the row")
    return LONE_SURROGATE.sub("\ufffd", value)


def _conversation(place: str, messages: object) -> str:
    """Write the messages of a row as `_text` does. A call of a tool, and content that is not text, is shown as JSON."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) and turn.get("role") for turn in messages):
        raise UserError(f"{place}: {MESSAGES!r} is {messages!r:.40}, not a list of messages; correct the row")
    turns = []
    for turn in messages:
        parts = [turn.get("content"), turn.get("tool_calls")]
        texts = [part if isinstance(part, str) else json.dumps(part) for part in parts if part]
        turns.append(f"{turn['role']}: {' '.join(texts)}")
    return LONE_SURROGATE.sub("\ufffd", "\n\n".join(turns))


def _human_label(place: str, row: dict, key: str) -> str | None:
    """Read the label of a row; None if the key is absent or null."""
    label = row.get(key)
    if label is not None and label not in HUMAN_LABELS:
        raise UserError(f"{place}: {key!r} is {label!r:.40}; give {', '.join(HUMAN_LABELS)} or null")
    return label


def _refuse_empty(pairs: list[Pair], file: str, baseline_key: str) -> None:
    """Raise UserError if all baselines are empty; say how many are."""
    empty = sum(not pair.baseline.strip() for pair in pairs)
    if empty == len(pairs):
        raise UserError(
            f"{file}: {baseline_key!r} is empty in every row, as when sampling had no reference model; "
            "compare with another key, as in -bk chosen"
        )
    if empty:
        print(f"{empty} of {len(pairs)} baselines are empty texts; they are judged as they are")


def read_verdicts(files: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read preferences, and lengths of candidates and of baselines, from csv files with VERDICT_COLUMNS: three of (n,).

    Lengths are in characters; a preference is in [0, 1], 1 if the candidate won. A pair without one is left out.
    Raises UserError if a file is missing or holds something else, or if all preferences are the same.
    """
    rows = [row for file in files for row in _verdict_rows(file)]
    ours, theirs, scores = np.array(rows, dtype=float).reshape(-1, 3).T
    if not len(rows) or np.ptp(scores) == 0:
        problem = "all preferences are the same" if len(rows) else "no pair has a preference"
        raise UserError(f"--length_anchor {' '.join(files)}: {problem}; give rewrites that win and rewrites that lose")
    return scores, ours, theirs


def _verdict_rows(file: str) -> list[list[float]]:
    """Read the numbers of VERDICT_COLUMNS in each row that has a preference."""
    rows = []
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines)
            for column in VERDICT_COLUMNS:
                if column not in (reader.fieldnames or ()):
                    raise UserError(f"--length_anchor {file}: no column {column!r}; give {', '.join(VERDICT_COLUMNS)}")
            for row in reader:
                texts = [row[column] for column in VERDICT_COLUMNS]
                if texts[-1]:
                    rows.append(_verdict_numbers(f"{file}, line {reader.line_num}", texts))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--length_anchor {file}: {error}; give a csv that --verdicts wrote") from error
    return rows


def _verdict_numbers(place: str, texts: list[str]) -> list[float]:
    """Read two lengths and a preference of a row. place: of the row, for errors"""
    try:
        ours, theirs, score = map(float, texts)
    except (TypeError, ValueError):
        ours, theirs, score = -1.0, -1.0, -1.0
    if not (0 <= ours < np.inf and 0 <= theirs < np.inf and 0 <= score <= 1):
        raise UserError(f"{place}: {texts} are not two lengths and a preference between 0 and 1; correct the row")
    return [ours, theirs, score]


def lengths(pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Count the characters of the candidates and of the baselines: two arrays of (n_pairs,)."""
    return np.array([len(pair.candidate) for pair in pairs]), np.array([len(pair.baseline) for pair in pairs])


#### SAMPLING AND POSITIONS


def sample_pairs(pairs: list[Pair], n: int | None, seed: int) -> list[Pair]:
    """Take a sample of `n` pairs, in the order of the file. A larger sample contains the smaller ones of its seed."""
    if n is None or n >= len(pairs):
        return pairs
    ranked = sorted(range(len(pairs)), key=lambda index: pair_hash(pairs[index], seed))
    return [pairs[index] for index in sorted(ranked[:n])]


def orders(pair: Pair, both: bool, seed: int) -> tuple[int, ...]:
    """List the orders in which a pair is judged, both or a random one: 0 shows the candidate first, 1 the baseline."""
    return (0, 1) if both else (pair_hash(pair, seed)[-1] & 1,)


def pair_hash(pair: Pair, seed: int) -> bytes:
    """Hash a pair and a seed into 16 bytes, which decide all that is random about the pair."""
    return digest(str(seed), pair.prompt, pair.candidate, pair.baseline)


def digest(*texts: str) -> bytes:
    """Hash a sequence of texts into 16 bytes. Lengths are hashed too: ("ab", "c") and ("a", "bc") differ."""
    hashed = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        hashed.update(len(data).to_bytes(8, "big"))
        hashed.update(data)
    return hashed.digest()


def slots(pair: Pair, order: int) -> tuple[str, str]:
    """Put the responses in the order in which they are shown: (first, second)."""
    return (pair.baseline, pair.candidate) if order else (pair.candidate, pair.baseline)
