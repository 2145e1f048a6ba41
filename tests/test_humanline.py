"""The humanline clamp: the log-ratio of each token within bounds, for any loss with a reference model."""

import math

import pytest
import torch

import dataloaders
import trainers
from halos import metrics
from halos.config import validate
from halos.engine import Batch
from halos.errors import UserError
from halos.models import PerToken
from helpers import example, make_config
from small_runs import make_trainer, state_of
from test_losses import bare, close, vector

ON = ("humanline.enabled=true",)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)


def test_the_clamp_by_hand():
    """Log-ratios 3, -2, 1 | 0.5, -3 of a pair, clamped to [-1, 1.5], are 1.5, -1, 1 | 0.5, -1: sums 1.5 and -0.5.

    DPO with beta 0.5 costs ln(1 + e^-1), and the gradients of tokens within the bounds are -/+ 0.5 sigmoid(-1).
    """
    ratios = vector(3, -2, 1, 0.5, -3)
    logps, reference = (ratios - 4).requires_grad_(), torch.full((5,), -4.0)
    batch = Batch([example([1], [2, 3, 4], [5, 6])], PerToken(logps, None, None), reference).clamped(-1, 1.5)
    outcome = bare(trainers.DPOTrainer, beta=0.5).batch_loss(batch)
    close(outcome.losses, (math.log(1 + math.exp(-1)),))
    close(outcome.chosen_rewards, (0.75,))
    close(outcome.rejected_rewards, (-0.25,))
    outcome.losses.sum().backward()
    slope = 0.5 / (1 + math.e)
    close(logps.grad, (0, 0, -slope, slope, 0))
    assert batch.metrics["clamped/tokens"].tolist() == [True, True, False, False, True]
    assert torch.equal(batch.policy.logps[2:4], logps[2:4])


@pytest.mark.parametrize("loss", ["dpo", "kto", "kto_mismatched", "ppo"])
def test_clamped_tokens_have_no_gradient(tmp_path, loss):
    """Whoever gives the reference log-probs, and whatever the loss: here every second token is 9 nats off.

    The share of clamped tokens is logged, in training and in evaluation.
    """
    trainer = make_trainer(tmp_path, loss, *ON)
    live = trainer.reference_logps
    trainer.reference_logps = lambda examples: live(examples) - 9 * (torch.arange(len(live(examples))) % 2)
    forward, batch = trainer.forward(trainer.train_loader.batches[0])
    outcome = trainer.backward(trainer.batch_loss(batch), forward, batch)
    gradient, is_trained = forward.leaf.grad[:, 0], (~batch.unrelated).repeat_interleave(batch.lengths)
    assert batch.is_clamped.tolist() == [bool(i % 2) for i in range(len(gradient))]
    assert not gradient[batch.is_clamped].any() and gradient[~batch.is_clamped & is_trained].all()
    close((batch.policy.logps - batch.reference_logps)[batch.is_clamped], torch.tensor(1.5).expand(len(gradient) // 2))
    assert trainer.summarize([outcome], "train")["clamped/tokens"] == pytest.approx(0.5, abs=0.01)
    assert trainer.evaluate()["clamped_eval/tokens"] == pytest.approx(0.5, abs=0.01)


def test_bounds_that_nothing_reaches_change_nothing(tmp_path):
    """Training with bounds of 100 nats is training without, bit by bit; without them nothing is logged of them."""
    runs = [
        make_trainer(tmp_path / str(len(words)), "dpo", "lr=0.1", *words)
        for words in ((), (*ON, "humanline.log_epsilon_P=-100", "humanline.log_epsilon_R=100"))
    ]
    for trainer in runs:
        trainer.log_evaluation = trainer.save = lambda: None
        trainer.train()
    states = [state_of(trainer) for trainer in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    rows = [metrics.read_metrics(f"{trainer.run_dir}/metrics.jsonl") for trainer in runs]
    assert [row["loss/train"] for row in rows[0]] == [row["loss/train"] for row in rows[1]]
    assert "clamped/tokens" not in rows[0][0] and rows[1][-1]["clamped/tokens"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("loss=sft", *ON), "humanline.enabled=true clamps log-ratios to a reference model, and loss=sft has none"),
        (("loss=dpo", "humanline.log_epsilon_R=-1"), "humanline.log_epsilon_R=-1 must be a number of at least 0"),
        (("loss=dpo", "humanline.log_epsilon_P=1"), "humanline.log_epsilon_P=1 must be a number at most 0"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        validate(make_config(tmp_path, *words), trainers, dataloaders)
