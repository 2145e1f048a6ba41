"""Do what is missing of a suite: commands in forked workers of a process that has imported everything once.

What a run has left is not made again: training resumes from its newest state, sampling and judging from what is on
disk, and a run with scores.json is finished. Each run has a log, logs/NAME.log, and all commands are in commands.txt.
"""

import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import NoReturn

from halos.errors import Stopped, UserError
from halos.suite import measures, plan
from halos.suite.plan import Run
from halos.suite.settings import Suite

SCORES = "scores.json"
AGAIN = "stopped; run the same command again to go on"
STOPPED = (75, 130, 143)  # exit codes of a command that a signal has ended; negative ones are of signals, too


@dataclass(frozen=True)
class Programs:
    """The project's entry points and the modules that a user edits, as `scripts/suite.py` has imported them."""

    train: Callable[[], None]
    sample: Callable[[], None]
    compare: Callable[[], None]
    trainers: ModuleType
    dataloaders: ModuleType
    formats: dict[str, str]  # loss -> data format of its trainer


@dataclass
class Runner:
    """Finishes runs, one after the other.

    total: how many the suite has; found: how many of them were finished before this command
    """

    suite: Suite
    programs: Programs
    total: int
    found: int = 0
    done: int = 0
    made: int = 0  # of the done ones, those that this command has made
    started: float = field(default_factory=time.monotonic)

    def finish(self, run: Run) -> dict:
        """Do what is missing of a run, and return its scores. Raises UserError if a command fails."""
        path = plan.file_of(self.suite, run, SCORES)
        if not os.path.isfile(path):
            began = time.monotonic()
            self.train(run)
            if self.suite.judge is not None:
                self.sample_and_judge(run)
            self.call(run, measures.write, self.suite, run, self.programs.trainers, self.programs.dataloaders)
            self.made += 1
            self.say(run, time.monotonic() - began)
        self.done += 1
        with open(path, encoding="utf-8") as file:
            scores = json.load(file)
        if scores["words"] != list(run.words):
            was, now = shlex.join(scores["words"]), shlex.join(run.words)
            raise UserError(f"{path} is of a run with {was}, not with {now}; give another out=DIR")
        return scores

    def train(self, run: Run) -> None:
        words = [*plan.train_words(self.suite, run, self.programs.formats), "resume=true"]
        self.command(run, self.programs.train, "train.py", words)

    def sample_and_judge(self, run: Run) -> None:
        if not os.path.isfile(plan.file_of(self.suite, run, "samples.json")):
            self.command(run, self.programs.sample, "eval.py", plan.sample_words(self.suite, run))
        if not os.path.isfile(plan.file_of(self.suite, run, "verdicts.csv")):
            self.command(run, self.programs.compare, "compare.py", plan.judge_words(self.suite, run))

    def command(self, run: Run, program: Callable[[], None], name: str, words: list[str]) -> None:
        line = shlex.join(["python", name, *words])
        with open(os.path.join(self.suite.out, "commands.txt"), "a") as file:
            file.write(f"{line}\n")
        self.call(run, _as_program, program, name, words, line)

    def call(self, run: Run, function: Callable, *args) -> None:
        """Call a function in a forked worker, whose output goes to the log of the run."""
        log = os.path.join(self.suite.out, "logs", f"{run.name}.log")
        worker = multiprocessing.get_context("fork").Process(target=_logged, args=(log, function, *args))
        sys.stdout.flush()
        worker.start()
        code = _end_of(worker)
        if code in STOPPED or code < 0:
            raise Stopped(AGAIN, code if code > 0 else 128 - code)
        if code:
            raise UserError(f"{run.name} failed, with exit code {code}; {log} says why")

    def say(self, run: Run, seconds: float) -> None:
        """Say what has been done, and how long the rest will take."""
        left = max(0, self.total - self.found - self.made) * (time.monotonic() - self.started) / self.made
        print(f"[{self.done + 1}/{self.total}] {run.name}: {seconds:.0f} s; {left / 60:.0f} min left", flush=True)


def _end_of(worker: BaseProcess) -> int:
    """Wait for a worker and return its exit code. A signal to this process ends the worker, which saves its state."""
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        worker.join()
    except (KeyboardInterrupt, Stopped):
        worker.terminate()
        worker.join()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    assert worker.exitcode is not None
    return worker.exitcode


def _stop(number: int, frame) -> NoReturn:
    raise Stopped(AGAIN, 128 + number)


def _logged(log: str, function: Callable, *args) -> None:
    """Call a function with stdout and stderr in a file."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    function(*args)


def _as_program(program: Callable[[], None], name: str, words: list[str], line: str) -> None:
    """Run one of the project's programs with `words` as its command line."""
    print(f"$ {line}", flush=True)
    sys.argv = [name, *words]
    program()


#### FILES OF THE SUITE


def prepare(suite: Suite) -> None:
    """Make the suite's directory. Raises UserError if it is that of another suite."""
    os.makedirs(os.path.join(suite.out, "logs"), exist_ok=True)
    path = os.path.join(suite.out, "suite.json")
    now = json.loads(json.dumps(vars(suite)))
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            before = json.load(file)
        growing = ("rows", "seeds", "sizes", "aa", "out", "tries")  # more of these: a larger suite of the same runs
        different = [key for key in now if now[key] != before.get(key) and key not in growing]
        different += [f"sizes.{key}" for key, words in before["sizes"].items() if now["sizes"].get(key, words) != words]
        if different:
            raise UserError(f"out={suite.out} holds a suite with other {', '.join(different)}; give another out=DIR")
    plan.write_json(path, now)
