"""The tokens of a training row as spans: what each is, what is trained on, and what truncation cuts.

`choose` finds rows that are worth a look, `show` makes the spans of a row. The ids come from the loader, so they are
those that training reads.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from halos.errors import UserError
from halos.examples import Example
from halos.inspection.numbers import Split
from halos.loader import DataLoader
from halos.tokens import Role

EDGE = 120  # tokens shown at both ends of a longer run that truncation cuts
BEFORE = 8  # tokens of the prompt that are decoded with a response, so that its first token reads as behind them
UNFINISHED = "\ufffd"  # what a part of a character decodes to
LONGEST_CHARACTER = 4  # bytes, and so tokens


class Kind(StrEnum):
    """The kind of a token."""

    CONTEXT = "context"  # read by the model and not trained on
    TRAINED = "trained"
    END = "end"  # end of turn, trained on
    SPECIAL = "special"  # BOS, EOS or another control token that is context
    CUT = "cut"  # taken away by truncation


class Span(NamedTuple):
    """A token. A gap in a long run of cut tokens is one span with the id -1, which stands for all of them."""

    id: int
    text: str
    kind: Kind
    stands_for: int = 1


class Shown(NamedTuple):
    """A training row as spans."""

    number: int  # of the row in the epoch
    why: list[str]  # why it was chosen
    example: Example
    prompt: list[Span]
    roles: tuple[Role, ...]
    responses: list[list[Span]]


#### WHICH ROWS


def choose(split: Split, n: int) -> dict[int, list[str]]:
    """Return up to `n` rows of an epoch that are worth a look: {row: why}, the most typical first."""
    chosen: dict[int, list[str]] = {}
    for row, why in _worth_a_look(split):
        if row in chosen or len(chosen) < n:
            chosen.setdefault(row, []).append(why)
    for row in range(len(split.rows)):  # the order is random, so these are samples
        if len(chosen) >= n:
            break
        chosen.setdefault(row, ["sample"])
    return chosen


def _worth_a_look(split: Split) -> Iterator[tuple[int, str]]:
    responses, rows = split.responses, np.arange(len(split.rows))
    whole = np.zeros(len(rows), np.int64)
    np.maximum.at(whole, responses.row, responses.prompt + responses.response)
    yield int(np.argmin(np.abs(whole - np.median(whole)))), "typical length"
    yield int(whole.argmax()), "longest"
    has_context = (responses.trained < responses.response_kept) & (responses.trained > 0)
    for why, mask in {
        "several turns": has_context,
        "prompt cut": responses.prompt_kept < responses.prompt,
        "response cut": responses.response_kept < responses.response,
        "nothing to train on": responses.trained == 0,
    }.items():
        if mask.any():
            yield int(responses.row[mask][0]), why
    contradicting, examples = set(split.repetition.contradicting), split.loader.examples
    for why, found in {
        "contradicted": (i for i, row in enumerate(split.rows) if examples[row.example].id in contradicting),
        "control tokens as text": (i for i, row in enumerate(split.rows) if row.example in split.written),
    }.items():
        if (first := next(found, None)) is not None:
            yield first, why
    for dataset in split.datasets:
        if (responses.dataset == dataset.name).any():
            yield int(responses.row[responses.dataset == dataset.name][0]), f"first of {dataset.name}"
    yield int(whole.argmin()), "shortest"


def find(splits: dict[str, Split], wanted: str) -> dict[str, dict[int, list[str]]]:
    """Return the rows of an example, given by its id or by a row's number in the epoch: {split: {row: why}}."""
    found = {
        name: {
            i: [wanted] for i, row in enumerate(split.rows) if wanted in (str(i), split.loader.examples[row.example].id)
        }
        for name, split in splits.items()
    }
    if not any(found.values()):
        raise UserError(
            f"show={wanted}: no training row has this id or number; give an id such as "
            f"{_first_id(splits)}, or a row from 0 to {max(len(split.rows) for split in splits.values()) - 1}"
        )
    return found


def _first_id(splits: dict[str, Split]) -> str:
    split = next(iter(splits.values()))
    return split.loader.examples[split.rows[0].example].id


#### THEIR TOKENS


def show(split: Split, number: int, why: list[str]) -> Shown:
    """Make the spans of a row."""
    loader, row = split.loader, split.rows[number]
    prompt, responses = loader.whole(row)
    prompt_kept, responses_kept = loader.positions_kept(row)
    speller = Speller(loader)
    spelled = (
        speller.spans(np.where(ids < 0, ~ids, ids), kept, trained=ids >= 0, before=prompt[-BEFORE:].tolist())
        for ids, kept in zip(responses, responses_kept, strict=True)
    )
    return Shown(
        number,
        why,
        loader.examples[row.example],
        speller.spans(prompt, prompt_kept, trained=np.zeros(len(prompt), bool), before=[]),
        row.roles,
        list(spelled),
    )


class Speller:
    """Spells token ids as spans."""

    def __init__(self, loader: DataLoader):
        self.tokenizer = loader.encoder.tokenizer
        self.ends = set(loader.renderer.stop_ids)
        self.special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.special |= {self.tokenizer.bos_token_id, self.tokenizer.eos_token_id}

    def spans(self, ids: np.ndarray, kept: np.ndarray, trained: np.ndarray, before: list[int]) -> list[Span]:
        """Make one span per token. kept: positions that truncation leaves; trained: (n,) bool; before: ids in front"""
        is_cut = np.ones(len(ids), bool)
        is_cut[kept] = False
        result: list[Span] = []
        start = 0
        for gap_start, gap_end in [*_gaps(is_cut), (len(ids), len(ids))]:
            shown = ids[start:gap_start].tolist()
            texts = self.texts([*before, *ids[:start].tolist()][-BEFORE:], shown)
            kinds = map(self._kind, shown, trained[start:gap_start], is_cut[start:gap_start])
            result += map(Span, shown, texts, kinds)
            if gap_end > gap_start:
                n = gap_end - gap_start
                result.append(Span(-1, f" ... {n:,} more tokens are cut ... ", Kind.CUT, n))
            start = gap_end
        return result

    def _kind(self, token: int, is_trained: bool, is_cut: bool) -> Kind:
        if is_cut:
            return Kind.CUT
        if is_trained:
            return Kind.END if token in self.ends else Kind.TRAINED
        return Kind.SPECIAL if token in self.special else Kind.CONTEXT

    def texts(self, before: list[int], ids: list[int]) -> list[str]:
        """Return the text of each token, as a part of the whole text.

        Of the tokens that share one character, the last has the character, and the others have no text.
        """
        ids, texts = [*before, *ids], []
        start, read = 0, len(before)
        for end in range(len(before) + 1, len(ids) + 1):
            known, now = self._decode(ids[start:read]), self._decode(ids[start:end])
            is_part = now.endswith(UNFINISHED) and end < len(ids) and end - read < LONGEST_CHARACTER
            texts.append("" if is_part else now[len(known) :])
            if not is_part:
                start, read = read, end
        return texts

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _gaps(is_cut: np.ndarray) -> list[tuple[int, int]]:
    """Return the middles (start, end) of long runs that are cut."""
    edges = np.flatnonzero(np.diff(is_cut.astype(np.int8), prepend=0, append=0)).tolist()
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [(start + EDGE, end - EDGE) for start, end in runs if end - start > 2 * EDGE + 1]
