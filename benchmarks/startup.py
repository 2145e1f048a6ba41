"""Seconds from the command to the first optimizer step, beside the import of transformers; and seconds of --help.

    python -m benchmarks.startup

Times the first step of `python train.py do_first_eval=false` on the embedded data with SFT and with DPO, whose tokens
and reference log-probs are cached already. The commands take turns, and medians are printed. The import is timed from
the start of Python until it is done; how long Python then takes to end is not part of it.
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

LOSSES = ("sft", "dpo")
SCRIPTS = ("train.py", "eval.py", "compare.py")
IMPORT = "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM; print(flush=True)"


def seconds_of(*command: str) -> float:
    """Seconds until the command has printed a line."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], cwd=PROJECT, stdout=-1, stderr=-3) as process:
        assert process.stdout is not None and process.stdout.readline(), "the command failed"
        elapsed = time.perf_counter() - started
        process.stdout.read()
    return elapsed


def first_step(cache_dir: str, loss: str, name: str) -> float:
    """Seconds until metrics.jsonl has its first line."""
    path = os.path.join(cache_dir, name, "metrics.jsonl")
    words = [f"loss={loss}", f"cache_dir={cache_dir}", f"exp_name={name}", "n_examples=128", "do_first_eval=false"]
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "train.py", *words], cwd=PROJECT, stdout=-3, stderr=-3) as process:
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
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as cache_dir:
        for loss in LOSSES:
            first_step(cache_dir, loss, f"warm-up-{loss}")
        for n in range(args.rounds):
            times.setdefault("import of transformers", []).append(seconds_of("-c", IMPORT))
            for loss in LOSSES:
                times.setdefault(f"first step of {loss}", []).append(first_step(cache_dir, loss, f"{loss}-{n}"))
            for script in SCRIPTS:
                times.setdefault(f"{script} --help", []).append(seconds_of(script, "--help"))
    for what, values in times.items():
        print(f"{what:24} {statistics.median(values):5.2f} s ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
