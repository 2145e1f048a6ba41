"""Resuming: a run that goes on from a saved state is the run that would have been, bit by bit."""

import os

import pytest
import torch

from halos import checkpoint, metrics, states
from small_runs import batches_for, loader_for, losses, make_trainer


@pytest.fixture(autouse=True)
def no_pictures_and_exports(monkeypatch):
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)
    monkeypatch.setattr(checkpoint, "save", lambda *args, **kwargs: None)


def trainer_of(folder, loss, *words, **loader):
    """A trainer over two epochs of 36 examples: 5 updates each, the last of 4 examples. It evaluates and saves a state
    after every second full batch."""
    loader = loader_for(loss, 36, **{"batch_size": 8, "n_epochs": 2} | loader)
    words = ("eval_every=16", "lr_scheduler=cosine", "optimizer=AdamW", "lr=0.001", "keep_checkpoints=2", *words)
    return make_trainer(folder, loss, *words, train_loader=loader, eval_batches=batches_for(loss, 1, seed=1))


def resumed(folder, loss, *words, **loader):
    trainer = trainer_of(folder, loss, "resume=true", *words, **loader)
    trainer.load_state(states.newest(trainer.run_dir))
    return trainer


def killed(trainer, updates: int) -> None:
    """Train until so many updates are made, and stop as kill -9 does: with nothing said or saved."""

    def die(microbatches):
        if trainer.state.updates >= updates:
            trainer.states.wait()  # a kill while a state is written is another test
            raise Killed
        type(trainer).train_step(trainer, microbatches)

    trainer.train_step = die
    with pytest.raises(Killed):
        trainer.train()


class Killed(Exception):
    pass


def numbers(trainer) -> list[dict]:
    """All rows of metrics.jsonl, without how fast they were made."""
    rows = metrics.read_metrics(os.path.join(trainer.run_dir, "metrics.jsonl"))
    return [{key: value for key, value in row.items() if key != "examples_per_second"} for row in rows]


def assert_same_run(trainer, other) -> None:
    """Weights, optimizer and every row of the metrics are equal bit by bit."""
    assert numbers(trainer) == numbers(other)
    ours, theirs = (t.policy.state_dict() for t in (trainer, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (t.state.optimizer.state_dict() for t in (trainer, other))
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():
        assert all(torch.equal(ours["state"][index][key], value) for key, value in state.items())


@pytest.mark.parametrize("words", [(), ("model.gradient_accumulation_steps=2",), ("model.packing=false",)])
@pytest.mark.parametrize("loss", losses())
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, loss, words):
    """Of 10 updates, a state is saved after the 2nd, 4th, ... The run dies after 7, so a seventh is made twice."""
    whole = trainer_of(tmp_path / "whole", loss, *words)
    whole.train()
    per_step = getattr(whole.config.loss, "ppo_epochs", 1)
    killed(trainer_of(tmp_path / "parts", loss, *words), whole.state.updates * 7 // 10 // per_step * per_step)
    last = resumed(tmp_path / "parts", loss, *words)
    assert 0 < last.state.updates < whole.state.updates
    last.train()
    assert_same_run(last, whole)
