"""Length control: independent computations, refusals, judges without length bias, anchors, coverage of intervals."""

import html
from itertools import product

import numpy as np
import pytest
from scipy.optimize import linprog, minimize
from scipy.special import expit, log_expit, logit

from halos.errors import UserError
from halos.judge import page, statistics, table
from halos.judge.judges import JudgeScores
from halos.judge.length_control import MODEL_SD, fit_logistic, is_separable, length_controlled, make_design
from halos.judge.samples import read_verdicts
from test_judge_statistics import covers, simulate_scores

#### A SECOND COMPUTATION


def covariates_again(candidate_lengths, baseline_lengths) -> tuple[np.ndarray, np.ndarray]:
    """Compute tanh(d / sd(d)), with n - 1 in sd, and the standardized length of the longer response, with n."""
    n, differences = len(candidate_lengths), np.subtract(candidate_lengths, baseline_lengths).astype(float)
    longer = np.maximum(candidate_lengths, baseline_lengths).astype(float)
    deviation = np.sqrt(np.sum((differences - differences.mean()) ** 2) / (n - 1))
    return np.tanh(differences / deviation), (longer - longer.mean()) / np.sqrt(np.mean((longer - longer.mean()) ** 2))


def win_rate_again(coefficients, z) -> float:
    return float(np.mean(expit(coefficients[0] + coefficients[2] * z)))


def fit_again(scores, candidate_lengths, baseline_lengths):
    """Compute coefficients, win rate and errors of slope and win rate with another optimizer, and in plain sums.

    The priors are 1.51 +- 1 for the slope and 0 +- 1 for the trend. A pair's residual is divided by 1 - its leverage.
    """
    x, z = covariates_again(candidate_lengths, baseline_lengths)

    def loss(c):
        logits = c[0] + c[1] * x + c[2] * z
        likelihood = np.sum(scores * log_expit(logits) + (1 - scores) * log_expit(-logits))
        return -likelihood + (c[1] - 1.51) ** 2 / 2 + c[2] ** 2 / 2

    options = {"xatol": 1e-9, "fatol": 1e-14, "maxiter": 5000}
    c = minimize(loss, [0.0, 0.0, 0.0], method="Nelder-Mead", options=options).x
    rows, p = np.stack([np.ones_like(x), x, z], axis=1), expit(c[0] + c[1] * x + c[2] * z)
    hessian, meat = np.diag([0.0, 1.0, 1.0]), np.diag([0.0, 1.0, 1.0])
    for row, p_i in zip(rows, p, strict=True):
        hessian += p_i * (1 - p_i) * np.outer(row, row)
    for row, p_i, score in zip(rows, p, scores, strict=True):
        leverage = p_i * (1 - p_i) * row @ np.linalg.solve(hessian, row)
        meat += ((score - p_i) / (1 - leverage)) ** 2 * np.outer(row, row)
    covariance = np.linalg.solve(hessian, np.linalg.solve(hessian, meat).T)
    steps = 1e-5 * np.eye(3)
    slopes = [(win_rate_again(c + step, z) - win_rate_again(c - step, z)) / 2e-5 for step in steps]
    return c, win_rate_again(c, z), np.sqrt(covariance[1, 1]), np.sqrt(slopes @ covariance @ slopes)


@pytest.mark.parametrize("seed", range(10))
def test_length_controlled_against_a_second_computation(seed):
    """Lengths up to 900, scores of 0, 1/4, ..., 1 that favour the longer response; two pairs without a score."""
    rng = np.random.default_rng(seed)
    ours, theirs = rng.integers(10, 900, (2, 60))
    scores = rng.binomial(4, expit(0.4 + (ours - theirs) / 500)) / 4
    coefficients, rate, slope_error, error = fit_again(scores, ours, theirs)
    padded = [np.append(values, [5, 700]) for values in (ours, theirs)]
    fit = length_controlled(np.append(scores, [np.nan, np.nan]), *padded)
    assert [fit["win_rate"], fit["slope"]] == pytest.approx([rate, coefficients[1]], abs=1e-6)
    assert fit["intercept"] == pytest.approx(logit(rate), abs=1e-5) and fit["reason"] is None
    half, slope_half = 1.959963984540054 * np.array([error / rate / (1 - rate), slope_error])
    assert logit(fit["interval"]) == pytest.approx([logit(rate) - half, logit(rate) + half], abs=1e-5)
    slope_bounds = [coefficients[1] - slope_half, coefficients[1] + slope_half]
    assert fit["slope_interval"] == pytest.approx(slope_bounds, abs=1e-5)
    assert fit["overlap"] == min(np.mean(ours >= theirs), np.mean(ours <= theirs))


def test_equal_numbers_of_wins_on_mirrored_lengths():
    """Each length difference occurs once with a win and once, with the other sign, with a loss: the rate is 1/2."""
    differences = np.array([30, -20, 50, -10, 5, 40, -60, 15])
    scores = np.array([1, 0, 1, 1, 0, 1, 0, 1])
    ours, theirs = 100 + np.maximum(differences, 0), 100 + np.maximum(-differences, 0)
    fit = length_controlled(np.append(scores, 1 - scores), np.append(ours, theirs), np.append(theirs, ours))
    assert fit["win_rate"] == pytest.approx(0.5) and fit["intercept"] == pytest.approx(0, abs=1e-12)
    assert np.mean(fit["interval"]) == pytest.approx(0.5) and fit["slope"] > 1.5 and fit["overlap"] == 0.5


def test_length_controlled_when_almost_separable():
    """One long loss among wins, short losses otherwise, and one difference of a million beside ones of one character.

    The equations of the maximum hold: residuals sum to 0, and weighted by a covariate to the pull of its prior.
    """
    rng = np.random.default_rng(0)
    for outlier, sharpness in product([0, 10**4, 10**6], [1, 10, 30]):
        ours = 10 + np.append(rng.integers(-2, 3, 40), outlier)
        scores = np.append(expit(sharpness * rng.normal(size=40)), 1.0)
        design = make_design(np.stack([ours, np.full(41, 10)]).astype(float), ours.std(ddof=1))
        coefficients, covariance = fit_logistic(design, scores, 1.51, 1.0)
        residuals = scores - expit(design @ coefficients)
        assert design.T @ residuals == pytest.approx([0, coefficients[1] - 1.51, coefficients[2]], abs=1e-6)
        assert (np.linalg.eigvalsh(covariance) > 0).all()


def test_length_controlled_where_newtons_whole_step_diverges():
    """With three ties where the candidate is shorter, among 100 losses, whole steps of maximum likelihood fail."""
    ours = 10 + np.repeat([-2, -1, 3, 100], [1, 2, 50, 50])
    scores = np.repeat([0.5, 0.5, 0, 0], [1, 2, 50, 50])
    coefficients, *_ = fit_again(scores, ours, np.full(103, 10))
    design = make_design(np.stack([ours, np.full(103, 10)]).astype(float), ours.std(ddof=1))
    assert fit_logistic(design, scores, 1.51, 1.0)[0] == pytest.approx(coefficients, abs=1e-4)


#### NO NUMBER


def separable_by_linear_programs(x, scores) -> bool:
    """Search (a, b) != 0 with a + b x >= 0 wherever s > 0 and <= 0 wherever s < 1, with |a|, |b| <= 1."""
    rows = np.stack([np.ones_like(x), x], axis=1)
    constraints = np.concatenate([-rows[scores > 0], rows[scores < 1]])
    goals = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
    found = [linprog(goal, A_ub=constraints, b_ub=np.zeros(len(constraints)), bounds=[(-1, 1)] * 2) for goal in goals]
    return min(result.fun for result in found) < -1e-9


def test_separable_means_that_a_line_separates():
    """Compare with linear programs on small sets of few lengths, where ranges touch in every way."""
    rng = np.random.default_rng(0)
    seen = {True: 0, False: 0}
    for _ in range(300):
        n = int(rng.integers(3, 7))
        x, scores = rng.integers(-2, 3, n) / 2, rng.choice([0, 0, 0.5, 1, 1], n)
        if np.ptp(x):
            expected = separable_by_linear_programs(x, scores)
            assert is_separable(x, scores) == expected, (x, scores)
            seen[expected] += 1
    assert min(seen.values()) > 50


def reason_of(scores, differences) -> str | None:
    """Return the reason for three times these pairs."""
    scores, differences = np.tile(np.array(scores, dtype=float), 3), np.tile(differences, 3)
    return length_controlled(scores, 2000 + differences, np.full(len(scores), 2000))["reason"]


def test_length_controlled_says_why_not():
    assert "separates" in reason_of([0, 0, 1, 1], [-20, -10, 10, 20])
    assert "separates" in reason_of([0, 0, 1, 0, 1], [-20, 0, 0, 0, 20])  # all but equal lengths: quasi-separable
    assert "separates" in reason_of([1, 1, 0.5, 0], [-20, -10, 0, 20])  # the tie is on the line
    assert reason_of([1, 0, 0.5, 0, 0], [-20, 10, 0, 20, -30]) is None
    assert "same" in reason_of([1, 1, 1, 1], [-20, -10, 10, 20])
    assert "vary" in reason_of([1, 0, 1, 0], [7, 7, 7, 7])
    assert "far from 0" in reason_of([1, 0, 1, 0], [1000, 1001, 1002, 1003])
    assert "fewer than 10" in reason_of([1, 0, 1], [3, 4, 5])


def short_candidate(rng, n=400, slope=1.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw scores and lengths of a candidate that is longer in 4 % of the pairs. Its rate at equal lengths is 0.3."""
    theirs = rng.integers(900, 3000, n)
    ours = (theirs * rng.uniform(0.2, 1.03, n)).round()
    x, _ = covariates_again(ours, theirs)
    return (rng.random(n) < expit(logit(0.3) + slope * x)).astype(float), ours, theirs


def test_little_overlap_gives_no_number_but_the_share():
    scores, ours, theirs = short_candidate(np.random.default_rng(0))
    fit = length_controlled(scores, ours, theirs)
    share = np.mean(ours > theirs)
    assert fit["win_rate"] is None and fit["interval"] is None and fit["slope"] is None and 0.01 < share < 0.06
    assert f"longer one in {100 * share:.1f} % of the pairs" in fit["reason"] and "points" in fit["reason"]
    assert fit["overlap"] == np.mean(ours >= theirs)
    mirrored = length_controlled(1 - scores, theirs, ours)
    assert "shorter one" in mirrored["reason"] and mirrored["overlap"] == fit["overlap"]


def test_table_and_page_say_why_there_is_no_number(tmp_path):
    scores, *lengths = short_candidate(np.random.default_rng(0))
    judges = [JudgeScores("a", np.stack([scores, scores], axis=1), np.ones((len(scores), 2), bool))]
    summary = statistics.summarize(judges, *lengths)
    reason = summary["length_controlled"]["reason"]
    assert f"– ({reason})" in table.table(summary, "policy", "chosen") and "overlap" in reason
    page.write_html(str(tmp_path / "page.html"), "title", summary, [], judges_of_none(), lambda *_: None, "compare.py")
    assert html.escape(reason) in (tmp_path / "page.html").read_text(encoding="utf-8")


def judges_of_none() -> list[JudgeScores]:
    return [JudgeScores("a", np.empty((0, 2)), np.empty((0, 2), bool))]


def test_easier_short_prompts_invent_no_wins():
    """The judge has no length bias. The candidate writes 800 characters whatever is asked, and wins where little is to
    be said: 25 % of all prompts. By length differences alone, it would win 51 % at equal lengths; with the trend, 29 %.
    """
    rng = np.random.default_rng(0)
    theirs = rng.uniform(200, 4000, 3000).round()
    ours = np.full(3000, 800.0) + rng.integers(-300, 300, 3000)
    chances = expit(1 - 2.5 * theirs / 2100)
    scores = (rng.random(3000) < chances).astype(float)
    design = make_design(np.stack([ours, theirs]), (ours - theirs).std(ddof=1))
    alone, _ = fit_logistic(design * (1, 1, 0), scores, 0.0, 1e3)
    ours_fit, _ = fit_logistic(design, scores, 1.51, 1.0)
    assert expit(alone[0]) > 0.4 and chances.mean() < 0.26
    assert np.mean(expit(design * (1, 0, 1) @ ours_fit)) == pytest.approx(chances.mean(), abs=0.08)


#### JUDGES AND ANCHORS


def drawn(rng, n, rate, slope, shift) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw scores and lengths; `rate` is the win rate at equal lengths, `shift` of the candidate in characters."""
    theirs = rng.integers(600, 3400, n)
    ours = np.maximum(theirs + rng.normal(shift, 500, n).round(), 1)
    x, _ = covariates_again(ours, theirs)
    return simulate_scores(rng, expit(logit(rate) + slope * x)), ours, theirs


def test_a_judge_without_length_bias_is_hardly_corrected():
    """Candidates that are longer in 73 % of 400 pairs. The mean correction is -0.4 points; the noise is 2.6 points."""
    rng, moves = np.random.default_rng(0), []
    for _ in range(100):
        scores, *lengths = drawn(rng, 400, 0.6, 0.0, 300)
        moves.append(length_controlled(scores, *lengths)["win_rate"] - scores.mean())
    assert abs(np.mean(moves)) < 0.01, np.mean(moves)


def rewrites(rng, n, slope) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw an anchor of n pairs, half of them half as long, half of them 1.5 times as long, and a little worse."""
    theirs = rng.integers(900, 3000, n)
    ours = (theirs * np.where(np.arange(n) % 2, 0.5, 1.5)).round()
    return (rng.random(n) < expit(-0.3 + slope * np.tanh((ours - theirs) / 700))).astype(float), ours, theirs


@pytest.mark.parametrize("slope", [0.0, 1.5])
def test_an_anchor_gives_the_judges_slope_where_lengths_hardly_overlap(slope):
    """The true rate, 30 % with either judge, lies in the interval; the slope's prior is the anchor's, +- MODEL_SD."""
    rng = np.random.default_rng(1)
    comparison = short_candidate(rng, slope=slope)
    assert length_controlled(*comparison)["win_rate"] is None
    fit = length_controlled(*comparison, rewrites(rng, 4000, slope))
    assert fit["reason"] is None and covers(fit["interval"], 0.3) and fit["slope"] == pytest.approx(slope, abs=0.4)
    low, high = fit["slope_interval"]
    assert high - low < 2 * 1.96 * MODEL_SD


def test_an_anchor_of_few_pairs_is_not_enough():
    rng = np.random.default_rng(2)
    assert "overlap" in length_controlled(*short_candidate(rng), rewrites(rng, 10, 1.5))["reason"]


def test_an_anchor_changes_little_where_lengths_overlap():
    rng = np.random.default_rng(3)
    comparison = drawn(rng, 2000, 0.6, 1.0, 0)
    rates = [length_controlled(*comparison, anchor)["win_rate"] for anchor in (None, rewrites(rng, 2000, 0.0))]
    assert rates[0] == pytest.approx(rates[1], abs=0.005)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (None, "No such file"),
        ("length_candidate,length_baseline\n3,4\n", "no column 'preference_candidate'"),
        ("length_candidate,length_baseline,preference_candidate\n3,4,1\n3,four,0\n", "line 3"),
        ("length_candidate,length_baseline,preference_candidate\n3,4,1.5\n", "between 0 and 1"),
        ("length_candidate,length_baseline,preference_candidate\n3,4,\n", "no pair has a preference"),
        ("length_candidate,length_baseline,preference_candidate\n3,4,1\n4,3,1\n", "all preferences are the same"),
    ],
)
def test_an_anchor_that_cannot_be_read_is_one_line(tmp_path, lines, problem):
    path = tmp_path / "anchor.csv"
    if lines:
        path.write_text(lines)
    with pytest.raises(UserError, match=problem) as error:
        read_verdicts((str(path),))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_anchors_are_joined(tmp_path):
    for name, text in (("one", "0,10,20,0.25\n1,5,20,\n"), ("two", "0,30,20,1\n")):
        (tmp_path / name).write_text("row,length_candidate,length_baseline,preference_candidate\n" + text)
    scores, ours, theirs = read_verdicts((str(tmp_path / "one"), str(tmp_path / "two")))
    assert (scores.tolist(), ours.tolist(), theirs.tolist()) == ([0.25, 1], [10, 30], [20, 20])


#### COVERAGE

SIZES = [pytest.param(60, marks=pytest.mark.slow), 200, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("rate", "slope"), [(0.5, 0.0), (0.7, 1.5), (0.9, 1.5)])
@pytest.mark.parametrize("n", SIZES)
def test_the_truth_is_in_the_interval_95_times_of_100(n, rate, slope):
    """1000 candidates that are longer on average; the plain win rate is not `rate` unless the slope is 0."""
    rng = np.random.default_rng(0)
    fits = [length_controlled(*drawn(rng, n, rate, slope, 100)) for _ in range(1000)]
    intervals = [fit["interval"] for fit in fits if fit["reason"] is None]
    coverage = np.mean([covers(interval, rate) for interval in intervals])
    assert len(intervals) > 950 and 0.93 <= coverage <= 0.97, (len(intervals), coverage)
