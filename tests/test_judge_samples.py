"""Samples: which pairs are taken, and which response is shown first. Files are read in test_compare.py."""

from halos.judge.samples import Pair, orders, sample_pairs


def test_samples_are_nested_and_do_not_depend_on_the_order_of_the_file():
    pairs = [Pair(n, f"prompt {n}", f"a{n}", f"b{n}") for n in range(100)]
    small, large = (set(pair.row for pair in sample_pairs(pairs, n, seed=3)) for n in (20, 50))
    assert small < large and len(small) == 20
    assert {pair.row for pair in sample_pairs(pairs[::-1], 20, seed=3)} == small
    assert {pair.row for pair in sample_pairs(pairs, 20, seed=4)} != small
    first = sum(orders(pair, both=False, seed=0) == (0,) for pair in pairs)
    assert 30 < first < 70
