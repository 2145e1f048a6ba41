"""Examples without their texts, as arrays: what a loader keeps once the texts are tokenized.

A million examples with their texts are 3.6 GB of Python objects, and about 60 bytes each here. `ExampleTable` reads as
a list of examples does: `table[i].pairs`, `len(table[i].generations)`.
"""

import ctypes
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any, NoReturn

from halos.errors import UserError
from halos.examples import Example


class TextsDropped(UserError):
    """The text of an example was asked for after it was tokenized."""

    def __init__(self) -> None:
        super().__init__(
            "texts of examples are dropped once they are tokenized, unless flatten() reads them in the first epoch; "
            "give keep_texts=True to the loader"
        )


class Dropped(Sequence):
    """As many generations as there were, without their texts. None: a prompt, of which nothing is known."""

    def __init__(self, n: int | None):
        self.n = n

    def __len__(self) -> int:
        if self.n is None:
            raise TextsDropped
        return self.n

    def __getitem__(self, index: Any) -> NoReturn:
        raise TextsDropped

    def __iter__(self) -> NoReturn:
        raise TextsDropped


def without_texts(example: Example) -> Example:
    """Return a copy of an example that has its pairs, but not its texts."""
    prompt: Any = Dropped(None)
    generations: Any = Dropped(len(example.generations))
    return replace(example, prompt=prompt, generations=generations, tools=None)


class Ragged:
    """Lists of numbers, one after the other in one array."""

    def __init__(self, lists: list, typecode: str, values: Iterable):
        self.offsets = array("Q", accumulate(map(len, lists), initial=0))
        self.values = array(typecode, values)

    def of(self, index: int, width: int = 1) -> array:
        """width: numbers per element of a list"""
        return self.values[width * self.offsets[index] : width * self.offsets[index + 1]]


class ExampleTable(Sequence):
    """Examples as arrays. `table[i]` is a StoredExample, or the Example that was put there."""

    def __init__(self, examples: list[Example]):
        flat = chain.from_iterable
        pairs, feedback = [one.pairs for one in examples], [one.feedback for one in examples]
        scores = [one.scores for one in examples]
        self.pairs = Ragged(pairs, "i", flat(flat(pairs)))
        self.feedback = Ragged(feedback, "i", flat(flat(feedback)))
        self.scores = Ragged(scores, "d", flat(scores))
        self.sft_index = array("i", (-1 if one.sft_index is None else one.sft_index for one in examples))
        self.n_generations = array("i", (len(one.generations) for one in examples))
        # What many examples share, once each: which end of a prompt to keep, and the data set.
        self.kinds = list(dict.fromkeys((one.truncation_mode, one.dataset_name) for one in examples))
        number = {kind: i for i, kind in enumerate(self.kinds)}
        self.kind = array("i", (number[one.truncation_mode, one.dataset_name] for one in examples))
        ids = [_short(one).encode("utf-8", "surrogatepass") for one in examples]
        self.ids = Ragged(ids, "B", flat(ids))
        self.replaced: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self.sft_index)

    def __getitem__(self, index: Any) -> Any:
        found = range(len(self))[index]
        if isinstance(found, range):
            return [self[i] for i in found]
        return self.replaced.get(found) or StoredExample(self, found)

    def __iter__(self) -> Iterator[Any]:
        if self.replaced:
            return (self.replaced.get(i) or StoredExample(self, i) for i in range(len(self)))
        return (StoredExample(self, i) for i in range(len(self)))

    def __setitem__(self, index: int, example: Example) -> None:
        self.replaced[index] = example


class StoredExample:
    """One example of a table. Its attributes have the names of those of Example."""

    __slots__ = ("index", "table")

    def __init__(self, table: ExampleTable, index: int):
        self.table = table
        self.index = index

    @property
    def pairs(self) -> list[tuple[int, int]]:
        flat = self.table.pairs.of(self.index, 2)
        return list(zip(flat[::2], flat[1::2], strict=True))

    @property
    def feedback(self) -> list[tuple[int, bool]]:
        flat = self.table.feedback.of(self.index, 2)
        return list(zip(flat[::2], map(bool, flat[1::2]), strict=True))

    @property
    def scores(self) -> list[float]:
        return self.table.scores.of(self.index).tolist()

    @property
    def sft_index(self) -> int | None:
        index = self.table.sft_index[self.index]
        return None if index < 0 else index

    @property
    def generations(self) -> Dropped:
        return Dropped(self.table.n_generations[self.index])

    @property
    def truncation_mode(self) -> str:
        return self.table.kinds[self.table.kind[self.index]][0]

    @property
    def dataset_name(self) -> str:
        return self.table.kinds[self.table.kind[self.index]][1]

    @property
    def id(self) -> str:
        text = self.table.ids.of(self.index).tobytes().decode("utf-8", "surrogatepass")
        return self.dataset_name + text[1:] if text.startswith("\0") else text

    @property
    def prompt(self) -> NoReturn:
        raise TextsDropped

    tools = prompt


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc): it keeps that of freed texts for itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _short(example: Example) -> str:
    """Return the id of an example, with the name of its data set as \\0."""
    name = example.dataset_name
    return f"\0{example.id[len(name) :]}" if name and example.id.startswith(name) else example.id
