"""Differences between rows of the suite, with seeds and prompts as random effects.

Scores are matrices (n_seeds, n_prompts): run s answered prompt p. All runs answer the same prompts, so a difference of
two rows is paired over prompts, and over seeds where both rows have them. The runs of a seed share their luck over all
prompts: seeds are clusters, and there are few. Radiologists who read the same cases with two methods pose the same
problem, and we use the analysis of that field: D. Dorfman, K. Berbaum, C. Metz, Investigative Radiology 27 (1992), with
the degrees of freedom of S. Hillis, Statistics in Medicine 26 (2007). How often its intervals and those of a bootstrap
cover the truth is in docs/suite.md.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit  # scipy.stats takes a second to import

CONFIDENCE = 0.95
POWER = 0.80


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and prompts.

    low, high: interval; family-wise, if there are several comparisons
    p: two-sided, of the hypothesis that the mean is 0, times the number of comparisons, at most 1
    smallest: the smallest true difference that would have been found (its interval without 0) with probability 0.8
    """

    mean: float
    low: float
    high: float
    error: float
    df: float
    p: float
    smallest: float

    @property
    def differs(self) -> bool:
        return self.low > 0 or self.high < 0


def estimate(scores: np.ndarray, n_comparisons: int = 1) -> Estimate:
    """Estimate the mean of scores, or of differences of scores: (n_seeds, n_prompts), NaN where one is missing.

    With one seed, the interval is over prompts alone. n_comparisons: for Bonferroni's correction
    """
    scores = scores[:, np.isfinite(scores).all(axis=0)]
    mean = float(scores.mean())
    error, df = standard_error(scores)
    tail = (1 - CONFIDENCE) / 2 / n_comparisons
    if error == 0:
        return Estimate(mean, mean, mean, 0.0, df, 0.0 if mean else 1.0, 0.0)
    critical = float(stdtrit(df, 1 - tail))
    p = min(1.0, 2 * n_comparisons * float(stdtr(df, -abs(mean) / error)))
    smallest = (critical + float(stdtrit(df, POWER))) * error
    return Estimate(mean, mean - critical * error, mean + critical * error, error, df, p, smallest)


def standard_error(scores: np.ndarray) -> tuple[float, float]:
    """Compute the standard error of the mean of (n_seeds, n_prompts) scores, and its degrees of freedom.

    With the mean squares of seeds, of prompts, and of the rest of a two-way table,
        variance = (MS_seed + max(MS_prompt - MS_rest, 0)) / (n_seeds n_prompts),
    of which only MS_seed has few degrees of freedom: df = (n_seeds - 1) (that sum / MS_seed)^2 (Hillis). Seeds cannot
    vary less than the rest does, but five of them can by chance, which would make far too narrow intervals of one
    comparison in fifty. So MS_seed is at least MS_rest here.
    """
    n_seeds, n_prompts = scores.shape
    if n_seeds == 1:
        return float(scores.std(ddof=1) / n_prompts**0.5), n_prompts - 1
    by_seed, by_prompt = scores.mean(axis=1), scores.mean(axis=0)
    rest = scores - by_seed[:, None] - by_prompt + scores.mean()
    ms_seed, ms_prompt = n_prompts * by_seed.var(ddof=1), n_seeds * by_prompt.var(ddof=1)
    ms_rest = (rest**2).sum() / ((n_seeds - 1) * (n_prompts - 1))
    ms_seed = max(ms_seed, ms_rest)
    total = ms_seed + max(ms_prompt - ms_rest, 0.0)
    df = (n_seeds - 1) * (total / ms_seed) ** 2 if ms_seed > 0 else float(n_prompts - 1)
    return float((total / n_seeds / n_prompts) ** 0.5), float(df)


def no_difference_share(scores: np.ndarray, n_resamplings: int = 100, seed: int = 0) -> float:
    """Return how often one row under two names shows no difference: the A/A run.

    scores: (2 n_seeds, n_prompts) of one row. Each resampling gives half of the seeds, at random, to each name, and
    takes half of the prompts; the test is that of a single comparison.
    """
    rng = np.random.default_rng(seed)
    n_seeds, n_prompts = scores.shape[0] // 2, scores.shape[1] // 2
    found = 0
    for _ in range(n_resamplings):
        seeds = rng.permutation(scores.shape[0])
        prompts = rng.permutation(scores.shape[1])[:n_prompts]
        one, other = (scores[np.ix_(half, prompts)] for half in (seeds[:n_seeds], seeds[n_seeds : 2 * n_seeds]))
        found += estimate(one - other).differs
    return 1 - found / n_resamplings
