"""Helpers of the tests of compare.py: sample files, the command, its results, its journal, and a clock."""

import asyncio
import contextlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import compare as program
from halos.judge.gate import Clock
from helpers import PROJECT

WORDS = "the of and to in is that it was for on are as with his they be this have from or had by hot but some".split()


def rows_of(n: int, seed: int = 0) -> list[dict]:
    """Make `n` rows as eval.py writes them. The two responses of a row never have the same length."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    rows = []
    for number in range(n):
        chosen, policy = text(2, 40), text(2, 40)
        policy += "." * (len(policy) == len(chosen))
        rows.append({"prompt": f"\n\nHuman: {number} {text(3, 9)}?\n\nAssistant:", "chosen": chosen, "policy": policy})
        rows[-1]["reference"] = ""
    return rows


def write_samples(directory: Path, n: int, name: str = "samples.json", seed: int = 0) -> Path:
    path = directory / name
    path.write_text(json.dumps(rows_of(n, seed), indent=1))
    return path


def words_of(directory: Path, *words: str) -> list[str]:
    """The words of a command, by default over `samples.json` of the directory against `chosen`."""
    samples = [] if "-f" in words else ["-f", str(directory / "samples.json"), "-bk", "chosen"]
    results = [] if "-r" in words else ["-r", str(directory / "result.jsonl")]
    return [*samples, *results, *words]


def command(directory: Path, *words: str) -> list[str]:
    """The command with `words_of` these words, for a process of its own."""
    return [sys.executable, os.path.join(PROJECT, "compare.py"), *words_of(directory, *words)]


def environment(**variables: str) -> dict[str, str]:
    """The environment of this process, with these variables, and with no other ones of OpenAI."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    return {**inherited, **variables}


def compare(directory: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """Run compare.py in this process, in this working directory, with `words_of` these words."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with working_in(directory, **variables), redirect_stdout(out), redirect_stderr(err):
        try:
            program.main(words_of(directory, *words))
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@contextmanager
def working_in(directory: Path, **variables: str) -> Iterator[None]:
    """Inside, `directory` is the working directory, in `environment`. Its modules are forgotten at the end."""
    path, modules = list(sys.path), set(sys.modules)
    with contextlib.chdir(directory), mock.patch.dict(os.environ, environment(**variables), clear=True):
        try:
            yield
        finally:
            sys.path[:] = path
            for name in set(sys.modules) - modules:
                if str(getattr(sys.modules[name], "__file__", None)).startswith(str(directory)):
                    del sys.modules[name]


def last_line(done: subprocess.CompletedProcess) -> str:
    return done.stderr.replace("\r", "\n").strip().split("\n")[-1]


def results(directory: Path, name: str = "result.jsonl") -> list[dict]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def journal(directory: Path, name: str = "judgments") -> list[dict]:
    path = directory / name / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def kept(records: list[dict], kind: str) -> list[dict]:
    return [record for record in records if kind in record]


class FakeClock(Clock):
    """A clock on which waiting takes no time, and nothing else passes time."""

    def __init__(self):
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        await asyncio.sleep(0)
        if not event.is_set():
            self.time += seconds


NUMBERS = ("win_rate", "interval", "n_eff", "wins", "losses", "ties", "length_controlled", "position", "sign_test_p")


def numbers(line: dict) -> dict:
    return {name: line[name] for name in NUMBERS}


def at(server, *words: str) -> list[str]:
    """Flags for the judge of a test server."""
    return ["--judge", "test-judge", "--base_url", server.url, *words]
