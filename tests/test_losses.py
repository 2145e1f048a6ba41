"""Every loss as a plain function: hand-computed values, gradients, and what all losses must keep.

A loss runs on an instance of its trainer that has `config.loss` and nothing else: a loss that reads anything else fails
here. The generic tests run on each file of config/loss/, so a new loss is tested without a new test: if it defines
`loss`, as a function of four vectors, and in any case as a function of a batch.
"""

import glob
import math
import os

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import trainers
from halos import components
from halos.advice import balance, export_rounding
from halos.engine import Batch, Outcome
from halos.models import PerToken
from helpers import CONFIG_DIR, example
from small_runs import batches_for
from trainers import CDPOTrainer, DPOTrainer, KTOTrainer, SFTTrainer, SLiCTrainer


def bare(trainer, /, **hyper):
    """A trainer that has its hyperparameters and nothing else."""
    instance = trainer.__new__(trainer)
    instance.config = OmegaConf.create({"loss": hyper})
    return instance


def loss_of(trainer, /, **hyper):
    """The loss as a plain function of four vectors."""
    return bare(trainer, **hyper).loss


def vector(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, requires_grad=grad)


def close(actual, expected, **kwargs) -> None:
    expected = expected if isinstance(expected, torch.Tensor) else vector(*expected)
    torch.testing.assert_close(actual, expected, **kwargs)


#### EVERY LOSS


def yaml_losses() -> dict[str, dict]:
    """The files of config/loss/."""
    found = {}
    for path in sorted(glob.glob(f"{CONFIG_DIR}/loss/*.yaml")):
        with open(path) as file:
            found[os.path.splitext(os.path.basename(path))[0]] = yaml.safe_load(file)
    return found


def trainer_of(name: str) -> type:
    return components.find(trainers, LOSSES[name]["trainer"])


LOSSES = yaml_losses()
OF_FOUR_VECTORS = [name for name in LOSSES if trainer_of(name).loss is not trainers.BasicTrainer.loss]
every_loss = pytest.mark.parametrize("name", OF_FOUR_VECTORS)
every_batch_loss = pytest.mark.parametrize("name", LOSSES)


def settings_of(name: str):
    settings = LOSSES[name]
    return loss_of(trainer_of(name), **settings), trainer_of(name).data_format, settings["use_reference_model"]


def arguments(
    data_format: str, with_reference: bool, n_chosen: int, n_rejected: int, scale: float = 5.0, seed: int = 0
):
    """Make the four vectors of a batch. Pairs have as many rejected as chosen responses, and SFT has none."""
    n_rejected = {"paired": n_chosen, "sft": 0}.get(data_format, n_rejected)
    generator = torch.Generator().manual_seed(seed)
    drawn = [scale * torch.randn(n, generator=generator) - 20 for n in (n_chosen, n_rejected) * 2]
    policy = [part.requires_grad_() for part in drawn[:2]]
    return [*policy, *(drawn[2:] if with_reference else (None, None))]


def test_the_losses_are_found():
    assert {"sft", "dpo", "cdpo", "kto", "slic", "ppo"} <= set(LOSSES)


@every_loss
@pytest.mark.parametrize("sizes", [(5, 3), (1, 1), (4, 0), (0, 4)], ids=str)
def test_lengths_dtypes_and_detached_rewards(name, sizes):
    """A loss returns one reward per response and one loss per pair or per response: float32, rewards detached."""
    loss, data_format, with_reference = settings_of(name)
    args = arguments(data_format, with_reference, *sizes)
    n_chosen, n_rejected = len(args[0]), len(args[1])
    losses, chosen_rewards, rejected_rewards = loss(*args)
    n_losses = n_chosen if data_format in ("paired", "sft") else n_chosen + n_rejected
    assert losses.shape == (n_losses,) and chosen_rewards.shape == (n_chosen,)
    assert rejected_rewards.shape == (n_rejected,)
    assert {losses.dtype, chosen_rewards.dtype, rejected_rewards.dtype} == {torch.float32}
    assert losses.requires_grad and not chosen_rewards.requires_grad and not rejected_rewards.requires_grad


@every_loss
@pytest.mark.parametrize("scale", [1e-3, 5.0, 1e4])
@pytest.mark.parametrize("sizes", [(5, 3), (4, 0), (0, 4)], ids=str)
def test_finite_values_and_gradients(name, scale, sizes):
    """Values and gradients are finite, also with an empty half, whose mean is NaN, and where exp overflows."""
    loss, data_format, with_reference = settings_of(name)
    args = arguments(data_format, with_reference, *sizes, scale=scale)
    results = loss(*args)
    assert all(part.isfinite().all() for part in results)
    results[0].sum().backward()
    for part in args[:2]:
        assert part.grad is None or part.grad.isfinite().all()


@every_loss
def test_pure_function_of_its_arguments(name):
    """The same arguments give the same result, and the loss does not change them."""
    loss, data_format, with_reference = settings_of(name)
    args = arguments(data_format, with_reference, 6, 4)
    before = [None if part is None else part.detach().clone() for part in args]
    first, second = loss(*args), loss(*args)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    for part, old in zip(args, before, strict=True):
        assert part is None or torch.equal(part, old)


@every_loss
def test_order_of_the_batch_does_not_matter(name):
    """A permuted batch gives the permuted rewards and the same mean loss."""
    loss, data_format, with_reference = settings_of(name)
    args = arguments(data_format, with_reference, 6, 6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = [part if part is None or not len(part) else part[order] for part in args]
    losses, chosen_rewards, rejected_rewards = loss(*args)
    p_losses, p_chosen_rewards, p_rejected_rewards = loss(*permuted)
    close(p_losses.mean(), losses.mean())
    close(p_chosen_rewards, chosen_rewards[order])
    close(p_rejected_rewards, rejected_rewards[order] if len(rejected_rewards) else rejected_rewards)


#### EVERY LOSS OF A BATCH


def a_batch(name: str, seed: int = 0) -> Batch:
    """Eight rows of the loss's own loader, with random log-probs, values and entropies of their tokens."""
    examples = batches_for(name, 1, seed=seed)[0]
    n_tokens = sum(len(response) for one in examples for response in one.responses)
    generator = torch.Generator().manual_seed(seed)
    logps, reference, values, entropy = torch.randn(4, n_tokens, generator=generator)
    policy = PerToken((logps - 3).requires_grad_(), values.requires_grad_(), entropy.abs())
    return Batch(examples, policy, reference - 3 if LOSSES[name]["use_reference_model"] else None)


def outcome_of(name: str, batch: Batch) -> Outcome:
    return bare(trainer_of(name), **LOSSES[name]).batch_loss(batch)


def permuted(batch: Batch, order: list[int]) -> Batch:
    """The batch with its examples in another order."""
    lengths = [sum(map(len, one.responses)) for one in batch.examples]

    def moved(vector):
        return None if vector is None else torch.cat([vector.detach().split(lengths)[i] for i in order])

    policy = PerToken(*(moved(vector) for vector in batch.policy))
    return Batch([batch.examples[i] for i in order], policy, moved(batch.reference_logps))


@every_batch_loss
def test_outcomes(name):
    """One reward and one log-prob per trained response, detached rewards, finite losses that depend on the policy."""
    batch = a_batch(name)
    outcome = outcome_of(name, batch)
    n_chosen, n_rejected = int(batch.chosen.sum()), int(batch.rejected.sum())
    assert outcome.chosen_rewards.shape == outcome.chosen_logps.shape == (n_chosen,)
    assert outcome.rejected_logps.shape == (n_rejected,) and len(outcome.rejected_rewards) in (0, n_rejected)
    assert outcome.losses.ndim == 1 and outcome.losses.isfinite().all() and outcome.losses.dtype == torch.float32
    assert not outcome.chosen_rewards.requires_grad and not outcome.rejected_rewards.requires_grad
    outcome.losses.sum().backward()
    assert batch.policy.logps.grad.isfinite().all() and batch.policy.logps.grad.any()


@every_batch_loss
def test_trained_responses_have_gradients(name):
    """Most of them: a hinge may be inactive. An unrelated response has none: `Forward` would not pass it on."""
    batch = a_batch(name)
    outcome_of(name, batch).losses.mean().backward()
    moves = batch.sum_by_response(batch.policy.logps.grad.abs()) > 0
    assert moves[batch.chosen | batch.rejected].float().mean() > 0.5
    assert not moves[batch.unrelated].any()


@every_batch_loss
def test_order_of_the_examples_does_not_matter(name):
    """A permuted batch has the same mean loss and mean rewards."""
    batch = a_batch(name)
    one, other = (outcome_of(name, b) for b in (batch, permuted(batch, [3, 0, 5, 1, 7, 4, 6, 2])))
    close(other.losses.mean(), one.losses.mean())
    close(other.chosen_rewards.mean(), one.chosen_rewards.mean())


@every_batch_loss
def test_metrics_are_numbers(name):
    """Two batches as one: every metric of a loss is finite, in training and, under another name, in evaluation."""
    trainer = bare(trainer_of(name), **LOSSES[name])
    outcomes = [trainer.batch_loss(a_batch(name, seed=seed)) for seed in (0, 1)]
    values, in_evaluation = trainer.summarize(outcomes, "train"), trainer.summarize(outcomes, "eval")
    assert all(isinstance(value, float) and math.isfinite(value) for value in values.values())
    assert values["loss/train"] == pytest.approx(torch.cat([o.losses for o in outcomes]).mean().item(), rel=1e-5)
    assert set(outcomes[0].metrics) <= set(values)
    assert {key.replace("/", "_eval/", 1) for key in outcomes[0].metrics} <= set(in_evaluation)


@every_batch_loss
def test_a_yaml_keeps_the_rules_of_its_trainer(name):
    trainer = trainer_of(name)
    assert all(rule.allows(LOSSES[name][key]) for key, rule in trainer.rules.items())
    assert all(LOSSES[name][key] for key in trainer.needs)


#### SFT


def test_sft_is_the_negative_log_likelihood():
    """SFT's losses are -log p, so each log-prob has the gradient -1. The rewards are the policy's log-probs."""
    logps = vector(-3, -5, grad=True)
    losses, chosen_rewards, rejected_rewards = loss_of(SFTTrainer)(logps, vector(), None, None)
    close(losses, (3, 5))
    close(chosen_rewards, (-3, -5))
    assert rejected_rewards.shape == (0,)
    losses.sum().backward()
    close(logps.grad, (-1, -1))


#### DPO AND cDPO

# Log-ratios 2 and -2 at beta 0.5: h = 0.5 * (2 - (-2)) = 2.
H2 = (-1.0, -6.0, -3.0, -4.0)


def of_one_pair(loss, policy_chosen, policy_rejected, reference_chosen=None, reference_rejected=None):
    """Return a pair's loss, its gradients of the chosen and rejected log-prob, and the two rewards."""
    policy = [vector(policy_chosen, grad=True), vector(policy_rejected, grad=True)]
    reference = [None if logp is None else vector(logp) for logp in (reference_chosen, reference_rejected)]
    losses, chosen_rewards, rejected_rewards = loss(*policy, *reference)
    losses.sum().backward()
    return losses.item(), policy[0].grad.item(), policy[1].grad.item(), chosen_rewards.item(), rejected_rewards.item()


def test_dpo_by_hand():
    """h = 2: loss ln(1 + e^-2) = 0.126928; dL/dpc = -beta sigmoid(-h) = -0.5 * 0.119203; rewards beta * (2, -2)."""
    loss, chosen_grad, rejected_grad, *rewards = of_one_pair(loss_of(DPOTrainer, beta=0.5), *H2)
    assert loss == pytest.approx(0.126928, abs=1e-6)
    assert chosen_grad == pytest.approx(-0.0596015, abs=1e-7)
    assert rejected_grad == pytest.approx(+0.0596015, abs=1e-7)
    assert rewards == [1.0, -1.0]


@pytest.mark.parametrize("beta", [0.01, 0.1, 3.0])
def test_dpo_is_ln2_when_policy_equals_reference(beta):
    """h = 0, so -log sigmoid(0) = ln 2 for every beta."""
    logps = torch.randn(4)
    losses, *_ = loss_of(DPOTrainer, beta=beta)(logps, logps - 1, logps, logps - 1)
    close(losses, torch.full((4,), math.log(2)))


def test_dpo_far_on_the_wrong_side_is_linear():
    """-log sigmoid(h) -> -h for h -> -inf: h = 0.1 * (-4000 - 6000) = -1000 costs 1000, its gradient is -beta."""
    loss, chosen_grad, *_ = of_one_pair(loss_of(DPOTrainer, beta=0.1), -4000, 6000, 0, 0)
    assert loss == pytest.approx(1000) and chosen_grad == pytest.approx(-0.1)


def test_cdpo_by_hand():
    """h = 2, epsilon 0.2: 0.8 * 0.126928 + 0.2 * 2.126928 = 0.526928.

    dL/dh = -0.8 sigmoid(-2) + 0.2 sigmoid(2) = -0.8 * 0.119203 + 0.2 * 0.880797 = +0.080797. The policy is more certain
    than the labels, so the gradient is positive and lowers h. dL/dpc = beta * dL/dh = 0.5 * 0.080797.
    """
    loss, chosen_grad, rejected_grad, *rewards = of_one_pair(loss_of(CDPOTrainer, beta=0.5, epsilon=0.2), *H2)
    assert loss == pytest.approx(0.526928, abs=1e-6)
    assert chosen_grad == pytest.approx(0.0403985, abs=1e-7)
    assert rejected_grad == pytest.approx(-0.0403985, abs=1e-7)
    assert rewards == [1.0, -1.0]


def test_cdpo_is_least_where_the_margin_says_how_sure_the_labels_are():
    """The loss has its minimum where sigmoid(h) = 1 - epsilon: h = ln(0.8 / 0.2) = ln 4, where dL/dh = 0."""
    _, chosen_grad, rejected_grad, *_ = of_one_pair(loss_of(CDPOTrainer, beta=1.0, epsilon=0.2), math.log(4), 0, 0, 0)
    assert chosen_grad == pytest.approx(0, abs=1e-7) and rejected_grad == pytest.approx(0, abs=1e-7)


def test_cdpo_with_epsilon_0_is_dpo():
    args = arguments("paired", True, 16, 16)
    for one, other in zip(
        loss_of(CDPOTrainer, beta=0.3, epsilon=0.0)(*args), loss_of(DPOTrainer, beta=0.3)(*args), strict=True
    ):
        assert torch.equal(one, other)


def test_cdpo_is_ln2_when_policy_equals_reference():
    """h = 0, so the loss is (1 - epsilon) ln 2 + epsilon ln 2 = ln 2 for every epsilon."""
    logps = torch.randn(4)
    losses, *_ = loss_of(CDPOTrainer, beta=0.1, epsilon=0.3)(logps, logps - 1, logps, logps - 1)
    close(losses, torch.full((4,), math.log(2)))


#### SLiC


def test_slic_by_hand_inside_the_margin():
    """pc = -4, pr = -3, beta 1: the hinge is 1 + 4 - 3 = 2, plus 0.1 * 4 makes 2.4. Gradients -1 - 0.1 and +1."""
    loss, *grads_and_rewards = of_one_pair(loss_of(SLiCTrainer, beta=1.0, lambda_coef=0.1), -4, -3)
    assert loss == pytest.approx(2.4)
    assert grads_and_rewards == pytest.approx([-1.1, 1.0, -4, -3])


def test_slic_by_hand_beyond_the_margin():
    """pc = -2, pr = -4, beta 1: the hinge max(0, 1 + 2 - 4) is 0, and 0.1 * 2 = 0.2 is left. Gradients -0.1 and 0."""
    loss, *grads_and_rewards = of_one_pair(loss_of(SLiCTrainer, beta=1.0, lambda_coef=0.1), -2, -4)
    assert loss == pytest.approx(0.2)
    assert grads_and_rewards == pytest.approx([-0.1, 0.0, -2, -4])


#### KTO

# With beta = ln 3, sigmoid(beta * x) = 3^x / (1 + 3^x): 1/2 at 0, 3/4 at 1, 9/10 at 2, 1/10 at -2.
KTO = {"beta": math.log(3), "desirable_weight": 1.0, "undesirable_weight": 1.0}
kto = loss_of(KTOTrainer, **KTO)


def kto_of_logratios(chosen, rejected, loss=kto):
    """Compute KTO for given log-ratios, with reference log-probs of -7.

    Returns (losses, chosen rewards, rejected rewards, gradient of chosen log-probs, gradient of rejected ones).
    """
    policy = [(vector(*ratios) - 7).requires_grad_() for ratios in (chosen, rejected)]
    results = loss(*policy, *(torch.full_like(part, -7) for part in policy))
    results[0].sum().backward()
    return *results, policy[0].grad, policy[1].grad


def test_kto_by_hand():
    """Chosen log-ratios 2 and 0 have mean 1 = KL_chosen, rejected 1 and 3 have mean 2 = KL_rejected.

    chosen:   1 - sigmoid(ln 3 * (2 - 2)) = 0.5    1 - sigmoid(ln 3 * (0 - 2)) = 1 - 1/10 = 0.9
    rejected: 1 - sigmoid(ln 3 * (1 - 1)) = 0.5    1 - sigmoid(ln 3 * (1 - 3)) = 0.9
    """
    losses, chosen_rewards, rejected_rewards, *_ = kto_of_logratios((2, 0), (1, 3))
    close(losses, (0.5, 0.9, 0.5, 0.9))
    close(chosen_rewards, vector(2, 0) * math.log(3))
    close(rejected_rewards, vector(1, 3) * math.log(3))


def test_kto_weights_multiply_the_losses_of_their_halves():
    """The losses of test_kto_by_hand, the desirable ones times 2 and the undesirable ones times 3.

    The gradient of a chosen ratio is -beta (2 s'_i + 3 * 0.34 / 2): its own loss, and the KL in the rejected losses.
    """
    weighted = loss_of(KTOTrainer, **KTO | {"desirable_weight": 2.0, "undesirable_weight": 3.0})
    losses, chosen_rewards, _, chosen_grad, rejected_grad = kto_of_logratios((2, 0), (1, 3), weighted)
    close(losses, (1.0, 1.8, 1.5, 2.7))
    close(chosen_rewards, vector(2, 0) * math.log(3))
    close(chosen_grad, -math.log(3) * vector(2 * 0.25 + 0.51, 2 * 0.09 + 0.51))
    close(rejected_grad, math.log(3) * vector(3 * 0.25 + 0.34, 3 * 0.09 + 0.34))


@pytest.mark.parametrize(
    ("counts", "weights", "expected"),
    [
        (
            (8, 8),
            (1, 1),
            "8 desirable and 8 undesirable responses per epoch; loss.desirable_weight=1 loss.unde",
        ),
        ((4, 12), (1, 1), "... recommends loss.desirable_weight from 3 to 4 (the other weight 1), not loss.desirable_"),
        ((4, 12), (3, 1), "... loss.desirable_weight=3 loss.undesirable_weight=1 are in the range that the KTO paper"),
        ((4, 12), (4, 1), "... loss.desirable_weight=4 loss.undesirable_weight=1 are in the range that the KTO paper"),
        (
            (4, 12),
            (4.1, 1),
            "... recommends loss.desirable_weight from 3 to 4 (the other weight 1), not loss.",
        ),
        ((12, 4), (1, 1), "... recommends loss.undesirable_weight from 2.25 to 3 (the other weight 1), not loss.desir"),
        ((3, 0), (1, 1), "warning: 3 desirable and 0 undesirable responses per epoch: KTO needs both to tell them"),
    ],
)
def test_kto_says_which_weights_the_paper_recommends(counts, weights, expected):
    """The paper's rule: desirable_weight n_desirable / (undesirable_weight n_undesirable) is from 1 to 4/3.

    For 4 desirable and 12 undesirable responses desirable_weight is from 12/4 = 3 to 4; for 12 and 4 undesirable_weight
    is from 12/4 * 3/4 = 2.25 to 3.
    """
    line = balance(*counts, *weights)
    assert expected.removeprefix("... ") in line and (expected.startswith("...") or line.startswith(expected))


def test_kto_gradient_flows_through_the_kl():
    """A ratio's gradient has a term from its own loss, and one through the KL. Log-ratios as in test_kto_by_hand.

    s' = s (1 - s) is 1/4 where the loss is 0.5, and 9/100 where it is 0.9. The sum of s' is 0.34 in each half.
    Own loss: d(chosen loss i)/d(ratio i) = -beta s'_i. KL_chosen is the mean of two ratios, so through it
    d(sum of rejected losses)/d(chosen ratio) = -beta * 0.34 / 2 = -0.17 beta. For rejected ratios both are positive.
    """
    *_, chosen_grad, rejected_grad = kto_of_logratios((2, 0), (1, 3))
    expected = math.log(3) * vector(0.25 + 0.17, 0.09 + 0.17)
    close(chosen_grad, -expected)
    close(rejected_grad, expected)


def test_kto_kl_is_clamped_at_0():
    """Chosen ratios -1, -3 have mean -2: KL_chosen = 0. Rejected -4, 0 have mean -2: KL_rejected = 0.

    chosen:   1 - sigmoid(-ln 3) = 1 - 1/4 = 3/4    1 - sigmoid(-3 ln 3) = 1 - 1/28 = 27/28
    rejected: 1 - sigmoid(4 ln 3) = 1 - 81/82       1 - sigmoid(0) = 1/2
    No gradient flows through a clamped KL: each ratio has only the term of its own loss, -beta s' or +beta s'.
    """
    losses, _, _, chosen_grad, rejected_grad = kto_of_logratios((-1, -3), (-4, 0))
    close(losses, (3 / 4, 27 / 28, 1 / 82, 1 / 2))
    close(chosen_grad, -math.log(3) * vector(3 / 16, 27 / 28**2))
    close(rejected_grad, math.log(3) * vector(81 / 82**2, 1 / 4))


def test_kto_is_one_half_when_policy_equals_reference():
    """All log-ratios and both KLs are 0, so every loss is 1 - sigmoid(0) = 0.5."""
    losses, *_ = kto_of_logratios((0, 0, 0), (0,))
    close(losses, (0.5, 0.5, 0.5, 0.5))


def test_kto_with_an_empty_half():
    """The KL of an empty half is 0.

    A chosen ratio of 1 alone costs 1 - 3/4, and a rejected ratio of 1 alone costs 1 - sigmoid(-ln 3) = 3/4. The
    gradients are -beta and +beta times sigmoid' = 3/4 * 1/4 = 3/16.
    """
    losses, _, rejected_rewards, chosen_grad, _ = kto_of_logratios((1,), ())
    close(losses, (0.25,))
    close(chosen_grad, (-math.log(3) * 3 / 16,))
    assert rejected_rewards.shape == (0,)
    losses, chosen_rewards, _, _, rejected_grad = kto_of_logratios((), (1,))
    close(losses, (0.75,))
    close(rejected_grad, (math.log(3) * 3 / 16,))
    assert chosen_rewards.shape == (0,)


def test_kto_kl_is_that_of_the_whole_batch():
    """KL_chosen is the mean over the whole batch: for the chosen ratios 4 and 0 it is 2.

    So a rejected ratio of 2 costs 1 - sigmoid(ln 3 * (2 - 2)) = 0.5. In a batch with the ratio 0 only, it costs 0.9.
    """
    losses, *_ = kto_of_logratios((4, 0), (2,))
    close(losses[2:], (0.5,))
    losses, *_ = kto_of_logratios((0,), (2,))
    close(losses[1:], (0.9,))


def test_kto_logs_its_kl_before_the_clamp():
    """Chosen ratios -1 and -3 have the mean -2, rejected ones 1 and 2 the mean 1.5: one half of two is clamped."""
    examples = [example([5], [6], chosen=(flag,)) for flag in (True, True, False, False)]
    batch = Batch(examples, PerToken(torch.tensor([-8.0, -10.0, -6.0, -5.0]), None, None), torch.full((4,), -7.0))
    trainer = bare(KTOTrainer, **KTO | {"beta": 0.5})
    values = trainer.summarize([trainer.batch_loss(batch)], "train")
    assert [values[key] for key in ("kl/chosen", "kl/rejected", "clamped/kl")] == pytest.approx([-2, 1.5, 0.5])


#### SIGNS


@pytest.mark.parametrize("name", ["dpo", "cdpo", "kto", "slic"])
def test_a_step_prefers_the_chosen_response(name):
    """A gradient step raises every chosen log-prob and lowers every rejected one, where policy equals reference.

    SLiC's hinge is active there, because the margins are far below its beta of 1 nat.
    """
    loss, _, with_reference = settings_of(name)
    policy = [torch.linspace(-9.2, -9.0, 5).requires_grad_(), torch.linspace(-9.1, -9.0, 5).requires_grad_()]
    reference = [part.detach().clone() for part in policy] if with_reference else [None, None]
    loss(*policy, *reference)[0].mean().backward()
    assert (policy[0].grad < 0).all() and (policy[1].grad > 0).all()


def test_an_export_that_rounds_the_run_away():
    """At 0.1 bfloat16 has steps of 2^-4 2^-7 = 4.9e-4. 20 updates of 5e-6 are 1e-4, less than half a step; 100 are not.

    Seen on a model of 135M parameters: after 20 such updates of DPO the export had 24 % of the way of the weights.
    """
    weights = [torch.full((3, 4), 0.1), torch.full((2,), -0.1)]
    (line,) = export_rounding(torch.bfloat16, weights, 5e-6, 20)
    assert (
        "bfloat16" in line and "(0.1) have steps of 0.0005; 20 updates with lr=5e-06 move them by about 0.0001" in line
    )
    assert export_rounding(torch.bfloat16, weights, 5e-6, 100) == []
    assert export_rounding(torch.float16, weights, 5e-6, 20) == []  # steps of 6.1e-5
    assert export_rounding(torch.bfloat16, [torch.zeros(3)], 5e-6, 20) == []
