"""The rows of an epoch: `Row`, what a loader's `flatten` lists; `Rows`, many of them as arrays; and their grouping.

A list of a million rows takes 260 MB and is slow to walk through, arrays of them take 26.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from halos.tokens import Role

ROLES = tuple(Role)  # a role is stored as its index here
CODES = {role: code for code, role in enumerate(ROLES)}
BLOCK = 4096  # rows that iteration makes at a time
UNTRAINED = CODES[Role.UNRELATED]

ONE_CHOSEN, ONE_REJECTED, PAIR = (Role.CHOSEN,), (Role.REJECTED,), (Role.CHOSEN, Role.REJECTED)


class Row(NamedTuple):
    """Responses to one prompt that a loss sees together. A pair has two, the chosen one first; other rows have one."""

    example: int  # whose prompt it is: index into DataLoader.examples
    responses: tuple[tuple[int, int], ...]  # (example, generation) each; of the same example unless unrelated
    roles: tuple[Role, ...]  # one per response

    @classmethod
    def of(cls, example: int, *, chosen: int | None = None, rejected: int | None = None) -> "Row":
        """A row of one example's generations, given by their indices: `Row.of(7, chosen=0, rejected=2)`."""
        if chosen is None and rejected is None:
            return cls(example, (), ())
        if rejected is None:
            return cls(example, ((example, chosen),), ONE_CHOSEN)  # type: ignore[arg-type]
        if chosen is None:
            return cls(example, ((example, rejected),), ONE_REJECTED)
        return cls(example, ((example, chosen), (example, rejected)), PAIR)

    def with_unrelated(self, other: "Row") -> "Row":
        """The row with the first response of another row beside its own: scored after this prompt, not trained on."""
        return self._replace(responses=(*self.responses, other.responses[0]), roles=(*self.roles, Role.UNRELATED))


class Rows(Sequence[Row]):
    """Rows as arrays. `rows[i]` is a Row, and `rows[i:j]` a list of them.

    examples: (n_rows,) whose prompt it is
    offsets: (n_rows + 1,) where the responses of each row start
    responses: (n_responses, 2) example and generation of each response
    roles: (n_responses,) index into ROLES
    """

    def __init__(self, examples: np.ndarray, offsets: np.ndarray, responses: np.ndarray, roles: np.ndarray):
        self.examples = examples
        self.offsets = offsets
        self.responses = responses
        self.roles = roles

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Rows":
        counts = np.fromiter((len(row[1]) for row in rows), np.int32, len(rows))
        pairs = chain.from_iterable(row[1] for row in rows)
        return cls(
            np.fromiter((row[0] for row in rows), np.int32, len(rows)),
            np.concatenate(([0], counts.cumsum())).astype(np.int32),
            np.fromiter(chain.from_iterable(pairs), np.int32).reshape(-1, 2),
            np.fromiter((CODES[role] for row in rows for role in row[2]), np.uint8),
        )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        found = range(len(self))[index]
        if isinstance(found, int):
            return self._between(found, found + 1)[0]
        if found.step == 1:
            return self._between(found.start, max(found.start, found.stop))
        return [self[i] for i in found]

    def _between(self, start: int, end: int) -> list[Row]:
        first, last = self.offsets[start], self.offsets[end]
        responses = list(map(tuple, self.responses[first:last].tolist()))
        roles = [ROLES[code] for code in self.roles[first:last].tolist()]
        bounds = (self.offsets[start : end + 1] - first).tolist()
        return [
            Row(example, tuple(responses[i:j]), tuple(roles[i:j]))
            for example, i, j in zip(self.examples[start:end].tolist(), bounds, bounds[1:], strict=False)
        ]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def row_of_response(self) -> np.ndarray:
        """(n_responses,) index of the row of each response."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def largest(self, per_response: np.ndarray) -> np.ndarray:
        """(n_responses,) -> (n_rows,): the largest of the responses of each row, 0 where it has none."""
        result = np.zeros(len(self), np.int64)
        np.maximum.at(result, self.row_of_response, per_response)
        return result

    def keys(self) -> np.ndarray:
        """(n_rows,) a hash of each row, equal for equal rows."""
        hashes = (blake2b(repr(row).encode(), digest_size=16).digest() for row in self)
        return np.frombuffer(b"".join(hashes), "V16")

    def take(self, positions: np.ndarray) -> "Rows":
        """Return the rows at these positions, in this order."""
        counts = np.diff(self.offsets)[positions]
        offsets = np.concatenate(([0], counts.cumsum())).astype(np.int32)
        kept = np.repeat(self.offsets[positions] - offsets[:-1], counts) + np.arange(offsets[-1])
        return Rows(self.examples[positions], offsets, self.responses[kept], self.roles[kept])


#### PROMPTS TOGETHER


def by_prompt(rows: Rows, batch_size: int) -> Rows:
    """Order rows so that those of one example are in one batch.

    Examples are shuffled as the rows were: each has the place of one of its rows, which its content determines. So
    examples with many rows come neither early nor late. Chosen and rejected rows of an example take turns. Where the
    next example does not fit into the rest of a batch, the first one that does comes before it. All batches are full:
    where none fits, an example is divided, and so is one with more rows than a batch.
    """
    _, example, counts = np.unique(rows.examples, return_inverse=True, return_counts=True)
    if len(counts) == len(rows):
        return rows
    role, first = rows.roles[rows.offsets[:-1]], rows.responses[rows.offsets[:-1], 1]
    last = rows.responses[rows.offsets[1:] - 1, 1]
    by_content = np.lexsort((last, first, role, example))
    place = by_content[np.cumsum(counts) - counts]  # of each example: the position of the first of its rows by content
    turn = _number_within(example * len(ROLES) + role)
    order = np.lexsort((role, turn, place[example]))
    return rows.take(np.concatenate(list(_fill(_parts(order, place[example][order], batch_size), batch_size))))


def _number_within(key: np.ndarray) -> np.ndarray:
    """(n,) number of each element among those with its key, counted from 0 in their order."""
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
    result = np.empty(len(key), np.int64)
    result[order] = np.arange(len(key)) - np.repeat(starts, np.diff(starts, append=len(key)))
    return result


def _parts(order: np.ndarray, group: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Divide `order` where `group` changes, and after each `batch_size` of a group."""
    number = _number_within(group)
    return np.split(order, np.flatnonzero(number % batch_size == 0)[1:])


def _fill(parts: list[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Yield the parts in such an order that batches end where parts do: the first that fits, else the first of all."""
    waiting: dict[int, deque[int]] = {}
    for number, part in enumerate(parts):
        waiting.setdefault(len(part), deque()).append(number)
    room = batch_size
    while waiting:
        size = min((size for size in waiting if size <= room), key=lambda size: waiting[size][0], default=0)
        size = size or min(waiting, key=lambda size: waiting[size][0])
        yield parts[waiting[size].popleft()]
        if not waiting[size]:
            del waiting[size]
        room = (room - size) % batch_size or batch_size
