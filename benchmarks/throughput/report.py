"""Check that all ways compute the same, and write tables of their time and memory."""

import math
import os
import re
import statistics

from benchmarks.throughput.block import WAYS, Result
from benchmarks.throughput.work import Batch, floor_flops, mismatched, sizes_of
from halos.errors import UserError

TOLERANCE = 1e-3  # relative, of losses and mean log-probs; of mean rewards below 1, which are differences, absolute
AGAINST = ("trl_live", "trl_precomputed", "plain")
HEAD = """# Training speed, side by side

Written by `python -m benchmarks.throughput`, one section for each run of it. How it measures is in its `--help`.
"""

#### DO ALL COMPUTE THE SAME


def check_numbers(loss: str, numbers: dict[str, dict[str, float]]) -> float:
    """Compare what all ways computed of the same batch. Returns the largest relative difference.

    Losses are compared within a family; log-probs and rewards, which need policy and reference, among all.
    Raises UserError at a difference above the tolerance.
    """
    largest = 0.0
    for family in dict.fromkeys(WAYS[loss][way].family for way in numbers):
        losses = {way: own["loss"] for way, own in numbers.items() if WAYS[loss][way].family == family}
        largest = max(largest, _spread(losses, "loss"))
    for name in next(iter(numbers.values())).keys() - {"loss"}:
        largest = max(largest, _spread({way: own[name] for way, own in numbers.items()}, name))
    return largest


def check_losses(loss: str, blocks: dict[str, list[Result]]) -> float:
    """Compare the losses of all steps likewise: a wrong gradient or update shows there."""
    largest = 0.0
    for family in dict.fromkeys(WAYS[loss][way].family for way in blocks):
        of_family = {way: own for way, own in blocks.items() if WAYS[loss][way].family == family}
        for number in range(len(next(iter(of_family.values()))[0].losses)):
            losses = {way: results[0].losses[number] for way, results in of_family.items()}
            largest = max(largest, _spread(losses, f"loss of step {number + 1}"))
    return largest


def _spread(values: dict[str, float], name: str) -> float:
    for way, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"the ways do not compute the same: {name} is {value} for {way}")
    least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    scale = max(abs(values[most]), abs(values[least]), 1.0 if name.startswith("rewards") else 1e-12)
    difference = (values[most] - values[least]) / scale
    if difference > TOLERANCE:
        raise UserError(
            f"the ways do not compute the same: {name} is {values[least]:.6g} for {least} and {values[most]:.6g} for "
            f"{most}, and may differ by {TOLERANCE:g} of it; speeds would not be comparable"
        )
    return difference


#### TABLES


def table(loss: str, batches: list[Batch], blocks: dict[str, list[Result]]) -> str:
    """One row per way. All medians and ranges are over the steps of all rounds."""
    against = [way for way in AGAINST if way in blocks]
    heads = ["", "s per step", "examples/s", "unique tokens/s", "peak memory, GiB", "share of the matrix rate"]
    heads += [f"times as fast as {WAYS[loss][way].title}" for way in against]
    lines = [_row(heads), "|---" * len(heads) + "|"]
    for way, results in blocks.items():
        seconds = seconds_of(results)
        n_examples, n_unique = (
            len(results) * sum(counts)
            for counts in zip(*((len(batch), sizes_of(batch).unique) for batch in batches), strict=True)
        )
        cells = [WAYS[loss][way].title, _median_and_range(seconds)]
        cells += [f"{n_examples / sum(seconds):.2f}", f"{n_unique / sum(seconds):,.0f}"]
        cells += [f"{max(one.peak_memory for one in results) / 2**30:.1f}"]
        cells += [f"{statistics.median(shares(loss, way, batches, results)):.0%}"]
        cells += [_ratio(blocks[other], results) if other != way else "" for other in against]
        lines.append(_row(cells))
    return "\n".join(lines)


def seconds_of(results: list[Result]) -> list[float]:
    return [seconds for one in results for seconds in one.seconds]


def shares(loss: str, way: str, batches: list[Batch], results: list[Result]) -> list[float]:
    """Return for each step the FLOPs that it needs at least, over what matrix products reach in its time."""
    kind = WAYS[loss][way]
    seen = [mismatched(batch) if kind.family == "mismatched" else batch for batch in batches]
    sizes = [sizes_of(batch) for batch in seen]
    return [
        floor_flops(size, one.body, one.head, kind.is_live) / seconds / statistics.mean(one.rates)
        for one in results
        for size, seconds in zip(sizes, one.seconds, strict=True)
    ]


def ratios(slower: list[Result], faster: list[Result]) -> list[float]:
    """Return for each step how many times as long the one way takes as the other."""
    return [a / b for a, b in zip(seconds_of(slower), seconds_of(faster), strict=True)]


def _ratio(slower: list[Result], faster: list[Result]) -> str:
    return _median_and_range(ratios(slower, faster))


def _median_and_range(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def notes(blocks: dict[str, list[Result]], difference: float | None) -> str:
    """Say on what was measured, and how well."""
    results = [one for own in blocks.values() for one in own]
    rates = [rate / 1e9 for one in results for rate in one.rates]
    before = ", ".join(f"{way} {_median_and_range([one.seconds_before for one in own])}" for way, own in blocks.items())
    versions = ", ".join(f"{name} {version}" for name, version in results[0].versions.items())
    agreement = "" if difference is None else f" Losses of all steps agree to {difference:.1e}."
    return (
        f"{os.cpu_count()} cores; a large matrix product runs at {statistics.median(rates):,.0f} GFLOP/s "
        f"({min(rates):,.0f} to {max(rates):,.0f}); other processes used at most "
        f"{max(one.other_load for one in results):.0%} of the cores. {versions}.{agreement} Seconds from the start of "
        f"a way to its first step, with precomputed log-probs: {before}."
    )


def write_section(path: str, title: str, text: str) -> None:
    """Put a section into a Markdown file, in the place of the one with the same title."""
    old = HEAD
    if os.path.exists(path):
        with open(path) as file:
            old = file.read()
    head, *sections = re.split(r"^## ", old, flags=re.M)
    kept = {section.partition("\n")[0]: section.partition("\n")[2].strip() for section in sections}
    kept[title] = text.strip()
    with open(path, "w") as file:
        file.write("\n\n".join([head.strip(), *(f"## {name}\n\n{body}" for name, body in kept.items())]) + "\n")
