"""The losses of pairs in `losses/`, at hand-computed values.

`H2` is a pair with the log-ratios 2 and -2. At beta 0.5 its rewards are 1 and -1 and its margin is 2. With s for the
sigmoid and L(x) = -log s(x), whose derivative is -s(-x):

    s(1) = 0.731059   s(2) = 0.880797   L(1) = 0.313262   L(-1) = 1.313262   L(2) = 0.126928   L(-2) = 2.126928

The derivative of s(x) is s'(x) = s(x) s(-x): s'(1) = 0.196612 and s'(2) = 0.104994.
"""

import math

import pytest
import torch

from dataloaders import ScoredPairsDataLoader
from halos.engine import Batch
from halos.errors import UserError
from halos.examples import Example
from halos.models import PerToken
from helpers import example
from losses import dpo, reference_free, tokens
from small_runs import tokenizer
from test_losses import H2, bare, close, loss_of, of_one_pair, settings_of, vector
from trainers import DPOTrainer


def check(trainer, hyper: dict, expected: tuple[float, float, float], logps=H2) -> None:
    """Compare a pair's loss and its gradients of the chosen and the rejected log-prob."""
    loss, *gradients = of_one_pair(loss_of(trainer, **hyper), *logps)[:3]
    assert loss == pytest.approx(expected[0], abs=2e-6)
    assert gradients == pytest.approx(expected[1:], abs=2e-6)


def ratios(chosen: float, rejected: float) -> tuple[float, float, float, float]:
    """Log-probs with these log-ratios."""
    return chosen - 3, rejected - 4, -3, -4


#### FUNCTIONS OF THE MARGIN


def test_ipo_has_a_target():
    """The log-ratios differ by 4. At beta 0.1 the target is 5: (4 - 5)^2 = 1 with the gradients 2 (4 - 5) = -2 and +2.

    At beta 0.5 the target is 1: (4 - 1)^2 = 9, and the gradients +6 and -6 lead back.
    """
    check(dpo.IPOTrainer, {"beta": 0.1}, (1, -2, 2))
    check(dpo.IPOTrainer, {"beta": 0.5}, (9, 6, -6))


def test_hinge_is_zero_beyond_a_margin_of_one():
    """At beta 0.2 the margin is 0.2 * 4 = 0.8: the loss is 0.2, the gradients -+beta. At beta 0.5 it is 2: nothing."""
    check(dpo.HingeDPOTrainer, {"beta": 0.2}, (0.2, -0.2, 0.2))
    check(dpo.HingeDPOTrainer, {"beta": 0.5}, (0, 0, 0))


def test_robust_dpo_by_hand():
    """Epsilon 0.1: (0.9 L(2) - 0.1 L(-2)) / 0.8 = (0.114235 - 0.212693) / 0.8 = -0.123072.

    dL/dh = -(0.9 s(-2) + 0.1 s(2)) / 0.8 = -(0.107283 + 0.088080) / 0.8 = -0.244203, times beta is 0.122101.
    """
    check(dpo.RobustDPOTrainer, {"beta": 0.5, "epsilon": 0.1}, (-0.123072, -0.122101, 0.122101))


def test_robust_dpo_is_dpo_on_average():
    """If a label is flipped with probability epsilon, the expected loss is DPO's on the true label."""
    loss = loss_of(dpo.RobustDPOTrainer, beta=0.5, epsilon=0.2)
    right, wrong = (of_one_pair(loss, *pair)[0] for pair in (ratios(2, -2), ratios(-2, 2)))
    assert 0.8 * right + 0.2 * wrong == pytest.approx(of_one_pair(loss_of(DPOTrainer, beta=0.5), *H2)[0], abs=1e-6)


def test_dpo_positive_penalises_a_chosen_response_that_loses():
    """A chosen log-ratio of 2 has no penalty: DPO, with -+beta s(-2). One of -1 with lambda 2 has the penalty 2.

    Then the margin is 0.5 (-1 + 2 - 2) = -0.5: L(-0.5) = 0.974077, and s(0.5) = 0.622459. The chosen log-prob has a
    gradient 1 + lambda times as large: -0.5 * 3 * 0.622459 = -0.933689, and the rejected one 0.5 * 0.622459 = 0.311230.
    """
    hyper = {"beta": 0.5, "lambda_coef": 2.0}
    check(dpo.DPOPositiveTrainer, hyper, (0.126928, -0.059601, 0.059601))
    check(dpo.DPOPositiveTrainer, hyper, (0.974077, -0.933689, 0.311230), ratios(-1, -2))


#### FUNCTIONS OF BOTH LOG-RATIOS


def test_apo_zero_raises_chosen_and_lowers_rejected():
    """1 - s(1) + s(-1) = 2 * 0.268941; both gradients are beta s'(1) = 0.5 * 0.196612."""
    check(dpo.APOZeroTrainer, {"beta": 0.5}, (0.537883, -0.098306, 0.098306))


def test_apo_down_lowers_both_and_rejected_more():
    """1 + s(1) - s(2) = 0.850262. Chosen: beta (s'(1) - s'(2)) = 0.045809, rejected: beta s'(2) = 0.052497."""
    check(dpo.APODownTrainer, {"beta": 0.5}, (0.850262, 0.045809, 0.052497))


def test_nca_has_an_optimum_for_the_chosen_response():
    """L(1) + 0.5 L(-1) + 0.5 L(1) = 0.313262 + 0.656631 + 0.156631 = 1.126524.

    Chosen: beta (-s(-1) + 0.5 s(1)) = 0.5 (-0.268941 + 0.365529), positive: the optimum is s(r) = 2/3. At a log-ratio
    of 0 it is beta (-0.5 + 0.25). Rejected: 0.5 beta s(-1) = 0.067235, at a log-ratio of 0 it is 0.5 beta / 2.
    """
    check(dpo.NCATrainer, {"beta": 0.5}, (1.126524, 0.048294, 0.067235))
    check(dpo.NCATrainer, {"beta": 0.5}, (2 * math.log(2), -0.125, 0.125), ratios(0, 0))


def test_sppo_has_a_target_for_each_response():
    """At beta 0.1 the targets are 5 and -5: (2 - 5)^2 + (-2 + 5)^2 = 18 with the gradients -6 and +6."""
    check(dpo.SPPOTrainer, {"beta": 0.1}, (18, -6, 6))


def test_cal_dpo_is_dpo_with_the_targets_of_sppo():
    """L(4) = 0.018150 and SPPO's 18; the gradients are SPPO's 6 and s(-4) = 0.017986, for which beta is 1."""
    check(dpo.CalDPOTrainer, {"beta": 0.1}, (18.018150, -6.017986, 6.017986))


#### DPO ON OTHER VECTORS


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("reverse_kl", (0.126928, -0.059601, 0.059601)),
        ("forward_kl", (0.026252, -0.001753, 0.095727)),
        ("jensen_shannon", (0.313262, -0.016029, 0.118441)),
        ("alpha", (0.091056, -0.016009, 0.118291)),
    ],
)
def test_fdpo_by_hand(divergence, expected):
    """f' and its derivative by log u, at log u = 2 and -2; h = 0.5 (f'(2) - f'(-2)), gradients -+0.5 s(-h) f''.

    forward_kl: 1 - e^-2 = 0.864665, 1 - e^2 = -6.389056: h = 3.626860. Derivatives e^-2 = 0.135335, e^2 = 7.389056.
    jensen_shannon: log 2 - L(2) = 0.566219, log 2 - L(-2) = -1.433781: h = 1. Derivatives s(-2), s(2).
    alpha 0.5: 2 (1 - e^-1) = 1.264241, 2 (1 - e) = -3.436564: h = 2.350402. Derivatives e^-1, e.
    """
    check(dpo.FDPOTrainer, {"beta": 0.5, "divergence": divergence, "alpha": 0.5}, expected)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jensen_shannon", "alpha"])
def test_fdpo_is_finite_where_the_ratio_overflows(divergence):
    """e^10000 is infinite, and so would be the difference of two such numbers."""
    loss = loss_of(dpo.FDPOTrainer, beta=0.1, divergence=divergence, alpha=0.5)
    for pair in (ratios(1e4, -1e4), ratios(-1e4, 1e4), ratios(-1e4, -1e4)):
        assert all(map(math.isfinite, of_one_pair(loss, *pair)))


def test_aot_compares_quantiles_of_the_whole_batch():
    """Margins 4 and 1 of the policy, 0 and 2 of the reference: sorted, 1 - 0 = 1 and 4 - 2 = 2. DPO has 4 and -1.

    So the pair with the margin 4 has the gradient -s(-2), and that with 1 has -s(-1). One pair alone is DPO.
    """
    loss = loss_of(dpo.AOTTrainer, beta=1.0)
    chosen, rejected = vector(4, 1, grad=True), vector(0, 0, grad=True)
    losses, *rewards = loss(chosen, rejected, vector(0, 2), vector(0, 0))
    close(losses, (0.313262, 0.126928), rtol=0, atol=2e-6)
    close(rewards[0], (4, -1))
    losses.sum().backward()
    close(chosen.grad, (-0.119203, -0.268941), rtol=0, atol=2e-6)
    close(rejected.grad, -chosen.grad)
    check(dpo.AOTTrainer, {"beta": 0.5}, (0.126928, -0.059601, 0.059601))


def test_unpaired_aot_compares_chosen_with_rejected_quantiles():
    """Chosen log-ratios 3 and 0, rejected 1 and -2: sorted, 0 - -2 = 2 and 3 - 1 = 2. Every gradient is -+s(-2)."""
    chosen, rejected = vector(3, 0, grad=True), vector(1, -2, grad=True)
    losses, *_ = loss_of(dpo.UnpairedAOTTrainer, beta=1.0)(chosen, rejected, vector(0, 0), vector(0, 0))
    close(losses, (0.126928, 0.126928), rtol=0, atol=2e-6)
    losses.sum().backward()
    close(chosen.grad, (-0.119203, -0.119203), rtol=0, atol=2e-6)
    close(rejected.grad, -chosen.grad)


#### WITHOUT A REFERENCE MODEL


def test_simpo_by_hand():
    """Log-probs per token -1 and -2, beta 2, gamma 1: the margin is 2 - 1 = 1, so L(1), with gradients -+2 s(-1)."""
    check(reference_free.SimPOTrainer, {"beta": 2.0, "gamma": 1.0}, (0.313262, -0.537883, 0.537883), (-1, -2))


def test_orpo_by_hand():
    """Probabilities per token of 1/2 and 1/4 have the odds 1 and 1/3, so the log odds differ by log 3, and s is 3/4.

    Lambda 0.5: log 2 + 0.5 log(4/3) = 0.836988. The derivative of the log odds by log p is 1 / (1 - p): 2 and 4/3.
    Chosen: -1 - 0.5 * 1/4 * 2 = -1.25, rejected: 0.5 * 1/4 * 4/3 = 1/6.
    """
    logps = math.log(1 / 2), math.log(1 / 4)
    check(reference_free.ORPOTrainer, {"lambda_coef": 0.5}, (0.836988, -1.25, 1 / 6), logps)


@pytest.mark.parametrize("logps", [(0.0, -1.0), (-1.0, 0.0), (-1e4, 0.0), (0.0, -1e4)], ids=str)
def test_orpo_is_finite_for_certain_responses(logps):
    """A response of one token can have the probability 1 in float32, whose odds are infinite."""
    assert all(map(math.isfinite, of_one_pair(loss_of(reference_free.ORPOTrainer, lambda_coef=0.1), *logps)))


#### TOKENS, LENGTHS, SCORES

TOKENS = [-0.5, -0.25, -0.25, -6.0]  # three of the chosen response, one of the rejected one: the log-ratios of H2


def of_batch(trainer, hyper: dict, logps=TOKENS, reference=(-1.0, -1.0, -1.0, -4.0), scores=(3.0, 1.0)):
    """Return the loss of one pair of 3 and 1 tokens, the gradient of each token, and the outcome."""
    pair = example([1], [2, 3, 4], [5])._replace(scores=scores)
    policy = torch.tensor(logps, requires_grad=True)
    outcome = bare(trainer, beta=0.5, **hyper).batch_loss(
        Batch([pair], PerToken(policy, None, None), torch.tensor(reference))
    )
    outcome.losses.sum().backward()
    close(outcome.chosen_logps.detach(), (-1.0,))
    return outcome.losses.item(), policy.grad.tolist(), outcome


def test_rpo_adds_the_likelihood_per_token():
    """DPO's 0.126928 and 1/3 nats per token; each chosen token has DPO's gradient -0.059601 and -1/3."""
    loss, gradient, outcome = of_batch(dpo.RPOTrainer, {"alpha": 1.0})
    assert loss == pytest.approx(0.126928 + 1 / 3, abs=2e-6)
    assert gradient == pytest.approx([-0.392935] * 3 + [0.059601], abs=2e-6)
    close(outcome.metrics["nll/chosen"].detach(), (1 / 3,))


def test_rdpo_pushes_less_where_the_chosen_response_is_longer():
    """Chosen has 2 tokens more, at alpha 0.5: L(2 + 1) = 0.048587 with -+0.5 s(-3) = 0.023713. DPO has 0.059601."""
    loss, gradient, _ = of_batch(dpo.RDPOTrainer, {"alpha": 0.5})
    assert loss == pytest.approx(0.048587, abs=2e-6)
    assert gradient == pytest.approx([-0.023713] * 3 + [0.023713], abs=2e-6)


def test_margin_dpo_weighs_pairs_by_their_scores():
    """Scores 3 and 1 at scale 4 weigh 1/2: half of DPO's loss and gradient. Scores that contradict the pair weigh 0."""
    loss, gradient, _ = of_batch(dpo.MarginDPOTrainer, {"scale": 4.0})
    assert loss == pytest.approx(0.063464, abs=2e-6)
    assert gradient == pytest.approx([-0.029801] * 3 + [0.029801], abs=2e-6)
    loss, gradient, _ = of_batch(dpo.MarginDPOTrainer, {"scale": 4.0}, scores=(1.0, 3.0))
    assert loss == 0 and not any(gradient)


def test_score_dpo_has_soft_labels():
    """Scores 3 and 1 at temperature 2: the label is s(1). s(1) L(2) + s(-1) L(-2) = 0.092792 + 0.572019 = 0.664811.

    The margin 2 is above the optimum 1, so the gradients 0.5 (-s(1) s(-2) + s(-1) s(2)) = 0.074869 and -0.074869 lead
    back. Near temperature 0 the label is 1 and the loss is DPO's.
    """
    loss, gradient, _ = of_batch(dpo.ScoreDPOTrainer, {"temperature": 2.0})
    assert loss == pytest.approx(0.664811, abs=2e-6)
    assert gradient == pytest.approx([0.074869] * 3 + [-0.074869], abs=2e-6)
    assert of_batch(dpo.ScoreDPOTrainer, {"temperature": 0.01})[0] == pytest.approx(0.126928, abs=2e-6)


def test_ld_dpo_counts_the_tail_of_the_longer_response_less():
    """The second and third token count 0.5: log-ratio 0.5 + 0.5 (0.75 + 0.75) = 1.25, margin 0.5 (1.25 + 2) = 1.625.

    L(1.625) = 0.179745, s(-1.625) = 0.164516: the gradients are -+0.082258, and half of it in the tail.
    """
    loss, gradient, _ = of_batch(tokens.LDDPOTrainer, {"alpha": 0.5})
    assert loss == pytest.approx(0.179745, abs=2e-6)
    assert gradient == pytest.approx([-0.082258, -0.041129, -0.041129, 0.082258], abs=2e-6)


@pytest.mark.parametrize(
    ("trainer", "hyper"),
    [
        (tokens.LDDPOTrainer, {"alpha": 1.0}),
        (dpo.RDPOTrainer, {"alpha": 0.0}),
        (dpo.RPOTrainer, {"alpha": 0.0}),
        (dpo.MarginDPOTrainer, {"scale": 2.0}),
    ],
)
def test_neutral_hyperparameters_are_dpo(trainer, hyper):
    """With a weight of 1 for all tokens, no penalty, no likelihood, or a weight of 1 for the pair, the loss is DPO."""
    expected = of_batch(DPOTrainer, {})
    found = of_batch(trainer, hyper)
    assert found[0] == pytest.approx(expected[0]) and found[1] == pytest.approx(expected[1])


def test_a_pair_without_scores_is_one_line(tmp_path):
    """The loader of the losses that need scores refuses the data before any model is loaded."""
    pairs = [
        Example("q", [" a", " b"], scores, [(0, 1)], dataset_name="d", id="d/1") for scores in ([], [1.0, math.nan])
    ]
    for pair in pairs:
        with pytest.raises(UserError, match="d/1 has a pair without scores, and loss.dataloader=ScoredPairsDataLo"):
            settings = {"batch_size": 1, "max_length": 9, "max_prompt_length": 9, "cache_dir": str(tmp_path)}
            ScoredPairsDataLoader([pair], tokenizer(), **settings)


#### SIGNS


@pytest.mark.parametrize(
    "name",
    "ipo hinge robust_dpo dpop apo_zero nca sppo cal_dpo fdpo aot aot_unpaired simpo orpo".split(),
)
def test_a_step_prefers_the_chosen_response(name):
    """Where policy equals reference, chosen log-probs rise and rejected ones fall. (APO-down lowers both.)"""
    loss, _, with_reference = settings_of(name)
    policy = [torch.linspace(-1.2, -1.0, 5).requires_grad_(), torch.linspace(-1.1, -1.0, 5).requires_grad_()]
    reference = [part.detach().clone() for part in policy] if with_reference else [None, None]
    loss(*policy, *reference)[0].mean().backward()
    assert (policy[0].grad < 0).all() and (policy[1].grad > 0).all()
