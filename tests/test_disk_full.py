"""A full disk is one line and exit code 2, what was saved before is whole, and nothing unfinished is left.

The disk is "full" by the limit on the size of a file that a process may write, from a given call on: the system then
refuses the write as on a full disk, with another number.
"""

import os
import resource
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

import eval as eval_program
import train as train_program
from halos import checkpoint, demo, launch, manifest, metrics, records, run_dir, sample_files, states, token_store
from halos.errors import UserError, disk_full
from halos.files import finished, writing
from helpers import ONE_BLOCK


def limit(size: int | None) -> None:
    """Set the largest size of a file that this process may write. None: the system's own limit"""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


@pytest.fixture(autouse=True)
def little_data(monkeypatch):
    monkeypatch.setattr(demo, "N_PROMPTS", {"train": 60, "test": 20})


@pytest.fixture
def full(monkeypatch):
    """full(owner, name, at_call): from this call of the function on, no file can have more than 50 bytes."""

    def from_call(owner, name: str, at_call: int = 1) -> None:
        own, calls = getattr(owner, name), []

        def limited(*args, **kwargs):
            calls.append(args)
            if len(calls) >= at_call:
                limit(50)
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, limited)

    yield from_call
    limit(None)


@pytest.fixture
def command(monkeypatch, capsys):
    def run(program, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["program", *words])
        code = 0
        try:
            program.main()
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            limit(None)
            GlobalHydra.instance().clear()
        return code, capsys.readouterr().err

    return run


def train(command, cache_dir) -> tuple[int, str]:
    words = ["exp_name=run", f"cache_dir={cache_dir}", *ONE_BLOCK, "n_examples=32", "intermediate_checkpoints=true"]
    words += ["keep_checkpoints=0"]  # the states are written in the background: tests/test_resume.py
    return command(train_program, *words)


def is_one_line(result: tuple[int, str], named: str) -> None:
    code, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert f"{named} cannot be written: File too large; what was written before is whole, so make room" in lines[0]


def nothing_unfinished(folder) -> None:
    left = [name for _, folders, names in os.walk(folder) for name in (*folders, *names)]
    assert not [name for name in left if "unfinished" in name or name.endswith((".old", ".lock"))]


@pytest.mark.parametrize(
    ("where", "named", "steps"),
    [
        ((token_store, "_write_files"), "", None),
        ((run_dir, "create"), "run/config.yaml", None),
        ((train_program.json, "dump", 5), "run/data.json", None),
        ((records.Records, "write"), "run/evaluations/step-0.parquet", []),
        ((metrics.MetricsLog, "evaluation"), "run/metrics.jsonl", []),
        ((metrics.MetricsLog, "evaluation", 3), "run/metrics.jsonl", [2]),
        ((checkpoint, "_write"), "run/LATEST", []),
        ((checkpoint, "_write", 2), "run/LATEST", [2]),
        ((checkpoint, "export", 2), "run/LATEST", [2]),
        ((manifest, "write", 6), "run/LATEST.unfinished/manifest.json", [2]),
        ((metrics, "draw_curves"), "run/curves.png", [2]),
    ],
    ids=lambda value: ".".join(map(str, value[1:])) if isinstance(value, tuple) else None,
)
def test_training_on_a_full_disk(command, full, tmp_path, where, named, steps):
    """Each of these was a traceback, and a checkpoint that did not fit was left half-written as LATEST.unfinished.

    steps: the checkpoints that are there afterwards; None: no run directory is there
    """
    full(*where)
    is_one_line(train(command, tmp_path), named)
    nothing_unfinished(tmp_path)
    run = tmp_path / "run"
    if steps is None:
        assert not run.exists() or not (run / "config.yaml").exists() or named == "run/data.json"
        return
    kept = sorted(name for name in os.listdir(run) if os.path.isdir(run / name) and name != "evaluations")
    assert kept == ["LATEST"] * bool(steps) + [f"step-{step}" for step in steps]
    for name in kept:
        manifest.check(str(run / name))


def test_a_state_on_a_full_disk(command, full, tmp_path):
    """The file progress.pt was a traceback: the error of torch.save(path) does not say why. The rest of a state is
    written in the background, so that the metrics may be the first to find no room."""
    full(states, "rng_state")
    words = ["exp_name=run", f"cache_dir={tmp_path}", *ONE_BLOCK, "n_examples=32", "do_first_eval=false"]
    is_one_line(command(train_program, *words, "save_every=8", "eval_every=1000"), "run/states/step-1")
    nothing_unfinished(tmp_path)
    assert states.newest(str(tmp_path / "run")) is None


@pytest.mark.parametrize(
    ("where", "words", "named"),
    [
        ((eval_program, "write_json"), ["-m", "eval"], "run/eval.json"),
        ((eval_program, "write_json"), ["-m", "sample", "-n", "2"], "run.json"),
    ],
)
def test_results_on_a_full_disk(command, full, tmp_path, where, words, named):
    code, err = train(command, tmp_path)
    assert code == 0, err
    full(*where)
    words = ["-c", f"{tmp_path}/run/config.yaml", *words, f"samples_dir={tmp_path}/samples", "n_eval_examples=8"]
    is_one_line(command(eval_program, *words), named)
    partial = [name for name in os.listdir(tmp_path / "samples")] if "sample" in words else []
    assert partial == ["run.partial.jsonl"] * ("sample" in words)  # the samples are there for the next command


def test_a_partial_file_on_a_full_disk(full, tmp_path):
    full(sample_files.json, "dumps")
    with (
        sample_files.PartialFile(str(tmp_path / "run.partial.jsonl"), ["a"]) as partial,
        pytest.raises(UserError, match="run.partial.jsonl cannot be written"),
    ):
        try:
            partial.recorder(["a"])({0: "text" * 100})
        finally:
            limit(None)


def test_the_errors_of_a_full_disk(tmp_path):
    """The error of the system names no file; that of safetensors has its number in its text only."""
    for number, reason in ((28, "No space left on device"), (122, "Disk quota exceeded"), (27, "File too large")):
        with pytest.raises(OSError, match=reason) as raised, finished(str(tmp_path / "file")):
            raise OSError(number, os.strerror(number))
        assert f"{tmp_path}/file cannot be written: {reason}; " in str(disk_full(raised.value))
    with pytest.raises(OSError, match="No space") as raised, writing("LATEST"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert str(disk_full(raised.value)).startswith("LATEST cannot be written: No space left on device; ")
    assert disk_full(FileNotFoundError(2, "No such file")) is None and disk_full(ValueError("28")) is None


def test_a_process_of_several_says_it_in_one_line():
    words = launch._last_words(OSError(28, "No space left on device", "LATEST"))
    assert (words.kind, words.code) == ("mistake", 2) and words.message.startswith("LATEST cannot be written: No space")
    assert launch._last_words(BrokenPipeError(32, "Broken pipe"))[1:4] == ("exit", 141, "")


def test_a_process_that_cannot_write_its_report_says_its_line_itself(tmp_path, capfd, monkeypatch):
    """If the temporary folder is on the full disk too, the launcher knew nothing of the reason, and named none."""
    monkeypatch.setenv("RANK", "0")

    def full(path):
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(launch, "finished", full)
    child = os.fork()
    if child == 0:
        launch._give_up(OSError(28, "No space left on device", "LATEST"), str(tmp_path))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    with pytest.raises(SystemExit) as end:
        launch._report([launch._End(0, 2, None)], 2)
    err = capfd.readouterr().err
    assert end.value.code == 2 and err.startswith("error: LATEST cannot be written: No space") and err.count("\n") == 1
    assert os.listdir(tmp_path) == []
