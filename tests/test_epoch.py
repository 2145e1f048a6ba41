"""The rows of an epoch as arrays, and the rows of one prompt in one batch."""

import random

import numpy as np
import pytest

from halos.epoch import Row, Rows, by_prompt
from halos.tokens import Role

PAIR = Row.of(3, chosen=1, rejected=0)
ROWS = [PAIR, Row.of(0, rejected=2), Row.of(3, chosen=1).with_unrelated(Row.of(7, chosen=4)), Row.of(1)]


def test_a_row_by_its_generations():
    assert PAIR == (3, ((3, 1), (3, 0)), (Role.CHOSEN, Role.REJECTED))
    assert ROWS[1:] == [
        (0, ((0, 2),), (Role.REJECTED,)),
        (3, ((3, 1), (7, 4)), (Role.CHOSEN, Role.UNRELATED)),
        (1, (), ()),
    ]


def test_arrays_give_the_rows_back():
    """Also negative positions, slices and iteration, with Python numbers: their text is part of a run's fingerprint."""
    rows = Rows.of(ROWS)
    assert list(rows) == ROWS and rows == ROWS and len(rows) == 4
    assert [rows[i] for i in (0, 2, -1)] == [ROWS[0], ROWS[2], ROWS[3]] and rows[1:3] == ROWS[1:3]
    assert rows[::-1] == ROWS[::-1] and rows[3:1] == [] and rows[2:99] == ROWS[2:]
    assert repr(rows[0][:2]) == "(3, ((3, 1), (3, 0)))"
    assert list(rows.take(np.array([2, 0, 2]))) == [ROWS[2], ROWS[0], ROWS[2]]
    with pytest.raises(IndexError):
        rows[4]
    assert list(Rows.of([])) == []


def test_sums_and_largest_by_row():
    rows = Rows.of(ROWS)
    assert rows.largest(np.array([5, 2, 9, 1, 8])).tolist() == [5, 9, 8, 0]


def test_a_row_takes_26_bytes():
    rows = Rows.of([Row.of(i, chosen=0, rejected=1) for i in range(1000)])
    arrays = (rows.examples, rows.offsets, rows.responses, rows.roles)
    assert sum(array.nbytes for array in arrays) == 26 * 1000 + 4


#### PROMPTS TOGETHER


def pairs_of(*examples: int) -> list[Row]:
    """Make rows of pairs (0, k) of these examples, k = 1, 2, ... in the order of their appearance."""
    seen: dict[int, int] = {}
    rows = []
    for example in examples:
        seen[example] = seen.get(example, 0) + 1
        rows.append(Row.of(example, chosen=0, rejected=seen[example]))
    return rows


def examples_of(rows: Rows, batch_size: int) -> list[list[int]]:
    return [rows.examples[i : i + batch_size].tolist() for i in range(0, len(rows), batch_size)]


def test_rows_of_an_example_come_in_one_batch():
    """Examples 5 (three rows), 2 (two), 7 and 9 (one each), in batches of 4.

    After example 5 there is room for one row: 7 comes before 2, which has two. Its rows and 9 are the second batch.
    """
    rows = Rows.of(pairs_of(5, 2, 7, 5, 9, 2, 5))
    grouped = by_prompt(rows, 4)
    assert examples_of(grouped, 4) == [[5, 5, 5, 7], [2, 2, 9]]
    assert sorted(grouped) == sorted(rows)


def test_an_example_is_divided_only_if_nothing_fits():
    """Three examples of three rows in batches of 4: the fourth row of each batch has to come from the next one."""
    grouped = by_prompt(Rows.of(pairs_of(1, 1, 1, 2, 2, 2, 3, 3, 3)), 4)
    assert examples_of(grouped, 4) == [[1, 1, 1, 2], [2, 2, 3, 3], [3]]
    assert examples_of(by_prompt(Rows.of(pairs_of(1, 1, 2, 1, 1, 1)), 4), 4) == [[1, 1, 1, 1], [1, 2]]


def test_without_repeated_prompts_nothing_changes():
    rows = Rows.of(pairs_of(4, 2, 9, 1))
    assert by_prompt(rows, 3) is rows


def test_chosen_and_rejected_take_turns():
    """Halves of three pairs of one example and of one of another, shuffled: the batch of 4 has two chosen of four."""
    halves = [Row.of(0, chosen=i) for i in range(3)] + [Row.of(1, rejected=1)]
    halves += [Row.of(0, rejected=3 + i) for i in range(3)] + [Row.of(1, chosen=0)]
    grouped = by_prompt(Rows.of(halves), 4)
    assert [row.roles[0] for row in grouped] == [Role.CHOSEN, Role.REJECTED] * 4
    assert examples_of(grouped, 4) == [[0, 0, 0, 0], [0, 0, 1, 1]]


def test_examples_with_many_rows_come_anywhere():
    """By its first row, an example with ten rows would come early. Its mean place among 91 examples is the middle."""
    rows, places = pairs_of(*[0] * 10, *range(1, 91)), []
    for seed in range(300):
        random.Random(seed).shuffle(rows)
        order = list(dict.fromkeys(by_prompt(Rows.of(rows), 100).examples.tolist()))
        places.append(order.index(0))
    assert abs(np.mean(places) - 45) < 5  # a standard deviation is 26 / sqrt(300) = 1.5


def test_batches_are_whole_groups_if_sizes_are_mixed():
    """1,000 examples of one to five rows in batches of 32: no example is in two batches but at the end of the epoch."""
    draw = random.Random(0)
    examples = [example for example in range(1000) for _ in range(draw.randint(1, 5))]
    draw.shuffle(examples)
    batches = examples_of(by_prompt(Rows.of(pairs_of(*examples)), 32), 32)
    assert all(len(batch) == 32 for batch in batches[:-1])
    torn = sum(len(set(one) & set(other)) for one, other in zip(batches, batches[1:], strict=False))
    assert torn <= 5, torn
