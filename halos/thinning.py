"""Weights of datasets: how often the rows of one are seen per epoch, exactly, as a function of (seed, epoch).

A weight of 2 puts every example of the dataset into the loader twice. The fraction of a weight is a share of the rows:
with 0.5, an epoch has half of them and the next one has the other half; with 2.5, every row twice and half of them a
third time. The rows of a dataset stand in a fixed shuffled order, and each epoch takes the next
`round(fraction * n_rows)` of them, around the end to the beginning. So epochs are equally long, and after any number of
epochs no row was seen more than once more often than another one. Pairs, labelled responses, and responses that SFT
imitates are counted separately. An example that several datasets share has the weight of the first.
"""

import random
from dataclasses import dataclass, replace
from typing import Any

from halos.examples import Example

KINDS = ("pairs", "feedback", "sft_index")  # fields of an Example that become rows


@dataclass
class Thinned:
    """Examples of one dataset of which an epoch has a share of the rows."""

    name: str
    originals: dict[int, Example]  # by their index in the loader
    share: float  # between 0 and 1

    def take(self, examples: Any, seed: int, epoch: int) -> None:
        """Put the examples into their places with the rows of one epoch only."""
        chosen: dict[int, dict] = {index: {"pairs": [], "feedback": [], "sft_index": None} for index in self.originals}
        for kind in KINDS:
            for index, value in self._rows_of(kind, seed, epoch):
                if kind == "sft_index":
                    chosen[index][kind] = value
                else:
                    chosen[index][kind].append(value)
        for index, fields in chosen.items():
            examples[index] = replace(self.originals[index], **fields)

    def _rows_of(self, kind: str, seed: int, epoch: int) -> list[tuple]:
        rows = [(index, value) for index, example in self.originals.items() for value in _values(example, kind)]
        random.Random(f"{seed}-{self.name}-{kind}").shuffle(rows)
        n = max(1, round(self.share * len(rows))) if rows else 0
        taken = [rows[(epoch * n + i) % len(rows)] for i in range(n)]
        return sorted(taken)


def _values(example: Example, kind: str) -> list:
    value = getattr(example, kind)
    if kind == "sft_index":
        return [] if value is None else [value]
    return value


def repeated(examples: list[Example], weights: dict[str, float]) -> tuple[list[Example], list[Thinned]]:
    """Return the examples, each as often as its dataset's weight says, and those that are thinned anew each epoch."""
    if all(weight == 1 for weight in weights.values()):
        return examples, []
    result: list[Example] = []
    thinned = {name: Thinned(name, {}, weight % 1) for name, weight in weights.items() if weight % 1}
    for example in examples:
        weight = weights.get(example.dataset_name, 1)
        result += [example] * int(weight)
        if weight % 1:
            thinned[example.dataset_name].originals[len(result)] = example
            result.append(example)
    return result, list(thinned.values())
