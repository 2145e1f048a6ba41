"""Calls per second of compare.py against a local server that takes 200 ms for an answer, journal on; and memory.

    python -m benchmarks.judge

The ideal is concurrency / 0.2 s. Server and client share the machine's cores. The memory is that of 100,000 pairs of
2 kB before a Python function, in both orders.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from halos.project_dir import PROJECT

sys.path.insert(0, os.path.join(PROJECT, "tests"))

from comparing import command, environment, write_samples  # noqa: E402
from judge_server import serve  # noqa: E402

N_PAIRS = 1000


def throughput(concurrency: int) -> tuple[float, int]:
    """(calls per second from the bar's end, most calls in flight that the server saw)."""
    with tempfile.TemporaryDirectory() as name, serve(delay=0.2) as server:
        directory = Path(name)
        write_samples(directory, N_PAIRS)
        words = ["--judge", "m", "--base_url", server.url, "--concurrency", str(concurrency)]
        done = subprocess.run(command(directory, *words), env=environment(), capture_output=True, text=True, check=True)
        (rate,) = re.findall(r"([\d.]+)call/s", done.stderr.replace("\r", "\n").strip().split("\n")[-1])
        return float(rate), server.stats()["max_in_flight"]


def memory(n_pairs: int = 100_000) -> float:
    """GB at the peak."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        row = {"chosen": "c" * 900, "policy": "p" * 950, "reference": ""}
        rows = ({"prompt": f"{number:06} " + "q" * 143, **row} for number in range(n_pairs))
        (directory / "samples.json").write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")
        (directory / "judge.py").write_text("def longer(prompt, a, b):\n    return 1 if len(a) > len(b) else 2\n")
        done = subprocess.run(
            command(directory, "--judge", "judge:longer"), cwd=directory, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


if __name__ == "__main__":
    for concurrency in (32, 128):
        rate, in_flight = throughput(concurrency)
        print(
            f"concurrency {concurrency}: {rate:.0f} calls/s of {concurrency / 0.2:.0f}, at most {in_flight} in flight"
        )
    print(f"100,000 pairs of 2 kB, both orders: {memory():.2f} GB at the peak")
