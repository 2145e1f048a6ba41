"""The trainer on a model of two layers: training steps, what they must not depend on, metrics, and checkpoints.

Loaders are replaced by ones that yield given batches; models come from the project's own loading.
"""

import json
import math
import os
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trainers
from halos import advice, checkpoint, loading, metrics, run_dir
from halos.engine import Outcome
from halos.errors import UserError
from helpers import example, judged, make_config
from small_runs import (
    CPU,
    FEW,
    SMALL,
    Batches,
    assert_same_training,
    batches_for,
    loader_for,
    losses,
    make_trainer,
    moved,
    one_per_loader,
    rows_of,
    state_of,
    tokenizer,
    trained,
)

LOSSES = losses()


@pytest.fixture(autouse=True)
def curves(monkeypatch):
    """Leave out drawing, which takes longer than everything else here; calling `curves()` turns it on again."""
    draw = metrics.draw_curves
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)
    return lambda: monkeypatch.setattr(metrics, "draw_curves", draw)


#### EQUIVALENCES


def gradient(trainer, packs: bool, limit: int) -> tuple[torch.Tensor, Outcome]:
    """The gradient and the outcome of two batches, packed or padded, with at most `limit` tokens per forward pass."""
    for model in filter(None, (trainer.policy, trainer.reference_model)):
        model.use_packing(packs)
    trainer.config.model.max_tokens_per_forward = limit
    trainer.policy.zero_grad()
    outcomes = [trainer.forward_backward(batch) for batch in trainer.train_loader.batches[:2]]
    gradients = [p.grad.flatten() for p in trainer.policy.parameters() if p.requires_grad]
    return torch.cat(gradients), Outcome.concatenate(outcomes)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_gradient_is_that_of_padded_batches(tmp_path, loss):
    """The gradient is the same packed, padded, and in several forward passes, to 1e-5, and the losses and rewards are.

    A statistic of the batch, such as a mean or an order, would differ if each forward pass had a loss of its own. The
    reference model is another one than the policy, so that no log-ratio is 0.
    """
    trainer = make_trainer(tmp_path, loss)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trainer.reference_model.parameters() if trainer.reference_model else ():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    expected, outcome = gradient(trainer, packs=False, limit=16384)
    assert expected.norm() > 0
    for packs, limit in ((True, 16384), (True, 30)):
        found, other = gradient(trainer, packs, limit)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        torch.testing.assert_close(other.losses, outcome.losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.chosen_rewards, outcome.chosen_rewards, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", FEW)
def test_packed_training_is_padded_training(tmp_path, loss):
    """Three steps of packed and padded training move the weights alike, to 1e-5 of the movement.

    Storing a weight rounds it, by 1.5e-7 in norm over all weights, whatever the step. At lr 0.05 that is 3e-6 of the
    movement.
    """
    packed = trained(tmp_path / "packed", loss, "model.packing=true", "lr=0.05")
    padded = trained(tmp_path / "padded", loss, "model.packing=false", "model.logps=plain", "lr=0.05")
    assert_same_training(packed, padded)


def test_packed_training_is_padded_training_with_adamw(tmp_path):
    """Packed training equals padded training with AdamW, too.

    AdamW divides by the size of the gradient, so gradients close to 0 count like large ones. With eps 1e-4, their
    rounding noise (1e-8 of a gradient of 0.1) does not count.
    """
    words = ("optimizer=AdamW", "lr=1e-3", "++optimizer_kwargs.eps=1e-4")
    packed = trained(tmp_path / "packed", "dpo", "model.packing=true", *words)
    padded = trained(tmp_path / "padded", "dpo", "model.packing=false", *words)
    assert_same_training(packed, padded)


@pytest.mark.parametrize("loss", FEW)
def test_several_forwards_are_one(tmp_path, loss):
    """Several forward passes of a batch train as one: one example in each (max_tokens_per_forward=1), or a few.

    KTO's KL is a statistic of the whole batch, so it would differ if each forward pass had a loss of its own.
    """
    whole = trained(tmp_path / "whole", loss)
    for limit in (1, 60):
        assert_same_training(trained(tmp_path / str(limit), loss, f"model.max_tokens_per_forward={limit}"), whole)


def test_several_forwards_without_packing_are_one(tmp_path):
    words = ("model.packing=false",)
    whole = trained(tmp_path / "whole", "kto", *words)
    assert_same_training(trained(tmp_path / "60", "kto", *words, "model.max_tokens_per_forward=60"), whole)


@pytest.mark.parametrize("loss", ["sft", "dpo"])
@pytest.mark.parametrize("sizes", [(4, 4), (6, 2), (3, 3, 2), (5, 2, 1)], ids=str)
def test_accumulation_is_one_batch(tmp_path, loss, sizes):
    """Microbatches of 4 + 4, or of 6 + 2, train as one batch of 8: the mean is over examples, not over microbatches."""
    (batch,) = batches_for(loss, 1)
    parts = [[batch.pop(0) for _ in range(size)] for size in sizes]
    words = ("model.batch_size=4", f"model.gradient_accumulation_steps={len(sizes)}")
    accumulated = trained(tmp_path / "accumulated", loss, *words, batches=parts)
    assert_same_training(accumulated, trained(tmp_path / "one", loss, batches=[sum(parts, [])]))
    assert accumulated[1][0]["examples"] == 8


def test_the_last_incomplete_accumulation_is_not_lost(tmp_path):
    """Five microbatches of 2, two per update, give updates of 4, 4 and 2 examples."""
    batches = batches_for("sft", 5, 2)
    _, rows = trained(tmp_path, "sft", "model.batch_size=2", "model.gradient_accumulation_steps=2", batches=batches)
    assert [row["examples"] for row in rows] == [4, 8, 10]
    assert [row["counters/updates"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_order_of_the_batch_does_not_matter(tmp_path, loss):
    batches = batches_for(loss)
    there = trained(tmp_path / "there", loss, batches=batches)
    back = trained(tmp_path / "back", loss, batches=[batch[::-1] for batch in batches])
    assert_same_training(there, back)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("way", ["true", "selective"])
def test_activation_checkpointing_changes_nothing(tmp_path, way):
    plain = trained(tmp_path / "plain", "dpo")
    assert_same_training(trained(tmp_path / "checkpointed", "dpo", f"model.activation_checkpointing={way}"), plain)


@pytest.mark.slow
def test_compiled_blocks_change_nothing(tmp_path):
    """Compiled blocks train as uncompiled ones, and are not compiled again for a batch of another layout.

    The first two batches, of different lengths, compile all graphs.
    """
    from torch._dynamo.utils import counters  # private, because torch has no public count of its graphs

    batches = batches_for("dpo", 6)
    plain = trained(tmp_path / "plain", "dpo", batches=batches)
    counters.clear()
    trained(tmp_path / "two", "dpo", "model.compile=true", batches=batches[:2])
    after_two = counters["stats"]["unique_graphs"]
    assert after_two > 0
    torch.compiler.reset()
    counters.clear()
    assert_same_training(trained(tmp_path / "compiled", "dpo", "model.compile=true", batches=batches), plain)
    assert counters["stats"]["unique_graphs"] == after_two


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("limit", [16384, 60])
def test_training_starts_at_a_logratio_of_exactly_0(tmp_path, packing, precision, limit):
    """Policy and reference compute alike, so DPO's loss starts at ln 2, and every reward at 0.

    This also holds if the policy stores float32 and computes in bfloat16.
    """
    words = (f"model.fsdp_policy_mp={precision}", f"model.packing={packing}", f"model.max_tokens_per_forward={limit}")
    trainer = make_trainer(tmp_path, "dpo", *words)
    assert trainer.reference_model.lm.dtype == getattr(torch, precision)
    outcome = trainer.forward_backward(trainer.train_loader.batches[0])
    assert not outcome.chosen_rewards.any() and not outcome.rejected_rewards.any()
    torch.testing.assert_close(outcome.losses, torch.full((8,), math.log(2)))
    assert (outcome.chosen_logps < -1).all()


@pytest.mark.parametrize("loss", one_per_loader())
@pytest.mark.parametrize("limit", [16384, 30])
def test_every_run_starts_at_a_logratio_of_exactly_0(tmp_path, loss, limit):
    """Policy and reference log-probs are equal at the start, bit by bit, with every loader.

    This holds for all roles, in one forward pass and in several.
    """
    trainer = make_trainer(tmp_path, loss, f"model.max_tokens_per_forward={limit}")
    with torch.no_grad():
        _, batch = trainer.forward(trainer.train_loader.batches[0])
    assert (batch.reference_logps is None) == (not trainer.config.loss.use_reference_model)
    assert batch.reference_logps is None or torch.equal(batch.policy.logps, batch.reference_logps)


def test_bfloat16_compute_moves_float32_weights_the_same_way(tmp_path):
    """After three steps in bfloat16, the weights have moved as in float32, to 5 % of the movement."""
    way, _ = trained(tmp_path / "float32", "sft")
    half, _ = trained(tmp_path / "bfloat16", "sft", "model.fsdp_policy_mp=bfloat16")
    assert way.norm() > 1e-3
    assert (half - way).norm() < 0.05 * way.norm()


def test_every_weight_trains_in_bfloat16_compute(tmp_path):
    """In a run from loading to LATEST, each weight moves in bfloat16, as it does in float32 (to 5 %).

    A regression: after a forward pass without a backward pass, FSDP leaves the embeddings, the last norm and the head
    gathered, in bfloat16. An optimizer that is made then holds those copies, and the stored weights never move.
    """
    ways = []
    for precision in ("float32", "bfloat16"):
        trainer = make_trainer(tmp_path / precision, "sft", f"model.fsdp_policy_mp={precision}", "do_first_eval=true")
        start = loading.load_lm(trainer.config, torch.float32).state_dict()
        trainer.train()
        saved = checkpoint.load_state(str(tmp_path / precision / "run/LATEST/policy.pt"))
        assert [name for name in start if torch.equal(start[name], saved[name])] == []
        ways.append(moved(start, saved))
    assert (ways[0] - ways[1]).norm() < 0.05 * ways[0].norm()


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_forward_leaves_the_float32_weights_as_they_were(tmp_path, packing):
    """After an evaluation in bfloat16, the saved float32 weights are unchanged, bit by bit, and not rounded."""
    trainer = make_trainer(tmp_path, "sft", "model.fsdp_policy_mp=bfloat16", f"model.packing={packing}")
    start = loading.load_lm(trainer.config, torch.float32).state_dict()
    trainer.evaluate()
    assert all(torch.equal(tensor, start[name]) for name, tensor in state_of(trainer).items())


def chosen_logps(trainer, batch):
    """Return `policy_chosen_logps` and `policy_rejected_logps`, as a loss gets them."""
    _, seen = trainer.forward(batch)
    return trainer.split(seen, seen.policy.logps)


def test_average_log_prob(tmp_path):
    """With `average_log_prob: true` a loss gets the mean log-prob over a response's tokens, otherwise the sum."""
    batch = batches_for("sft", 1)[0]
    summed = make_trainer(tmp_path / "sum", "sft", batches=[batch])
    mean = make_trainer(tmp_path / "mean", "sft", "++loss.average_log_prob=true", batches=[batch])
    lengths = torch.tensor([float(len(one.responses[0])) for one in batch])
    with torch.no_grad():
        (sums, _), (means, _) = (chosen_logps(trainer, batch) for trainer in (summed, mean))
    torch.testing.assert_close(means * lengths, sums)


def test_the_reference_does_not_move(tmp_path):
    trainer = make_trainer(tmp_path, "dpo")
    before = {name: tensor.clone() for name, tensor in trainer.reference_model.lm.state_dict().items()}
    trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.reference_model.lm.state_dict().items())
    assert not trainer.reference_model.training
    assert not any(p.requires_grad or p.grad is not None for p in trainer.reference_model.parameters())


#### METRICS


def outcome(losses, chosen_rewards, rejected_rewards, chosen_logps=None, rejected_logps=None) -> trainers.Outcome:
    vectors = (
        losses,
        chosen_rewards,
        rejected_rewards,
        chosen_logps or chosen_rewards,
        rejected_logps or rejected_rewards,
    )
    return trainers.Outcome(*(torch.tensor(vector, dtype=torch.float32) for vector in vectors))


def summary(trainer_class, *outcomes) -> dict[str, float]:
    return trainer_class.summarize(trainer_class.__new__(trainer_class), list(outcomes), "train")


def test_metrics_of_pairs_by_hand():
    """The rewards of the pairs are (1, 0), (2, 3), (5, 5) and (4, -2): two wins and a tie, so accuracy is 2.5 / 4.

    The means are (1 + 2 + 5 + 4) / 4 = 3 and (0 + 3 + 5 - 2) / 4 = 1.5, and the margin is 3 - 1.5.
    """
    values = summary(
        trainers.DPOTrainer,
        outcome([1, 2, 3], [1, 2, 5], [0, 3, 5], [-1, -2, -3], [-10, -20, -30]),
        outcome([6], [4], [-2], [-6], [-40]),
    )
    assert values == {
        "loss/train": 3.0,
        "rewards_train/chosen": 3.0,
        "rewards_train/rejected": 1.5,
        "rewards_train/accuracies": 0.625,
        "rewards_train/margins": 1.5,
        "logps_train/chosen": -3.0,
        "logps_train/rejected": -25.0,
    }


def test_metrics_of_single_responses_by_hand():
    """Chosen 1, 2, 4 and rejected 0, 4 have six combinations: 1 > 0, 2 > 0, 4 > 0 are wins, and 4 = 4 is half a win."""
    values = summary(trainers.KTOTrainer, outcome([1, 2, 3, 4, 5], [1, 2, 4], [0, 4]))
    assert values["rewards_train/accuracies"] == pytest.approx(3.5 / 6)
    assert values["rewards_train/margins"] == pytest.approx(7 / 3 - 4 / 2)
    assert values["loss/train"] == 3.0


def test_metrics_without_one_half():
    """Metrics that cannot be computed are left out, and are never NaN."""
    assert summary(trainers.KTOTrainer, outcome([1, 3], [1, 2], [])) == {
        "loss/train": 2.0, "rewards_train/chosen": 1.5, "logps_train/chosen": 1.5,
    }  # fmt: skip
    assert summary(trainers.KTOTrainer, outcome([1, 3], [], [1, 2])) == {
        "loss/train": 2.0, "rewards_train/rejected": 1.5, "logps_train/rejected": 1.5,
    }  # fmt: skip


def test_evaluation_of_a_batch_by_hand(tmp_path):
    """SFT's evaluation loss is the mean of the summed negative log-likelihood over all test examples (5 + 3).

    The expected value is computed from the model's own logits, one sequence after the other.
    """
    batches = [batches_for("sft", 1, 5)[0], batches_for("sft", 1, 3, seed=1)[0]]
    trainer = make_trainer(tmp_path, "sft", eval_batches=batches)
    values = trainer.evaluate()
    trainer.policy.use_packing(False)
    expected = []
    for one in sum(batches, []):
        ids = torch.tensor([[*one.prompt, *one.responses[0]]])
        with torch.no_grad():
            every = trainer.policy.lm(ids).logits[0].log_softmax(-1)
        expected.append(-sum(every[i - 1, ids[0, i]].item() for i in range(len(one.prompt), ids.shape[1])))
    assert values["loss/eval"] == pytest.approx(sum(expected) / 8, rel=1e-5)
    assert values["logps_eval/chosen"] == pytest.approx(-sum(expected) / 8, rel=1e-5)
    assert trainer.policy.training


def test_kto_evaluates_batches_of_one_kind(tmp_path):
    """KTO can evaluate a batch without rejected responses, which binary feedback may give."""
    chosen = [judged(one, True) for one in batches_for("kto", 1)[0]]
    values = make_trainer(tmp_path, "kto", eval_batches=[chosen]).evaluate()
    assert values["loss/eval"] == pytest.approx(0.5)
    assert "rewards_eval/rejected" not in values and all(map(math.isfinite, values.values()))


def test_the_log_of_a_run(tmp_path, curves):
    """Three batches of 8 are logged, and evaluations before the first, after every 16 examples, and at the end."""
    curves()
    trainer = make_trainer(tmp_path, "dpo", "do_first_eval=true", "eval_every=16")
    trainer.train()
    evaluations, steps = rows_of(trainer, "eval"), rows_of(trainer)
    assert [(row["step"], row["examples"]) for row in evaluations] == [(0, 0), (2, 16), (3, 24)]
    assert [(row["step"], row["examples"]) for row in steps] == [(1, 8), (2, 16), (3, 24)]
    assert evaluations[0]["loss/eval"] == pytest.approx(math.log(2))
    assert evaluations[0]["rewards_eval/margins"] == 0
    for row in steps:
        assert row["counters/examples"] == row["examples"] and row["counters/updates"] == row["step"]
        assert row["grad_norm"] > 0 and row["examples_per_second"] > 0
    assert os.path.getsize(os.path.join(trainer.run_dir, "curves.png")) > 1000


def test_training_lowers_the_loss_it_trains_on(tmp_path):
    """On the same batch ten times, SFT's loss falls at every update, at a small learning rate."""
    _, rows = trained(tmp_path, "sft", "lr=1e-3", batches=batches_for("sft", 1) * 10)
    losses = [row["loss/train"] for row in rows]
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))


#### THE UPDATE


def test_gradients_are_clipped_by_their_global_norm(tmp_path):
    """With SGD at lr 0.01 and max_grad_norm 0.5 the weights move by 0.01 * 0.5, in the direction of the gradient.

    The logged norm is the one before clipping.
    """
    batches = batches_for("sft", 1)
    free, (row,) = trained(tmp_path / "free", "sft", "model.max_grad_norm=1e9", batches=batches)
    clipped, (clipped_row,) = trained(tmp_path / "clipped", "sft", "model.max_grad_norm=0.5", batches=batches)
    assert row["grad_norm"] == pytest.approx(float(free.norm()) / 0.01, rel=1e-4)
    assert clipped_row["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-6)
    assert clipped.norm() == pytest.approx(0.01 * 0.5, rel=1e-4)
    assert torch.cosine_similarity(free, clipped, dim=0) == pytest.approx(1, abs=1e-6)


def factors(folder, *words, n_batches=10) -> list[float]:
    """Return the factor of the peak learning rate for each update, and for one more."""
    config = make_config(folder, "loss=sft", *SMALL, *words)
    trainer = trainers.SFTTrainer(torch.nn.Linear(1, 1), None, None, config, Batches([[None]] * n_batches), None, "")
    return [trainer.lr_factor(update) for update in range(n_batches + 1)]


def test_warmup(tmp_path):
    """Four updates of warm-up have the factors 1/5, 2/5, 3/5, 4/5; then 1. A factor of 0 would waste an update."""
    assert factors(tmp_path, "warmup_steps=4", n_batches=6) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    assert factors(tmp_path, "warmup_steps=0", n_batches=2) == [1, 1, 1]
    assert factors(tmp_path, "warmup_steps=150", n_batches=1)[0] == pytest.approx(1 / 151)


def test_linear_and_cosine_end_at_0(tmp_path):
    """Two updates of warm-up, then eight from 1 to 0: linear 1 - k / 8, cosine (1 + cos(pi k / 8)) / 2."""
    linear = factors(tmp_path, "warmup_steps=2", "lr_scheduler=linear")
    assert linear == pytest.approx([1 / 3, 2 / 3, *(1 - k / 8 for k in range(9))])
    cosine = factors(tmp_path, "warmup_steps=2", "lr_scheduler=cosine")
    assert cosine == pytest.approx([1 / 3, 2 / 3, *((1 + math.cos(math.pi * k / 8)) / 2 for k in range(9))])
    assert linear[-1] == 0 and cosine[-1] == pytest.approx(0) and cosine[6] == pytest.approx(0.5)


def test_a_schedule_counts_updates_not_microbatches(tmp_path):
    """Ten microbatches, three per update, are four updates (3, 3, 3, 1), so linear goes 1, 3/4, 1/2, 1/4, 0."""
    words = ("lr_scheduler=linear", "model.gradient_accumulation_steps=3")
    assert factors(tmp_path, *words)[:5] == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_the_schedule_reaches_the_weights(tmp_path):
    """SGD moves the weights by lr * factor * gradient, so one update at the factor 1/5 moves them a fifth as far."""
    batches = batches_for("sft", 1)
    full, _ = trained(tmp_path / "full", "sft", batches=batches)
    fifth, _ = trained(tmp_path / "fifth", "sft", "warmup_steps=4", batches=batches)
    assert (fifth - full / 5).norm() < 1e-4 * full.norm()


def test_the_logged_lr_is_the_one_that_was_used(tmp_path):
    """With lr 0.01 and four updates of warm-up, the first updates use and log 1/5, 2/5, 3/5 of 0.01."""
    _, rows = trained(tmp_path, "sft", "warmup_steps=4")
    assert [row["lr"] for row in rows] == pytest.approx([0.002, 0.004, 0.006])


def test_weight_decay_spares_vectors(tmp_path):
    """Weight decay applies to matrices, and not to vectors, such as norms.

    With a gradient of 0, AdamW at lr 0.1 and weight decay 0.5 scales a decayed weight by 1 - 0.1 * 0.5 = 0.95.
    """
    trainer = make_trainer(tmp_path, "sft", "optimizer=AdamW", "lr=0.1", "++optimizer_kwargs.weight_decay=0.5")
    before = state_of(trainer)
    optimizer = trainer.make_optimizer()
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in trainer.policy.parameters()} and len(grouped) == len(
        set(grouped)
    )
    for parameter in trainer.policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, after in state_of(trainer).items():
        torch.testing.assert_close(after, before[name] * (0.95 if after.ndim > 1 else 1.0), rtol=1e-6, atol=0)


def test_eval_is_due_when_a_multiple_is_passed(tmp_path):
    """With eval_every 8, evaluation is due after 8 examples, and again when a multiple of 8 has been passed."""
    trainer = make_trainer(tmp_path, "sft")
    assert not trainer.eval_is_due()
    trainer.state.position = {"examples_seen": 8}
    assert trainer.eval_is_due()
    trainer.state.evaluated_at = 8
    assert not trainer.eval_is_due()
    trainer.state.position = {"examples_seen": 21}  # after an incomplete batch at the end of an epoch
    assert trainer.eval_is_due()


#### NOT FINITE


class Overflowing(trainers.SFTTrainer):
    """SFT with a loss that is infinite on the second batch."""

    calls = 0

    def loss(self, *logps):
        losses, *rewards = super().loss(*logps)
        self.calls += 1
        return losses * (float("inf") if self.calls == 2 else 1.0), *rewards


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_weights(tmp_path, where, precision, monkeypatch):
    """If the second update is not finite, the weights are those after the first one, bit by bit.

    They are in not_finite/, with the examples of the second update. LATEST is what it was: there is none yet.
    """
    batches = batches_for("sft", 3)
    trainer = make_trainer(tmp_path, "sft", f"model.fsdp_policy_mp={precision}", batches=batches)
    after_each = []
    log_step = trainer.log_step
    monkeypatch.setattr(trainer, "log_step", lambda *args: (after_each.append(state_of(trainer)), log_step(*args)))
    if where == "loss":
        trainer.__class__ = Overflowing
    else:  # a finite loss whose gradient is NaN, as sqrt at 0 has
        backward = trainer.forward_backward

        def spoiled(batch):
            result = backward(batch)
            if batch[0] is batches[1][0]:
                next(trainer.policy.parameters()).grad.mul_(float("nan"))
            return result

        monkeypatch.setattr(trainer, "forward_backward", spoiled)
    monkeypatch.setattr(trainer, "eval_is_due", lambda: False)
    with pytest.raises(
        UserError, match=f"the {where} is not finite after 1 updates.*the 8 examples are in .*not_finite"
    ):
        trainer.train()
    assert len(after_each) == 1
    now = state_of(trainer)
    saved = checkpoint.load_state(os.path.join(trainer.run_dir, "not_finite", "policy.pt"))
    assert not os.path.exists(os.path.join(trainer.run_dir, "LATEST"))
    for name, tensor in after_each[0].items():
        assert torch.equal(now[name], tensor) and torch.equal(saved[name], tensor)
    with open(os.path.join(trainer.run_dir, "not_finite", "examples.json")) as file:
        written = json.load(file)
    assert written == [
        {
            "prompt": tokenizer().decode(one.prompt),
            "responses": [tokenizer().decode(one.responses[0])],
            "ids": [*one.ids],
        }
        for one in batches[1]
    ]


def test_not_finite_names_all_examples_of_the_update(tmp_path, monkeypatch):
    """If an accumulated gradient is not finite, the examples of both microbatches (2 x 4) are written down."""
    batches = batches_for("sft", 2, 4)
    trainer = make_trainer(tmp_path, "sft", "model.gradient_accumulation_steps=2", batches=batches)
    next(trainer.policy.parameters()).grad = torch.full_like(next(trainer.policy.parameters()), float("inf"))
    with pytest.raises(UserError, match="the gradient is not finite after 0 updates.*the 8 examples"):
        trainer.guarded_step(batches)
    with open(os.path.join(trainer.run_dir, "not_finite", "examples.json")) as file:
        assert len(json.load(file)) == 8


#### CHECKPOINTS

PROBE = torch.tensor([[5, 6, 7, 8, 9, 10]])


def logits_of(lm) -> torch.Tensor:
    with torch.no_grad():
        return lm.eval()(PROBE, use_cache=False).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of three updates, saved after each: (folder with run/, trainer, final logits)."""
    folder = tmp_path_factory.mktemp("cache")
    trainer = make_trainer(folder, "dpo", "intermediate_checkpoints=true", "datasets=[demo]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "draw_curves", lambda *args: None)
        trainer.train()
    trainer.policy.use_packing(False)
    return folder, trainer, logits_of(trainer.policy.lm)


def test_policy_pt(run):
    """policy.pt is {'step_idx', 'state', 'metrics'} with the model's own names, in float32; weights_only opens it."""
    folder, trainer, _ = run
    saved = torch.load(folder / "run/LATEST/policy.pt", weights_only=True)
    assert saved.keys() == {"step_idx", "state", "metrics"}
    assert saved["step_idx"] == 3
    assert saved["metrics"]["loss/eval"] == rows_of(trainer, "eval")[-1]["loss/eval"]
    config = make_config(folder, "loss=dpo", *SMALL)
    fresh = loading.load_lm(config, torch.float32)
    assert list(saved["state"]) == list(fresh.state_dict())
    for name, tensor in state_of(trainer).items():
        assert saved["state"][name].dtype == torch.float32 and torch.equal(saved["state"][name], tensor)


def test_the_export_is_opened_by_transformers(run):
    """transformers opens the export: the same logits bit by bit, the same tokenizer, and a model card.

    The export is float32, because a model with random weights has no dtype of a base checkpoint.
    """
    folder, _, logits = run
    latest = folder / "run" / "LATEST"
    lm = AutoModelForCausalLM.from_pretrained(latest)
    assert lm.dtype == torch.float32
    assert torch.equal(logits_of(lm), logits)
    text = "\n\nHuman: hello there"
    assert AutoTokenizer.from_pretrained(latest)(text)["input_ids"] == tokenizer()(text)["input_ids"]
    card = (latest / "README.md").read_text()
    assert "`dpo` loss" in card and "| loss/eval |" in card and "from_pretrained" in card
    assert (latest / "config.yaml").exists()


def test_export_dtype(tmp_path):
    """`model.export_dtype=bfloat16` rounds the export and not policy.pt; config.json has the dtype."""
    trainer = make_trainer(tmp_path, "sft", "model.export_dtype=bfloat16")
    trainer.save()
    latest = tmp_path / "run" / "LATEST"
    exported = load_file(latest / "model.safetensors")
    for name, tensor in state_of(trainer).items():
        assert torch.equal(exported[name], tensor.to(torch.bfloat16))
    assert json.loads((latest / "config.json").read_text())["dtype"] == "bfloat16"
    assert checkpoint.load_state(str(latest / "policy.pt"))["lm_head.weight"].dtype == torch.float32


def test_policy_dtype(tmp_path):
    """Weights that are stored in bfloat16 are saved in bfloat16."""
    trainer = make_trainer(tmp_path, "sft", "model.policy_dtype=bfloat16")
    trainer.save()
    state = checkpoint.load_state(str(tmp_path / "run/LATEST/policy.pt"))
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_intermediate_checkpoints(run):
    """Each evaluation leaves a directory step-N, LATEST equals the last one, and no unfinished directory is left."""
    folder, _, _ = run
    names = {path.name for path in (folder / "run").iterdir() if path.is_dir()}
    assert names == {"LATEST", "evaluations", "step-1", "step-2", "step-3"}
    states = [checkpoint.load_state(str(folder / "run" / f"step-{i}" / "policy.pt")) for i in (1, 2, 3)]
    assert not torch.equal(states[0]["lm_head.weight"], states[1]["lm_head.weight"])
    latest = checkpoint.load_state(str(folder / "run/LATEST/policy.pt"))
    assert all(torch.equal(latest[name], tensor) for name, tensor in states[2].items())
    assert torch.load(folder / "run/step-2/policy.pt", weights_only=True)["step_idx"] == 2


def test_latest_alone_without_intermediate_checkpoints(tmp_path):
    """Without intermediate checkpoints there is only LATEST, which is replaced at each save."""
    trainer = make_trainer(tmp_path, "sft")
    trainer.train()
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {"LATEST", "evaluations"}
    assert torch.load(tmp_path / "run/LATEST/policy.pt", weights_only=True)["step_idx"] == 3


def test_tied_weights(tmp_path):
    """Tied weights are one tensor under two names after training; they are saved once, and tied again when loaded."""
    trainer = make_trainer(tmp_path, "sft", "++model.architecture.tie_word_embeddings=true")
    trainer.train()
    latest = tmp_path / "run" / "LATEST"
    state = torch.load(latest / "policy.pt", weights_only=True)["state"]
    head, embedding = state["lm_head.weight"], state["model.embed_tokens.weight"]
    assert head.data_ptr() == embedding.data_ptr()
    trainer.policy.use_packing(False)
    logits = logits_of(trainer.policy.lm)
    lm = AutoModelForCausalLM.from_pretrained(latest)
    assert lm.lm_head.weight is lm.model.embed_tokens.weight and torch.equal(logits_of(lm), logits)
    words = ("++model.architecture.tie_word_embeddings=true", "model.load_from=run/LATEST/policy.pt")
    lm = loading.load_lm(make_config(tmp_path, "loss=sft", *SMALL, *words), torch.float32)
    assert lm.lm_head.weight is lm.model.embed_tokens.weight and torch.equal(logits_of(lm), logits)


def test_a_save_that_dies_leaves_the_old_latest(tmp_path, monkeypatch):
    """If a save fails, LATEST is the old checkpoint: the new one is renamed to LATEST only when it is complete."""
    trainer = make_trainer(tmp_path, "sft")
    trainer.save()
    before = checkpoint.load_state(str(tmp_path / "run/LATEST/policy.pt"))["lm_head.weight"].clone()
    trainer.train_step(trainer.train_loader.batches[:1])

    def full_disk(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "export", full_disk)
        with pytest.raises(OSError, match="No space"):
            trainer.save()
    assert torch.equal(checkpoint.load_state(str(tmp_path / "run/LATEST/policy.pt"))["lm_head.weight"], before)
    trainer.save()  # the leftovers do not disturb the next save
    assert not torch.equal(checkpoint.load_state(str(tmp_path / "run/LATEST/policy.pt"))["lm_head.weight"], before)


#### LOAD_FROM


def hub_repository(latest, folder):
    """Write a directory like a hub repository: sharded safetensors with an index, and no policy.pt."""
    folder.mkdir()
    state = load_file(latest / "model.safetensors")
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: state[key].contiguous() for key in keys}, folder / shard, metadata={"format": "pt"})
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "generation_config.json", "README.md", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(latest / name, folder / name)
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    return folder


def test_load_from_in_three_forms(run, tmp_path):
    """From each form of `model.load_from`, policy and reference get the run's final weights, bit by bit.

    The forms: policy.pt relative to cache_dir or absolute, a Hugging Face directory, the layout of a hub repository.
    """
    folder, _, logits = run
    latest = folder / "run" / "LATEST"
    forms = ["run/LATEST/policy.pt", str(latest / "policy.pt"), str(latest)]
    forms.append(str(hub_repository(latest, tmp_path / "archangel_dpo_tiny")))
    for form in forms:
        config = make_config(folder, "loss=dpo", *SMALL, f"model.load_from={form}", "model.packing=false")
        loading.check_load_from(config)
        policy, reference = loading.load_policy_and_reference(config, tokenizer(), CPU)
        assert torch.equal(logits_of(policy.lm), logits)
        assert torch.equal(logits_of(reference.lm), logits)


def test_training_goes_on_from_load_from(run):
    """If training starts from the run's policy, the reference is that policy, too: DPO's log-ratios start at 0."""
    folder, _, _ = run
    trainer = make_trainer(folder, "dpo", "exp_name=next", "model.load_from=run/LATEST/policy.pt")
    outcome = trainer.forward_backward(trainer.train_loader.batches[0])
    assert not outcome.chosen_rewards.any()


def load(folder, path) -> None:
    """Check `model.load_from=path` as a run does before anything else loads."""
    loading.check_load_from(make_config(folder, "loss=sft", *SMALL, f"model.load_from={path}"))


def test_a_missing_policy_pt(tmp_path):
    with pytest.raises(UserError, match=r"nothing/policy.pt does not exist; model.load_from takes a policy.pt"):
        load(tmp_path, "nothing/policy.pt")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_policy_pt(run, tmp_path, share):
    """A policy.pt that is cut anywhere is refused; the message names the file and a remedy."""
    data = (run[0] / "run/LATEST/policy.pt").read_bytes()
    (tmp_path / "policy.pt").write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        UserError, match=r"policy.pt is damaged, or not a policy.pt of this project \(.*another checkpoint"
    ):
        load(tmp_path, "policy.pt")


@pytest.mark.parametrize("content", [[1, 2], {"weights": {}}, 7], ids=str)
def test_another_file_that_torch_wrote(tmp_path, content):
    torch.save(content, tmp_path / "policy.pt")
    with pytest.raises(UserError, match="not a policy.pt of this project"):
        load(tmp_path, "policy.pt")


def test_a_file_that_runs_code_is_not_run(tmp_path):
    """A pickle that contains a function call is refused and not executed."""

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"state": Harmful()}, tmp_path / "policy.pt")
    with pytest.raises(UserError, match="not a policy.pt of this project"):
        load(tmp_path, "policy.pt")
    assert not (tmp_path / "harm").exists()


def changed(run, tmp_path, change) -> str:
    """Return the error message for the run's policy.pt after `change` was applied to its state."""
    saved = torch.load(run[0] / "run/LATEST/policy.pt", weights_only=True)
    change(saved["state"])
    torch.save(saved, tmp_path / "policy.pt")
    with pytest.raises(UserError, match="is a checkpoint of another architecture: it ") as error:
        load(tmp_path, "policy.pt")
    return str(error.value)


def test_the_first_differing_key_is_named(run, tmp_path):
    """A missing weight, an extra one, and one of another shape are named; of several, the first in model order."""

    def narrow(state):
        state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"][:7]
        state["lm_head.weight"] = state["lm_head.weight"][:7]

    message = changed(run, tmp_path, lambda state: state.pop("model.layers.0.self_attn.k_proj.weight"))
    assert "it has no model.layers.0.self_attn.k_proj.weight" in message
    message = changed(run, tmp_path, lambda state: state.update({"v_head.weight": torch.zeros(1)}))
    assert "it has v_head.weight, which the model does not have" in message
    message = changed(run, tmp_path, narrow)
    assert "it has model.layers.1.mlp.up_proj.weight of shape (7, 32), the model of (48, 32)" in message


def test_another_architecture(run):
    """For a model with one more layer, the first weight that the checkpoint lacks is named."""
    folder, _, _ = run
    config = make_config(
        folder, "loss=sft", *SMALL, "model.load_from=run/LATEST/policy.pt", "model.architecture.num_hidden_layers=3"
    )
    with pytest.raises(UserError, match=r"another architecture: it has no model.layers.2.*choose the model= it is of"):
        loading.check_load_from(config)


def test_a_directory_that_lacks_a_weight(run, tmp_path):
    """A directory that lacks a weight is refused. transformers would start that weight at random values."""
    folder, _, _ = run
    directory = hub_repository(folder / "run" / "LATEST", tmp_path / "repository")
    state = load_file(folder / "run/LATEST/model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = make_config(folder, "loss=sft", *SMALL, f"model.load_from={directory}")
    with pytest.raises(UserError, match="lacks the weight model.layers.1.mlp.up_proj.weight"):
        loading.load_policy_and_reference(config, tokenizer(), CPU)


def test_a_directory_that_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    config = make_config(tmp_path, "loss=sft", *SMALL, f"model.load_from={tmp_path / 'empty'}")
    with pytest.raises(UserError, match=r"model.load_from=.*empty cannot be loaded"):
        loading.load_policy_and_reference(config, tokenizer(), CPU)


#### THE RUN DIRECTORY


def test_an_existing_run_is_refused(tmp_path):
    config = make_config(tmp_path, "loss=sft", *SMALL)
    run_dir.refuse_existing(config)
    run_dir.create(config)
    with pytest.raises(UserError, match=r"run already holds a run; .*overwrite=true \(renames it to .*run.bak-N\)"):
        run_dir.refuse_existing(config)


def test_an_empty_directory_is_no_run(tmp_path):
    (tmp_path / "run").mkdir()
    config = make_config(tmp_path, "loss=sft", *SMALL)
    run_dir.refuse_existing(config)
    run_dir.create(config)
    assert os.listdir(tmp_path) == ["run"] and os.listdir(tmp_path / "run") == ["config.yaml"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="run is a file"):
        run_dir.refuse_existing(make_config(tmp_path, "loss=sft", *SMALL, "overwrite=true"))


def test_overwrite_renames_and_deletes_nothing(tmp_path):
    """overwrite=true renames: the second run moves the first to run.bak-1, the third the second to run.bak-2."""
    config = make_config(tmp_path, "loss=sft", *SMALL, "overwrite=true")
    for number in (1, 2, 3):
        run_dir.refuse_existing(config)
        directory = run_dir.create(config)
        with open(os.path.join(directory, "note"), "w") as file:
            file.write(str(number))
    assert sorted(os.listdir(tmp_path)) == ["run", "run.bak-1", "run.bak-2"]
    notes = [(tmp_path / name / "note").read_text() for name in ("run.bak-1", "run.bak-2", "run")]
    assert notes == ["1", "2", "3"]


def test_config_yaml_is_the_config(tmp_path):
    """config.yaml is the config with every `${...}` resolved."""
    config = make_config(tmp_path, "loss=kto", "model=tiny")
    directory = run_dir.create(config)
    written = OmegaConf.load(os.path.join(directory, "config.yaml"))
    assert written == OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    assert written.exp_name == "kto_tiny" == os.path.basename(directory)


def test_the_same_seed_gives_the_same_run(tmp_path):
    """The same seed gives the same training, bit by bit. Another seed gives other weights."""
    one, two = (trained(tmp_path / name, "kto") for name in ("one", "two"))
    assert torch.equal(one[0], two[0])
    lms = [
        loading.load_lm(make_config(tmp_path, "loss=sft", *SMALL, f"seed={seed}"), torch.float32) for seed in (1, 1, 2)
    ]
    assert torch.equal(lms[0].lm_head.weight, lms[1].lm_head.weight)
    assert not torch.equal(lms[0].lm_head.weight, lms[2].lm_head.weight)


def test_equal_prompts_in_a_batch_train_as_apart(tmp_path):
    """Responses of different examples with equal prompts share the prompt in a pack, and do not see each other.

    KTO on such a batch trains as with one forward pass per example.
    """
    batch = [
        example([5, 6, 7], [8, 9, 10], chosen=(True,)),
        example([5, 6, 7], [11, 12], chosen=(False,)),
        example([1, 2], [3], chosen=(True,)),
        example([5, 6, 7], [13, 14, 15, 16], chosen=(True,)),
    ]
    shared = trained(tmp_path / "shared", "kto", batches=[batch])
    apart = trained(tmp_path / "apart", "kto", "model.max_tokens_per_forward=1", batches=[batch])
    assert_same_training(shared, apart)


#### BEFORE THE FIRST UPDATE


def test_a_run_that_is_too_short_for_its_warmup_says_so(tmp_path):
    """Five updates of 150 warm-up steps: the last one has 5/151 of lr=5e-7, which is 1.7e-8."""
    words = "warmup_steps=150", "lr=5e-7"
    trainer = make_trainer(tmp_path, "sft", *words, batches=batches_for("sft", 5))
    (line,) = trainer.advice()
    assert line.startswith(
        "warning: updates in this run: 5, fewer than warmup_steps=150: the learning rate ends at 1.7e-08,"
    )
    trainer.config.warmup_steps = 5
    assert trainer.advice() == []


def test_kto_advises_on_its_batch_and_its_weights(tmp_path):
    """A batch of one response has no other half, so its KL is 0. Eight pairs have as many responses of each kind."""
    loader = loader_for("kto", 8, batch_size=1)
    trainer = make_trainer(tmp_path, "kto", "model.batch_size=1", "eval_every=1", train_loader=loader)
    balance, batch = trainer.advice()
    assert balance.startswith("8 desirable and 8 undesirable responses per epoch; ")
    assert batch.startswith("warning: model.batch_size=1: the other half of each batch")


#### SLOW DTYPES


def test_a_dtype_that_is_slow_on_this_cpu_is_a_warning(tmp_path, monkeypatch):
    """One line for each key that asks for it; none where bfloat16 is as fast, none on a GPU, none for float32."""
    rates = {torch.float32: 120.0, torch.bfloat16: 0.9}
    monkeypatch.setattr(advice, "product_rate", rates.get)
    words = ("model.fsdp_policy_mp=bfloat16", "model.reference_dtype=bfloat16")
    dtypes = loading.compute_dtypes(make_config(tmp_path, "loss=dpo", *words), CPU)
    lines = advice.slow_dtypes(dtypes, CPU)
    assert lines == [
        f"warning: model.{key}=bfloat16: this CPU multiplies at 0.9 GFLOP/s in it and at 120.0 in float32; use "
        f"model.{key}=float32"
        for key in ("fsdp_policy_mp", "reference_dtype")
    ]
    assert advice.slow_dtypes(dtypes, torch.device("cuda")) == []
    stored = loading.compute_dtypes(make_config(tmp_path, "loss=sft", "model.policy_dtype=bfloat16", words[1]), CPU)
    assert list(stored) == ["model.policy_dtype"]  # SFT has no reference model
    rates[torch.bfloat16] = 240.0
    assert advice.slow_dtypes(dtypes, CPU) == []
    plain = loading.compute_dtypes(make_config(tmp_path, "loss=dpo"), CPU)
    assert advice.slow_dtypes(plain, CPU) == [] and set(plain.values()) == {torch.float32}


def test_rates_of_products_are_measured():
    assert 0.01 < advice.product_rate(torch.bfloat16) < 1e5 and 0.1 < advice.product_rate(torch.float32) < 1e5
