"""A global batch as a loss sees it, its forward and backward passes by role, and the state of training."""

import math
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode  # private: see halos/plan/measure.py

import trainers
from halos import metrics
from halos.engine import Batch, Forward, Outcome, Statistic, pieces
from halos.errors import UserError
from halos.models import PerToken
from halos.tokens import Role
from helpers import example, make_config, random_examples, tiny_policy
from small_runs import loader_for, losses, make_trainer, rows_of, state_of


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)


def close(actual, expected, **kwargs) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), **kwargs)


#### A BATCH


def test_a_batch_by_hand():
    """The batch: a pair of 2 and 1 tokens with scores, and a chosen response of 1 token with an unrelated one of 3."""
    pair = example([1, 2], [3, 4], [5])._replace(scores=(4.0, 1.5), ids=("a/1/0", "a/1/1"), dataset="a")
    single = example([6], [7], [8, 9, 10], chosen=(True, None))._replace(ids=("b/2/0", "a/1/1"), dataset="b")
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -64.0])
    batch = Batch([pair, single], PerToken(logps, None, None), None)
    assert batch.lengths.tolist() == [2, 1, 1, 3]
    assert batch.chosen.tolist() == [True, False, True, False]
    assert batch.rejected.tolist() == [False, True, False, False]
    assert batch.unrelated.tolist() == [False, False, False, True]
    assert batch.sum_by_response(logps).tolist() == [-3, -4, -8, -112]
    assert batch.scores[:2].tolist() == [4.0, 1.5] and batch.scores[2:].isnan().all()
    assert batch.ids == ["a/1/0", "a/1/1", "b/2/0", "a/1/1"] and batch.datasets == ["a", "a", "b", "b"]


def test_margins_of_pairs():
    """Margins are score of chosen minus score of rejected: 4 - 1.5 and 0 - 3; NaN for the pair without scores."""
    examples = [example([1], [2], [3])._replace(scores=scores) for scores in ((4.0, 1.5), (0.0, 3.0), ())]
    batch = Batch(examples, PerToken(torch.zeros(6), None, None), None)
    close(batch.margins, [2.5, -3.0, math.nan], equal_nan=True)


def test_outcomes_are_concatenated_with_their_metrics():
    """Means and statistics are taken over all elements of all batches.

    The losses 1, 2 and 6 have the mean 3 and the variance (4 + 1 + 9) / 3 = 14/3.
    """

    def outcome(losses, **metrics):
        vector = torch.tensor(losses)
        return Outcome(vector, *[vector] * 4, metrics=metrics)

    def variance(x):
        return x.var(correction=0)

    first = outcome([1.0, 2.0], a=torch.tensor([1.0, 2.0]), v=Statistic(variance, (torch.tensor([1.0, 2.0]),)))
    second = outcome([6.0], a=torch.tensor(6.0), b=torch.tensor([5.0]), v=Statistic(variance, (torch.tensor([6.0]),)))
    values = trainers.DPOTrainer.__new__(trainers.DPOTrainer).summarize([first, second], "eval")
    assert (values["loss/eval"], values["a_eval"], values["b_eval"]) == (3, 3, 5)
    assert values["v_eval"] == pytest.approx(14 / 3)


#### FORWARD AND BACKWARD

MIXED = [
    example([5, 6, 7], [8, 9], [10, 11, 12], chosen=(True, None)),
    example([1, 2], [3, 4], [20], [30, 31], chosen=(True, False, None)),
    example([5, 6, 7], [13], [14, 15], chosen=(None, False)),
]


def gradient_of(policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("max_tokens", [1, 12, 1000])
def test_unrelated_responses_are_scored_and_not_trained_on(packs, max_tokens):
    """Unrelated responses get the log-probs of a plain forward pass, and contribute no gradient.

    A loss of all tokens has the gradient of the same loss of the trained tokens.
    """
    policy = tiny_policy("llama", packs)
    expected = policy(policy.inputs(MIXED)).logps
    forward = Forward(policy, MIXED, max_tokens)
    batch = Batch(MIXED, forward.tokens, None)
    close(batch.policy.logps, expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(0.5, 2, len(expected))
    trained = (~batch.unrelated).repeat_interleave(batch.lengths)
    (weights * batch.policy.logps).sum().backward()
    forward.backward()
    gradient = gradient_of(policy)
    policy.zero_grad()
    (weights * expected * trained).sum().backward()
    assert (gradient - gradient_of(policy)).norm() <= 1e-5 * gradient.norm() and gradient.norm() > 0.1


def test_what_runs_with_a_graph_holds_no_unrelated_response():
    """The forward pass with a graph contains no unrelated response. Without gradient, the same forward passes run.

    So policy and reference model compute the same, bit by bit.
    """
    policy = tiny_policy("llama", packs=True)
    forward = Forward(policy, MIXED, 1000)
    (piece,) = forward.pieces
    assert [role for one in piece.examples for role in one.roles].count(Role.UNRELATED) == 0
    assert sum(len(one.responses) for one in piece.examples) == 4
    with torch.no_grad():
        frozen = Forward(policy, MIXED, 1000)
    assert torch.equal(frozen.leaf, forward.leaf) and forward.leaf.requires_grad and not frozen.leaf.requires_grad


def test_pieces_partition_the_tokens_of_the_batch():
    """Forward passes of trained and of unrelated responses together contain every token of the batch once."""
    device = torch.device("cpu")
    trained, untrained = frozenset({Role.CHOSEN, Role.REJECTED}), frozenset({Role.UNRELATED})
    found = [pieces(MIXED, roles, 7, device) for roles in (trained, untrained)]
    positions = torch.cat([piece.positions for part in found for piece in part])
    assert sorted(positions.tolist()) == list(range(sum(len(r) for one in MIXED for r in one.responses)))
    assert len(found[0]) > 1


def test_the_scores_and_ids_of_a_batch_come_from_its_loader():
    """Every margin is 1, because the examples have the scores 1 and 0. The 8 responses of 4 pairs have 8 ids."""
    (batch,) = loader_for("dpo", 4, batch_size=4)
    seen = Batch(batch, PerToken(torch.zeros(sum(len(r) for one in batch for r in one.responses)), None, None), None)
    assert seen.margins.tolist() == [1.0] * 4
    assert len(set(seen.ids)) == 8 and set(seen.datasets) == {"drawn"}


#### THE STATE OF TRAINING


@pytest.mark.parametrize("loss", losses())
def test_a_state_that_was_loaded_goes_on_as_the_one_that_was_saved(tmp_path, loss):
    """Training that continues from saved weights and state equals training without a break, bit by bit.

    One trainer trains for two epochs. Another continues from its weights and state after the first one.
    """
    words = ("optimizer=AdamW", "warmup_steps=3", "lr_scheduler=cosine", "n_epochs=2", "lr=0.01", "eval_every=16")

    def trainer_of(name):
        trainer = make_trainer(
            tmp_path / name, loss, *words, train_loader=loader_for(loss, 16, batch_size=8, n_epochs=2)
        )
        trainer.log_evaluation = trainer.save = lambda: None
        return trainer

    whole, second, kept = trainer_of("whole"), trainer_of("second"), []

    def keep_half():
        if whole.state.updates == whole.total_updates() // 2:
            kept.extend(deepcopy([whole.policy.state_dict(), whole.state.state_dict()]))

    whole.should_stop = keep_half
    whole.train()
    second.policy.load_state_dict(kept[0])
    second.state.load_state_dict(kept[1])
    assert second.state.examples == whole.state.examples // 2
    second.train()
    assert (second.state.examples, second.state.updates) == (whole.state.examples, whole.state.updates)
    for name, tensor in state_of(whole).items():
        assert torch.equal(tensor, state_of(second)[name]), name
    rows, others = (
        [{k: v for k, v in row.items() if not metrics.is_time(k)} for row in rows_of(t)] for t in (whole, second)
    )
    assert len(others) == len(rows) // 2 and others == rows[len(others) :]


def test_should_stop_is_asked_after_every_step(tmp_path):
    """Training ends after the second of three updates, with an evaluation and a checkpoint at 16 examples."""
    trainer, asked = make_trainer(tmp_path, "sft", "eval_every=800"), []

    def should_stop():
        asked.append(trainer.state.updates)
        return len(asked) == 2

    trainer.should_stop = should_stop
    trainer.train()
    assert asked == [1, 2] and len(rows_of(trainer)) == 2
    assert [row["examples"] for row in rows_of(trainer, "eval")] == [16]
    assert torch.load(tmp_path / "run/LATEST/policy.pt", weights_only=True)["step_idx"] == 2


def test_should_stop_sees_the_evaluation_of_its_step(tmp_path):
    """With an evaluation after every update of 8 examples: a rule on its loss stops at the second, which is not
    repeated at the end."""
    trainer = make_trainer(tmp_path, "sft", "lr=1e-3")
    trainer.should_stop = lambda: trainer.state.eval_metrics["loss/eval"] < threshold
    threshold = 0.0
    trainer.train()
    losses = [row["loss/eval"] for row in rows_of(trainer, "eval")]
    assert len(losses) == 3 and losses[0] > losses[1]
    threshold = sum(losses[:2]) / 2
    again = make_trainer(tmp_path / "again", "sft", "lr=1e-3")
    again.should_stop = lambda: again.state.eval_metrics["loss/eval"] < threshold
    again.train()
    assert [row["loss/eval"] for row in rows_of(again, "eval")] == losses[:2]


def test_ppo_is_asked_after_the_last_epoch_on_a_batch(tmp_path):
    """It never leaves a batch half used: of two epochs on each of three batches, it takes those on the first two."""
    trainer = make_trainer(tmp_path, "ppo", "loss.ppo_epochs=2")
    trainer.should_stop = lambda: trainer.state.updates >= 3
    trainer.train()
    assert [row["examples"] for row in rows_of(trainer)] == [8, 8, 16, 16]


def test_a_loss_may_call_another(tmp_path):
    """A loss may use `super().loss`: DPO plus a likelihood term, in one step of training.

    At the start DPO's loss is ln 2, so the sum is ln 2 - 0.5 * log p(chosen).
    """

    class RPOTrainer(trainers.DPOTrainer):
        def loss(self, policy_chosen_logps, *others):
            losses, *rewards = super().loss(policy_chosen_logps, *others)
            return losses - 0.5 * policy_chosen_logps, *rewards

    trainer = make_trainer(tmp_path, "dpo")
    trainer.__class__ = RPOTrainer
    outcome = trainer.forward_backward(trainer.train_loader.batches[0])
    close(outcome.losses, math.log(2) - 0.5 * outcome.chosen_logps)


def test_a_loss_can_log_the_names_of_its_examples(tmp_path):
    """The dataset names of a batch reach `batch_loss`, in training and in evaluation: here as a metric per dataset.

    The loss is ln 2 for both datasets at the start. Both have 4 of 8 pairs, so the total is the mean of the two.
    """

    class PerDataset(trainers.DPOTrainer):
        def batch_loss(self, batch):
            outcome = super().batch_loss(batch)
            chosen = [name for name, one in zip(batch.datasets, batch.chosen.tolist(), strict=True) if one]
            for name in set(chosen):
                mask = torch.tensor([one == name for one in chosen])
                outcome.metrics[f"loss/{name}"] = outcome.losses[mask]
            return outcome

    mixed = [one._replace(dataset="ab"[i % 2]) for i, one in enumerate(random_examples(8))]
    trainer = make_trainer(tmp_path, "dpo", batches=[mixed])
    trainer.__class__ = PerDataset
    trainer.train()
    (row,), (evaluation,) = rows_of(trainer), rows_of(trainer, "eval")
    assert row["loss/a"] == row["loss/b"] == pytest.approx(math.log(2))
    assert evaluation["loss/eval"] == pytest.approx((evaluation["loss_eval/a"] + evaluation["loss_eval/b"]) / 2)


#### MISTAKES THAT WOULD TRAIN IN SILENCE


def trained_by(folder, name: str, /, **overrides):
    """One update by the trainer of a loss in which these methods and attributes are replaced."""
    trainer = make_trainer(folder, name)
    trainer.__class__ = type("Changed", (type(trainer),), overrides)
    trainer.train_step(trainer.train_loader.batches[:1])
    return trainer


def test_a_term_of_the_entropy_is_refused(tmp_path):
    """It has no gradient, so it would train nothing; as a metric it is welcome."""

    def bonus(self, batch):
        outcome = trainers.SFTTrainer.batch_loss(self, batch)
        return replace(outcome, losses=outcome.losses - batch.policy.entropy.sum())

    with pytest.raises(UserError, match="policy.entropy, which has no gradient"):
        trained_by(tmp_path, "sft", batch_loss=bonus, uses_entropy=True)


def test_a_scalar_loss_is_refused(tmp_path):
    def scalar(self, *logps):
        losses, *rewards = trainers.SFTTrainer.loss(self, *logps)
        return losses.mean(), *rewards

    with pytest.raises(UserError, match=r"Changed has the shape \(\); return a vector"):
        trained_by(tmp_path, "sft", loss=scalar)


def test_a_nan_in_a_metric_is_seen():
    """A mean of nothing is left out, and so is a statistic that is undefined. A NaN among values is logged."""
    none = torch.empty(0)
    metrics = {"a/nan": torch.tensor([1.0, math.nan]), "a/none": none, "a/flags": torch.tensor([True, False])}
    metrics["a/undefined"] = Statistic(lambda x: x.sum() / 0 * 0, (torch.ones(1),))
    outcome = Outcome(torch.ones(1), none, none, none, none, metrics=metrics)
    values = trainers.DPOTrainer.__new__(trainers.DPOTrainer).summarize([outcome], "train")
    assert math.isnan(values["a/nan"]) and values["a/flags"] == 0.5 and not {"a/none", "a/undefined"} & set(values)


def test_what_a_trainer_keeps_is_part_of_the_state(tmp_path):
    trainer = make_trainer(tmp_path, "sft", train_loader=loader_for("sft", 16, batch_size=8))
    trainer.state.own["mean"] = 0.25
    again = make_trainer(tmp_path / "again", "sft", train_loader=loader_for("sft", 16, batch_size=8))
    again.state.load_state_dict(trainer.state.state_dict())
    assert again.state.own == {"mean": 0.25}


#### THE HOST DOES NOT WAIT

# What reads values of tensors on the host, or needs them to know a shape. On a GPU the host waits for each.
WAITING = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "repeat_interleave"}


class Waits(TorchDispatchMode):
    """Counts operations that a host with a GPU waits for."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in WAITING or masks:
            self.found[name] += 1
        return operator(*args, **(kwargs or {}))


# Those of the project: a loss that a user adds to trainers.py may use masks.
OURS = ["sft", "dpo", "cdpo", "kto", "slic", "ppo"]
OURS += [loss for loss in losses() if make_config("", f"loss={loss}").loss.trainer.startswith("losses.")]


@pytest.mark.parametrize("loss", OURS)
def test_a_step_reads_the_device_once(tmp_path, loss):
    """A step has no operation of WAITING: all that the host needs is in one `tolist` before the update, which is none.

    The line of metrics.jsonl comes after the step. SGD, since AdamW reads its own count of steps, which is on the CPU.
    """
    trainer = make_trainer(tmp_path, loss)
    trainer.log = metrics.NoLog()
    batch = trainer.train_loader.batches[0]
    with Waits() as waits:
        trainer.train_step([batch])
    assert trainer.state.updates == 1 and not waits.found


def test_waits_are_found():
    with Waits() as waits:
        x = torch.arange(4.0)
        x[x > 1], bool(x.sum() > 1), x.repeat_interleave(torch.tensor([1, 0, 2, 1]))
    assert set(waits.found) >= {"index", "_local_scalar_dense", "repeat_interleave"}
