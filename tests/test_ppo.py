"""Offline PPO: its parts at hand-computed values, and the whole step against one written response by response."""

import json
import math
import os
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode  # private: see halos/plan/make.py
from transformers import AutoModelForCausalLM

import trainers
from halos import checkpoint, loading, metrics, sharding
from halos.engine import Batch
from halos.errors import UserError
from halos.models import PerToken, PolicyModel, ValueHead
from helpers import ARCHITECTURES, example, make_config, random_examples, tiny_lm
from small_runs import (
    CPU,
    SMALL,
    assert_same_training,
    batches_for,
    make_trainer,
    moved,
    rows_of,
    state_of,
    tokenizer,
    trained,
)
from utils import discounted_sums


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)


def ppo(**hyper) -> trainers.PPOTrainer:
    """Make a trainer that has only its hyperparameters."""
    settings = {"cliprange": 0.5, "lam": 0.95, "gamma": 0.99, "critic_coef": 0.0, "KL_coef": 0.0, "kl_estimator": "k3"}
    trainer = trainers.PPOTrainer.__new__(trainers.PPOTrainer)
    trainer.config = OmegaConf.create({"loss": settings | hyper})
    return trainer


def close(actual, expected, **kwargs) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), **kwargs)


#### ADVANTAGES AND RETURNS


def test_gae_and_returns_by_hand():
    """gamma = lam = 1/2. Three tokens with the values 0.5, 0.2, 0.6 and a reward of +1 for the last one have

    deltas     0.5 * 0.2 - 0.5 = -0.4       0.5 * 0.6 - 0.2 = 0.1     1 - 0.6 = 0.4
    advantages -0.4 + 0.25 * 0.2 = -0.35    0.1 + 0.25 * 0.4 = 0.2    0.4
    returns    0.25                         0.5                       1

    so the return of the last token includes its own reward. One token of value 0.3 with a reward of -1 has the delta
    and advantage -1 - 0.3 = -1.3, and the return -1. After the end of a response, both are 0.
    """
    values = torch.tensor([[0.5, 0.2, 0.6], [0.3, 0.0, 0.0]])
    rewards = torch.tensor([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0]])
    advantages, returns = ppo(gamma=0.5, lam=0.5).advantages_and_returns(values, rewards)
    close(advantages, [[-0.35, 0.2, 0.4], [-1.3, 0.0, 0.0]])
    close(returns, [[0.25, 0.5, 1.0], [-1.0, 0.0, 0.0]])


def by_definition(values: list[float], reward: float, gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Return (advantages, returns) of one response, as double sums over its tokens.

    A_t = sum_l (gamma lam)^l delta_(t+l) and G_t = sum_l gamma^l r_(t+l), with value 0 after the end.
    """
    n = len(values)
    rewards = [0.0] * (n - 1) + [reward]
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    advantages = [sum((gamma * lam) ** ahead * deltas[t + ahead] for ahead in range(n - t)) for t in range(n)]
    returns = [sum(gamma**ahead * rewards[t + ahead] for ahead in range(n - t)) for t in range(n)]
    return advantages, returns


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5), (1.0, 0.3)])
def test_gae_and_returns_by_definition(gamma, lam):
    """Advantages and returns of responses of 1 to 60 tokens equal the O(T^2) sums of `by_definition`."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 60, 7, 33]
    values = torch.zeros(4, 60)
    rewards = torch.zeros(4, 60)
    for row, length in enumerate(lengths):
        values[row, :length] = torch.randn(length, generator=generator)
        rewards[row, length - 1] = 1 - 2 * (row % 2)
    advantages, returns = ppo(gamma=gamma, lam=lam).advantages_and_returns(values, rewards)
    for row, length in enumerate(lengths):
        expected = by_definition(values[row, :length].tolist(), 1 - 2 * (row % 2), gamma, lam)
        close(advantages[row, :length], expected[0], rtol=1e-5, atol=1e-5)
        close(returns[row, :length], expected[1], rtol=1e-5, atol=1e-5)
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_lam_1_is_return_minus_value():
    """With lam = 1 the deltas telescope, so A_t = G_t - V_t."""
    values, rewards = torch.randn(3, 9), torch.randn(3, 9)
    advantages, returns = ppo(gamma=0.9, lam=1.0).advantages_and_returns(values, rewards)
    close(advantages, returns - values)


def test_discounted_sums_of_a_long_response():
    """2048 ones, discounted by 0.99, sum to (1 - 0.99^n) / (1 - 0.99) where n terms are left."""
    sums = discounted_sums(torch.ones(1, 2048), 0.99)[0]
    close(sums[[0, 1948, 2047]], [(1 - 0.99**n) / 0.01 for n in (2048, 100, 1)], rtol=1e-5, atol=0.0)


def test_an_episode_by_hand(tmp_path):
    """A desirable response of two tokens and an undesirable one of one token, with values 0, gamma 1/2 and lam 1.

    The returns are 1/2, 1 and -1. The advantages are the same before they are normalised: their mean is 1/6, and their
    variance is (1/4 + 1 + 1) / 3 - 1/36 = 13/18.
    """
    trainer = make_trainer(tmp_path, "ppo", "loss.gamma=0.5", "loss.lam=1")
    batch = [example([5, 6], [7, 8], chosen=(True,)), example([5], [9], chosen=(False,))]
    episode = trainer.episode(Batch(batch, PerToken(torch.zeros(3), torch.zeros(3), None), None))
    close(episode.returns, [0.5, 1.0, -1.0])
    close(episode.advantages, (torch.tensor([0.5, 1.0, -1.0]) - 1 / 6) / math.sqrt(13 / 18))
    with torch.no_grad():
        logps = trainer.reference_model(trainer.reference_model.inputs(batch)).logps
    close(trainer.reference_logps(batch), logps)


#### THE LOSS


def test_an_episode_waits_for_no_device():
    """Fake tensors have no values: an operation whose result the CPU would have to wait for raises."""
    examples = random_examples(5, (1, 2))
    n = sum(map(sum, (one.n_targets for one in examples)))
    with FakeTensorMode():
        batch = Batch(examples, PerToken(*(torch.empty(n) for _ in range(3))), torch.empty(n))
        episode = ppo().episode(batch)
        assert episode.advantages.shape == episode.returns.shape == (n,)
        assert trainers.explained_variance(batch.policy.values, episode.returns).shape == ()
        with pytest.raises(DynamicOutputShapeException):
            batch.policy.values[batch.policy.values > 0]


def loss_of_tokens(trainer, logratios, advantages, values=None, returns=None):
    """Compute PPO's loss of responses of one token each.

    Returns (outcome, gradient of the log-probs, gradient of the values); gradients are those of the summed losses.
    """
    n = len(logratios)
    reference = torch.full((n,), -3.0)
    logps = (reference + torch.as_tensor(logratios)).requires_grad_()
    values = torch.tensor(values or [0.0] * n, requires_grad=True)
    examples = [example([5], [6], chosen=(i % 2 == 0,)) for i in range(n)]
    batch = Batch(examples, PerToken(logps, values, torch.ones(n)), reference)
    episode = trainers.Episode(advantages=torch.tensor(advantages), returns=torch.tensor(returns or [0.0] * n))
    outcome = trainer.clipped_loss(batch, episode)
    outcome.losses.sum().backward()
    return outcome.detach(), logps.grad, values.grad


def test_clipping_on_both_sides():
    """With cliprange 1/2, ratios r are clipped to [1/2, 2]; the loss is the larger of -A r and -A clip(r).

    r = 1,   A = +1: -1, within the range           gradient -A r = -1
    r = 3,   A = +1: max(-3, -2) = -2, clipped      gradient 0: raising a good token further gains nothing
    r = 3,   A = -1: max(3, 2) = 3, not clipped     gradient +3: a bad token is still lowered
    r = 1/4, A = -1: max(1/4, 1/2) = 1/2, clipped   gradient 0
    r = 1/4, A = +1: max(-1/4, -1/2) = -1/4         gradient -1/4
    """
    ratios, advantages = [1.0, 3.0, 3.0, 0.25, 0.25], [1.0, 1.0, -1.0, -1.0, 1.0]
    outcome, gradient, _ = loss_of_tokens(ppo(), [math.log(r) for r in ratios], advantages)
    close(outcome.losses, [-1.0, -2.0, 3.0, 0.5, -0.25])
    close(outcome.metrics["loss/policy"], outcome.losses)
    close(gradient, [-1.0, 0.0, 3.0, 0.0, -0.25])
    assert outcome.metrics["clipfrac/policy"].tolist() == [0, 1, 0, 1, 0]


def test_the_critic_by_hand():
    """The critic's loss is 0.5 (V - G)^2, times critic_coef 0.1. V = G costs nothing.

    V = 3, G = 1: 0.5 * 4 = 2, times 0.1 is 0.2; the gradient is 0.1 * (3 - 1) = 0.2.
    """
    outcome, gradient, value_gradient = loss_of_tokens(
        ppo(critic_coef=0.1), [0.0, 0.0], [0.0, 0.0], values=[3.0, 0.5], returns=[1.0, 0.5]
    )
    close(outcome.metrics["loss/critic"], [2.0, 0.0])
    close(outcome.losses, [0.2, 0.0])
    close(value_gradient, [0.2, 0.0])
    close(gradient, [0.0, 0.0])


def test_kl_by_hand():
    """The KL estimate is exp(d) - 1 - d, with the gradient exp(d) - 1; here times KL_coef 0.1.

    d = ln 2: 1 - ln 2, gradient 1. d = -ln 2: ln 2 - 1/2, gradient -1/2.
    The original's estimator k1 is -d, with the gradient -1; it is negative for d > 0.
    """
    logratios = [math.log(2), -math.log(2)]
    outcome, gradient, _ = loss_of_tokens(ppo(KL_coef=0.1), logratios, [0.0, 0.0])
    close(outcome.metrics["loss/policykl"], [1 - math.log(2), math.log(2) - 0.5])
    close(outcome.losses, 0.1 * outcome.metrics["loss/policykl"])
    close(gradient, [0.1, -0.05])
    outcome, gradient, _ = loss_of_tokens(ppo(KL_coef=0.1, kl_estimator="k1"), logratios, [0.0, 0.0])
    close(outcome.metrics["loss/policykl"], [-math.log(2), math.log(2)])
    close(gradient, [-0.1, -0.1])


def test_kl_is_never_negative_and_means_kl_reference_policy():
    """The KL estimate is never negative. Its mean over tokens drawn from the reference r is sum r log(r / p)."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 50, generator=generator).log_softmax(-1)
    outcome, *_ = loss_of_tokens(ppo(), policy - reference, [0.0] * 50)
    kl, expected = outcome.metrics["loss/policykl"], (reference.exp() * (reference - policy)).sum()
    assert (kl >= 0).all()
    close((reference.exp() * kl).sum(), expected, rtol=1e-4, atol=1e-6)


def test_a_small_logratio_keeps_its_kl():
    """For d = 1e-3 the KL estimate is d^2 / 2 + d^3 / 6 = 5.0017e-7.

    exp(d) - 1 - d, computed in float32, would be off by 1e-7, a fifth of that.
    """
    trainer = ppo()
    batch = Batch([example([5], [6])], PerToken(torch.tensor([1e-3]), torch.zeros(1), torch.zeros(1)), torch.zeros(1))
    kl = trainer.clipped_loss(batch, trainers.Episode(torch.zeros(1), torch.zeros(1))).metrics["loss/policykl"]
    close(kl, [5.0017e-7], rtol=1e-3, atol=0.0)


def test_metrics_by_hand():
    """Two responses of one token: a desirable one with log-ratio ln 2, and an undesirable one with -ln 2.

    Values 0 and 1, returns 1 and -1: the returns have the variance 1, and returns minus values, (1, -2), have 9/4. So
    the explained variance is 1 - 9/4. Ratios 2 and 1/2 have the mean 5/4, and neither is clipped to [1/2, 2].
    """
    trainer = ppo(critic_coef=0.01, KL_coef=0.1)
    outcome, *_ = loss_of_tokens(
        trainer, [math.log(2), -math.log(2)], [1.0, -1.0], values=[0.0, 1.0], returns=[1.0, -1.0]
    )
    values = trainer.summarize([outcome], "train")
    policy, critic, kl = (-2 + 0.5) / 2, 0.5 * (1 + 4) / 2, 0.25
    expected = {
        "loss/policy": policy,
        "loss/critic": critic,
        "loss/policykl": kl,
        "loss/total": policy + 0.01 * critic + 0.1 * kl,
        "loss/train": policy + 0.01 * critic + 0.1 * kl,
        "loss/entropy": 1.0,
        "loss/seqratio": 1.25,
        "clipfrac/policy": 0.0,
        "returns/mean": 0.0,
        "returns/var": 1.0,
        "val/mean": 0.5,
        "val/var": 0.25,
        "val/explained_variance": -1.25,
        "rewards_train/chosen": math.log(2),
        "rewards_train/rejected": -math.log(2),
        "rewards_train/accuracies": 1.0,
        "rewards_train/margins": 2 * math.log(2),
        "logps_train/chosen": -3 + math.log(2),
        "logps_train/rejected": -3 - math.log(2),
    }
    assert values == pytest.approx(expected, rel=1e-5, abs=1e-6)
    in_evaluation = trainer.summarize([outcome, outcome], "eval")
    assert in_evaluation["loss_eval/policy"] == values["loss/policy"]
    assert in_evaluation["loss/eval"] == values["loss/train"] and "val_eval/mean" in in_evaluation
    assert not {"loss/policy", "val/mean", "loss/train"} & set(in_evaluation)


def test_metrics_stay_finite():
    """Metrics are finite with a sequence ratio of e^60 and with equal returns: JSON has no Infinity and no NaN.

    Equal returns have no explained variance, so that metric is left out.
    """
    outcome, *_ = loss_of_tokens(ppo(), [50.0, 60.0], [0.0, 0.0], returns=[1.0, 1.0])
    values = ppo().summarize([outcome], "train")
    assert all(map(math.isfinite, values.values())) and "val/explained_variance" not in values
    assert values["loss/seqratio"] > 1e20


#### THE VALUE HEAD


def critic_policy(name: str, packs: bool, dtype: torch.dtype = torch.float32) -> PolicyModel:
    """Make a small model with a value head whose last layer does not start at 0."""
    lm = tiny_lm(name)
    torch.manual_seed(0)
    v_head = ValueHead(lm.get_output_embeddings().weight.shape[1])
    torch.nn.init.normal_(v_head.value.weight, std=0.3)
    policy = PolicyModel(lm, v_head=v_head)
    sharding.prepare_policy(policy, dtype, activation_checkpointing=False, block_name=None)
    policy.use_packing(packs)
    return policy


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_values_are_padded_values(name):
    """Packed and padded agree to 1e-5 in log-probs, values, entropies, and the gradients of the value head."""
    examples = random_examples(6, (2, 1, 3))
    results = []
    for packs in (True, False):
        policy = critic_policy(name, packs)
        per_token = policy(policy.inputs(examples), with_entropy=True)
        per_token.values.pow(2).sum().backward()
        grads = [parameter.grad for parameter in policy.v_head.parameters()]
        results.append([per_token.logps, per_token.values, per_token.entropy, *grads])
    for packed, padded in zip(*results, strict=True):
        assert (packed - padded).norm() <= 1e-5 * padded.norm() and padded.norm() > 0.01


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_critic_never_moves_the_language_model(packs, dtype):
    """The gradient of the values reaches all weights of the value head, in float32, and none of the language model."""
    policy = critic_policy("llama", packs, dtype)
    values = policy(policy.inputs(random_examples(4))).values
    assert values.dtype == torch.float32
    values.sum().backward()
    for name, parameter in policy.named_parameters():
        gradient = parameter.grad
        if name.startswith("v_head."):
            assert parameter.dtype == gradient.dtype == torch.float32 and gradient.abs().sum() > 0
        else:
            assert gradient is None or not gradient.abs().sum()


def test_a_new_value_head_says_0_and_learns_at_once():
    """A new value head gives the value 0 everywhere, and the gradient of its last layer is not 0."""
    v_head = ValueHead(8)
    hidden = torch.randn(5, 8)
    values = v_head(hidden)
    assert values.shape == (5,) and not values.any()
    values.sum().backward()
    assert v_head.value.weight.grad.any()


def test_one_forward_per_epoch_serves_the_critic_too(tmp_path, monkeypatch):
    """For two epochs on a batch that fits one forward pass, the reference runs once and the policy twice."""
    trainer = make_trainer(tmp_path, "ppo", "loss.ppo_epochs=2")
    calls = []
    forward = PolicyModel.forward
    monkeypatch.setattr(PolicyModel, "forward", lambda self, *a, **k: calls.append(self) or forward(self, *a, **k))
    trainer.train_step(trainer.train_loader.batches[:1])
    assert calls == [trainer.policy, trainer.reference_model, trainer.policy]


#### THE STEP


def critic_state(trainer) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone() for name, tensor in checkpoint.full_state(trainer.policy.v_head, torch.float32).items()
    }


def plain_ppo(trainer, batch, epochs: int) -> None:
    """Run PPO on one batch as in a textbook, without packing, autograd leaf, or clipping of gradients.

    Each response goes through the model's own logits; advantages are `by_definition`; the loss is the mean over all
    tokens; SGD is written out.
    """
    loss, lm, v_head = trainer.config.loss, trainer.policy.lm, trainer.policy.v_head
    for model in (trainer.policy, trainer.reference_model):
        model.use_packing(False)

    def forward(model, prompt, response):
        ids = torch.tensor([[*prompt, *response]])
        output = model(ids, output_hidden_states=True)
        at = slice(len(prompt) - 1, -1)
        logps = output.logits[0, at].log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        return logps, output.hidden_states[-1][0, at].detach()

    rows = [(one.prompt, one.responses[0], 1.0 if one.roles[0] == "chosen" else -1.0) for one in batch]
    old, advantages, returns = [], [], []
    for prompt, response, reward in rows:
        with torch.no_grad():
            old.append(forward(trainer.reference_model.lm, prompt, response)[0])
            values = v_head(forward(lm, prompt, response)[1]).tolist()
        pairs = by_definition(values, reward, loss.gamma, loss.lam)
        advantages.append(torch.tensor(pairs[0]))
        returns.append(torch.tensor(pairs[1]))
    every = torch.cat(advantages)
    mean, std = every.mean(), (every.var(correction=0) + 1e-8).sqrt()
    parameters = list(trainer.policy.parameters())
    for _ in range(epochs):
        total = 0.0
        for row, (prompt, response, _) in enumerate(rows):
            logps, hidden = forward(lm, prompt, response)
            d = logps - old[row]
            advantage = (advantages[row] - mean) / std
            clipped = d.exp().clamp(loss.cliprange, 1 / loss.cliprange)
            policy_loss = -torch.minimum(advantage * d.exp(), advantage * clipped).sum()
            critic_loss = 0.5 * ((v_head(hidden) - returns[row]) ** 2).sum()
            kl = (d.exp() - 1 - d).sum()
            total = total + policy_loss + loss.critic_coef * critic_loss + loss.KL_coef * kl
        grads = torch.autograd.grad(total / len(every), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, grads, strict=True):
                parameter -= trainer.config.lr * gradient


@pytest.mark.parametrize("words", ["", "model.packing=false model.logps=plain", "model.max_tokens_per_forward=60"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_the_step_is_the_textbooks(tmp_path, epochs, words):
    """On two batches, with one or three epochs each, policy and critic move as in `plain_ppo`, to 1e-5 of the movement.

    At lr 0.3, steps are large enough that some ratios are clipped.
    """
    words = (*words.split(), f"loss.ppo_epochs={epochs}", "lr=0.3", "loss.critic_coef=0.5")
    words += ("model.max_grad_norm=1e9", "model.v_head_max_grad_norm=1e9")
    trainers_ = [make_trainer(tmp_path / name, "ppo", *words) for name in ("ours", "plain")]
    start, critic_start = state_of(trainers_[0]), critic_state(trainers_[0])
    batches = batches_for("ppo", 2)
    trainers_[0].train_loader.batches = batches
    trainers_[0].train()
    for batch in batches:
        plain_ppo(trainers_[1], batch, epochs)
    ways = [moved(start, state_of(trainer)) for trainer in trainers_]
    critic_ways = [moved(critic_start, critic_state(trainer)) for trainer in trainers_]
    for ours, plain in (ways, critic_ways):
        assert plain.norm() > 0.01
        assert (ours - plain).norm() <= 1e-5 * plain.norm()
    rows = rows_of(trainers_[0])
    assert len(rows) == 2 * epochs
    if epochs > 1:
        assert 0 < rows[-1]["clipfrac/policy"] < 1


def test_epochs_are_updates_over_the_same_advantages(tmp_path):
    """Two batches of 8 with two epochs each give four updates and four lines in the log, at 8, 8, 16, 16 examples.

    The returns are the same in both epochs of a batch, and the values are not. A linear schedule counts all four
    updates: 1, 3/4, 1/2, 1/4 of lr 0.1.
    """
    words = ("loss.ppo_epochs=2", "lr_scheduler=linear", "lr=0.1", "loss.critic_coef=1", "model.v_head_max_grad_norm=9")
    _, rows = trained(tmp_path, "ppo", *words, batches=batches_for("ppo", 2))
    assert [row["step"] for row in rows] == [1, 2, 3, 4] == [row["counters/updates"] for row in rows]
    assert [row["counters/examples"] for row in rows] == [8, 8, 16, 16]
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert rows[0]["returns/mean"] == rows[1]["returns/mean"] != rows[2]["returns/mean"]
    assert rows[0]["val/mean"] == 0 != rows[1]["val/mean"]
    assert rows[0]["loss/policykl"] == 0 < rows[1]["loss/policykl"]


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("sizes", [(4, 4), (6, 2), (5, 2, 1)], ids=str)
def test_accumulation_is_one_batch(tmp_path, sizes, epochs):
    """Accumulated microbatches of any sizes train as one batch: advantages are normalised over all of them."""
    (batch,) = batches_for("ppo", 1)
    one = trained(tmp_path / "one", "ppo", f"loss.ppo_epochs={epochs}", batches=[list(batch)])
    parts = [[batch.pop(0) for _ in range(size)] for size in sizes]
    words = (f"loss.ppo_epochs={epochs}", f"model.gradient_accumulation_steps={len(sizes)}")
    accumulated = trained(tmp_path / "accumulated", "ppo", *words, batches=parts)
    assert_same_training(accumulated, one)
    assert [row["examples"] for row in accumulated[1]] == [8] * epochs


def test_the_last_incomplete_accumulation_is_not_lost(tmp_path):
    """Three microbatches of 4, two per update, with two epochs, give updates after 8, 8, 12, 12 examples."""
    words = ("model.batch_size=4", "model.gradient_accumulation_steps=2", "loss.ppo_epochs=2")
    trainer = make_trainer(tmp_path, "ppo", *words, batches=batches_for("ppo", 3, 4))
    trainer.train()
    assert [row["examples"] for row in rows_of(trainer)] == [8, 8, 12, 12]
    assert [row["examples"] for row in rows_of(trainer, "eval")] == [8, 12]


def test_the_critic_has_a_clip_of_its_own(tmp_path):
    """The critic's gradient has its own limit of 0.05, so SGD at lr 0.01 moves the value head by 0.01 * 0.05.

    The steep loss of the critic does not change the gradient norm or the movement of the language model, compared with
    critic_coef=0. There is only one update, because later advantages depend on the critic.
    """
    batches = batches_for("ppo", 1)
    steep = ("loss.critic_coef=1000", "model.v_head_max_grad_norm=0.05")
    ways = []
    for name, words in (("none", ("loss.critic_coef=0",)), ("steep", steep)):
        trainer = make_trainer(tmp_path / name, "ppo", *words, batches=batches)
        start, critic_start = state_of(trainer), critic_state(trainer)
        trainer.train()
        ways.append((moved(start, state_of(trainer)), moved(critic_start, critic_state(trainer)), rows_of(trainer)[0]))
    (way, critic_way, row), (steep_way, steep_critic_way, steep_row) = ways
    assert way.norm() > 1e-4 and torch.equal(way, steep_way)
    assert not critic_way.any() and row["v_head_grad_norm"] == 0
    assert steep_critic_way.norm() == pytest.approx(0.01 * 0.05, rel=1e-4)
    assert steep_row["v_head_grad_norm"] > 1 and steep_row["grad_norm"] == row["grad_norm"]


def test_bfloat16_compute(tmp_path):
    """In bfloat16, training starts at a ratio of exactly 1, and policy and critic move as in float32, to 10 %."""
    ways = []
    for precision in ("float32", "bfloat16"):
        words = (f"model.fsdp_policy_mp={precision}", "loss.critic_coef=1", "model.v_head_max_grad_norm=10", "lr=0.1")
        trainer = make_trainer(tmp_path / precision, "ppo", *words)
        start, critic_start = state_of(trainer), critic_state(trainer)
        trainer.train()
        row = rows_of(trainer)[0]
        assert row["rewards_train/margins"] == 0 == row["loss/policykl"] and row["loss/seqratio"] == 1
        ways.append((moved(start, state_of(trainer)), moved(critic_start, critic_state(trainer))))
    for exact, half in zip(*ways, strict=True):
        assert exact.norm() > 1e-3 and (half - exact).norm() < 0.1 * exact.norm()


def test_a_value_that_is_not_finite_stops_the_run(tmp_path):
    """A critic whose value is infinite stops the run before a weight changes; the 8 examples are written down."""
    trainer = make_trainer(tmp_path, "ppo")
    torch.nn.init.constant_(trainer.policy.v_head.value.bias, float("inf"))
    before = state_of(trainer)
    with pytest.raises(UserError, match="the loss is not finite after 0 updates"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(trainer).items())
    assert len(json.loads((tmp_path / "run/not_finite/examples.json").read_text())) == 8


def test_evaluation_reports_what_other_losses_do(tmp_path):
    """Evaluation reports rewards: log-ratios summed per response. They are 0 at the start.

    After training they equal the rewards computed here from the log-probs.
    """
    trainer = make_trainer(tmp_path, "ppo", "lr=0.1")
    assert trainer.evaluate()["rewards_eval/margins"] == 0
    trainer.train()
    values = trainer.evaluate()
    batch = trainer.eval_loader.batches[0]
    lengths = [len(one.responses[0]) for one in batch]
    with torch.no_grad():
        policy, reference = (
            torch.stack([part.sum() for part in model(model.inputs(batch)).logps.split(lengths)])
            for model in (trainer.policy, trainer.reference_model)
        )
    chosen = torch.tensor([one.roles[0] == "chosen" for one in batch])
    rewards = policy - reference
    expected = {
        "rewards_eval/chosen": rewards[chosen].mean(),
        "rewards_eval/rejected": rewards[~chosen].mean(),
        "rewards_eval/margins": rewards[chosen].mean() - rewards[~chosen].mean(),
        "rewards_eval/accuracies": (rewards[chosen][:, None] > rewards[~chosen]).float().mean(),
        "logps_eval/chosen": policy[chosen].mean(),
        "logps_eval/rejected": policy[~chosen].mean(),
    }
    for name, value in expected.items():
        assert values[name] == pytest.approx(value.item(), rel=1e-5), name
    assert {"loss/eval", "val_eval/explained_variance", "loss_eval/policykl"} <= set(values)


def test_average_log_prob_is_heard(tmp_path):
    """With average_log_prob, reported log-probs are means over a response. The loss of tokens does not change."""
    trainer = make_trainer(tmp_path, "ppo", "++loss.average_log_prob=true")
    batch = trainer.eval_loader.batches[0]
    with torch.no_grad():
        logps = trainer.policy(trainer.policy.inputs(batch)).logps
    means = [part.mean() for part in logps.split([len(one.responses[0]) for one in batch])]
    chosen = [mean for mean, one in zip(means, batch, strict=True) if one.roles[0] == "chosen"]
    assert trainer.evaluate()["logps_eval/chosen"] == pytest.approx(torch.stack(chosen).mean().item(), rel=1e-5)


#### CHECKPOINTS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its cache_dir, and the final weights of its critic."""
    folder = tmp_path_factory.mktemp("cache")
    draw, metrics.draw_curves = metrics.draw_curves, lambda *args: None
    trainer = make_trainer(folder, "ppo", "lr=0.1", "loss.critic_coef=1", "intermediate_checkpoints=true")
    trainer.train()
    metrics.draw_curves = draw
    return folder, critic_state(trainer)


def test_v_head_pt(run):
    """v_head.pt is {'step_idx', 'state', 'metrics'} in float32, in LATEST and each step-N; `weights_only` opens it."""
    folder, critic = run
    saved = torch.load(folder / "run/LATEST/v_head.pt", weights_only=True)
    assert saved["step_idx"] == 3 and "loss/eval" in saved["metrics"] and set(saved["state"]) == set(critic)
    for name, tensor in critic.items():
        assert saved["state"][name].dtype == torch.float32 and torch.equal(saved["state"][name], tensor)
    first = checkpoint.load_state(str(folder / "run/step-1/v_head.pt"))
    assert not torch.equal(first["value.weight"], critic["value.weight"])


def test_the_export_is_a_plain_language_model(run):
    folder, _ = run
    latest = folder / "run" / "LATEST"
    names = set(load_file(latest / "model.safetensors"))
    assert names == set(checkpoint.load_state(str(latest / "policy.pt"))) and not [n for n in names if "v_head" in n]
    assert set(AutoModelForCausalLM.from_pretrained(latest).state_dict()) == names


@pytest.mark.parametrize("form", ["policy.pt", "directory"])
def test_a_critic_goes_on_from_its_checkpoint(run, form):
    """The critic continues from its checkpoint, bit by bit, if `model.load_from` is the policy.pt or the directory."""
    folder, critic = run
    path = "run/LATEST/policy.pt" if form == "policy.pt" else str(folder / "run" / "LATEST")
    trainer = make_trainer(folder, "ppo", f"exp_name=next_{form[:3]}", f"model.load_from={path}")
    assert all(torch.equal(tensor, critic[name]) for name, tensor in critic_state(trainer).items())


def test_a_new_critic_depends_on_the_seed_alone(run, tmp_path, monkeypatch):
    """A new critic depends on the seed only, for random weights and for a checkpoint without a critic.

    A v_head.pt in the working directory is not used.
    """
    folder, _ = run
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "run/LATEST/v_head.pt", tmp_path / "v_head.pt")
    (tmp_path / "sft").mkdir()
    shutil.copy(folder / "run/LATEST/policy.pt", tmp_path / "sft/policy.pt")
    words = [(), (f"model.load_from={tmp_path}/sft/policy.pt",), ("seed=2",)]
    states = [critic_state(make_trainer(tmp_path / str(i), "ppo", *given)) for i, given in enumerate(words)]
    assert not states[0]["value.weight"].any()
    assert torch.equal(states[0]["hidden.weight"], states[1]["hidden.weight"])
    assert not torch.equal(states[0]["hidden.weight"], states[2]["hidden.weight"])


def test_a_new_critic_moves_no_other_random_number(tmp_path):
    """Making a critic does not change torch's global random generator: draws after it are the same as for KTO."""
    draws = []
    for loss in ("ppo", "kto"):
        torch.manual_seed(5)
        make_trainer(tmp_path / loss, loss)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


def test_checkpoints_without_their_critic(run, tmp_path):
    """A critic that is damaged, or has another width, is refused before a model loads.

    A missing critic is refused in evaluation only: training starts with a new one.
    """
    folder, _ = run
    shutil.copytree(folder / "run" / "LATEST", tmp_path / "LATEST")
    os.remove(tmp_path / "LATEST" / "manifest.json")  # which would find the damage first
    policy_pt, v_head_pt = str(tmp_path / "LATEST/policy.pt"), tmp_path / "LATEST/v_head.pt"
    config = make_config(tmp_path, "loss=ppo", *SMALL, f"model.load_from={policy_pt}")
    loading.check_load_from(config)
    loading.check_policy_pt(config, policy_pt, with_value_head=True)
    saved = torch.load(v_head_pt, weights_only=True)
    saved["state"]["hidden.weight"] = saved["state"]["hidden.weight"][:, :7]
    torch.save(saved, v_head_pt)
    with pytest.raises(
        UserError, match=r"v_head.pt .* it has hidden.weight of shape \(32, 7\), the model of \(32, 32\)"
    ):
        loading.check_load_from(config)
    v_head_pt.write_bytes(b"no")
    with pytest.raises(UserError, match="v_head.pt is damaged"):
        loading.check_load_from(config)
    os.remove(v_head_pt)
    loading.check_load_from(config)  # training takes a new critic
    with pytest.raises(UserError, match="v_head.pt does not exist"):
        loading.load_policy_and_reference(config, tokenizer(), CPU, policy_pt)


def test_losses_without_a_critic_have_none(tmp_path):
    trainer = make_trainer(tmp_path, "kto")
    trainer.train()
    assert trainer.policy.v_head is None and not (tmp_path / "run/LATEST/v_head.pt").exists()


def test_the_columns_of_a_token(tmp_path):
    """A `Forward` gathers log-probs, values and entropies, each into its own field."""
    trainer = make_trainer(tmp_path, "ppo")
    batch = batches_for("ppo", 1)[0]
    with torch.no_grad():
        gathered = trainer.forward(batch)[1].policy
        per_token = trainer.policy(trainer.policy.inputs(batch), with_entropy=True)
    for name in ("logps", "values", "entropy"):
        assert torch.equal(getattr(gathered, name), getattr(per_token, name)), name
