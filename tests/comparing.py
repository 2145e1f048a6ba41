"""What the tests of compare.py share: sample files, the command, and what its journal holds."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from helpers import PROJECT

WORDS = "the of and to in is that it was for on are as with his they be this have from or had by hot but some".split()


def rows_of(n: int, seed: int = 0) -> list[dict]:
    """Samples as eval.py writes them, with ragged lengths; no two responses have the same length."""
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


def command(directory: Path, *words: str) -> list[str]:
    samples = [] if "-f" in words else ["-f", str(directory / "samples.json"), "-bk", "chosen"]
    results = [] if "-r" in words else ["-r", str(directory / "result.jsonl")]
    return [sys.executable, os.path.join(PROJECT, "compare.py"), *samples, *results, *words]


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    return {**inherited, **variables}


def compare(directory: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """compare.py as a user runs it, by default on `samples.json` of the directory against `chosen`."""
    env = environment(**variables)
    return subprocess.run(
        command(directory, *words), cwd=directory, env=env, capture_output=True, text=True, timeout=300
    )


def last_line(done: subprocess.CompletedProcess) -> str:
    return done.stderr.replace("\r", "\n").strip().split("\n")[-1]


def results(directory: Path, name: str = "result.jsonl") -> list[dict]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def journal(directory: Path, name: str = "judgments") -> list[dict]:
    path = directory / name / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def kept(records: list[dict], kind: str) -> list[dict]:
    return [record for record in records if kind in record]


NUMBERS = ("win_rate", "interval", "n_eff", "wins", "losses", "ties", "length_controlled", "position", "sign_test_p")


def numbers(line: dict) -> dict:
    return {name: line[name] for name in NUMBERS}
