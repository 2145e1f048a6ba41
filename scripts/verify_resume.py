"""Check that a run which is killed and resumed is the run that would have been, for any config.

    python scripts/verify_resume.py loss=kto model=tiny nproc_per_node=2

Takes the words of train.py, and `kill_after=N`: updates after which the run is killed with SIGKILL (default: half of
them). It trains once at one go and once in two parts, in a folder of its own, and compares every line of metrics.jsonl
(but for speeds) and every weight of policy.pt: bit by bit, or with `tolerance=1e-5` up to that share of their size, as
after a change of the number of processes (`resume_with=nproc_per_node=1`).
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import torch

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)

from halos.commands import report_user_errors, take_words, whole_number  # noqa: E402  found in the project
from halos.errors import UserError  # noqa: E402
from halos.metrics import is_time  # noqa: E402

OWN = {"kill_after": "", "tolerance": "0", "resume_with": ""}


def command(folder: str, name: str, words: list[str]) -> list[str]:
    own = [f"cache_dir={folder}", f"exp_name={name}"]
    return [sys.executable, os.path.join(PROJECT, "train.py"), *words, *own]


def train(folder: str, name: str, words: list[str]) -> None:
    done = subprocess.run(command(folder, name, words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"the run failed with exit code {done.returncode}: {done.stderr.strip().splitlines()[-1]}")


def train_and_kill(folder: str, name: str, words: list[str], updates: int) -> int:
    """Start a run, and kill all of its processes after so many updates. Returns the updates that it had made."""
    path = os.path.join(folder, name, "metrics.jsonl")
    settings = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    run = subprocess.Popen(command(folder, name, words), **settings)
    while run.poll() is None and last_update(path) < updates:
        time.sleep(0.01)
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    return last_update(path)


def rows_of(path: str) -> list[dict]:
    """Return the whole lines of metrics.jsonl, without speeds. A run that is killed can leave half a line."""
    with open(path) as file:
        rows = [json.loads(line) for line in file if line.endswith("\n")]
    return [{key: value for key, value in row.items() if not is_time(key)} for row in rows]


def last_update(path: str) -> int:
    if not os.path.exists(path):
        return 0
    return max((row["step"] for row in rows_of(path)), default=0)


def difference(folder: str) -> tuple[float, float]:
    """Return the largest difference between the two runs, of a metric and of a weight, as a share of its size.

    Raises UserError if one run has a line that the other one has not.
    """
    rows, others = (rows_of(os.path.join(folder, name, "metrics.jsonl")) for name in ("parts", "whole"))
    places, other_places = ([(row["step"], row["mode"], sorted(row)) for row in table] for table in (rows, others))
    if places != other_places:
        raise UserError(f"metrics.jsonl has {len(rows)} lines after resuming and {len(others)} without; they differ")
    numbers = [
        [torch.tensor(value, dtype=torch.float64) for row in table for key, value in row.items() if key != "mode"]
        for table in (rows, others)
    ]
    metric = max(map(share, *numbers), default=0.0)
    paths = [os.path.join(folder, name, "LATEST", "policy.pt") for name in ("parts", "whole")]
    states = [torch.load(path, weights_only=True, mmap=True)["state"] for path in paths]
    return metric, max(share(states[0][name], states[1][name]) for name in states[1])


def share(value: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference over that of `other`, which counts as 1 at least; 0 only for equal bits."""
    if torch.equal(value, other):
        return 0.0
    return ((value.double() - other.double()).norm() / other.double().norm().clamp(min=1.0)).item()


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    with report_user_errors():
        own = take_words(OWN)
        words = sys.argv[1:]
        with tempfile.TemporaryDirectory() as folder:
            train(folder, "whole", words)
            total = last_update(os.path.join(folder, "whole", "metrics.jsonl"))
            kill_after = whole_number("kill_after", own["kill_after"] or str(total // 2), "10")
            made = train_and_kill(folder, "parts", words, kill_after)
            changed = [own["resume_with"]] if own["resume_with"] else []
            train(folder, "parts", [*words, *changed, "resume=true"])
            metric, weight = difference(folder)
        print(f"{total} updates at one go, and {made}, killed, and resumed: ", end="")
        print(f"largest difference of a metric {metric:.3g}, of a weight {weight:.3g}, of its size")
        if max(metric, weight) > float(own["tolerance"]):
            raise UserError("the resumed run is another one; see docs/reliability.md")


if __name__ == "__main__":
    main()
