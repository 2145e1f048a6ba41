"""Statistics: known values, independent computations, symmetries, coverage of intervals, and empty input."""

import json
import math
import warnings

import numpy as np
import pytest

from halos.judge import statistics
from halos.judge.judges import JudgeScores


def judge(scores, name="judge", asked=None, has_positions=True) -> JudgeScores:
    """Make the scores of a judge that was asked in both orders; scores of shape (n,) are the same in both."""
    scores = np.array(scores, dtype=float)
    if scores.ndim == 1:
        scores = np.stack([scores, scores], axis=1)
    asked = np.ones(scores.shape, bool) if asked is None else np.array(asked)
    return JudgeScores(name, scores, asked, has_positions)


def random_judges(rng, n, n_judges=2, missing=0.0) -> list[JudgeScores]:
    scores = rng.choice([0.0, 0.5, 1.0], (n_judges, n, 2))
    scores[rng.random(scores.shape) < missing] = np.nan
    return [judge(scores[k], f"judge {k}") for k in range(n_judges)]


def summary_of(judges, seed=0, human=None) -> dict:
    rng = np.random.default_rng(seed)
    n = len(judges[0].scores)
    return statistics.summarize(judges, rng.integers(10, 900, n), rng.integers(10, 900, n), human)


#### KNOWN VALUES


def test_60_wins_40_losses():
    scores = np.repeat([1.0, 0.0], [60, 40])
    rate, counts = statistics.win_rate(scores), statistics.outcome_counts(scores)
    assert rate["win_rate"] == 0.6 and rate["n_eff"] == pytest.approx(100)
    assert rate["interval"] == pytest.approx([0.502003, 0.690599], abs=5e-7)
    assert counts["decided_interval"] == pytest.approx([0.497209, 0.696705], abs=5e-7)
    assert counts["sign_test_p"] == pytest.approx(0.0568879336, abs=5e-11)


def test_45_wins_30_losses_25_ties():
    """var(s) = (45 + 25 / 4) / 100 - 0.575^2 = 0.181875, so n_eff = 100 * 0.575 * 0.425 / 0.181875."""
    summary = summary_of([judge(np.repeat([1, 0, 0.5], [45, 30, 25]))])
    assert (summary["wins"], summary["losses"], summary["ties"]) == (45, 30, 25)
    assert summary["win_rate"] == 0.575 and summary["n_eff"] == pytest.approx(134.3643, abs=5e-5)
    assert summary["interval"] == pytest.approx([0.490473, 0.655358], abs=5e-7)
    assert summary["decided_rate"] == 0.6
    assert summary["sign_test_p"] == pytest.approx(0.105342269, abs=5e-10)


def test_mcnemar_18_to_6():
    """Twice the binomial tail: 2 * (C(24, 0) + ... + C(24, 6)) / 2^24."""
    by_hand = 2 * sum(math.comb(24, k) for k in range(7)) / 2**24
    assert statistics.mcnemar(18, 6) == pytest.approx(by_hand) == pytest.approx(0.02265584, abs=5e-9)
    assert statistics.mcnemar(6, 18) == pytest.approx(by_hand)
    assert statistics.mcnemar(0, 0) is None


def test_cohen_kappa():
    """Observed 0.85, by chance 0.5 * 0.45 + 0.5 * 0.55 = 0.5."""
    assert statistics.cohen_kappa([[40, 10], [5, 45]]) == pytest.approx(0.7)
    assert statistics.cohen_kappa([[0, 5], [5, 0]]) == pytest.approx(-1)
    assert statistics.cohen_kappa([[7, 0], [0, 0]]) is None and statistics.cohen_kappa([[0, 0], [0, 0]]) is None


def test_fleiss_kappa():
    """3, 3 and 1 of 3 pairs of raters agree: observed 7/9. 5 of 9 votes are for the first: by chance (25 + 16) / 81."""
    assert statistics.fleiss_kappa([[3, 0], [0, 3], [2, 1]]) == pytest.approx((7 / 9 - 41 / 81) / (1 - 41 / 81))
    assert statistics.fleiss_kappa([[3, 0], [3, 0]]) is None and statistics.fleiss_kappa(np.empty((0, 3))) is None


def test_a_judge_that_always_says_the_first():
    """The candidate wins when shown first, and only then: 20 ties, and 20 pairs that the first slot won twice."""
    summary = summary_of([judge(np.tile([1.0, 0.0], (20, 1)))])
    assert summary["win_rate"] == 0.5 and (summary["wins"], summary["losses"], summary["ties"]) == (0, 0, 20)
    assert summary["n_eff"] == 20 and summary["interval"] == statistics.wilson(0.5, 20)
    position = summary["position"]
    assert position["first_slot_share"] == 1.0 and position["reason"] is None
    assert (position["first_twice"], position["second_twice"], position["consistent"]) == (20, 0, 0)
    assert position["mcnemar_p"] == pytest.approx(2 / 2**20)
    assert summary["decided_rate"] is None and summary["sign_test_p"] is None
    assert "same" in summary["length_controlled"]["reason"]


@pytest.mark.parametrize(("score", "expected"), [(1.0, 1.0), (0.0, 0.0)])
def test_all_won_or_all_lost(score, expected):
    """Wilson at m = 1: the lower bound is n / (n + z^2), and the upper is 1."""
    summary = summary_of([judge(np.full(30, score))])
    low, high = summary["interval"] if score else [1 - bound for bound in reversed(summary["interval"])]
    assert summary["win_rate"] == summary["decided_rate"] == expected and summary["n_eff"] == 30
    assert [low, high] == pytest.approx([30 / (30 + 1.959963984540054**2), 1], rel=1e-12)
    assert summary["sign_test_p"] == pytest.approx(2 / 2**30)
    assert summary["length_controlled"]["reason"] == "all scores are the same"


#### SCORES, POSITIONS, AGREEMENT


def test_pair_scores_average_orders_and_then_judges():
    """A judge that scores single responses has the weight of one that is asked twice: (1 + (1 + 0) / 2) / 2."""
    both = judge([[1, 0], [1, 1], [np.nan, 1]])
    single = judge([[1, np.nan], [np.nan, np.nan], [0, np.nan]], "rule", [[True, False]] * 3, has_positions=False)
    assert statistics.pair_scores([both])[:2].tolist() == [0.5, 1] and np.isnan(statistics.pair_scores([both])[2])
    np.testing.assert_array_equal(statistics.pair_scores([both, single]), [0.75, np.nan, np.nan])


def test_rounded_means_of_logprob_scores_are_ties():
    """Sums such as 0.7 + 0.3 may miss 1 by 1e-16, which is a tie. A margin of 1e-6 is not."""
    scores = np.array([0.5 - 2**-54, 0.5 + 2**-53, 0.5 + 1e-6, 0.5 - 1e-6, np.nan])
    np.testing.assert_array_equal(statistics.outcomes(scores), [0, 0, 1, -1, np.nan])
    assert statistics.effective_n(scores[:2]) == 2


def test_position_counts():
    """Pairs: won, lost, tied in both; first twice (2), second twice (1); first and tie; one order failed (first)."""
    scores = [[1, 1], [0, 0], [0.5, 0.5], [1, 0], [1, 0], [0, 1], [1, 0.5], [1, np.nan]]
    position = statistics.position_bias([judge(scores)])
    counts = [position[key] for key in ("consistent", "inconsistent", "first_twice", "second_twice")]
    assert counts == [3, 4, 2, 1]
    # Firsts: 1 each of the pairs won and lost in both orders, 4 of first twice, 1 with the tie, 1 with the failure.
    assert position["first_slot_share"] == 8 / (8 + 4)
    assert position["mcnemar_p"] == 1.0 and position["reason"] is None


def test_position_with_one_order():
    """The candidate wins where it is first and loses where it is second; no pair was judged twice."""
    one = judge([[1, np.nan], [np.nan, 0], [np.nan, 1]], asked=[[True, False], [False, True], [False, True]])
    position = statistics.position_bias([one])
    assert position["first_slot_share"] == 2 / 3 and position["mcnemar_p"] is position["consistent"] is None
    assert position["reason"] == "no pair was judged in both orders"


def test_position_of_several_judges_is_summed_but_tested_one_by_one():
    first, fair = judge(np.tile([1.0, 0.0], (9, 1))), judge(np.ones(9))
    rule = judge([[0, np.nan]] * 9, "rule", [[True, False]] * 9, has_positions=False)
    position = statistics.position_bias([first, fair, rule])
    assert position["first_slot_share"] == 27 / 36 and position["first_twice"] == position["consistent"] == 9
    assert position["mcnemar_p"] is None and "alone" in position["reason"]
    assert statistics.position_bias([first, rule])["mcnemar_p"] == 2 / 2**9
    assert "one by one" in statistics.position_bias([rule])["reason"]


def test_position_says_what_it_lacks():
    assert statistics.position_bias([judge([0.5, 0.5])])["reason"] == "all verdicts are ties"
    assert statistics.position_bias([judge([1, 0])])["reason"] == "no pair was won twice by the same slot"


def test_agreement_of_two_judges():
    """The table of `test_cohen_kappa`, and one more pair without a verdict of the second judge."""
    one, other = np.repeat([1, 1, 0, 0], [40, 10, 5, 45]), np.repeat([1, 0, 1, 0], [40, 10, 5, 45])
    agreement = statistics.judge_agreement([judge([*one, 1]), judge([*other, np.nan])])
    assert agreement["kind"] == "cohen" and agreement["n"] == 100 and agreement["reason"] is None
    assert agreement["kappa"] == pytest.approx(0.7)


def test_agreement_of_three_judges():
    """The counts of `test_fleiss_kappa`: win win loss on the third pair."""
    agreement = statistics.judge_agreement([judge([1, 0, 1]), judge([1, 0, 1]), judge([1, 0, 0])])
    assert agreement["kind"] == "fleiss" and agreement["n"] == 3
    assert agreement["kappa"] == pytest.approx((7 / 9 - 41 / 81) / (1 - 41 / 81))


def test_agreement_says_what_it_lacks():
    assert statistics.judge_agreement([judge([1, 0])])["reason"] == "there is one judge"
    alike = statistics.judge_agreement([judge([1, 1]), judge([1, 1])])
    assert alike["kappa"] is None and alike["n"] == 2 and "by chance is 1" in alike["reason"]
    never_both = statistics.judge_agreement([judge([1, np.nan]), judge([np.nan, 1])])
    assert never_both["n"] == 0 and never_both["kappa"] is None and never_both["reason"]


def test_agreement_with_people():
    """5 of 6 labelled pairs have a score, and 4 of them agree: [[2, 0, 0], [0, 1, 0], [1, 0, 1]] for win, tie, loss."""
    scores = np.array([1, 1, 0.5, 0, 0, np.nan, 1])
    human = ["candidate", "candidate", "tie", "candidate", "baseline", "tie", None]
    agreement = statistics.human_agreement(scores, human)
    assert agreement["n"] == 5 and agreement["agreement"] == 0.8
    assert agreement["interval"] == statistics.clopper_pearson(4, 5)
    by_chance = (2 * 3 + 1 * 1 + 2 * 1) / 25
    assert agreement["kappa"] == pytest.approx((0.8 - by_chance) / (1 - by_chance))
    summary = summary_of([judge(scores)], human=human)
    assert summary["human"] == summary["judges"][0]["human"] == agreement
    assert summary_of([judge(scores)], human=[None] * 7)["human"] is None
    assert statistics.human_agreement(scores, [None] * 5 + ["tie", None])["reason"]


#### FAILURES


def test_failures_are_counted_and_bounded():
    """Pair 0 is complete and won; pair 1 lost one order, the other failed; pair 2 failed twice."""
    summary = summary_of([judge([[1, 1], [0, np.nan], [np.nan, np.nan]])])
    assert (summary["n_pairs"], summary["n_judged"]) == (3, 1)
    assert (summary["failures"], summary["failed_units"]) == (2, 3)
    assert summary["bounds"] == pytest.approx([(1 + 0 + 0) / 3, (1 + 0.5 + 1) / 3])


def test_an_order_that_was_not_asked_is_no_failure():
    summary = summary_of([judge([[1, np.nan], [np.nan, 0]], asked=[[True, False], [False, True]])])
    assert summary["failures"] == summary["failed_units"] == 0 and summary["n_judged"] == 2
    assert summary["bounds"] == [summary["win_rate"]] * 2 == [0.5, 0.5]


def test_each_judge_has_its_own_complete_pairs():
    """The second judge failed at one pair. The pair is left out of the summary, but not of the first judge's row."""
    summary = summary_of([judge([1, 1, 0, 1], "a"), judge([1, 0, 1, np.nan], "b")])
    assert [row["name"] for row in summary["judges"]] == ["a", "b"]
    assert [row["n_judged"] for row in summary["judges"]] == [4, 3] and summary["n_judged"] == 3
    assert [row["failures"] for row in summary["judges"]] == [0, 1] and summary["failed_units"] == 2
    assert summary["judges"][0]["win_rate"] == 0.75 and summary["win_rate"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert (summary["wins"], summary["ties"]) == (1, 2)


@pytest.mark.parametrize("seed", range(20))
def test_bounds_hold_what_the_missing_verdicts_hid(seed):
    """The win rate of the complete data lies within the bounds, whatever is missing. So does the win rate of the
    complete pairs, if only whole pairs are missing."""
    rng = np.random.default_rng(seed)
    judges = random_judges(rng, 40)
    truth = statistics.win_rate(statistics.pair_scores(judges))["win_rate"]
    for one in judges:
        one.scores[rng.random(one.scores.shape) < 0.2] = np.nan
    low, high = statistics.bounds(judges)
    assert low - 1e-12 <= truth <= high + 1e-12 and low < high
    for one in judges:
        one.scores[np.isnan(statistics.pair_scores(judges))] = np.nan
    low, high = statistics.bounds(judges)
    assert low < statistics.win_rate(statistics.pair_scores(judges))["win_rate"] < high


#### NOTHING, OR LITTLE, TO COUNT


def numbers_of(value):
    """Yield all leaves of nested dicts and lists."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers_of(part)
    else:
        yield value


def assert_is_plain(summary):
    """The summary is JSON without NaN, made of Python's own types, and every part with a null has a reason."""
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert {type(value) for value in numbers_of(summary)} <= {int, float, str, type(None)}
    parts = [summary["agreement"], summary["human"]]
    parts += [row[key] for row in (summary, *summary["judges"]) for key in ("length_controlled", "position")]
    for part in filter(None, parts):
        assert (part["reason"] is not None) == any(part[key] is None for key in part if key != "reason"), part


@pytest.mark.parametrize("n_judges", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("missing", [0.0, 0.3, 1.0])
def test_any_amount_of_data_gives_numbers_or_reasons(n, missing, n_judges):
    rng = np.random.default_rng(n)
    human = [["candidate", "baseline", "tie", None][k] for k in rng.integers(0, 4, n)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(5):
            assert_is_plain(summary_of(random_judges(rng, n, n_judges, missing), seed, human))


@pytest.mark.parametrize("judges", [[judge(np.empty((0, 2)))], [judge(np.full((4, 2), np.nan))]])
def test_no_pair_judged(judges):
    summary = summary_of(judges)
    for key in ("win_rate", "interval", "n_eff", "decided_rate", "decided_interval", "sign_test_p"):
        assert summary[key] is None
    assert summary["n_judged"] == summary["wins"] == summary["losses"] == summary["ties"] == 0
    assert summary["length_controlled"]["reason"] == "fewer than 10 pairs were judged"
    assert summary["position"]["reason"] == "nothing was judged"
    assert summary["bounds"] == ([0.0, 1.0] if summary["n_pairs"] else None)


def test_one_pair():
    summary = summary_of([judge([1.0])])
    assert summary["win_rate"] == 1 and summary["n_eff"] == 1 and summary["sign_test_p"] == 1
    assert summary["interval"] == statistics.wilson(1, 1) and summary["decided_interval"] == pytest.approx([0.025, 1])


#### SYMMETRIES


def assert_same_numbers(one, other):
    assert list(one) == list(other)
    first, second = (list(numbers_of(summary)) for summary in (one, other))
    for a, b in zip(first, second, strict=True):
        assert a == (pytest.approx(b, rel=1e-9, abs=1e-9) if isinstance(b, float) else b)


def random_comparison(seed, n=80):
    rng = np.random.default_rng(seed)
    judges = random_judges(rng, n, 3, missing=0.05)
    lengths = rng.integers(10, 900, (2, n))
    human = [["candidate", "baseline", "tie", None][k] for k in rng.integers(0, 4, n)]
    return judges, lengths, human


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_pairs_does_not_matter(seed):
    judges, lengths, human = random_comparison(seed)
    order = np.random.default_rng(seed).permutation(len(human))
    shuffled = [judge(one.scores[order], one.name) for one in judges]
    assert_same_numbers(
        statistics.summarize(shuffled, *lengths[:, order], [human[i] for i in order]),
        statistics.summarize(judges, *lengths, human),
    )


def mirrored(summary):
    """Compute what a summary becomes if candidate and baseline are exchanged."""

    def rate(value):
        return value if value is None else 1 - value

    def interval(values):
        return values if values is None else [1 - value for value in reversed(values)]

    controlled = summary["length_controlled"]
    changed = {
        "win_rate": rate(summary["win_rate"]),
        "interval": interval(summary["interval"]),
        "wins": summary["losses"],
        "losses": summary["wins"],
        "decided_rate": rate(summary["decided_rate"]),
        "decided_interval": interval(summary["decided_interval"]),
        "length_controlled": controlled
        | {
            "win_rate": rate(controlled["win_rate"]),
            "interval": interval(controlled["interval"]),
            "intercept": -controlled["intercept"],
        },
        "bounds": interval(summary["bounds"]),
    }
    if "judges" in summary:
        changed["judges"] = [mirrored(row) for row in summary["judges"]]
    return summary | changed


@pytest.mark.parametrize("seed", range(3))
def test_exchanging_candidate_and_baseline_mirrors_everything(seed):
    """The new candidate's score when shown first is 1 minus the old candidate's score when shown second."""
    judges, lengths, human = random_comparison(seed)
    exchanged = [judge(1 - one.scores[:, ::-1], one.name) for one in judges]
    labels = {"candidate": "baseline", "baseline": "candidate", "tie": "tie", None: None}
    assert_same_numbers(
        statistics.summarize(exchanged, *lengths[::-1], [labels[label] for label in human]),
        mirrored(statistics.summarize(judges, *lengths, human)),
    )


#### COVERAGE, AND MANY PAIRS


def simulate_scores(rng, means):
    """Draw (n_sets, n) scores with these expectations. A score is the mean of two orders, which are equal half the
    time; each order is a tie with probability 0.4 min(p, 1 - p)."""

    def verdicts():
        ties = 0.4 * np.minimum(means, 1 - means)
        wins = means - ties / 2
        draws = rng.random(means.shape)
        return np.select([draws < wins, draws < wins + ties], [1.0, 0.5], 0.0)

    one, other = verdicts(), verdicts()
    return (one + np.where(rng.random(means.shape) < 0.5, one, other)) / 2


def covers(interval, value) -> bool:
    return interval[0] <= value <= interval[1]


SIZES = [pytest.param(50, marks=pytest.mark.slow), 200, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("rate", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("n", SIZES)
def test_the_win_rate_is_in_its_interval_95_times_of_100(n, rate):
    """2000 sets of n pairs; their standard error is 0.5 %."""
    rng = np.random.default_rng(0)
    sets = simulate_scores(rng, np.full((2000, n), rate))
    coverage = np.mean([covers(statistics.win_rate(scores)["interval"], rate) for scores in sets])
    assert 0.935 <= coverage <= 0.97, coverage


def test_100_000_pairs():
    """1000 pairs, each 100 times: the same estimates, from 100 times as many pairs. Time is in benchmarks/judge.py."""
    few, lengths, human = random_comparison(0, 1000)
    many = [judge(np.tile(one.scores, (100, 1)), one.name) for one in few]
    small = statistics.summarize(few, *lengths, human)
    large = statistics.summarize(many, *np.tile(lengths, 100), human * 100)
    for key in ("n_pairs", "n_judged", "failures", "failed_units", "n_eff", "wins", "losses", "ties"):
        assert large[key] == pytest.approx(100 * small[key])
    for key in ("win_rate", "decided_rate", "bounds"):
        assert large[key] == pytest.approx(small[key])
    assert large["length_controlled"]["win_rate"] == pytest.approx(small["length_controlled"]["win_rate"], abs=1e-4)
    assert large["agreement"]["kappa"] == pytest.approx(small["agreement"]["kappa"])
