"""Checkpoints that were killed while they were written, or damaged later: found, finished, named, and passed over."""

import os
import signal
import subprocess
import sys

import pytest

import eval as eval_program
from halos import checkpoint, loading, locks, manifest, run_dir
from halos.errors import UserError
from helpers import PROJECT, make_config
from small_runs import SMALL, make_trainer


@pytest.fixture
def trainer(tmp_path):
    """A run with the checkpoints step-1, step-2 and LATEST, which is step-2."""
    trainer = make_trainer(tmp_path, "sft", "intermediate_checkpoints=true")
    for trainer.state.updates in (1, 2):
        checkpoint_of(trainer)
    return trainer


def checkpoint_of(trainer) -> None:
    trainer.log = trainer.open_log()
    trainer.log.evaluation(trainer.state.updates, 0, {"loss/eval": 1.0})
    trainer.log.close()
    trainer.save()


def flip(path: str, position: int = -100) -> None:
    with open(path, "r+b") as file:
        file.seek(position, os.SEEK_END if position < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_the_config_of_a_checkpoint_has_no_password(tmp_path):
    """It was saved as it is, while the config of the run had its passwords replaced; checkpoints are uploaded."""
    trainer = make_trainer(tmp_path, "sft", "sampler_url='http://me:swordfish@host:1/v1'")
    trainer.write_checkpoint([f"{trainer.run_dir}/LATEST"])
    for folder in ("", "LATEST/"):
        with open(f"{trainer.run_dir}/{folder}config.yaml") as file:
            text = file.read()
        assert "swordfish" not in text and "host:1/v1" in text


def test_every_checkpoint_has_a_manifest_and_nothing_is_left(trainer):
    run = trainer.run_dir
    assert sorted(os.listdir(run)) == ["LATEST", "config.yaml", "curves.png", "metrics.jsonl", "step-1", "step-2"]
    for name in ("LATEST", "step-1", "step-2"):
        manifest.check(os.path.join(run, name))
    assert os.path.samefile(f"{run}/LATEST/policy.pt", f"{run}/step-2/policy.pt")  # linked, not copied


KILLED = """
import os, signal, sys
from halos import files
rename, left = os.rename, int(sys.argv[2])
def dies(*paths):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    rename(*paths)
os.rename = dies
files.replace_directory(sys.argv[1] + ".unfinished", sys.argv[1])
"""


@pytest.mark.parametrize(("renames", "complete", "found"), [(0, True, 2), (1, True, 3), (1, False, 2)])
def test_a_kill_at_each_rename_is_found_and_finished(trainer, renames, complete, found):
    """After a kill between the two renames, eval.py said "holds no checkpoint ... train the run first", although
    LATEST.old was whole.

    renames: done before the kill; complete: whether the new checkpoint was; found: the step of LATEST afterwards
    """
    latest = os.path.join(trainer.run_dir, "LATEST")
    os.rename(latest, latest + ".kept")
    trainer.state.updates = 3
    checkpoint_of(trainer)
    os.rename(latest, latest + ".unfinished")
    os.rename(latest + ".kept", latest)
    if not complete:
        os.remove(os.path.join(latest + ".unfinished", manifest.NAME))
    killed = subprocess.run([sys.executable, "-c", KILLED, latest, str(renames)], cwd=PROJECT)
    assert killed.returncode == -signal.SIGKILL
    assert os.path.isdir(latest) == (renames == 0)
    assert eval_program.find_policy_pt(f"{trainer.run_dir}/config.yaml") == f"{latest}/policy.pt"
    run_dir.recover(trainer.run_dir)
    assert not [name for name in os.listdir(trainer.run_dir) if name.endswith((".old", ".unfinished"))]
    manifest.check(latest)
    assert checkpoint_step(latest) == found


def checkpoint_step(directory: str) -> int:
    import torch

    return torch.load(os.path.join(directory, "policy.pt"), weights_only=True)["step_idx"]


def test_a_reader_leaves_a_live_run_alone(trainer, monkeypatch):
    """While the run has its lock, nobody finishes its replacement; what was LATEST is read meanwhile."""
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    latest = os.path.join(trainer.run_dir, "LATEST")
    os.rename(latest, latest + ".old")
    with locks.take(trainer.run_dir):
        assert checkpoint.newest_whole(trainer.run_dir) == latest + ".old"
    assert checkpoint.newest_whole(trainer.run_dir) == latest


def test_the_config_of_a_checkpoint_that_was_being_replaced(trainer, monkeypatch):
    latest = os.path.join(trainer.run_dir, "LATEST")
    os.rename(latest, latest + ".old")
    monkeypatch.setattr(sys, "argv", ["eval.py", "-c", f"{latest}/config.yaml", "-m", "eval"])
    assert eval_program.load_run(eval_program.arguments())[1] == f"{latest}/policy.pt"


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(trainer, capfd, damage):
    """A flipped bit in policy.pt was evaluated as if it were the run; a truncated one ended eval.py."""
    run = trainer.run_dir
    path = os.path.join(run, "LATEST", "policy.pt")
    if damage == "flipped":
        flip(path)  # LATEST and step-2 are the same file
    else:
        os.truncate(path, 1000)
    assert eval_program.find_policy_pt(f"{run}/config.yaml") == f"{run}/step-1/policy.pt"
    warnings = capfd.readouterr().err.splitlines()
    reason = "its checksum differs" if damage == "flipped" else "has 1,000 bytes"
    assert len(warnings) == 2 and all(line.startswith("warning: ") and reason in line for line in warnings)
    assert f"{path} " in warnings[0] and all(f"{run}/step-1 is used instead" in line for line in warnings)


def test_without_a_whole_checkpoint_the_newest_damage_is_the_error(trainer):
    for name in ("LATEST", "step-1"):
        flip(os.path.join(trainer.run_dir, name, "policy.pt"))
    with pytest.raises(UserError, match=r"LATEST/policy.pt is not what was written.*no whole checkpoint, so train"):
        eval_program.find_policy_pt(f"{trainer.run_dir}/config.yaml")


@pytest.mark.parametrize("name", ["LATEST/policy.pt", "LATEST"])
def test_damaged_weights_to_start_from_are_named_with_the_whole_ones(trainer, tmp_path, name):
    """A checkpoint that a command names is never replaced by another: the user chooses."""
    run = trainer.run_dir
    flip(os.path.join(run, "LATEST", "model.safetensors"))
    flip(os.path.join(run, "LATEST", "policy.pt"))
    config = make_config(tmp_path, "loss=sft", *SMALL, f"model.load_from={run}/{name}")
    with pytest.raises(UserError, match=rf"LATEST/\S+ is not what was written: .*; whole are {run}/step-1$"):
        loading.check_load_from(config)


def test_what_is_not_read_is_not_checked(trainer, tmp_path):
    """An edited model card, or damage of the export only, does not keep policy.pt from being used."""
    run = trainer.run_dir
    with open(f"{run}/LATEST/README.md", "a") as file:
        file.write("a note")
    flip(f"{run}/LATEST/model.safetensors")
    loading.check_load_from(make_config(tmp_path, "loss=sft", *SMALL, f"model.load_from={run}/LATEST/policy.pt"))
    assert eval_program.find_policy_pt(f"{run}/config.yaml") == f"{run}/LATEST/policy.pt"


def test_checkpoints_of_earlier_versions_have_no_manifest(trainer, tmp_path, capfd):
    run = trainer.run_dir
    os.remove(f"{run}/LATEST/manifest.json")
    loading.check_load_from(make_config(tmp_path, "loss=sft", *SMALL, f"model.load_from={run}/LATEST/policy.pt"))
    assert eval_program.find_policy_pt(f"{run}/config.yaml") == f"{run}/LATEST/policy.pt"
    assert capfd.readouterr().err == ""


def test_a_save_that_fails_leaves_the_last_one_and_no_rest(trainer, monkeypatch):
    """Every disk that was full left LATEST.unfinished, with all that had fitted on it."""
    run = trainer.run_dir
    before = os.stat(f"{run}/LATEST/policy.pt").st_ino

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", fails)
    trainer.state.updates = 3
    with pytest.raises(OSError, match="No space left"):
        trainer.save()
    assert sorted(name for name in os.listdir(run) if os.path.isdir(f"{run}/{name}")) == ["LATEST", "step-1", "step-2"]
    assert os.stat(f"{run}/LATEST/policy.pt").st_ino == before


def test_the_next_start_clears_what_a_dead_run_left(trainer, tmp_path):
    """Whoever has the lock next finishes the run's replacements, and touches nothing that a user has made."""
    run = trainer.run_dir
    os.rename(f"{run}/LATEST", f"{run}/LATEST.old")
    for name in ("states/step-4.unfinished", "step-3.unfinished", "notes.old", "mine.unfinished"):
        os.makedirs(f"{run}/{name}")
    for name in (".curves.png.unfinished", "paper.old"):
        with open(f"{run}/{name}", "w") as file:
            file.write("torn")
    config = make_config(tmp_path, "loss=sft", *SMALL, "overwrite=true")
    with run_dir.locked(config):
        run_dir.create(config)
    kept = sorted(set(os.listdir(f"{run}.bak-1")) - {"config.yaml", "curves.png", "metrics.jsonl"})
    assert kept == ["LATEST", "mine.unfinished", "notes.old", "paper.old", "states", "step-1", "step-2"]
    assert os.listdir(f"{run}.bak-1/states") == []
    assert os.listdir(tmp_path / "run") == ["config.yaml"]
