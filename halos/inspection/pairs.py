"""Length bias, duplicates and contradictions of preferences; prompts that training and test share.

Texts are compared exactly, and once more without regard to case and white space.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from halos.examples import Example, Text, key_of
from halos.loader import DataLoader


@dataclass(frozen=True)
class LengthBias:
    """How often the chosen response of a pair is the longer one, in tokens before truncation."""

    longer: int
    shorter: int
    ties: int
    mean_chosen: float
    mean_rejected: float

    @property
    def pairs(self) -> int:
        return self.longer + self.shorter + self.ties

    @property
    def share(self) -> float | None:
        """Share of pairs in which the chosen response is longer, ties apart; None if all are ties."""
        decided = self.longer + self.shorter
        return self.longer / decided if decided else None

    @property
    def is_sure(self) -> bool:
        """True if the share is more than two standard errors from one half."""
        decided = self.longer + self.shorter
        return self.share is not None and abs(self.share - 0.5) > 1 / decided**0.5


@dataclass(frozen=True)
class Repetition:
    """Rows that say the same twice, or the opposite. A judgment is a pair or a labelled response."""

    judgments: int  # that remain
    dropped: int  # exact duplicates within a dataset, which its reader has dropped
    merged: int  # exact duplicates between datasets, which merging has dropped
    near: int  # duplicates of what remains, except for case and white space
    contradictions: int  # a > b and b > a of one prompt, or one response with both labels
    near_contradictions: int  # the same without regard to case and white space
    both: int  # responses that are chosen in one judgment and rejected in another one
    contradicting: list[str]  # ids of some examples with contradictions


@dataclass(frozen=True)
class CommonPrompts:
    """Test prompts that are also training prompts."""

    test_prompts: int
    exact: int
    near: int  # without regard to case and white space; includes the exact ones
    ids: list[str]  # of some of these test examples


SHOWN = 3  # ids to look up, per kind


def length_bias(loader: DataLoader, examples: dict[int, Example]) -> LengthBias | None:
    """Compare the responses of all pairs. examples: by their index in the loader. None if there are no pairs"""
    pairs = [
        (loader.first_response[index] + better, loader.first_response[index] + worse)
        for index, example in examples.items()
        for better, worse in example.pairs
    ]
    if not pairs:
        return None
    chosen, rejected = np.array(loader.response_lengths)[np.array(pairs)].T
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    return LengthBias(longer, shorter, len(pairs) - longer - shorter, float(chosen.mean()), float(rejected.mean()))


def repetition(account: list[dict], examples: list[Example]) -> Repetition:
    """Count duplicates and contradictions. account: of the datasets before they were merged"""
    judgments = sum(len(example.pairs) + len(example.feedback) for example in examples)
    read = sum(source["pairs"] + source["feedback"] for source in account)
    exact = [example.id for example in examples for _ in range(_n_contradictions(_said(example)))]
    near = [said for example in examples for said in _said_nearly(example)]
    return Repetition(
        judgments=judgments,
        dropped=sum(
            source["dropped"].get(f"duplicate {what}", 0) for source in account for what in ("pair", "feedback")
        ),
        merged=max(0, read - judgments) if account else 0,
        near=len(near) - len(set(near)),
        contradictions=len(exact),
        near_contradictions=_n_contradictions(near),
        both=sum(_n_both(example) for example in examples),
        contradicting=list(dict.fromkeys(exact))[:SHOWN],
    )


def _said(example: Example) -> list[tuple]:
    """Return the judgments as (better, worse): a label compares with nothing, None."""
    labels = [(response, None) if desirable else (None, response) for response, desirable in example.feedback]
    return [*example.pairs, *labels]


def _said_nearly(example: Example) -> Iterator[tuple]:
    """Yield the judgments as (prompt, better, worse) with keys that ignore case and white space."""
    prompt = near_key(example.prompt, example.tools)
    keys = {i: near_key(generation) for i, generation in enumerate(example.generations)} | {None: None}
    for better, worse in _said(example):
        yield prompt, keys[better], keys[worse]


def _n_contradictions(judgments: Iterable[tuple]) -> int:
    """Count the judgments (..., better, worse) whose opposite is among them, each such two once."""
    distinct = set(judgments)
    opposite = sum((*rest, worse, better) in distinct for *rest, better, worse in distinct if better != worse)
    return opposite // 2


def _n_both(example: Example) -> int:
    better, worse = zip(*_said(example), strict=True) if example.pairs or example.feedback else ((), ())
    return len((set(better) & set(worse)) - {None})


def common_prompts(train: Iterable[Example], test: Iterable[Example]) -> CommonPrompts:
    """Find the test prompts that training has, too."""
    train, test = list(train), list(test)
    exact = {key_of(example.prompt, example.tools) for example in train}
    near = {near_key(example.prompt, example.tools) for example in train}
    same = [example for example in test if key_of(example.prompt, example.tools) in exact]
    alike = [example for example in test if near_key(example.prompt, example.tools) in near]
    ids = list(dict.fromkeys(example.id for example in [*same, *alike]))[:SHOWN]
    return CommonPrompts(len(test), len(same), len(alike), ids)


def near_key(text: Text, tools: list[dict] | None = None) -> bytes:
    """Return a hash of a text or of messages that ignores case and white space."""
    parts = [text] if isinstance(text, str) else [part for message in text for part in _parts(message)]
    words = "\0".join(" ".join(part.casefold().split()) for part in [*parts, str(tools or "")])
    return blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _parts(message: dict) -> tuple[str, str, str]:
    """Return the role of a message, its content, and everything else that it has."""
    others = {key: value for key, value in message.items() if key not in ("role", "content") and value}
    return str(message.get("role")), str(message.get("content") or ""), str(others or "")
