"""What the verdicts of judges say, and how surely: pure functions of arrays of scores, without files and without calls.

A pair's score is the candidate's: 1 won, 0 lost, 0.5 tied, or between, as the mean over orders and judges; NaN where
the pair is not complete. `summarize` puts everything together; each number has a function of its own below it.
All intervals are two-sided, at 95 %. What cannot be computed is None, with a reason beside it, and never NaN.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr, betaincinv, expit, log_expit, ndtri  # scipy.stats takes a second to import

from halos.judge.judges import JudgeScores

CONFIDENCE = 0.95
Z = float(ndtri(0.5 + CONFIDENCE / 2))
TOLERANCE = 1e-9  # scores that differ by less are equal: means of log-probs are rounded
MIN_SPREAD = 1e-3  # of the length covariate; below it, the fit cannot tell the slope from the intercept
MAX_STEPS = 200  # of Newton's method, which takes 5 to 8
CONVERGED = 1e-14  # twice what the log-likelihood had left to gain before the last step
NOT_CONVERGED = "the regression on the length difference did not converge"
OUTCOME_OF_LABEL = {"candidate": 1, "tie": 0, "baseline": -1}


def summarize(
    judges: list[JudgeScores],
    candidate_lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    human: Sequence[str | None] | None = None,
) -> dict:
    """All numbers of a comparison, ready for JSON.

    candidate_lengths, baseline_lengths: (n_pairs,), in characters
    human: (n_pairs,), candidate, baseline, tie, or None where nobody said

    n_pairs; n_judged: pairs with a verdict for every unit that was asked; failures: pairs without; failed_units
    win_rate, interval, n_eff: `win_rate`
    wins, losses, ties, decided_rate, decided_interval, sign_test_p: `outcome_counts`
    length_controlled: `length_controlled`; position: `position_bias`; bounds: `bounds`
    human: `human_agreement`, or None if nobody said anything
    judges: all of the above for each judge alone, over the pairs that are complete for that judge, and its name
    agreement: `judge_agreement`
    """
    data = (np.asarray(candidate_lengths, dtype=float), np.asarray(baseline_lengths, dtype=float), human)
    rows = [{"name": judge.name, **_summary([judge], *data)} for judge in judges]
    return {**_summary(judges, *data), "judges": rows, "agreement": judge_agreement(judges)}


def _summary(
    judges: list[JudgeScores],
    candidate_lengths: np.ndarray,
    baseline_lengths: np.ndarray,
    human: Sequence[str | None] | None,
) -> dict:
    scores = pair_scores(judges)
    failed = np.stack([judge.asked & np.isnan(judge.scores) for judge in judges])
    return {
        "n_pairs": len(scores),
        "n_judged": int(np.isfinite(scores).sum()),
        "failures": int(failed.any(axis=(0, 2)).sum()),
        "failed_units": int(failed.sum()),
        **win_rate(scores),
        **outcome_counts(scores),
        "length_controlled": length_controlled(scores, candidate_lengths, baseline_lengths),
        "position": position_bias(judges),
        "bounds": bounds(judges),
        "human": human_agreement(scores, human) if human is not None and any(human) else None,
    }


#### SCORES AND OUTCOMES


def pair_scores(judges: list[JudgeScores]) -> np.ndarray:
    """(n_pairs,): the mean over judges of each judge's mean over orders, so that judges count alike.

    NaN where a unit that was asked has no verdict.
    """
    return np.mean([_filled_scores(judge, np.nan) for judge in judges], axis=0)


def _filled_scores(judge: JudgeScores, missing: float) -> np.ndarray:
    """(n_pairs,): a judge's mean over the orders that were asked, with `missing` in place of what has no verdict."""
    verdicts = np.where(np.isnan(judge.scores), missing, judge.scores)
    n_asked = judge.asked.sum(axis=1)
    total = np.where(judge.asked, verdicts, 0.0).sum(axis=1)
    return np.divide(total, n_asked, out=np.full(len(total), np.nan), where=n_asked > 0)


def outcomes(scores: np.ndarray) -> np.ndarray:
    """Scores of any shape -> 1 where the candidate won, 0 tied, -1 lost; NaN where there is no score.

    >>> outcomes(np.array([0.75, 0.3 + 0.2, 0.0])).tolist()
    [1.0, 0.0, -1.0]
    """
    margins = np.asarray(scores, dtype=float) - 0.5
    return np.where(np.abs(margins) < TOLERANCE, 0.0, np.sign(margins))


def bounds(judges: list[JudgeScores]) -> list[float] | None:
    """[worst, best]: the win rate over all pairs, if each missing verdict had gone against the candidate, or for it.

    The win rate of the complete pairs alone may lie outside, where the verdicts of incomplete pairs tell against it.
    """
    filled = [np.mean([_filled_scores(judge, missing) for judge in judges], axis=0) for missing in (0.0, 1.0)]
    asked = np.isfinite(filled[0])
    return [float(scores[asked].mean()) for scores in filled] if asked.any() else None


#### THE WIN RATE


def win_rate(scores: np.ndarray) -> dict:
    """The mean score with its Wilson interval: {win_rate, interval, n_eff}. scores: (n_pairs,); NaN is left out."""
    scores = scores[np.isfinite(scores)]
    if not len(scores):
        return {"win_rate": None, "interval": None, "n_eff": None}
    mean, n_eff = float(scores.mean()), effective_n(scores)
    return {"win_rate": mean, "interval": wilson(mean, n_eff), "n_eff": n_eff}


def effective_n(scores: np.ndarray) -> float:
    """How many wins and losses would fix their mean m as well as these scores do: n m (1 - m) / var(s).

    Wins and losses alone give n; ties and other scores between vary less, and give more. The variance is the
    population's; where it is 0 (all won, all lost, all tied), n. scores: (n,), n > 0, none NaN.
    """
    if np.ptp(scores) < TOLERANCE:
        return float(len(scores))
    mean = scores.mean()
    return float(len(scores) * mean * (1 - mean) / scores.var())


def wilson(mean: float, n_eff: float) -> list[float]:
    """Score interval of a proportion (Wilson, 1927), for a sample size that need not be whole."""
    shrink = 1 + Z**2 / n_eff
    center = (mean + Z**2 / (2 * n_eff)) / shrink
    half = Z * np.sqrt(mean * (1 - mean) / n_eff + Z**2 / (4 * n_eff**2)) / shrink
    return [float(max(center - half, 0.0)), float(min(center + half, 1.0))]


def outcome_counts(scores: np.ndarray) -> dict:
    """{wins, losses, ties, decided_rate, decided_interval, sign_test_p}: the last three leave out the ties.

    scores: (n_pairs,); NaN is left out
    """
    outcome = outcomes(scores)
    wins, losses, ties = (int((outcome == value).sum()) for value in (1, -1, 0))
    decided = wins + losses
    return {
        "wins": wins,
        "losses": losses,
        "ties": ties,
        "decided_rate": wins / decided if decided else None,
        "decided_interval": clopper_pearson(wins, decided) if decided else None,
        "sign_test_p": sign_test(wins, losses),
    }


def clopper_pearson(k: int, n: int) -> list[float]:
    """Exact interval of a proportion (Clopper and Pearson, 1934), k of n > 0."""
    tail = (1 - CONFIDENCE) / 2
    low = float(betaincinv(k, n - k + 1, tail)) if k else 0.0
    return [low, float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0]


def sign_test(wins: int, losses: int) -> float | None:
    """Exact two-sided p of so uneven a split if both were as likely; None if there is nothing to split."""
    n = wins + losses
    return min(1.0, 2 * float(bdtr(min(wins, losses), n, 0.5))) if n else None


#### LENGTH


def length_controlled(scores: np.ndarray, candidate_lengths: ArrayLike, baseline_lengths: ArrayLike) -> dict:
    """The win rate at equal lengths, by fractional logistic regression (Papke and Wooldridge, 1996).

    E[score] = logistic(intercept + slope * tanh(d / sd(d))), where d is the candidate's length minus the baseline's and
    sd has ddof 1, as in https://arxiv.org/abs/2404.04475; the win rate is logistic(intercept). Maximum likelihood, with
    intervals from the sandwich covariance (HC0), the win rate's through the logistic; with 50 pairs they are a little
    narrow, and cover 93 to 94 %.

    scores: (n_pairs,); NaN is left out. Lengths: (n_pairs,), in characters.
    Returns {win_rate, interval, intercept, slope, slope_interval, reason}: reason is None, or why the others are.
    """
    judged = np.isfinite(scores)
    differences = np.asarray(candidate_lengths, dtype=float) - np.asarray(baseline_lengths, dtype=float)
    covariate, scores = _length_covariate(differences[judged]), scores[judged]
    try:
        fit = _cannot_fit(covariate, scores) or _fit_logistic(covariate, scores)
    except np.linalg.LinAlgError:  # scores within rounding of a set that is separable
        fit = NOT_CONVERGED
    if isinstance(fit, str):
        keys = ("win_rate", "interval", "intercept", "slope", "slope_interval")
        return {**dict.fromkeys(keys), "reason": fit}
    coefficients, errors = fit
    low, high = coefficients - Z * errors, coefficients + Z * errors
    return {
        "win_rate": float(expit(coefficients[0])),
        "interval": [float(expit(low[0])), float(expit(high[0]))],
        "intercept": float(coefficients[0]),
        "slope": float(coefficients[1]),
        "slope_interval": [float(low[1]), float(high[1])],
        "reason": None,
    }


def _length_covariate(differences: np.ndarray) -> np.ndarray:
    """tanh(d / sd(d)): (n,), in [-1, 1]; zeros where d does not vary."""
    deviation = differences.std(ddof=1) if len(differences) > 1 else 0.0
    return np.tanh(differences / deviation) if deviation else np.zeros(len(differences))


def _cannot_fit(covariate: np.ndarray, scores: np.ndarray) -> str | None:
    """Why the regression has no solution, or None."""
    if len(scores) < 3:
        return "fewer than 3 pairs were judged"
    if np.ptp(scores) < TOLERANCE:
        return "all scores are the same"
    if np.ptp(covariate) < MIN_SPREAD:
        return "the length difference does not vary, or is far from 0 in all pairs"
    if is_separable(covariate, scores):
        return "the length difference separates wins from losses"
    return None


def is_separable(covariate: np.ndarray, scores: np.ndarray) -> bool:
    """Whether the likelihood has no maximum, for a covariate that varies: separation, quasi-separation included.

    A score s weighs as s of a win and 1 - s of a loss. The maximum exists unless a line a + b x is at least 0 at every
    win and at most 0 at every loss (Albert and Anderson, 1984). With one covariate this means that one of the two is
    missing, or that the ranges of x at wins and at losses have at most an end in common. Scores between 0 and 1 are in
    both ranges.
    """
    wins, losses = covariate[scores > TOLERANCE], covariate[scores < 1 - TOLERANCE]
    if not len(wins) or not len(losses):
        return True
    return bool(wins.max() <= losses.min() or losses.max() <= wins.min())


def _fit_logistic(covariate: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray] | str:
    """(intercept, slope) of maximum likelihood with their standard errors (HC0), or why there are none.

    Newton's method, with its step halved while it loses likelihood: where few pairs hold the slope, a whole step can
    jump to where the likelihood is flat.
    """
    design = np.stack([np.ones_like(covariate), covariate], axis=1)
    coefficients, gain = np.zeros(2), np.inf
    for _ in range(MAX_STEPS):
        means = expit(design @ coefficients)
        residuals = scores - means
        bread = np.linalg.inv((design.T * (means * (1 - means))) @ design)
        if abs(gain) < CONVERGED:
            break
        gradient = design.T @ residuals
        step = bread @ gradient
        gain = gradient @ step
        least = _log_likelihood(design @ coefficients, scores) * (1 + TOLERANCE)  # likelihoods are negative
        while _log_likelihood(design @ (coefficients + step), scores) < least:
            step = step / 2
        coefficients = coefficients + step
    else:
        return NOT_CONVERGED
    if np.abs(residuals).max() < TOLERANCE:
        return "the regression on the length difference fits exactly, so its error is unknown"
    return coefficients, np.linalg.norm(design @ bread * residuals[:, None], axis=0)


def _log_likelihood(logits: np.ndarray, scores: np.ndarray) -> float:
    """Of scores under Bernoulli means, up to a constant for scores between 0 and 1."""
    return float(scores @ log_expit(logits) + (1 - scores) @ log_expit(-logits))


#### POSITION


def position_bias(judges: list[JudgeScores]) -> dict:
    """Whether judges favour a slot, of the judges that see two responses; counts are summed over them.

    first_slot_share: of the single verdicts that are no tie, those for the response shown first; 0.5 without bias, if
        every pair is judged in both orders
    consistent, inconsistent: pairs whose two orders have the same outcome, or not
    first_twice, second_twice: of the inconsistent ones, those that the first slot won in both orders, or the second;
        in the others one order is a tie
    mcnemar_p: `mcnemar` of these two, for one judge (verdicts of several on the same pair are not independent)
    reason: why any of these is None, or None
    """
    slots = [outcomes(judge.scores) * (1, -1) for judge in judges if judge.has_positions]  # 1 where the first slot won
    verdicts = np.concatenate(slots) if slots else np.empty((0, 2))
    firsts, seconds = int((verdicts == 1).sum()), int((verdicts == -1).sum())
    lean = verdicts.sum(axis=1)  # NaN unless both orders are there
    counts = {
        "consistent": int((lean == 0).sum()),
        "inconsistent": int((np.abs(lean) > 0).sum()),
        "first_twice": int((lean == 2).sum()),
        "second_twice": int((lean == -2).sum()),
    }
    p = mcnemar(counts["first_twice"], counts["second_twice"]) if len(slots) == 1 else None
    return {
        "first_slot_share": firsts / (firsts + seconds) if firsts + seconds else None,
        **(counts if np.isfinite(lean).any() else dict.fromkeys(counts)),
        "mcnemar_p": p,
        "reason": _position_reason(len(slots), verdicts, p),
    }


def _position_reason(n_judges: int, verdicts: np.ndarray, p: float | None) -> str | None:
    """Why something about positions is None. verdicts: (n, 2), of `n_judges` judges."""
    if not n_judges:
        return "responses were scored one by one, so there are no positions"
    if np.isnan(verdicts).all():
        return "nothing was judged"
    if not np.any(np.abs(verdicts) == 1):
        return "all verdicts are ties"
    if np.isnan(verdicts).any(axis=1).all():
        return "no pair was judged in both orders"
    if n_judges > 1:
        return "McNemar's test is for each judge alone"
    return "no pair was won twice by the same slot" if p is None else None


def mcnemar(b: int, c: int) -> float | None:
    """Exact two-sided p of b discordant pairs one way and c the other (McNemar, 1947); None if there are none."""
    return sign_test(b, c)


#### AGREEMENT


def judge_agreement(judges: list[JudgeScores]) -> dict:
    """{kind, kappa, n, reason}: kappa of the judges' outcomes (win, tie, loss), over the n pairs complete for all.

    kind: cohen for two judges, fleiss for more; None for one
    """
    if len(judges) < 2:
        return {"kind": None, "kappa": None, "n": 0, "reason": "there is one judge"}
    said = np.stack([outcomes(pair_scores([judge])) for judge in judges])
    said = said[:, np.isfinite(said).all(axis=0)]
    if len(judges) == 2:
        kind, kappa = "cohen", cohen_kappa(_cross_table(*said))
    else:
        counts = np.stack([(said == value).sum(axis=0) for value in (1, 0, -1)], axis=1)
        kind, kappa = "fleiss", fleiss_kappa(counts)
    return {"kind": kind, "kappa": kappa, "n": said.shape[1], "reason": _kappa_reason(said.shape[1], kappa)}


def human_agreement(scores: np.ndarray, human: Sequence[str | None]) -> dict:
    """How often the outcome is the one that people chose, over the n pairs with a score and a label.

    human: (n_pairs,), candidate, baseline, tie or None
    Returns {n, agreement, interval, kappa, reason}: the share, its Clopper-Pearson interval, Cohen's kappa.
    """
    labels = np.array([OUTCOME_OF_LABEL[label] if label else np.nan for label in human], dtype=float)
    both = np.isfinite(scores) & np.isfinite(labels)
    said, labels = outcomes(scores[both]), labels[both]
    n, agreed = len(labels), int((said == labels).sum())
    kappa = cohen_kappa(_cross_table(said, labels))
    return {
        "n": n,
        "agreement": agreed / n if n else None,
        "interval": clopper_pearson(agreed, n) if n else None,
        "kappa": kappa,
        "reason": _kappa_reason(n, kappa),
    }


def _kappa_reason(n: int, kappa: float | None) -> str | None:
    if not n:
        return "no pair was judged by all"
    return "all verdicts are the same, so agreement by chance is 1" if kappa is None else None


def _cross_table(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(3, 3) counts of two arrays of outcomes."""
    return np.array([[np.sum((one == a) & (other == b)) for b in (1, 0, -1)] for a in (1, 0, -1)])


def cohen_kappa(table: ArrayLike) -> float | None:
    """Agreement of two raters beyond chance (Cohen, 1960). table: (k, k) counts; None if chance alone gives 1.

    >>> round(cohen_kappa([[40, 10], [5, 45]]), 9)
    0.7
    """
    table = np.asarray(table, dtype=float)
    if not table.sum():
        return None
    shares = table / table.sum()
    return _beyond_chance(np.trace(shares), shares.sum(axis=1) @ shares.sum(axis=0))


def fleiss_kappa(counts: ArrayLike) -> float | None:
    """Agreement of several raters beyond chance (Fleiss, 1971); None if chance alone gives 1.

    counts: (n, k), how many raters put a subject into a category; all rows have the same sum, of at least 2
    """
    counts = np.asarray(counts, dtype=float)
    if not len(counts):
        return None
    n_raters = counts[0].sum()
    observed = ((counts**2).sum(axis=1) - n_raters) / (n_raters * (n_raters - 1))
    shares = counts.sum(axis=0) / counts.sum()
    return _beyond_chance(observed.mean(), shares @ shares)


def _beyond_chance(observed: float, by_chance: float) -> float | None:
    return float((observed - by_chance) / (1 - by_chance)) if 1 - by_chance > TOLERANCE else None
