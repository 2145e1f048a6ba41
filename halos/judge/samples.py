"""What a judge compares: pairs of responses from sample files, and what judges said of them.

Which pairs are sampled, and which response is shown first, are functions of a hash of (seed, prompt, both responses):
they depend neither on the order of the file nor on the order of the calls.
"""

import hashlib
import os
import re
from dataclasses import dataclass

import numpy as np

from halos.datafiles import SUFFIXES, is_message, read_rows
from halos.errors import UserError, did_you_mean

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
HUMAN_LABELS = ("candidate", "baseline", "tie")


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with two responses. `row` counts the file's rows from 1; `human` is candidate, baseline, tie or None."""

    row: int
    prompt: str
    candidate: str
    baseline: str
    human: str | None = None


# ---- Reading


def read_pairs(
    file: str,
    candidate_key: str,
    baseline_key: str,
    prompt_key: str = "prompt",
    human_key: str | None = None,
    baseline_file: str | None = None,
) -> list[Pair]:
    """The pairs of a sample file, as eval.py writes it, or as .jsonl or .parquet.

    baseline_file: the baseline of a prompt is in its row of this file instead; prompts that only one of the two files
    has are left out. A row without a key, a prompt that occurs twice and baselines without any text are UserErrors.
    """
    keys = [prompt_key, candidate_key] + [baseline_key] * (baseline_file is None)
    rows = _rows(file, keys, human_key)
    if baseline_file is None:
        pairs = [Pair(row, prompt, ours, theirs, human) for row, (prompt, ours, theirs), human in rows]
    else:
        baselines = {prompt: text for _, (prompt, text), _ in _rows(baseline_file, [prompt_key, baseline_key])}
        pairs = [
            Pair(row, prompt, ours, baselines[prompt], human)
            for row, (prompt, ours), human in rows
            if prompt in baselines
        ]
        if not pairs:
            raise UserError(f"{file} and {baseline_file} have no prompt in common; sample both for the same prompts")
        if len(pairs) < max(len(rows), len(baselines)):
            print(f"{len(pairs)} prompts are in both files ({len(rows)} and {len(baselines)}); the others are left out")
    _refuse_empty(pairs, baseline_file or file, baseline_key)
    if human_key and not any(pair.human for pair in pairs):
        raise UserError(f"{file}: no row has a label in {human_key!r}; give a key that holds {', '.join(HUMAN_LABELS)}")
    return pairs


def _rows(file: str, keys: list[str], human_key: str | None = None) -> list[tuple[int, list[str], str | None]]:
    """(row number, texts of the keys, human label) of every row; the first key is the prompt's, which is unique."""
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file; give the samples that eval.py wrote, as in -f samples/NAME.json")
    if not file.endswith(SUFFIXES):
        raise UserError(f"{file}: not a sample file; give one that ends in {', '.join(SUFFIXES)}")
    rows, seen = [], dict[str, int]()
    for number, (where, row) in enumerate(read_rows(file, forms=", ".join(keys)), 1):
        place = f"{where} (row {number})"
        texts = [_text(place, row, key) for key in keys]
        first = seen.setdefault(texts[0], number)
        if first != number:
            raise UserError(f"{place}: the same {keys[0]} as row {first}; keep one of the two")
        rows.append((number, texts, _human_label(place, row, human_key) if human_key else None))
    return rows


def _text(place: str, row: dict, key: str) -> str:
    """A text, or the text of chat messages: ROLE: CONTENT, with blank lines between them.

    Half a surrogate pair, as a sample that was cut in an emoji has it, cannot be sent: it becomes U+FFFD.
    """
    if key not in row:
        raise UserError(f"{place}: no key {key!r}; {did_you_mean(key, row)}")
    value = row[key]
    if isinstance(value, list) and value and all(map(is_message, value)):
        value = "\n\n".join(f"{message['role']}: {message['content']}" for message in value)
    if not isinstance(value, str):
        raise UserError(f"{place}: {key!r} is {value!r:.40}, not a text; correct the row")
    return LONE_SURROGATE.sub("\ufffd", value)


def _human_label(place: str, row: dict, key: str) -> str | None:
    """The label of a row; a row without one, or with null, is not labelled."""
    label = row.get(key)
    if label is not None and label not in HUMAN_LABELS:
        raise UserError(f"{place}: {key!r} is {label!r:.40}; give {', '.join(HUMAN_LABELS)} or null")
    return label


def _refuse_empty(pairs: list[Pair], file: str, baseline_key: str) -> None:
    empty = sum(not pair.baseline.strip() for pair in pairs)
    if empty == len(pairs):
        raise UserError(
            f"{file}: {baseline_key!r} is empty in every row, as when sampling had no reference model; "
            "compare with another key, as in -bk chosen"
        )
    if empty:
        print(f"{empty} of {len(pairs)} baselines are empty texts; they are judged as they are")


def lengths(pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Characters of the candidates and of the baselines."""
    return np.array([len(pair.candidate) for pair in pairs]), np.array([len(pair.baseline) for pair in pairs])


# ---- Sampling, and positions


def sample_pairs(pairs: list[Pair], n: int | None, seed: int) -> list[Pair]:
    """`n` of the pairs, in the order of the file; a larger sample contains the smaller ones of the same seed."""
    if n is None or n >= len(pairs):
        return pairs
    ranked = sorted(range(len(pairs)), key=lambda index: pair_hash(pairs[index], seed))
    return [pairs[index] for index in sorted(ranked[:n])]


def orders(pair: Pair, both: bool, seed: int) -> tuple[int, ...]:
    """Which orders a pair is judged in: 0 shows the candidate first, 1 the baseline."""
    return (0, 1) if both else (pair_hash(pair, seed)[-1] & 1,)


def pair_hash(pair: Pair, seed: int) -> bytes:
    return digest(str(seed), pair.prompt, pair.candidate, pair.baseline)


def digest(*texts: str) -> bytes:
    """16 bytes that identify a sequence of texts; lengths are hashed too, so that no two sequences run together."""
    hashed = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        hashed.update(len(data).to_bytes(8, "big"))
        hashed.update(data)
    return hashed.digest()


def slots(pair: Pair, order: int) -> tuple[str, str]:
    """The responses as they are shown: first, second."""
    return (pair.baseline, pair.candidate) if order else (pair.candidate, pair.baseline)
