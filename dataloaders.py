"""The data: what an example is, the datasets that can be named in `datasets=[...]`, and the loaders that make batches.

To add a dataset, write `get_{name}(split)` below; it returns a `Dataset`. To add a way of making training rows from
examples, subclass `DataLoader` and override `flatten`. Everything about tokens is in `halos/tokens.py`.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from halos.errors import UserError
from halos.tokens import TokenizedExample


@dataclass
class Example:
    """One prompt, its distinct responses, and what people thought of them."""

    prompt: str | list[dict]  # text, or chat messages that the loader renders with the tokenizer's template
    generations: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # one per generation where the source has scores, else empty
    pairs: list[tuple[int, int]] = field(default_factory=list)  # (better, worse), indices into generations
    feedback: list[tuple[int, bool]] = field(default_factory=list)  # (generation, desirable), for binary feedback
    sft_index: int | None = None  # the generation that SFT imitates
    truncation_mode: str = "keep_end"  # which end of a prompt survives when it is too long: keep_start or keep_end
    dataset_name: str = ""

    def add(self, generation: str) -> int:
        """The index of a generation, which is stored once however often it comes."""
        if generation not in self.generations:
            self.generations.append(generation)
        return self.generations.index(generation)


class Dataset:
    """The examples of one source, one per prompt, with an exact account of the rows that were read and dropped."""

    def __init__(self, name: str):
        self.name = name
        self.examples: dict[str, Example] = {}
        self.rows = 0
        self.dropped: Counter[str] = Counter()  # reason -> rows

    def example(self, prompt: str | list[dict], truncation_mode: str = "keep_end") -> Example:
        """The example of this prompt, made when the prompt is new."""
        key = prompt if isinstance(prompt, str) else repr(prompt)
        if key not in self.examples:
            self.examples[key] = Example(prompt, truncation_mode=truncation_mode, dataset_name=self.name)
        return self.examples[key]
