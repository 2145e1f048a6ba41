"""The loggers beside the run directory, with their own libraries, and without the network."""

import json
import os
import subprocess
import sys

import pytest

from halos import loggers, metrics, states
from halos.errors import UserError
from helpers import PROJECT
from small_runs import loader_for, make_trainer

SECRET = "sk-abcdefghijklmnop123456"


def test_which_loggers_a_config_names():
    assert loggers.names([], False) == []
    assert loggers.names([], True) == ["wandb"]
    assert loggers.names(["tensorboard", "wandb"], True) == ["tensorboard", "wandb"]


def test_a_logger_that_is_unknown_or_not_installed(monkeypatch):
    with pytest.raises(UserError, match=r"log_to=\[tensorbord\] is not a logger; did you mean 'tensorboard'"):
        loggers.check({"log_to": ["tensorbord"], "wandb.enabled": False})
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log_to=\[trackio\]: trackio is not installed; pip install trackio"):
        loggers.check({"log_to": ["trackio"], "wandb.enabled": False})


def test_all_loggers_get_all_metrics():
    got = []

    class Recorder:
        def log(self, values, step):
            got.append((values, step))

        def finish(self):
            got.append("end")

    several = loggers.Loggers([Recorder(), Recorder()])
    several.log({"loss/train": 1.0}, step=3)
    several.finish()
    assert got == [({"loss/train": 1.0}, 3)] * 2 + ["end"] * 2


def test_tensorboard_has_what_metrics_jsonl_has(tmp_path, monkeypatch):
    """A run that goes on hides the steps that it makes again: each step has one value, the one in metrics.jsonl."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)
    words = ("log_to=[tensorboard]", "minimum_log_interval_secs=0", "keep_checkpoints=2", "save_every=16")

    def trainer(*more):
        return make_trainer(tmp_path, "sft", *words, *more, train_loader=loader_for("sft", 32, batch_size=8))

    first = trainer()
    first.save = lambda: None
    first.should_stop = lambda: first.state.updates == 3
    first.save_state = lambda: type(first).save_state(first) if first.state.updates == 2 else None
    first.train()
    again = trainer("resume=true")
    again.save = lambda: None
    again.load_state(states.newest(again.run_dir))
    assert again.state.updates == 2
    again.train()
    events = accumulator.EventAccumulator(os.path.join(again.run_dir, "tensorboard")).Reload()
    rows = metrics.read_metrics(os.path.join(again.run_dir, "metrics.jsonl"))
    for name, mode in (("loss/train", "train"), ("loss/eval", "eval"), ("grad_norm", "train")):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(row["step"], row[name]) for row in rows if row["mode"] == mode]
        assert logged == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]


TRACKIO = """
import json, sys
from omegaconf import OmegaConf
from halos import loggers
settings = {"enabled": False, "project": "archangel"}
model = {"name_or_path": "https://me:SECRET@host/m"}
config = OmegaConf.create({"log_to": ["trackio"], "wandb": settings, "exp_name": "kto", "model": model})
one = loggers.open_all(config, sys.argv[1], None)
one.log({"loss/train": 1.0}, step=1)
one.finish()
again = loggers.open_all(config, sys.argv[1], 1)
again.log({"loss/train": 0.5, "lr": 0.1}, step=2)
again.finish()
from trackio.sqlite_storage import SQLiteStorage
runs = SQLiteStorage.get_runs("archangel")
logs = SQLiteStorage.get_logs("archangel", "kto")
print("FOUND", json.dumps([runs, [{k: row[k] for k in row if k != "timestamp"} for row in logs]]))
""".replace("SECRET", SECRET)


def test_trackio_goes_on_in_its_run_and_knows_no_secret(tmp_path):
    """In a process of its own, since trackio reads where its data are when it is imported."""
    pytest.importorskip("trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": PROJECT}
    command = [sys.executable, "-c", TRACKIO, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs, rows = json.loads(done.stdout.partition("FOUND ")[2].partition("\n")[0])
    assert runs == ["kto"]
    assert rows == [{"loss/train": 1.0, "step": 1}, {"loss/train": 0.5, "lr": 0.1, "step": 2}]
    for folder, _, names in os.walk(tmp_path):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                assert SECRET.encode() not in file.read(), name
