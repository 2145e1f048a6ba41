"""The best evaluation: what counts as better, when BEST/ is written, and when a run stops."""

import os

import pytest
from omegaconf import OmegaConf

from halos import best, checkpoint, metrics, states
from halos.errors import UserError
from small_runs import batches_for, loader_for, make_trainer, rows_of

NAN = float("nan")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)


@pytest.fixture
def saved(monkeypatch) -> list[str]:
    """The names of the checkpoints that are written, instead of the checkpoints."""
    names: list[str] = []
    write = lambda paths, *args, step, **kwargs: names.extend(f"{os.path.basename(path)} {step}" for path in paths)  # noqa: E731
    monkeypatch.setattr(checkpoint, "save", write)
    return names


def settings(mode: str, patience: int | None = None, min_delta: float = 0.0, metric: str | None = "loss/eval"):
    return OmegaConf.create({"metric": metric, "mode": mode, "patience": patience, "min_delta": min_delta})


def followed(values: list[float], chosen) -> list[tuple]:
    """The best value after each evaluation, and the evaluations since then."""
    known, seen = {}, []
    for updates, value in enumerate(values):
        known = best.after(known, chosen, updates, {"loss/eval": value})
        seen.append((known.get("value"), known["worse"]))
    return seen


def test_what_is_better_by_hand():
    assert followed([3, 2, 2, 4, 1], settings("min")) == [(3, 0), (2, 0), (2, 1), (2, 2), (1, 0)]
    assert followed([3, 2, 4], settings("max")) == [(3, 0), (3, 1), (4, 0)]
    assert followed([3, 2.6, 2.4, 2.0], settings("min", min_delta=0.5)) == [(3, 0), (3, 1), (2.4, 0), (2.4, 1)]
    assert followed([NAN, 3, NAN, 2], settings("min")) == [(None, 1), (3, 0), (3, 1), (2, 0)]
    assert best.after({}, settings("min", metric=None), 1, {"loss/eval": 1}) == {}


def test_an_unknown_metric_is_named_with_its_neighbours():
    """At the first evaluation. One that is missing later is one without a better value."""
    with pytest.raises(UserError, match="best.metric=loss/evla is not a metric of the evaluations; did you mean"):
        best.after({}, settings("min", metric="loss/evla"), 0, {"loss/eval": 1.0})
    known = {"value": 1.0, "updates": 0, "worse": 0}
    assert best.after(known, settings("min"), 4, {"others": 1.0}) == {**known, "worse": 1}


def test_what_the_config_must_say():
    for values, message in (
        ({"best.metric": None, "best.patience": 3, "best.mode": None}, "best.patience=3 needs a metric"),
        ({"best.metric": "loss/eval", "best.patience": None, "best.mode": None}, "best.metric=loss/eval needs a direc"),
        (
            {"best.metric": "loss/eval", "best.patience": None, "best.mode": "min", "do_first_eval": False},
            "best.metric=loss/eval needs do_first_eval=true",
        ),
    ):
        with pytest.raises(UserError, match=message):
            best.check(values)


#### RUNS

BY_LOSS = ("best.metric=loss/eval", "best.mode=min", "best.patience=2")


def planted(trainer, values: list[float]):
    """Replace the evaluations of a trainer by ones with these losses, by the updates before them."""
    trainer.evaluate = lambda: {"loss/eval": values[trainer.state.updates]}
    return trainer


def test_a_run_stops_when_nothing_gets_better(tmp_path, saved, capsys):
    """Losses 5, 3, 4, 2, 3, 3, 1: the second evaluation in a row that is no better is that after 5 updates."""
    trainer = make_trainer(tmp_path, "sft", *BY_LOSS, "do_first_eval=true", batches=batches_for("sft", 7))
    planted(trainer, [5, 3, 4, 2, 3, 3, 1, 9]).train()
    assert trainer.state.updates == 5
    assert saved == ["BEST 0", "LATEST 1", "BEST 1", "LATEST 2", "LATEST 3", "BEST 3", "LATEST 4", "LATEST 5"]
    assert (
        "stopped early: 2 evaluations without a better loss/eval; the best is 2 at step 3, whose weights are in BEST"
    ) in capsys.readouterr().out


def test_a_trainers_own_should_stop_counts_as_well(tmp_path, saved):
    trainer = make_trainer(tmp_path, "sft", *BY_LOSS, batches=batches_for("sft", 7))
    trainer.should_stop = lambda: trainer.state.updates == 2
    planted(trainer, [9, 8, 7, 6, 5, 4, 3, 2]).train()
    assert trainer.state.updates == 2


def test_a_resumed_run_knows_its_best(tmp_path, saved):
    """Killed after 3 updates, with the state of the 2nd: the evaluations of the rest are counted on."""
    losses = [5, 1, 2, 0.5, 3, 0.7, 4, 9]
    words = (*BY_LOSS, "keep_checkpoints=2", "eval_every=8", "best.patience=3")
    loader = {"batch_size": 8}
    whole = make_trainer(tmp_path / "whole", "sft", *words, train_loader=loader_for("sft", 56, **loader))
    planted(whole, losses).train()
    assert whole.state.updates == 6 and whole.state.best == {"value": 0.5, "updates": 3, "worse": 3}
    first = make_trainer(tmp_path / "parts", "sft", *words, train_loader=loader_for("sft", 56, **loader))
    first.should_stop = lambda: first.state.updates == 2
    planted(first, losses).train()
    again = make_trainer(tmp_path / "parts", "sft", *words, "resume=true", train_loader=loader_for("sft", 56, **loader))
    again.load_state(states.newest(again.run_dir))
    assert again.state.best == {"value": 1, "updates": 1, "worse": 1}
    planted(again, losses).train()
    assert again.state.best == whole.state.best and again.state.updates == 6
    ended = [[(row["step"], row["loss/eval"]) for row in rows_of(one, "eval")] for one in (whole, again)]
    assert ended[0] == ended[1]


def test_best_is_a_whole_checkpoint(tmp_path):
    """BEST has what LATEST had then, and shares its files; both are found and checked as LATEST is."""
    trainer = make_trainer(tmp_path, "sft", "best.metric=loss/eval", "best.mode=min", batches=batches_for("sft", 2))
    values = iter([1.0, 2.0])
    own = trainer.evaluate
    trainer.evaluate = lambda: own() | {"loss/eval": next(values)}
    trainer.train()
    content = {
        name: checkpoint.load_state(os.path.join(trainer.run_dir, name, "policy.pt")) for name in ("BEST", "LATEST")
    }
    assert any((content["BEST"][name] != content["LATEST"][name]).any() for name in content["LATEST"])
    checkpoint.check_whole(os.path.join(trainer.run_dir, "BEST"))
    assert set(os.listdir(os.path.join(trainer.run_dir, "BEST"))) == set(
        os.listdir(os.path.join(trainer.run_dir, "LATEST"))
    )
