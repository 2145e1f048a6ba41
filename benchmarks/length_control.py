"""Length control against what AlpacaEval publishes, with each model left out, and on simulated comparisons.

    python -m benchmarks.length_control DIRECTORY

DIRECTORY holds recorded.csv.gz (model, length_candidate, length_baseline, preference_candidate; one baseline) and
leaderboard.csv (model, win_rate, length_controlled, in percent). Prints tables in Markdown: the recorded comparisons;
other choices of z; each model, with z and the prior chosen on the others alone; and how often intervals hold the truth
in simulated comparisons, without an anchor and with one. Takes 5 minutes on one core.
"""

import argparse
import os

import numpy as np
import pandas as pd
from scipy.special import expit, logit

from halos.judge import length_control
from halos.judge.length_control import Z, at_equal_lengths, fit_logistic, length_controlled, make_design

#### RECORDED COMPARISONS


def read(directory: str) -> dict[str, tuple]:
    """Read model -> (scores, lengths of (2, n), published raw and length-controlled win rate)."""
    recorded = pd.read_csv(os.path.join(directory, "recorded.csv.gz"))
    published = pd.read_csv(os.path.join(directory, "leaderboard.csv")).set_index("model")
    sets = {}
    for model, rows in recorded.groupby("model", sort=False):
        lengths = rows[["length_candidate", "length_baseline"]].to_numpy(dtype=float).T
        rates = published.loc[model, ["win_rate", "length_controlled"]]
        sets[str(model)] = (rows["preference_candidate"].to_numpy(), lengths, *(rates / 100))
    return sets


def withheld(scores: np.ndarray, design: np.ndarray, prior: tuple[float, float]) -> tuple[float, list[float]]:
    """Compute win rate and interval also where `length_controlled` gives none. prior: mean and sd of the slope."""
    coefficients, covariance = fit_logistic(design, scores, *prior)
    rate, center, gradient = at_equal_lengths(design, coefficients)
    half = Z * np.sqrt(gradient @ covariance @ gradient) / (rate * (1 - rate))
    return rate, [expit(center - half), expit(center + half)]


def design_of(lengths: np.ndarray) -> np.ndarray:
    return make_design(lengths, (lengths[0] - lengths[1]).std(ddof=1))


def percent(rate: float, interval: list[float]) -> str:
    return f"{100 * rate:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def show_recorded(sets: dict[str, tuple]) -> None:
    print("| model | raw | published | ours | overlap | if a number were forced |\n|---|---|---|---|---|---|")
    given, errors, held, forced_held = 0, [], 0, 0
    for model, (scores, lengths, _, published) in sets.items():
        fit = length_controlled(scores, *lengths)
        rate, interval = withheld(scores, design_of(lengths), (length_control.SLOPE, length_control.SLOPE_SD))
        forced_held += interval[0] <= published <= interval[1]
        ours, forced = fit["reason"].rpartition(" ")[0].rpartition(" ")[2] if fit["reason"] else "", ""
        if fit["reason"]:
            ours, forced = f"– ({ours} points)", percent(rate, interval)
        else:
            ours = percent(fit["win_rate"], fit["interval"])
            given, held = given + 1, held + (fit["interval"][0] <= published <= fit["interval"][1])
            errors.append(abs(fit["win_rate"] - published))
        row = (model, f"{100 * scores.mean():.1f}", f"{100 * published:.1f}", ours, f"{fit['overlap']:.3f}", forced)
        print("|", " | ".join(row), "|")
    print(
        f"\n{given} numbers; largest error {100 * max(errors):.1f} points; {held} intervals hold the published value;"
    )
    print(f"{forced_held} of {len(sets)} intervals would hold it if a number were given for each model\n")


#### EACH MODEL LEFT OUT

TRENDS = {
    "none": lambda lengths: np.zeros(lengths.shape[1]),
    "longer response": lambda lengths: lengths.max(axis=0),
    "baseline's response": lambda lengths: lengths[1],
    "both together": lambda lengths: lengths.sum(axis=0),
    "log of the longer": lambda lengths: np.log(lengths.max(axis=0)),
    "rank of the longer": lambda lengths: lengths.max(axis=0).argsort(kind="stable").argsort(),
}


def design_with(name: str, lengths: np.ndarray) -> np.ndarray:
    design, trend = design_of(lengths), TRENDS[name](lengths)
    design[:, 2] = (trend - trend.mean()) / (trend.std() or 1.0)
    return design


def error_of(name: str, one: tuple, prior: tuple[float, float]) -> float:
    scores, lengths, _, published = one
    return abs(withheld(scores, design_with(name, lengths), prior)[0] - published)


def is_given(one: tuple) -> bool:
    return length_controlled(one[0], *one[1])["reason"] is None


def show_trends(sets: dict[str, tuple]) -> None:
    print(
        "| z | mean error, 12 models | largest error, 12 models | largest where a number is given |\n|---|---|---|---|"
    )
    prior = (length_control.SLOPE, length_control.SLOPE_SD)
    given = np.array([is_given(one) for one in sets.values()])
    for name in TRENDS:
        errors = 100 * np.array([error_of(name, one, prior) for one in sets.values()])
        print(f"| {name} | {errors.mean():.1f} | {errors.max():.1f} | {errors[given].max():.1f} |")
    print()


def prior_of(others: list[tuple]) -> tuple[float, float]:
    """Estimate mean and spread of the others' slopes, each fitted alone (DerSimonian and Laird, 1986)."""
    fits = [fit_logistic(design_of(lengths), scores, 0.0, 1e3) for scores, lengths, *_ in others]
    slopes, variances = (np.array(values) for values in zip(*((c[1], v[1, 1]) for c, v in fits), strict=True))
    weights = 1 / variances
    mean = weights @ slopes / weights.sum()
    excess = weights @ (slopes - mean) ** 2 - (len(slopes) - 1)
    spread = max(excess, 0.0) / (weights.sum() - (weights**2).sum() / weights.sum())
    weights = 1 / (variances + spread)
    return float(weights @ slopes / weights.sum()), float(np.sqrt(spread))


def show_left_out(sets: dict[str, tuple]) -> None:
    """Choose z and the prior of the slope on the eleven other models, and estimate the twelfth."""
    print("| left out | z chosen | prior of the slope | published | estimate | held |\n|---|---|---|---|---|---|")
    for model, one in sets.items():
        others = [other for name, other in sets.items() if name != model]
        prior = prior_of(others)
        name = min(TRENDS, key=lambda name: sum(error_of(name, other, prior) for other in others if is_given(other)))
        rate, interval = withheld(one[0], design_with(name, one[1]), prior)
        held = "yes" if interval[0] <= one[3] <= interval[1] else "no"
        mark = "" if is_given(one) else " (no number)"
        shown = (f"{model}{mark}", name, "{:.2f} ± {:.2f}".format(*prior), f"{100 * one[3]:.1f}")
        print("|", " | ".join((*shown, percent(rate, interval), held)), "|")
    print()


#### SIMULATED COMPARISONS


def draw(rng, n: int, ratio: float, rate: float, slope: float, trend: float = -0.3) -> tuple:
    """Draw scores, lengths (2, n) and the true win rate at equal lengths, which is near `rate`.

    ratio: of the candidate's typical length to the baseline's; both depend on the prompt
    A score is the mean of two orders, which are equal half the time; an order is a tie with 0.4 min(p, 1 - p).
    """
    common = rng.normal(size=n)
    theirs = np.maximum(1900 * np.exp(0.6 * common - 0.18), 20).round()
    ours = np.maximum(ratio * 1900 * np.exp(0.45 * common + 0.5 * rng.normal(size=n) - 0.2), 5).round()
    lengths = np.stack([ours, theirs])
    design = design_of(lengths)
    means = expit(design @ (logit(rate), slope, trend))

    def verdicts() -> np.ndarray:
        ties = 0.4 * np.minimum(means, 1 - means)
        wins, draws = means - ties / 2, rng.random(n)
        return np.select([draws < wins, draws < wins + ties], [1.0, 0.5], 0.0)

    one, other = verdicts(), verdicts()
    scores = (one + np.where(rng.random(n) < 0.5, one, other)) / 2
    return scores, lengths, expit(logit(rate) + trend * design[:, 2]).mean()


def draw_anchor(rng, slope: float, n: int = 400) -> tuple:
    """Draw an anchor of n pairs: half of the rewrites are shorter, half are longer, and each costs some quality."""
    theirs = np.maximum(1900 * np.exp(0.6 * rng.normal(size=n) - 0.18), 20).round()
    ours = (theirs * np.where(np.arange(n) % 2, 0.5, 1.5)).round()
    means = expit(-0.3 + slope * np.tanh((ours - theirs) / 1100))
    return (rng.random(n) < means).astype(float), ours, theirs


def show_coverage(n_sets: int, anchored: bool) -> None:
    print("| pairs | length ratio | win rate | " + " | ".join(f"slope {slope}" for slope in SLOPES) + " |")
    print("|---|---|---|" + "---|" * len(SLOPES))
    for n, ratio, rate in ((60, 1.0, 0.5), (200, 1.0, 0.5), (200, 1.0, 0.2), (805, 1.0, 0.2), (805, 0.6, 0.2),
                           (805, 0.6, 0.05), (805, 0.4, 0.05), (805, 0.4, 0.2)):  # fmt: skip
        cells = [coverage(n_sets, n, ratio, rate, slope, anchored) for slope in SLOPES]
        print(f"| {n} | {ratio} | {rate} | " + " | ".join(cells) + " |", flush=True)
    print()


SLOPES = (0.0, 0.75, 1.5, 2.25)


def coverage(n_sets: int, n: int, ratio: float, rate: float, slope: float, anchored: bool) -> str:
    """Say how many intervals hold the truth, the mean error in points, and the share of the sets that get a number.

    With an anchor, `slope` is the judge's, and that of each model differs from it by MODEL_SD.
    """
    rng = np.random.default_rng(0)
    held, errors = 0, []
    for _ in range(n_sets):
        anchor = draw_anchor(rng, slope) if anchored else None
        own = slope + length_control.MODEL_SD * rng.normal() if anchored else slope
        scores, lengths, truth = draw(rng, n, ratio, rate, own)
        fit = length_controlled(scores, *lengths, anchor)
        if fit["reason"] is None:
            held += fit["interval"][0] <= truth <= fit["interval"][1]
            errors.append(fit["win_rate"] - truth)
    if len(errors) < n_sets / 50:
        return "–"
    given = "" if len(errors) == n_sets else f"; {100 * len(errors) / n_sets:.0f} %"
    return f"{100 * held / len(errors):.1f} % ({100 * np.mean(errors):+.1f}{given})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", help="recorded comparisons; without, only simulated ones")
    parser.add_argument("--sets", type=int, default=1000, help="simulated comparisons per row and slope")
    args = parser.parse_args()
    if args.directory:
        sets = read(args.directory)
        show_recorded(sets)
        show_trends(sets)
        show_left_out(sets)
    for anchored in (False, True):
        print(f"Coverage {'with an anchor of 400 pairs' if anchored else 'without an anchor'} (mean error in points)\n")
        show_coverage(args.sets, anchored)


if __name__ == "__main__":
    main()
