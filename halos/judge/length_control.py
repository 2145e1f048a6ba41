"""Length control: the win rate that the candidate would have if its responses were as long as the baseline's.

A judge that likes long responses lets a long-winded candidate win. `length_controlled` estimates by how much, from
scores and lengths alone, or says why they cannot tell. docs/judging.md shows it on recorded comparisons of 12 models.

    logit E[score] = intercept + slope * tanh(d / sd(d)) + trend * z

d is the candidate's length minus the baseline's, as in AlpacaEval (https://arxiv.org/abs/2404.04475). z is the length
of the longer response, standardized over the pairs: it stands for how much there is to say. A candidate of short
responses is the longer one only where the prompt asks for little. Without z, the slope would absorb that these prompts
are easier, and the fit would invent wins. The win rate is the mean over the pairs of logistic(intercept + trend * z).

Slope and trend have normal priors. The one of the slope is wide enough for a judge without length bias (0) and for
AlpacaEval's (1.51), or it comes from an anchor: the judge's verdicts on rewrites of the baseline's own responses.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, log_expit, ndtri  # scipy.stats takes a second to import

CONFIDENCE = 0.95  # of all intervals in this folder
Z = float(ndtri(0.5 + CONFIDENCE / 2))
TOLERANCE = 1e-9  # scores that differ by less are equal: means of log-probs are rounded
SLOPE, SLOPE_SD = 1.51, 1.0  # mean of AlpacaEval's 199 published slopes; wide enough for a judge without length bias
MODEL_SD = 0.39  # spread of these 199: how much the slopes of models differ before one judge
TREND_SD = 1.0
MAX_SLOPE_PART = 0.03  # of the win rate: the slope's part of the interval, if it is the larger part
MIN_PAIRS = 10
MIN_SPREAD = 1e-3  # of tanh(d / sd(d)); below it, the fit cannot tell the slope from the intercept
MAX_STEPS = 200  # of Newton's method, which takes 5 to 8
CONVERGED = 1e-14  # twice what the objective had left to gain before the last step
KEYS = ("win_rate", "interval", "intercept", "slope", "slope_interval")

Verdicts = tuple[np.ndarray, np.ndarray, np.ndarray]  # scores and both lengths, each (n,)


def length_controlled(
    scores: np.ndarray,
    candidate_lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    anchor: Verdicts | None = None,
) -> dict:
    """Estimate the win rate at equal lengths, with its interval; or say why there is none.

    scores: (n_pairs,), NaN left out; lengths: (n_pairs,), in characters
    anchor: scores of rewrites of the baseline's responses against these, lengths of the rewrites and of the responses

    Returns {win_rate, interval, intercept, slope, slope_interval, overlap, reason}. intercept: logit of the win rate.
    overlap: share of the pairs with the less common sign of the length difference; equal lengths count as both signs.
    Either reason is None, or all others are, except overlap, which is None only if no pair was judged.
    """
    judged = np.isfinite(scores)
    lengths = np.stack([np.asarray(side, dtype=float)[judged] for side in (candidate_lengths, baseline_lengths)])
    scores = np.asarray(scores, dtype=float)[judged]
    differences = lengths[0] - lengths[1]
    overlap = min(float(np.mean(differences >= 0)), float(np.mean(differences <= 0))) if len(scores) else None
    fit = _cannot_fit(_length_covariate(differences), scores) or _estimate(scores, lengths, anchor)
    if isinstance(fit, str):
        return {**dict.fromkeys(KEYS), "overlap": overlap, "reason": fit}
    return {**fit, "overlap": overlap, "reason": None}


def _cannot_fit(covariate: np.ndarray, scores: np.ndarray) -> str | None:
    """Say why the data determine no slope; None if they do."""
    if len(scores) < MIN_PAIRS:
        return f"fewer than {MIN_PAIRS} pairs were judged"
    if np.ptp(scores) < TOLERANCE:
        return "all scores are the same"
    if np.ptp(covariate) < MIN_SPREAD:
        return "the length difference does not vary, or is far from 0 in all pairs"
    if is_separable(covariate, scores):
        return "the length difference separates wins from losses"
    return None


def is_separable(covariate: np.ndarray, scores: np.ndarray) -> bool:
    """Return whether wins and losses are separable (or quasi-separable), so that the likelihood has no maximum.

    A score s counts as s of a win and 1 - s of a loss. The maximum exists unless a line a + b x is at least 0 at every
    win and at most 0 at every loss (Albert and Anderson, 1984). With one covariate x that varies, there is such a line
    if there are no wins, or no losses, or if the ranges of x at wins and at losses share at most an end point. Scores
    between 0 and 1 are in both ranges.
    """
    wins, losses = covariate[scores > TOLERANCE], covariate[scores < 1 - TOLERANCE]
    if not len(wins) or not len(losses):
        return True
    return bool(wins.max() <= losses.min() or losses.max() <= wins.min())


#### THE ESTIMATE


def _estimate(scores: np.ndarray, lengths: np.ndarray, anchor: Verdicts | None) -> dict | str:
    """Compute the numbers of `length_controlled`; or the reason if too much of the interval is due to the slope.

    lengths: (2, n), of candidate and baseline
    With an anchor that determines the judge's slope better than models differ, the number is always given.
    """
    deviation = float((lengths[0] - lengths[1]).std(ddof=1))
    slope, slope_sd = SLOPE, SLOPE_SD
    if anchor is not None:
        slope, error = _anchor_slope(anchor, deviation)
        slope_sd = float(np.hypot(error, MODEL_SD))
    design = make_design(lengths, deviation)
    coefficients, covariance = fit_logistic(design, scores, slope, slope_sd)
    rate, logit, gradient = at_equal_lengths(design, coefficients)
    variance = gradient @ covariance @ gradient
    slope_error = float(np.sqrt(covariance[1, 1]))
    slope_part = Z * abs(gradient @ covariance[1]) / slope_error
    if anchor is None or error > MODEL_SD:
        if slope_part > MAX_SLOPE_PART and slope_part**2 > Z**2 * variance / 2:
            return _too_uncertain(lengths, slope_part)
    half = Z * np.sqrt(variance) / (rate * expit(-logit))
    return {
        "win_rate": rate,
        "interval": [float(expit(logit - half)), float(expit(logit + half))],
        "intercept": logit,
        "slope": float(coefficients[1]),
        "slope_interval": [float(coefficients[1] + side * Z * slope_error) for side in (-1, 1)],
    }


def _anchor_slope(anchor: Verdicts, deviation: float) -> tuple[float, float]:
    """Estimate the judge's slope and its error from an anchor. Rewriting may cost quality: the intercept is free.

    deviation: of the length differences in the comparison, so that a slope means the same in both
    """
    scores, *lengths = anchor
    coefficients, covariance = fit_logistic(make_design(np.stack(lengths), deviation), scores, SLOPE, SLOPE_SD)
    return float(coefficients[1]), float(np.sqrt(covariance[1, 1]))


def _too_uncertain(lengths: np.ndarray, slope_part: float) -> str:
    longer, shorter = np.mean(lengths[0] > lengths[1]), np.mean(lengths[0] < lengths[1])
    share, word = min((longer, "longer"), (shorter, "shorter"))
    return (
        f"lengths overlap too little: the candidate's response is the {word} one in {100 * share:.1f} % of the pairs, "
        f"and the effect of length alone leaves ±{100 * slope_part:.1f} points"
    )


def _length_covariate(differences: np.ndarray) -> np.ndarray:
    """Compute tanh(d / sd(d)): (n,), in [-1, 1]; zeros if d does not vary."""
    deviation = differences.std(ddof=1) if len(differences) > 1 else 0.0
    return np.tanh(differences / deviation) if deviation else np.zeros(len(differences))


def make_design(lengths: np.ndarray, deviation: float) -> np.ndarray:
    """Make the covariates of intercept, slope and trend: (n, 3). lengths: (2, n)."""
    longer = lengths.max(axis=0)
    spread = longer.std()
    trend = (longer - longer.mean()) / spread if spread else np.zeros(len(longer))
    return np.stack([np.ones(len(longer)), np.tanh((lengths[0] - lengths[1]) / deviation), trend], axis=1)


def at_equal_lengths(design: np.ndarray, coefficients: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Compute (win rate, its logit, gradient of the win rate) where the covariate of the slope is 0."""
    equal = design * (1.0, 0.0, 1.0)
    means, misses = expit(equal @ coefficients), expit(-equal @ coefficients)
    rate = float(means.mean())
    return rate, float(np.log(rate) - np.log(misses.mean())), (means * misses) @ equal / len(means)


def fit_logistic(
    design: np.ndarray, scores: np.ndarray, slope: float, slope_sd: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fit intercept, slope and trend, and compute their covariance: (3,) and (3, 3).

    The estimate maximizes the Bernoulli likelihood of the scores (Papke and Wooldridge, 1996) times the priors. The
    covariance is the sandwich with residuals as if each pair were left out (HC3), and with a prior as a measurement.
    By Newton's method. A step is halved while it lowers the objective: where few pairs determine a coefficient, a whole
    step can jump to where the likelihood is flat.
    """
    center, precision = np.array([0.0, slope, 0.0]), np.array([0.0, slope_sd**-2, TREND_SD**-2])

    def objective(coefficients: np.ndarray) -> float:
        logits = design @ coefficients
        likelihood = scores @ log_expit(logits) + (1 - scores) @ log_expit(-logits)
        return float(likelihood - precision @ (coefficients - center) ** 2 / 2)

    coefficients = np.zeros(3)
    for _ in range(MAX_STEPS):
        means = expit(design @ coefficients)
        weights, residuals = means * expit(-design @ coefficients), scores - means
        bread = np.linalg.inv((design.T * weights) @ design + np.diag(precision))
        gradient = design.T @ residuals - precision * (coefficients - center)
        step = bread @ gradient
        if gradient @ step < CONVERGED:
            break
        least = objective(coefficients) * (1 + TOLERANCE)  # objectives are negative
        while objective(coefficients + step) < least:
            step = step / 2
        coefficients = coefficients + step
    leverage = weights * np.einsum("ij,jk,ik->i", design, bread, design)
    rows = design * (residuals / np.maximum(1 - leverage, TOLERANCE))[:, None]
    return coefficients, bread @ (rows.T @ rows + np.diag(precision)) @ bread
