"""Speed of compare.py: calls per second, memory, statistics, and the CPU time of the test server itself.

    python -m benchmarks.judge

Calls per second are measured against a local server that takes 200 ms per reply, with the journal on; the ideal is
concurrency / 0.2 s. Server and client share the machine's cores. Memory is that of 100,000 pairs of 2 kB, judged by a
Python function in both orders. Statistics are those of 100,000 pairs.
"""

import http.client
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from halos.project_dir import PROJECT

sys.path.insert(0, os.path.join(PROJECT, "tests"))

from comparing import command, environment, write_samples  # noqa: E402
from halos.judge import statistics  # noqa: E402
from halos.judge.judges import JudgeScores  # noqa: E402
from judge_server import serve  # noqa: E402

N_PAIRS = 1000


def throughput(concurrency: int) -> tuple[float, int]:
    """Measure (calls per second, from the end of the progress bar; most calls in flight that the server saw)."""
    with tempfile.TemporaryDirectory() as name, serve(delay=0.2) as server:
        directory = Path(name)
        write_samples(directory, N_PAIRS)
        words = ["--judge", "m", "--base_url", server.url, "--concurrency", str(concurrency)]
        done = subprocess.run(command(directory, *words), env=environment(), capture_output=True, text=True, check=True)
        (rate,) = re.findall(r"([\d.]+)call/s", done.stderr.replace("\r", "\n").strip().split("\n")[-1])
        return float(rate), server.stats()["max_in_flight"]


def memory(n_pairs: int = 100_000) -> float:
    """Measure the peak memory of a comparison by a Python function, in GB."""
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


def statistics_seconds(n_pairs: int = 100_000) -> float:
    """Measure the CPU time of all numbers of a comparison, in seconds. It should stay below one second."""
    rng = np.random.default_rng(0)
    judges = [JudgeScores("judge", rng.choice([0.0, 0.5, 1.0], (n_pairs, 2)), np.ones((n_pairs, 2), bool))]
    human = rng.choice(["candidate", "baseline", "tie"], n_pairs).tolist()
    start = time.process_time()
    statistics.summarize(judges, *rng.integers(10, 2000, (2, n_pairs)), human)
    return time.process_time() - start


def server_microseconds(n: int = 2000) -> float:
    """Measure the test server's CPU time per request, in microseconds. With 667, one core serves 1500 calls/s."""
    request = {"model": "m", "messages": [{"role": "user", "content": "x" * 2000}], "max_tokens": 512, "temperature": 0}
    with serve(delay=0, verdict="first") as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        before = _cpu_seconds(server.process.pid)
        for _ in range(n):
            connection.request("POST", "/v1/chat/completions", json.dumps(request))
            connection.getresponse().read()
        return (_cpu_seconds(server.process.pid) - before) / n * 1e6


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        user, system = file.read().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    print(f"the server takes {server_microseconds():.0f} us of CPU time per request")
    for concurrency in (32, 128):
        rate, in_flight = throughput(concurrency)
        print(
            f"concurrency {concurrency}: {rate:.0f} calls/s of {concurrency / 0.2:.0f}, at most {in_flight} in flight"
        )
    print(f"numbers of 100,000 pairs: {statistics_seconds():.2f} s of CPU time")
    print(f"100,000 pairs of 2 kB, both orders: {memory():.2f} GB at the peak")
