"""Counts of what one epoch of a loader holds: per dataset, per response, and per batch.

`inspect` collects everything about one split. All lengths are in tokens, with BOS and the end of turn.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from halos.epoch import Row
from halos.examples import Example, is_empty
from halos.inspection.pairs import LengthBias, Repetition, length_bias, repetition
from halos.loader import DataLoader
from halos.tokens import Role


@dataclass(frozen=True)
class Responses:
    """All responses of one epoch, in training order, as (n_responses,) arrays."""

    row: np.ndarray  # index of the training row
    dataset: np.ndarray  # name of the dataset that the row's prompt is from
    role: np.ndarray  # a Role
    prompt: np.ndarray  # tokens of the prompt
    prompt_kept: np.ndarray  # those that truncation leaves
    response: np.ndarray
    response_kept: np.ndarray
    trained: np.ndarray  # tokens of the response that are trained on
    prompt_key: np.ndarray  # equal where the truncated prompts are equal

    @property
    def is_first(self) -> np.ndarray:
        """(n_responses,) bool: True for the first response of each row."""
        return np.diff(self.row, prepend=-1) > 0

    def of(self, role: Role) -> np.ndarray:
        return self.role == role


@dataclass(frozen=True)
class Tokens:
    """Input tokens of one epoch, batch by batch of the loader's size, if one process runs each batch at once."""

    padded: int  # one sequence per response, padded to the longest of its batch
    packed: int  # without padding, the prompt repeated for each response
    shared: int  # equal prompts of a batch once: what the engine runs

    @property
    def saved_by_sharing(self) -> float:
        return 1 - self.shared / self.packed

    @property
    def saved(self) -> float:
        return 1 - self.shared / self.padded


@dataclass(frozen=True)
class DatasetNumbers:
    """One dataset: what was read of it, and what one epoch has of it. Merged examples count for their first dataset."""

    name: str
    weight: float
    rows_read: int
    examples: int
    pairs: int
    feedback: int
    dropped: dict[str, int]  # reason -> rows
    notes: list[str]
    control: int  # examples in whose texts control tokens are written
    rows: int  # training rows of one epoch
    responses: int
    truncated_prompts: int  # training rows
    truncated_responses: int


@dataclass(frozen=True)
class Split:
    """Everything about one split."""

    name: str
    loader: DataLoader
    rows: Sequence[Row]
    responses: Responses
    datasets: list[DatasetNumbers]
    tokens: Tokens
    equal_after_truncation: int  # pairs; a paired loader drops them
    empty: int  # responses without text, dropped or not
    untrained: int  # responses of which truncation leaves no token to train on
    bias: LengthBias | None  # None if nothing is rejected
    repetition: Repetition
    written: set[int]  # examples in whose texts control tokens are written, by their index in the loader
    chat: dict[str, int]  # what the renderer had to do -> examples or replies


def inspect(loader: DataLoader, name: str, weights: dict[str, float] | None = None) -> Split:
    """Collect the numbers of one split. weights: of the datasets, 1 where not named"""
    rows = loader.order(0)
    responses = read_responses(loader, rows)
    examples = distinct_examples(loader)
    used = {response for row in rows for response in row.responses}
    written = {i for i, example in examples.items() if loader.renderer.has_control_tokens(example)}
    is_preference = bool(responses.of(Role.REJECTED).any())
    return Split(
        name=name,
        loader=loader,
        rows=rows,
        responses=responses,
        datasets=list(_datasets(loader, responses, written, weights or {})),
        tokens=count_tokens(responses, loader.batch_size),
        equal_after_truncation=_equal_after_truncation(loader, examples) if is_preference else 0,
        empty=sum(source["dropped"].get("empty response", 0) for source in loader.account)
        + sum(is_empty(loader.examples[index].generations[generation]) for index, generation in used),
        untrained=int(((responses.trained == 0) & ~responses.of(Role.UNRELATED)).sum()),
        bias=length_bias(loader, examples) if is_preference else None,
        repetition=repetition(loader.account, list(examples.values())),
        written=written,
        chat=dict(loader.renderer.counts),
    )


def distinct_examples(loader: DataLoader) -> dict[int, Example]:
    """Return the examples with all of their rows, each once whatever its weight, by their index in the loader."""
    originals = dict(enumerate(loader.examples))
    for thinned in loader.thinned:
        originals |= thinned.originals
    first = {id(example): index for index, example in reversed(originals.items())}
    return {index: originals[index] for index in sorted(first.values())}


def read_responses(loader: DataLoader, rows: Sequence[Row]) -> Responses:
    """Read the rows as training does, and measure each response."""
    measured = [one for number, row in enumerate(rows) for one in _measure(loader, number, row)]
    return Responses(*(np.array(column) for column in zip(*measured, strict=True)))


def _measure(loader: DataLoader, number: int, row: Row) -> Iterator[tuple]:
    """Yield the fields of `Responses` for each response of a row."""
    kept, prompt = loader.tokenized(row), loader.prompt_lengths[row.example]
    key = hash(kept.prompt.tobytes())
    whole = loader.whole(row)[1]
    for role, before, response, n in zip(row.roles, whole, kept.responses, kept.n_targets, strict=True):
        yield number, kept.dataset, role, prompt, len(kept.prompt), len(before), len(response), n, key


def count_tokens(responses: Responses, batch_size: int) -> Tokens:
    """Count the input tokens of an epoch in three layouts. The last token of a packed response is never an input."""
    batch = responses.row // batch_size
    lengths = responses.prompt_kept + responses.response_kept
    widths = np.zeros(batch.max() + 1, np.int64)
    np.maximum.at(widths, batch, lengths)
    _, once = np.unique(np.stack((batch, responses.prompt_key)), axis=1, return_index=True)
    own = int((responses.response_kept - 1).sum())
    return Tokens(
        padded=int(widths[batch].sum()),
        packed=int(responses.prompt_kept.sum()) + own,
        shared=int(responses.prompt_kept[once].sum()) + own,
    )


def _datasets(
    loader: DataLoader, responses: Responses, written: set[int], weights: dict[str, float]
) -> Iterator[DatasetNumbers]:
    n_written = Counter(loader.examples[index].dataset_name for index in written)
    for source in loader.account:
        own, first = responses.dataset == source["name"], responses.is_first
        yield DatasetNumbers(
            name=source["name"],
            weight=weights.get(source["name"], 1),
            rows_read=source["rows"],
            **{key: source[key] for key in ("examples", "pairs", "feedback", "dropped", "notes")},
            control=n_written[source["name"]],
            rows=int((own & first).sum()),
            responses=int(own.sum()),
            truncated_prompts=int((own & first & (responses.prompt_kept < responses.prompt)).sum()),
            truncated_responses=int((own & (responses.response_kept < responses.response)).sum()),
        )


def _equal_after_truncation(loader: DataLoader, examples: dict[int, Example]) -> int:
    """Count the pairs of which truncation leaves the same response twice, also where a loader splits pairs."""
    pairs = [
        Row.of(index, chosen=better, rejected=worse)
        for index, example in examples.items()
        for better, worse in example.pairs
    ]
    return sum(map(loader.is_one_response, pairs))
