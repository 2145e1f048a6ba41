"""One writer at a time: halos/locks.py, and what starts of runs do with it."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from omegaconf import OmegaConf

import eval as eval_program
from halos import locks, manifest, run_dir
from halos.errors import UserError
from halos.sample_files import PartialFile
from helpers import ONE_BLOCK, PROJECT

HOLD = "import sys, time; from halos import locks; lock = locks.take(sys.argv[1]); print('has it', flush=True); {}"


def other_process(path, then: str = "time.sleep(60)") -> subprocess.Popen:
    """Start a process that takes the lock of a path. Returns when it has it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(then), str(path)], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "has it\n"
    return process


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.0)


def test_a_lock_is_held_until_its_process_dies(tmp_path, impatient):
    """The kernel releases it: a run that was killed with SIGKILL does not lock its directory for ever."""
    process = other_process(tmp_path / "run")
    with pytest.raises(locks.Held, match=f"process {process.pid} on .* since 20"):
        locks.take(str(tmp_path / "run"))
    assert locks.holder(str(tmp_path / "run")) and locks.holder(str(tmp_path / "else")) is None
    end(process)
    with locks.take(str(tmp_path / "run")):
        assert f"process {os.getpid()} on" in str(locks.holder(str(tmp_path / "run")))
    assert locks.holder(str(tmp_path / "run")) is None


def test_a_lock_is_waited_for(tmp_path):
    process = other_process(tmp_path / "entry", "time.sleep(0.5)")
    said = []
    started = time.monotonic()
    with locks.take(str(tmp_path / "entry"), said.append):
        assert time.monotonic() - started > 0.2 and process.wait(5) == 0
    assert said == [said[0]] and f"process {process.pid} on" in said[0]
    end(process)


def test_two_ways_to_write_a_directory_have_one_lock(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    assert locks.lock_file(str(tmp_path / "link" / "run")) == locks.lock_file(str(tmp_path / "data" / "." / "run"))


def test_a_file_system_without_locks(tmp_path, monkeypatch, capfd):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    locks.take(str(tmp_path / "run")).release()
    assert "has no locks (Function not implemented); see to it" in capfd.readouterr().err


def test_a_lock_leaves_no_file_and_is_had_by_one_at_a_time(tmp_path):
    """Whoever waited for a lock whose file is removed meanwhile takes the new file, as everyone after it does."""
    path, order = str(tmp_path / "eval.json"), []

    def one(name: str) -> None:
        with locks.take(path, lambda who: None):
            order.append(name)
            time.sleep(0.02)
            order.append(name)

    threads = [threading.Thread(target=one, args=(str(n),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(order) == 16 and order[::2] == order[1::2]
    assert os.listdir(tmp_path) == []


#### RUNS


def locked(*words: str, cache_dir):
    settings = {"overwrite": False, "resume": False, "cache_dir": str(cache_dir)}
    return run_dir.locked(OmegaConf.merge(OmegaConf.create(settings), OmegaConf.from_dotlist(list(words))))


@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_a_live_run_is_not_touched(tmp_path, impatient, overwrite):
    """A second start with overwrite=true renamed the directory of a live run. Both ended with exit code 0, and one
    directory had the weights of the first run under the config of the second."""
    process = other_process(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine")
    words = r"run is being written by process \d+ on .*; choose another exp_name, or wait for its end"
    with (
        pytest.raises(UserError, match=words),
        locked("exp_name=run", f"overwrite={overwrite}", cache_dir=tmp_path),
    ):
        pass
    assert sorted(os.listdir(tmp_path)) == [".run.lock", "run"]
    end(process)


def test_a_refused_start_lets_the_lock_go(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine")
    with pytest.raises(UserError, match="already holds a run"), locked("exp_name=run", cache_dir=tmp_path):
        pass
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("name", ["other/LATEST", "other/x", "other/LATEST/deeper"])
@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl"])
def test_a_run_inside_another_is_refused(tmp_path, name, file):
    """exp_name=other/LATEST was accepted, and the next save of the run `other` deleted it."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / file).write_text("")
    message = f"exp_name={name} is inside the run .*/other; choose another exp_name"
    with pytest.raises(UserError, match=message), locked(f"exp_name={name}", cache_dir=tmp_path):
        pass
    assert os.listdir(tmp_path) == ["other"] and os.listdir(tmp_path / "other") == [file]


def test_a_run_inside_one_that_is_about_to_begin_is_refused(tmp_path):
    process = other_process(tmp_path / "other")
    with pytest.raises(UserError, match="is inside the run"), locked("exp_name=other/x", cache_dir=tmp_path):
        pass
    assert os.listdir(tmp_path) == [".other.lock"]
    end(process)


def test_a_directory_of_runs_is_never_renamed(tmp_path):
    """overwrite=true with the name of a directory of runs renamed all of them, live ones as well."""
    (tmp_path / "sweep" / "a").mkdir(parents=True)
    words = ("exp_name=sweep", "overwrite=true")
    with locked(*words, cache_dir=tmp_path):
        pass
    process = other_process(tmp_path / "sweep" / "a")
    message = "sweep is a directory of other runs, such as .*sweep/a; choose"
    with pytest.raises(UserError, match=message), locked(*words, cache_dir=tmp_path):
        pass
    end(process)
    (tmp_path / "sweep" / "a" / "config.yaml").write_text("")
    with pytest.raises(UserError, match=message), locked(*words, cache_dir=tmp_path):
        pass
    with locked("exp_name=sweep/b", cache_dir=tmp_path):
        pass


#### RESULTS


def test_two_evaluations_at_once_write_two_whole_files(tmp_path):
    """Both wrote the same temporary file: one result could have the end of the other, or be lost."""
    path = str(tmp_path / "eval.json")
    contents = [{"results": [n] * 20_000} for n in range(4)]
    threads = [threading.Thread(target=eval_program.write_json, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(os.listdir(tmp_path)) == ["eval.json", *(f"eval.json.bak-{n}" for n in (1, 2, 3))]
    written = [json.loads((tmp_path / name).read_text()) for name in os.listdir(tmp_path)]
    assert sorted(written, key=str) == contents


def test_samples_are_never_written_to_a_file_that_is_gone(tmp_path, monkeypatch):
    """Between opening the partial file and locking it, another eval.py may finish and remove it. All samples that were
    made then went into the removed file."""
    path, flock, calls = str(tmp_path / "run.partial.jsonl"), fcntl.flock, []

    def removed_before(file, flags):
        calls.append(flags)
        if len(calls) == 1:
            os.remove(path)
        flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with PartialFile(path, ["a"]) as partial:
        partial.recorder(["a"])({0: "text"})
    with PartialFile(path, ["a"]) as partial:
        assert partial.texts == {"a": "text"}


#### PROCESSES

LAUNCHED = """
import os, sys, time
from halos import locks
from halos.launch import launch
import launch_workers
if __name__ == "__main__":
    lock = locks.take(sys.argv[1])
    launch(launch_workers.wait, sys.argv[2], nproc_per_node=2, held=lock)
"""


def test_the_processes_of_a_run_keep_its_lock(tmp_path, impatient):
    """If only the launcher had the lock, a process that ends slowly could still write after the launcher was killed."""
    (tmp_path / "facts").mkdir()
    (tmp_path / "launcher.py").write_text(LAUNCHED)
    environment = os.environ | {"PYTHONPATH": f"{PROJECT}:{PROJECT}/tests"}
    words = [sys.executable, "launcher.py", str(tmp_path / "run"), str(tmp_path / "facts")]
    launcher = subprocess.Popen(words, cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 90
    waiting = tmp_path / "facts" / "waits-0", tmp_path / "facts" / "waits-1"
    while not all(path.exists() for path in waiting) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [json.loads(path.read_text())["pid"] for path in waiting]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # it cannot notice that the launcher is gone
    launcher.kill()
    launcher.wait()
    with pytest.raises(locks.Held, match=f"process {launcher.pid} on"):
        locks.take(str(tmp_path / "run"))
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    while locks.holder(str(tmp_path / "run")) and time.monotonic() < deadline:
        time.sleep(0.05)
    locks.take(str(tmp_path / "run")).release()


RANK = """
import sys
from omegaconf import OmegaConf
from halos import run_dir
from halos.commands import report_user_errors
from halos.launch import joined
with report_user_errors(), joined():
    settings = {"cache_dir": sys.argv[1], "exp_name": "run", "overwrite": True, "resume": False}
    with run_dir.locked(OmegaConf.create(settings)):
        print("has it")
"""


def test_all_ranks_learn_that_the_directory_is_taken(tmp_path):
    """Under torchrun or SLURM rank 0 has the lock. If it is refused, all ranks end with one message between them."""
    holder = other_process(tmp_path / "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path)],
            cwd=PROJECT,
            env=os.environ | address | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    (out_0, err_0), (out_1, err_1) = (rank.communicate(timeout=90) for rank in ranks)
    end(holder)
    assert [rank.returncode for rank in ranks] == [2, 2] and out_0 == out_1 == err_1 == ""
    assert err_0.startswith(f"error: {tmp_path}/run is being written by process {holder.pid} on ")


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_a_second_start_leaves_a_live_run_alone_and_renames_a_dead_one(tmp_path, n):
    words = [sys.executable, "train.py", "exp_name=run", f"cache_dir={tmp_path}", *ONE_BLOCK]
    settings = {"cwd": PROJECT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([*words, f"nproc_per_node={n}", "n_epochs=1000"], process_group=0, **settings)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "LATEST").exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    second = subprocess.run([*words, "overwrite=true", "nproc_per_node=2", "n_examples=8"], **settings)
    assert second.returncode == 2 and f"is being written by process {first.pid} on " in second.stderr, second.stderr
    assert first.poll() is None and not (tmp_path / "run.bak-1").exists()
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    third = subprocess.run([*words, "overwrite=true", "n_examples=8"], **settings)
    assert third.returncode == 0, third.stderr
    for name, epochs in (("run.bak-1", 1000), ("run", 1)):
        assert OmegaConf.load(tmp_path / name / "config.yaml").n_epochs == epochs
        assert OmegaConf.load(tmp_path / name / "LATEST" / "config.yaml").n_epochs == epochs
        manifest.check(str(tmp_path / name / "LATEST"))
