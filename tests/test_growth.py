"""benchmarks/growth.py: the floor at hand-computed values, and a point of a tiny model with its picture."""

import numpy as np
import pytest

from benchmarks import growth
from halos.tokens import Role, TokenizedExample


def pair(prompt: list[int], chosen: int, rejected: int) -> TokenizedExample:
    ids = [np.zeros(n, np.int32) for n in (chosen, rejected)]
    return TokenizedExample(np.array(prompt, np.int32), tuple(ids), (Role.CHOSEN, Role.REJECTED))


def test_floor_by_hand():
    """A prompt of 3 and responses of 2 and 1: 6 tokens, 3 of them responses; 6 + (6 + 3) + (3 + 1) = 19 keys."""
    expected = 6 * 10 * 6 + 6 * 7 * 3 + 12 * 2 * 5 * 19
    assert growth.floor_flops([pair([1, 2, 3], 2, 1)], body=10, head=7, hidden=5, layers=2) == expected


def test_floor_counts_a_shared_prompt_once():
    """Two pairs of one prompt of 3: 9 tokens, 6 of them responses; 6 + 2 x 13 keys."""
    expected = 6 * 10 * 9 + 6 * 7 * 6 + 12 * 2 * 5 * 32
    twice = [pair([1, 2, 3], 2, 1)] * 2
    assert growth.floor_flops(twice, body=10, head=7, hidden=5, layers=2) == expected


def test_a_point_and_its_picture(tmp_path):
    small = {"hidden_size": 64, "layers": 1, "vocab_size": 64}
    rows = []
    for way in growth.WAYS:
        found = growth.measure("responses", 4, way, steps=1, **small)
        assert (
            found["seconds"] > 0
            and found["mib"] >= 0
            and found["floor"]
            == pytest.approx(
                growth.floor_flops(growth.examples_of("responses", 4, 64), found_body(small), 64 * 64, 64, 1)
                / (found["gflops"] * 1e9)
            )
        )
        rows.append({"panel": "responses", "value": 4, "way": way, **found})
    growth.draw(rows, str(tmp_path / "growth.png"))
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert growth.table(rows).count("\n") == 2


def found_body(size: dict) -> int:
    return growth.body_parameters(growth.llama(**size))
