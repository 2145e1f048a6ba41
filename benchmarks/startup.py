"""Seconds from the command to the first optimizer step, beside the import of transformers; and seconds of --help.

    python -m benchmarks.startup

Times the first step of `python train.py do_first_eval=false` on the embedded data, whose tokens are cached already. The
commands take turns, and medians are printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from halos.project_dir import PROJECT

IMPORT = "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM"


def seconds_of(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=PROJECT, check=True, capture_output=True)
    return time.perf_counter() - started


def first_step(cache_dir: str, name: str) -> float:
    """Seconds until metrics.jsonl has its first line."""
    path = os.path.join(cache_dir, name, "metrics.jsonl")
    command = ["train.py", f"cache_dir={cache_dir}", f"exp_name={name}", "n_examples=128", "do_first_eval=false"]
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], cwd=PROJECT, stdout=-3, stderr=-3) as process:
        while not (os.path.exists(path) and os.path.getsize(path)):
            assert process.poll() is None or os.path.exists(path), "the run failed"
            time.sleep(0.01)
        elapsed = time.perf_counter() - started
    with open(path) as file:
        assert json.loads(file.readline())["step"] == 1
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    times: dict[str, list[float]] = {"import of transformers": [], "first optimizer step": [], "--help": []}
    with tempfile.TemporaryDirectory() as cache_dir:
        first_step(cache_dir, "warm-up")
        for n in range(args.rounds):
            times["import of transformers"].append(seconds_of("-c", IMPORT))
            times["first optimizer step"].append(first_step(cache_dir, f"run-{n}"))
            times["--help"].append(seconds_of("train.py", "--help"))
    for what, values in times.items():
        print(f"{what:24} {statistics.median(values):5.2f} s ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
