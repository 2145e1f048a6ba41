"""Statistics: the numbers of a comparison, as pure functions of arrays of scores, without files and without calls.

The score of a pair is the candidate's: 1 won, 0.5 tied, 0 lost, or between, averaged over orders and judges; NaN if a
verdict is missing. `summarize` puts all numbers together; each number has a function of its own below it.
All intervals are two-sided, at 95 %. A number that cannot be computed is None, with a reason beside it, and never NaN.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr, betaincinv  # scipy.stats takes a second to import

from halos.judge.judges import JudgeScores
from halos.judge.length_control import CONFIDENCE, TOLERANCE, Verdicts, Z, length_controlled

OUTCOME_OF_LABEL = {"candidate": 1, "tie": 0, "baseline": -1}


def summarize(
    judges: list[JudgeScores],
    candidate_lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    human: Sequence[str | None] | None = None,
    anchor: Verdicts | None = None,
) -> dict:
    """Compute all numbers of a comparison, as a dict that JSON can hold.

    candidate_lengths, baseline_lengths: (n_pairs,), in characters
    human: (n_pairs,), a person's choice: candidate, baseline, tie, or None
    anchor: see `length_controlled`

    Its keys, and the functions that explain them:
    n_pairs; n_judged: pairs with all verdicts that were asked for; failures: pairs without; failed_units: their number
    win_rate, interval, n_eff: `win_rate`
    wins, losses, ties, decided_rate, decided_interval, sign_test_p: `outcome_counts`
    length_controlled: `length_controlled`; position: `position_bias`; bounds: `bounds`
    human: `human_agreement`, or None without any choice
    judges: name, and all of the above, for each judge alone, over the pairs with all verdicts of that judge
    agreement: `judge_agreement`
    """
    data = (np.asarray(candidate_lengths, dtype=float), np.asarray(baseline_lengths, dtype=float), human, anchor)
    rows = [{"name": judge.name, **_summary([judge], *data)} for judge in judges]
    return {**_summary(judges, *data), "judges": rows, "agreement": judge_agreement(judges)}


def _summary(
    judges: list[JudgeScores],
    candidate_lengths: np.ndarray,
    baseline_lengths: np.ndarray,
    human: Sequence[str | None] | None,
    anchor: Verdicts | None,
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
        "length_controlled": length_controlled(scores, candidate_lengths, baseline_lengths, anchor),
        "position": position_bias(judges),
        "bounds": bounds(judges),
        "human": human_agreement(scores, human) if human is not None and any(human) else None,
    }


#### SCORES AND OUTCOMES


def pair_scores(judges: list[JudgeScores]) -> np.ndarray:
    """Average the scores of each judge over orders, and then over judges, so that all judges have the same weight.

    Returns (n_pairs,); NaN where a verdict that was asked for is missing.
    """
    return np.mean([_filled_scores(judge, np.nan) for judge in judges], axis=0)


def _filled_scores(judge: JudgeScores, missing: float) -> np.ndarray:
    """Average a judge's scores over the orders that were asked, with `missing` for a missing verdict: (n_pairs,)."""
    verdicts = np.where(np.isnan(judge.scores), missing, judge.scores)
    n_asked = judge.asked.sum(axis=1)
    total = np.where(judge.asked, verdicts, 0.0).sum(axis=1)
    return np.divide(total, n_asked, out=np.full(len(total), np.nan), where=n_asked > 0)


def outcomes(scores: np.ndarray) -> np.ndarray:
    """Turn scores of any shape into 1 (the candidate won), 0 (tied) and -1 (lost); NaN stays NaN.

    >>> outcomes(np.array([0.75, 0.3 + 0.2, 0.0])).tolist()
    [1.0, 0.0, -1.0]
    """
    margins = np.asarray(scores, dtype=float) - 0.5
    return np.where(np.abs(margins) < TOLERANCE, 0.0, np.sign(margins))


def bounds(judges: list[JudgeScores]) -> list[float] | None:
    """Compute [worst, best]: the win rate of all pairs if the candidate had lost, or won, every missing verdict.

    The win rate of the complete pairs alone may lie outside, since incomplete pairs have verdicts, too.
    """
    filled = [np.mean([_filled_scores(judge, missing) for judge in judges], axis=0) for missing in (0.0, 1.0)]
    asked = np.isfinite(filled[0])
    return [float(scores[asked].mean()) for scores in filled] if asked.any() else None


#### THE WIN RATE


def win_rate(scores: np.ndarray) -> dict:
    """Compute the mean score and its Wilson interval: {win_rate, interval, n_eff}. scores: (n_pairs,), NaN left out."""
    scores = scores[np.isfinite(scores)]
    if not len(scores):
        return {"win_rate": None, "interval": None, "n_eff": None}
    mean, n_eff = float(scores.mean()), effective_n(scores)
    return {"win_rate": mean, "interval": wilson(mean, n_eff), "n_eff": n_eff}


def effective_n(scores: np.ndarray) -> float:
    """Compute the number of wins and losses whose mean would be as certain as that of these scores: n m (1 - m) / var.

    m is the mean, var the variance (of the population). Wins and losses alone give n. Ties and scores between vary
    less, and give more. If all scores are equal, var is 0, and the result is n.
    scores: (n,), n > 0, without NaN
    """
    if np.ptp(scores) < TOLERANCE:
        return float(len(scores))
    mean = scores.mean()
    return float(len(scores) * mean * (1 - mean) / scores.var())


def wilson(mean: float, n_eff: float) -> list[float]:
    """Compute the score interval of a proportion (Wilson, 1927); `n_eff` may be a fraction."""
    shrink = 1 + Z**2 / n_eff
    center = (mean + Z**2 / (2 * n_eff)) / shrink
    half = Z * np.sqrt(mean * (1 - mean) / n_eff + Z**2 / (4 * n_eff**2)) / shrink
    return [float(max(center - half, 0.0)), float(min(center + half, 1.0))]


def outcome_counts(scores: np.ndarray) -> dict:
    """Count {wins, losses, ties, decided_rate, decided_interval, sign_test_p}; the last three leave the ties out.

    scores: (n_pairs,), NaN left out
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
    """Compute the exact interval of a proportion, k of n > 0 (Clopper and Pearson, 1934)."""
    tail = (1 - CONFIDENCE) / 2
    low = float(betaincinv(k, n - k + 1, tail)) if k else 0.0
    return [low, float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0]


def sign_test(wins: int, losses: int) -> float | None:
    """Compute the exact two-sided p of the hypothesis that wins and losses are equally likely; None without any."""
    n = wins + losses
    return min(1.0, 2 * float(bdtr(min(wins, losses), n, 0.5))) if n else None


#### POSITION


def position_bias(judges: list[JudgeScores]) -> dict:
    """Measure whether the judges that see both responses prefer a slot. Counts are summed over these judges.

    first_slot_share: share of the verdicts (ties left out) for the response shown first; 0.5 without bias, if every
        pair is judged in both orders
    consistent, inconsistent: pairs whose two orders have the same outcome, and other pairs
    first_twice, second_twice: inconsistent pairs that the first slot won in both orders, and that the second slot won;
        in the other inconsistent pairs one order is a tie
    mcnemar_p: `mcnemar` of these two, for one judge (verdicts of several judges on a pair are not independent)
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
    """Say why a number about positions is None. verdicts: (n, 2), of `n_judges` judges."""
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
    """Compute the exact two-sided p of b discordant pairs one way and c the other (McNemar, 1947); None without any."""
    return sign_test(b, c)


#### AGREEMENT


def judge_agreement(judges: list[JudgeScores]) -> dict:
    """Compute kappa of the judges' outcomes (win, tie, loss) over the n pairs that have all verdicts of all judges.

    Returns {kind, kappa, n, reason}; kind is cohen for two judges, fleiss for more, None for one.
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
    """Compute how often the outcome is a person's choice, over the n pairs with both.

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
    """Count the pairs of outcomes in two arrays: (3, 3)."""
    return np.array([[np.sum((one == a) & (other == b)) for b in (1, 0, -1)] for a in (1, 0, -1)])


def cohen_kappa(table: ArrayLike) -> float | None:
    """Compute the agreement of two raters beyond chance (Cohen, 1960); None if chance alone gives 1.

    table: (k, k) counts

    >>> round(cohen_kappa([[40, 10], [5, 45]]), 9)
    0.7
    """
    table = np.asarray(table, dtype=float)
    if not table.sum():
        return None
    shares = table / table.sum()
    return _beyond_chance(np.trace(shares), shares.sum(axis=1) @ shares.sum(axis=0))


def fleiss_kappa(counts: ArrayLike) -> float | None:
    """Compute the agreement of several raters beyond chance (Fleiss, 1971); None if chance alone gives 1.

    counts: (n, k), number of raters who put subject i into category j; all rows have the same sum, of at least 2
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
