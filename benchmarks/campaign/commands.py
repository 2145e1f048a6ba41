"""The commands of the campaign, and what each of them makes if nothing happens to it."""

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from benchmarks.campaign import forks, runs
from benchmarks.campaign.forks import Changes, Child
from halos import metrics

SAMPLES_AT_ONCE = 4
CALLS_AT_ONCE = 4
JUDGE = """
import os, time
def longer(prompt, a, b):
    file = os.open("asked.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, repr((prompt, a, b)).encode() + b"\\n")
    os.close(file)
    time.sleep(0.01)
    return 1 if len(a) > len(b) else 2
"""

Prepare = Callable[[], None]


@dataclass
class Whole:
    """An uninterrupted command. seconds: of training, those after its first step; changes: of files, that it makes"""

    folder: str
    result: Any
    seconds: float
    changes: int


class Commands:
    """Starts commands in folders under `root`, and keeps what the uninterrupted ones have made."""

    def __init__(self, root: str):
        self.root = root
        self.train, self.eval, self.compare = runs.programs()
        # Each made once.
        self.whole_run, self.whole_samples = cache(self._whole_run), cache(self._whole_samples)
        self.whole_evaluation, self.whole_verdicts = cache(self._whole_evaluation), cache(self._whole_verdicts)

    def folder(self, name: str = "case") -> str:
        """Return an empty folder."""
        path = os.path.join(self.root, name)
        shutil.rmtree(path, ignore_errors=True)
        os.makedirs(path)
        return path

    #### TRAINING

    def start_run(self, folder: str, loss: str, n: int, *prepare: Prepare, resume: bool = False) -> Child:
        words = runs.words_of(folder, loss, f"nproc_per_node={n}", f"resume={str(resume).lower()}")
        return _start(self.train, words, folder, *prepare, *([runs.two_processes] if n > 1 else []))

    def _whole_run(self, loss: str, n: int) -> Whole:
        folder = self.folder(f"whole-{loss}-{n}")
        changes = Changes(folder)
        child = self.start_run(folder, loss, n, changes.prepare)
        started = wait_for_step(child, folder)
        _expect_success(child)
        return Whole(folder, None, time.monotonic() - started, changes.count)

    #### SAMPLES AND EVALUATIONS

    def start_sampling(self, folder: str, *prepare: Prepare) -> Child:
        config = os.path.join(self.whole_run("kto", 1).folder, "run", "config.yaml")
        words = ["-c", config, "-n", "24", "-b", str(SAMPLES_AT_ONCE), f"samples_dir={folder}"]
        return _start(self.eval, words, folder, *prepare)

    def _whole_samples(self) -> Whole:
        return _whole(self.start_sampling, self.folder("samples"), samples_of)

    def start_evaluation(self, folder: str, *prepare: Prepare) -> Child:
        words = ["-c", os.path.join(folder, "run", "config.yaml"), "-m", "eval", f"cache_dir={folder}"]
        return _start(self.eval, words, folder, *prepare)

    def _whole_evaluation(self) -> Whole:
        shutil.copytree(self.whole_run("kto", 1).folder, self.folder("evaluated"), dirs_exist_ok=True)
        return _whole(self.start_evaluation, os.path.join(self.root, "evaluated"), evaluation_of)

    #### VERDICTS

    def start_judging(self, folder: str, *prepare: Prepare) -> Child:
        words = ["-f", "samples.json", "-bk", "chosen", "-r", "result.jsonl", "--judge", "judge:longer"]
        words += ["--concurrency", str(CALLS_AT_ONCE), "--verdicts", "verdicts.csv"]
        return _start(self.compare, words, folder, *prepare)

    def _whole_verdicts(self) -> Whole:
        folder = self.folder("judged")
        write_judge(folder)
        return _whole(self.start_judging, folder, verdicts_of)


def _start(program: Callable[[], None], words: list[str], folder: str, *prepare: Prepare) -> Child:
    return forks.start(program, words, folder, lambda: [call() for call in prepare] and None)


def _whole(start: Callable[..., Child], folder: str, result_of: Callable[[str], Any]) -> Whole:
    changes, started = Changes(folder), time.monotonic()
    _expect_success(start(folder, changes.prepare))
    return Whole(folder, result_of(folder), time.monotonic() - started, changes.count)


def _expect_success(child: Child) -> None:
    ended = child.wait()
    assert ended.code == 0, ended.err


def wait_for_step(child: Child, folder: str, steps: int = 0, limit: float = forks.LIMIT) -> float:
    """Wait until the run has made more than so many steps, or has ended. Returns the time."""
    path = os.path.join(folder, "run", "metrics.jsonl")
    deadline = time.monotonic() + limit
    while child.is_alive() and time.monotonic() < deadline:
        if os.path.exists(path):
            with open(path) as file:
                if file.read().count('"mode": "train"') > steps:
                    break
        time.sleep(0.002)
    return time.monotonic()


#### WHAT COMMANDS LEAVE


def read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def samples_of(folder: str) -> Any:
    return read_json(os.path.join(folder, "run.json"))


def evaluation_of(folder: str) -> dict[str, float]:
    results = read_json(os.path.join(folder, "run", "eval.json"))["results"]
    return {name: value for name, value in results.items() if not metrics.is_time(name)}


def verdicts_of(folder: str) -> tuple[dict, str]:
    """The last result, without what differs between two commands that find the same, and the table of verdicts."""
    with open(os.path.join(folder, "result.jsonl")) as file:
        line = json.loads(file.read().strip().split("\n")[-1])
    with open(os.path.join(folder, "verdicts.csv")) as file:
        verdicts = file.read()
    names = ("win_rate", "interval", "n_eff", "wins", "losses", "ties", "position")
    return {name: line.get(name) for name in names}, verdicts


def calls_of(folder: str) -> list[str]:
    """Return the judge's questions, call by call."""
    path = os.path.join(folder, "asked.txt")
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return file.read().split("\n")[:-1]


def write_judge(folder: str, n: int = 30) -> None:
    """Write a file of samples, and a judge that notes what it is asked."""
    rng = random.Random(0)
    rows = [
        {"prompt": f"{i}?", "chosen": "c" * rng.randint(1, 99), "policy": "p" * rng.randint(1, 99), "reference": ""}
        for i in range(n)
    ]
    with open(os.path.join(folder, "samples.json"), "w") as file:
        json.dump(rows, file)
    with open(os.path.join(folder, "judge.py"), "w") as file:
        file.write(JUDGE)
