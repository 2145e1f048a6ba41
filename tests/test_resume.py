"""Resuming: a run that goes on from a saved state is the run that would have been, bit by bit."""

import errno
import math
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import distributed_workers as workers
from halos import checkpoint, files, manifest, metrics, mishaps, records, resume, run_dir, states
from halos.errors import Stopped, UserError
from halos.launch import launch
from halos.records import Records
from helpers import PROJECT, make_config
from small_runs import FEW, SMALL, batches_for, loader_for, make_trainer, moved

CPU_ERROR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."


@pytest.fixture(autouse=True)
def no_pictures_and_exports(monkeypatch):
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)
    monkeypatch.setattr(checkpoint, "save", lambda paths, *args, **kwargs: os.makedirs(paths[0], exist_ok=True))


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
    return [{key: value for key, value in row.items() if not metrics.is_time(key)} for row in rows]


def evaluations(trainer) -> dict[int, Records]:
    """All files in evaluations/, by the updates before them."""
    return {step: Records.read(records.path_of(trainer.run_dir, step)) for step in records.steps(trainer.run_dir)}


def assert_same_run(trainer, other) -> None:
    """Weights, optimizer, every row of the metrics and every evaluation are equal bit by bit."""
    assert numbers(trainer) == numbers(other)
    ours, theirs = evaluations(trainer), evaluations(other)
    assert list(ours) == list(theirs) and all(torch.equal(ours[step].logps, theirs[step].logps) for step in theirs)
    ours, theirs = (t.policy.state_dict() for t in (trainer, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (t.state.optimizer.state_dict() for t in (trainer, other))
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():
        assert all(torch.equal(ours["state"][index][key], value) for key, value in state.items())


@pytest.mark.parametrize("words", [(), ("model.gradient_accumulation_steps=2",), ("model.packing=false",)])
@pytest.mark.parametrize("loss", FEW)
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


@pytest.mark.parametrize("name", ["RMSprop", "SGD", "Adafactor", "NAdam", "Adagrad", "Muon"])
def test_every_optimizer_goes_on_where_it_was(tmp_path, name):
    words = (f"optimizer={name}", *(["++optimizer_kwargs.momentum=0.9"] if name in ("RMSprop", "SGD") else []))
    whole = trainer_of(tmp_path / "whole", "dpo", *words)
    whole.train()
    killed(trainer_of(tmp_path / "parts", "dpo", *words), 5)
    last = resumed(tmp_path / "parts", "dpo", *words)
    last.train()
    assert_same_run(last, whole)


def test_a_state_has_the_generators_and_what_a_trainer_keeps(tmp_path):
    """A loss that draws random numbers, and keeps a running mean, draws and keeps the same after resuming."""
    words = ("save_every=8",)
    trainer = trainer_of(tmp_path, "sft", *words)
    trainer.state.own = {"mean": torch.tensor([1.5]), "steps": 3}
    trainer.should_stop = lambda: trainer.state.updates == 2
    trainer.train()
    drawn = [draw().tolist() for draw in (lambda: torch.rand(3), lambda: np.random.rand(3))] + [random.random()]
    again = resumed(tmp_path, "sft", *words)
    assert again.state.own == {"mean": torch.tensor([1.5]), "steps": 3}
    assert drawn == [draw().tolist() for draw in (lambda: torch.rand(3), lambda: np.random.rand(3))] + [random.random()]


def test_the_newest_whole_state_is_used(tmp_path, capfd):
    """Of states after 2, 4, 7, 9 and 10 updates the last 3 stay. One with a flipped bit is named, and not used.

    One without a manifest is not complete, whatever else it has.
    """
    trainer = trainer_of(tmp_path, "sft", "keep_checkpoints=3")
    trainer.train()
    directory = states.directory_of(trainer.run_dir)
    assert sorted(os.listdir(directory)) == ["step-10", "step-7", "step-9"]
    with open(os.path.join(directory, "step-10", "__0_0.distcp"), "r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 4]))
    os.remove(os.path.join(directory, "step-9", "manifest.json"))
    assert states.newest(trainer.run_dir) == os.path.join(directory, "step-7")
    said = capfd.readouterr().out
    assert re.search(r"warning: .*step-10/__0_0.distcp is not what was written.*; the state before it is used\n$", said)


def test_a_state_that_is_being_written_does_not_count(tmp_path, monkeypatch):
    """A run killed while its second state is written goes on from the first one."""
    write = manifest.write
    monkeypatch.setattr(manifest, "write", lambda path: write(path) if "step-2" in path else time.sleep(0))
    monkeypatch.setattr(
        files, "replace_directory", lambda new, path: os.rename(new, path) if "step-2" in path else None
    )
    trainer = trainer_of(tmp_path, "sft")
    killed(trainer, 5)
    assert sorted(os.listdir(states.directory_of(trainer.run_dir))) == ["step-2", "step-4.unfinished"]
    assert states.newest(trainer.run_dir).endswith("step-2")


@pytest.mark.parametrize("at", range(5))
def test_a_kill_while_an_old_state_is_removed(tmp_path, monkeypatch, at):
    """A kill in the middle left a state with a manifest and without its weights; or, without the manifest, files that
    nothing removed. Now it is a whole state again, or gone, when the next start has recovered the run directory."""
    trainer = trainer_of(tmp_path, "sft", "keep_checkpoints=99")
    trainer.train()
    directory, calls = states.directory_of(trainer.run_dir), []

    def dying(own):
        def call(*args, **kwargs):
            calls.append(own)
            if len(calls) > at:
                raise Killed
            return own(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "remove", "unlink", "rmdir"):
            patch.setattr(os, name, dying(getattr(os, name)))
        with pytest.raises(Killed):
            states.remove(os.path.join(directory, "step-4"))
    run_dir.recover(trainer.run_dir)
    whole = states.complete(trainer.run_dir)
    assert sorted(os.listdir(directory)) == sorted(os.path.basename(path) for path in whole)
    assert len(whole) == (5 if at < 2 else 4)
    for path in whole:
        manifest.check(path)


def test_a_full_disk_while_a_state_is_written(tmp_path, monkeypatch):
    """What the background has raised ends the run at the next state. The states before are whole."""

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", path)

    trainer = trainer_of(tmp_path, "sft")
    write = manifest.write
    monkeypatch.setattr(manifest, "write", lambda path: full(path) if "step-4" in path else write(path))
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert states.newest(trainer.run_dir).endswith("step-2") and trainer.state.updates == 7


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_saves_after_the_step(tmp_path, number, code):
    """Three updates are made, and the signal comes in the third. The run that goes on is the uninterrupted one."""
    whole = trainer_of(tmp_path / "whole", "kto")
    whole.train()
    trainer = trainer_of(tmp_path / "parts", "kto")
    step, before = trainer.train_step, signal.getsignal(number)

    def step_with_signal(microbatches):
        if trainer.state.updates == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # from the launcher as well: not a second request
        step(microbatches)

    trainer.train_step = step_with_signal
    with pytest.raises(Stopped, match="stopped after 3 updates, which are saved; resume=true goes on") as stopped:
        trainer.train()
    assert stopped.value.code == code and signal.getsignal(number) == before
    assert states.newest(trainer.run_dir).endswith("step-3")
    last = resumed(tmp_path / "parts", "kto")
    last.train()
    assert_same_run(last, whole)


def test_a_signal_while_evaluating(tmp_path):
    """The signal comes in the evaluation after the second update. It is finished, and the step after it is made."""
    trainer = trainer_of(tmp_path, "sft")
    evaluate = trainer.evaluate
    trainer.evaluate = lambda: (
        os.kill(os.getpid(), signal.SIGTERM) if trainer.state.updates == 2 else None,
        evaluate(),
    )[1]
    with pytest.raises(Stopped, match="stopped after 3 updates"):
        trainer.train()


def test_a_second_signal_ends_the_process_at_once():
    """Two seconds after the first, in a step that never ends: exit code 143, within a second."""
    code = (
        "import time; from halos.stopping import StopRequest\n"
        "with StopRequest():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60), time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 143


def test_minutes_count_too(tmp_path):
    """With save_every_minutes=1e-9 there is a state after every step, whatever save_every says."""
    trainer = trainer_of(tmp_path, "sft", "save_every=1000", "save_every_minutes=1e-9", "keep_checkpoints=99")
    trainer.train()
    assert sorted(os.listdir(states.directory_of(trainer.run_dir))) == sorted(f"step-{i}" for i in range(1, 11))


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    trainer = trainer_of(tmp_path, "sft")
    trainer.train()
    again = resumed(tmp_path, "sft")
    again.evaluate = again.train_step = None  # neither is called
    again.train()
    assert numbers(again) == numbers(trainer)


def test_more_epochs_for_a_finished_run(tmp_path):
    """One epoch, and then one more: the updates are those of a run of two epochs, with a constant schedule."""
    constant = ("lr_scheduler=constant", "eval_every=1000", "do_first_eval=false")
    whole = trainer_of(tmp_path / "whole", "sft", *constant)
    whole.train()
    trainer_of(tmp_path / "parts", "sft", *constant, n_epochs=1).train()
    last = resumed(tmp_path / "parts", "sft", *constant)
    last.train()
    assert [row for row in numbers(last) if row["mode"] == "train"] == [
        r for r in numbers(whole) if r["mode"] == "train"
    ]


def test_other_data_are_refused(tmp_path):
    trainer_of(tmp_path, "sft").train()
    with pytest.raises(UserError, match="resume=true, but the training data have other texts or other rows"):
        resumed(tmp_path, "sft", seed=1)


def test_another_run_is_refused(tmp_path):
    """What decides what is learned may not differ, and each difference is named; where the run writes may."""
    trainer_of(tmp_path, "dpo")
    same = make_config(
        tmp_path, "loss=dpo", *SMALL, "resume=true", "lr_scheduler=cosine", "optimizer=AdamW", "lr=0.001"
    )
    free = ["n_epochs=3", "model.max_tokens_per_forward=99", "wandb.project=mine", "nproc_per_node=2"]
    resume.check_same(same)
    resume.check_same(OmegaConf.merge(same, OmegaConf.from_dotlist(free)))
    changes = OmegaConf.from_dotlist(["loss.beta=0.2", "seed=2", "datasets=[shp]", "model.max_length=77"])
    with pytest.raises(UserError) as error:
        resume.check_same(OmegaConf.merge(same, changes))
    named = "datasets=[shp] (was [demo]), loss.beta=0.2 (was 0.1), model.max_length=77 (was 256), seed=2 (was 1)"
    assert named in str(error.value)
    kto = make_config(tmp_path, "loss=kto", "resume=true", *SMALL)
    with pytest.raises(UserError, match=r"loss.name=kto \(was dpo\)"):
        resume.check_same(kto)


#### DAMAGED FILES


@pytest.mark.parametrize(
    "damage, rows_before, said",
    [
        (lambda data: data.replace(b'"step": 1,', b'"step": \0,'), 1, "1 lines of .* are no rows of a run"),
        (lambda data: b"null\n" + data[5:], 1, "2 lines of .* are no rows of a run"),
        (lambda data: b"", 0, "has 0 bytes, and the run had written .*: rows are missing"),
        (lambda data: data[:-9], 1, "has .* bytes, and the run had written .*: rows are missing"),
    ],
)
def test_metrics_that_are_damaged_do_not_keep_a_run_from_going_on(tmp_path, capfd, damage, rows_before, said):
    """A metrics.jsonl that was damaged, moved away or cut was a traceback; or NULs filled the place of the rows that
    were gone. The rows of the steps that follow are there, each on a line of its own."""
    trainer = trainer_of(tmp_path, "sft", "eval_every=1000", "save_every=16", "do_first_eval=false")
    trainer.should_stop = lambda: trainer.state.updates == 2
    trainer.evaluate = lambda: {"loss/eval": 1.0, "examples_per_second": 1.0}
    trainer.train()
    path = tmp_path / "run" / "metrics.jsonl"
    n_bytes = torch.load(f"{states.newest(trainer.run_dir)}/progress.pt", weights_only=True)["metrics_bytes"]
    path.write_bytes(damage(path.read_bytes()[:n_bytes]))
    last = resumed(tmp_path, "sft", "eval_every=1000", "save_every=16", "do_first_eval=false")
    last.evaluate = trainer.evaluate
    last.train()
    assert re.search(said, capfd.readouterr().out)
    rows = list(metrics.whole_rows(str(path)))
    assert [row["step"] for row in rows if row["mode"] == "train"][rows_before:] == list(range(3, 11))


@pytest.mark.parametrize(
    "text", ["a: b: c", "- 1", "loss: {name: dpo}", "\0", "datasets: 1\nloss: {}\nmodel: {}", "x: ${y}"]
)
def test_a_damaged_config_of_the_run_is_named(tmp_path, text):
    """resume=true reads the config.yaml of the run, and a damaged one was a traceback."""
    trainer = trainer_of(tmp_path, "dpo")
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="^resume=true: .*run/config.yaml.* .there is one in LATEST.$"):
        resume.check_same(OmegaConf.merge(trainer.config, {"resume": True}))


#### MISHAPS


def test_steps_that_are_not_finite_are_skipped(tmp_path):
    """Of 10 steps, the losses of the second and third are not finite: 8 updates. At most 10 in a row are skipped."""

    def broken(trainer, steps):
        step, made = trainer.forward_backward, []

        def forward_backward(examples):
            made.append(1)
            if len(made) in steps:
                raise mishaps.NotFinite("the loss", examples)
            return step(examples)

        trainer.forward_backward = forward_backward
        return trainer

    skipping = ("on_nonfinite=skip", "lr_scheduler=constant")
    trainer = broken(trainer_of(tmp_path / "skips", "dpo", *skipping), {2, 3})
    trainer.train()
    assert (trainer.state.updates, trainer.state.skipped, trainer.state.examples) == (8, 2, 72)
    assert numbers(trainer)[-2]["counters/skipped"] == 2
    assert [row["examples"] for row in numbers(trainer) if row["mode"] == "train"] == [8, 32, 36, 44, 52, 60, 68, 72]
    trainer = broken(trainer_of(tmp_path / "ends", "dpo", *skipping, n_epochs=5), range(3, 100))
    with pytest.raises(UserError, match="the loss is not finite after 2 updates; LATEST stays what it was"):
        trainer.train()
    assert trainer.state.skipped == mishaps.MOST_SKIPPED + 1 == 11


def test_an_evaluation_that_is_not_finite_keeps_latest(tmp_path):
    """A loss that is not finite on the test examples, although each update was, replaces nothing."""
    trainer = trainer_of(tmp_path, "sft", "do_first_eval=false", "eval_every=8")
    trainer.evaluate = lambda: {"loss/eval": math.nan}
    with pytest.raises(UserError, match="the loss on the test examples is not finite after 1 updates"):
        trainer.train()
    assert os.path.exists(tmp_path / "run/not_finite/examples.json") and not os.path.exists(tmp_path / "run/LATEST")
    assert states.newest(trainer.run_dir) is None


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(CPU_ERROR)]
)
def test_out_of_memory_is_one_message(tmp_path, error):
    """The step has 8 examples; the message names their tokens, the peak, and the two settings to change."""
    trainer = trainer_of(tmp_path, "sft")
    tokens = sum(example.n_tokens for example in next(iter(trainer.train_loader)))
    trainer.train_loader.restart()

    def fail(microbatches):
        raise error

    trainer.train_step = fail
    with pytest.raises(UserError) as told:
        trainer.train()
    assert re.search(rf"out of memory in a step of {tokens:,} tokens, at a peak of \d+\.\d GiB; lower", str(told.value))
    assert "model.max_tokens_per_forward=16384" in str(told.value) and "model.batch_size=8" in str(told.value)


#### SLURM


@pytest.mark.parametrize("code, queued", [(0, ""), (75, "requeue 17\n"), (143, ""), (2, "")])
@pytest.mark.parametrize("script", ["one_node", "multi_node"])
def test_a_job_is_queued_again_if_the_run_asks_for_it(tmp_path, script, code, queued):
    """srun stands for the run and its exit code, and gets resume=true. A cancelled or mistaken run is not repeated."""
    log, words = tmp_path / "queued", tmp_path / "words"
    for name, text in (("srun", f'echo "$@" > {words}; exit {code}'), ("scontrol", f'echo "$@" >> {log}')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment = os.environ | path | {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "17", "PYTHON": "python"}
    job = ["bash", os.path.join(PROJECT, "scripts/slurm", f"{script}.sbatch"), "loss=kto", "exp_name=mine"]
    assert subprocess.run(job, env=environment).returncode == code
    assert words.read_text() == "--kill-on-bad-exit=1 python train.py loss=kto exp_name=mine resume=true\n"
    assert (log.read_text() if log.exists() else "") == queued


#### SEVERAL PROCESSES


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_go_on_as_several_and_as_one(tmp_path, n):
    """Processes save a state after 2 of 10 steps; as many, and one, go on to where as many come at one go.

    As many are equal bit by bit, one is to 1e-5 of the way of the weights. PPO has a critic, too.
    """
    launch(workers.resume_runs, str(tmp_path), ("kto", "ppo"), nproc_per_node=n)
    for loss in ("kto", "ppo"):
        workers.go_on(str(tmp_path), "one", loss)
        start, whole, several, one = (
            torch.load(tmp_path / f"{loss}-{name}.pt", weights_only=True)
            for name in ("start", "whole", "several", "one")
        )
        assert all(torch.equal(several[name], whole[name]) for name in whole)
        way, other = moved(start, one), moved(start, whole)
        assert other.norm() > 1e-3 and (way - other).norm() <= 1e-5 * other.norm()


def test_the_command_itself_goes_on_and_names_what_differs(tmp_path):
    """train.py is stopped by SIGUSR1, goes on with resume=true, and refuses another beta, all in processes of its own.

    The check of the config composed Hydra's config anew, which Hydra refused inside train.py.
    """
    words = ["loss=dpo", f"cache_dir={tmp_path}", "exp_name=run", "n_examples=192", "do_first_eval=false", *SMALL[1:6]]
    command = [sys.executable, "train.py", *words, "keep_checkpoints=1"]
    settings = {"cwd": PROJECT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([*command, "n_examples=100000", "n_epochs=999"], **settings)
    rows = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (rows.exists() and rows.read_text().count("\n") > 1) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    assert "which are saved; resume=true goes on" in first.communicate(timeout=60)[1] and first.returncode == 75
    done = int(re.search(r"step-(\d+)", states.newest(str(tmp_path / "run")))[1])
    again = subprocess.run([*command, f"n_examples={64 * (done + 1)}", "n_epochs=999", "resume=true"], **settings)
    assert again.returncode == 0 and f"{64 * done} of {64 * (done + 1)} examples are done" in again.stdout, again.stderr
    other = subprocess.run([*command, "n_epochs=999", "resume=true", "loss.beta=0.3"], **settings)
    assert other.returncode == 2 and "loss.beta=0.3 (was 0.1); use the settings of that run" in other.stderr
