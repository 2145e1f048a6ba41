"""The scores of all rows as matrices, and the comparisons that the suite makes of them."""

import json
import os
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from halos.suite import plan
from halos.suite.contrasts import Estimate, estimate, no_difference_share
from halos.suite.plan import Run
from halos.suite.settings import Suite, before, loss_of, stages_of

MEASURES = ("right", "win", "order")  # the first that a suite has is the one that rows are compared by


@dataclass(frozen=True)
class Comparison:
    """A question and its answer: a difference in the suite's first measure."""

    question: str  # kind of comparison
    size: str
    one: str
    other: str
    found: Estimate


@dataclass(frozen=True)
class Findings:
    """The results of a suite.

    rows: size -> row -> measure -> Estimate at 95 %; base: size -> measure -> mean
    runs: size -> row -> the scores.json of each seed
    same: share of A/A resamplings without a difference, or None
    """

    measure: str
    seeds: int
    runs: dict[str, dict[str, list[dict]]]
    rows: dict[str, dict[str, dict[str, Estimate]]]
    base: dict[str, dict[str, float]]
    comparisons: list[Comparison]
    same: float | None


def quality(scores: dict) -> float:
    """Return the number that settings are chosen by: the mean of the suite's first measure."""
    return float(np.nanmean(next(scores[measure] for measure in MEASURES if measure in scores)))


def of_suite(suite: Suite, settings: dict[str, dict[str, tuple[str, ...]]], seeds: int) -> Findings:
    """Compute everything from the runs of seeds 1 to `seeds`."""
    runs = {size: scores_of(suite, size, range(1, seeds + 1), settings[size], suite.rows) for size in suite.sizes}
    first = next(iter(runs.values()))[suite.rows[0]][0]
    shown = [measure for measure in (*MEASURES, "length", "chosen", "rejected") if measure in first]
    rows = {
        size: {row: {name: estimate(matrix(of_row, name)) for name in shown} for row, of_row in by_row.items()}
        for size, by_row in runs.items()
    }
    comparisons = compared(
        suite, {size: {row: matrix(x, shown[0]) for row, x in y.items()} for size, y in runs.items()}
    )
    return Findings(shown[0], seeds, runs, rows, bases(suite, shown), comparisons, aa(suite, settings, shown[0]))


def scores_of(suite: Suite, size: str, seeds: range, settings, rows: tuple[str, ...]) -> dict[str, list[dict]]:
    """Read the scores of finished runs: row -> one dict per seed."""
    found: dict[str, list[dict]] = {}
    for run in plan.final_runs(suite, size, seeds, settings, rows):
        found.setdefault(run.row, []).append(read(suite, run))
    return found


def read(suite: Suite, run: Run) -> dict:
    with open(plan.file_of(suite, run, "scores.json"), encoding="utf-8") as file:
        return json.load(file)


def matrix(of_row: list[dict], measure: str) -> np.ndarray:
    """(n_seeds, n_prompts) scores of a row."""
    return np.array([scores[measure] for scores in of_row], dtype=float)


def bases(suite: Suite, measures: list[str]) -> dict[str, dict[str, float]]:
    """Means of the stand-ins for pretraining, which have no implied rewards."""
    found = {}
    for size in suite.sizes:
        if run := plan.base_run(suite, size):
            scores = read(suite, run)
            found[size] = {name: float(np.nanmean(scores[name])) for name in measures if name in scores}
    return found


#### COMPARISONS


def compared(suite: Suite, scores: dict[str, dict[str, np.ndarray]]) -> list[Comparison]:
    """Make all comparisons of all sizes; their number is what each interval is corrected for.

    scores: size -> row -> (n_seeds, n_prompts)
    """
    pairs = [(question, *pair) for question, of_question in questions(suite.rows).items() for pair in of_question]
    n = len(pairs) * len(scores)
    return [
        Comparison(question, size, one, other, estimate(difference(by_row, one) - difference(by_row, other), n))
        for size, by_row in scores.items()
        for question, one, other in pairs
    ]


def difference(by_row: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Return the scores of a row, or of a gain: 'sft+kto - kto'."""
    one, _, other = name.partition(" - ")
    return by_row[one] - by_row[other] if other else by_row[one]


def questions(rows: tuple[str, ...]) -> dict[str, list[tuple[str, str]]]:
    """Return what is compared: question -> (one, other)."""
    after = [row for row in rows if before(row) == "sft"]
    both = [row for row in after if loss_of(row) in rows and loss_of(row) != "sft"]
    gains = [f"{row} - {loss_of(row)}" for row in both]
    alone = [row for row in rows if "+" not in row and row != "sft"]
    # That KTO needs SFT least is published, so its gain is compared with those of the others.
    kto_gains = [pair for pair in combinations(gains, 2) if any("kto" in one for one in pair)]
    return {
        "is it better after SFT?": [(row, loss_of(row)) for row in both],
        "is it better than SFT alone?": [(row, "sft") for row in after],
        "which loss is better after SFT?": list(combinations(after, 2)),
        "which loss is better without SFT?": list(combinations(alone, 2)),
        "which loss gains more from SFT?": kto_gains,
    }


def aa(suite: Suite, settings, measure: str) -> float | None:
    """Return the share of A/A resamplings without a difference; None if its runs are not all there."""
    if not suite.aa:
        return None
    size, seeds = next(iter(suite.sizes)), range(1, 2 * suite.seeds + 1)
    made = plan.final_runs(suite, size, seeds, settings[size], stages_of(suite.aa))
    runs = [run for run in made if run.row == suite.aa]
    if not all(os.path.isfile(plan.file_of(suite, run, "scores.json")) for run in runs):
        return None
    return no_difference_share(matrix([read(suite, run) for run in runs], measure))
