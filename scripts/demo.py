"""`make demo`: SFT, then another loss from the SFT weights, on the embedded data, and what both are worth.

Runs the project's own commands and prints them. The table is of true quality: the answers of the demo data can be
checked, so no judge is needed. Takes some minutes on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import time

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)

from halos.demo import check  # noqa: E402

N_SAMPLES = 512
# What the demo changes on the command line, per loss; everything else is as in config/.
SETTINGS = {
    "sft": ["n_epochs=2", "n_examples=30080", "lr_scheduler=cosine", "eval_every=9600"],
    "kto": ["lr=3e-4", "n_examples=16000", "warmup_steps=20", "lr_scheduler=cosine", "eval_every=3200"],
    "ppo": ["lr=1e-4", "n_examples=16000", "warmup_steps=20", "lr_scheduler=cosine", "eval_every=3200"],
}
OTHERS = ["lr=1e-4", "n_examples=9600", "warmup_steps=20", "lr_scheduler=cosine", "eval_every=3200"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", default="kto", help="the loss after SFT")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache_dir", default=".cache/demo", help="where the runs go")
    parser.add_argument("--n_samples", type=int, default=N_SAMPLES, help="held-out prompts to sample for")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="given to every training command")
    args = parser.parse_intermixed_args()
    started = time.monotonic()

    common = [f"seed={args.seed}", f"cache_dir={args.cache_dir}", "overwrite=true", *args.overrides]
    sft, aligned = f"sft_seed{args.seed}", f"sft_{args.loss}_seed{args.seed}"
    run("train.py", "loss=sft", f"exp_name={sft}", *SETTINGS["sft"], *common)
    load = f"model.load_from={sft}/LATEST/policy.pt"
    run("train.py", f"loss={args.loss}", load, f"exp_name={aligned}", *SETTINGS.get(args.loss, OTHERS), *common)
    samples = {}
    for name in (sft, aligned):
        config = os.path.join(args.cache_dir, name, "config.yaml")
        run(
            "eval.py",
            "-c",
            config,
            "-n",
            str(args.n_samples),
            "-b",
            "128",
            "-u",
            "false",
            f"samples_dir={args.cache_dir}",
        )
        with open(os.path.join(args.cache_dir, f"{name}.json")) as file:
            samples[name] = json.load(file)
    print(table({"SFT": samples[sft], f"SFT+{args.loss.upper()}": samples[aligned]}))
    print(f"curves: {args.cache_dir}/{{{sft},{aligned}}}/curves.png   {time.monotonic() - started:.0f} s in all")


def run(*command: str) -> None:
    print("$ python " + " ".join(command), flush=True)
    result = subprocess.run([sys.executable, os.path.join(PROJECT, command[0]), *command[1:]])
    if result.returncode:
        sys.exit(result.returncode)


def table(samples: dict[str, list[dict]]) -> str:
    """True accuracy, mean quality, and win rate against the data's chosen response (ties count half), with 95 %."""
    chosen = next(iter(samples.values()))
    quality = {name: [check(row["prompt"], row["policy"]) for row in rows] for name, rows in samples.items()}
    baseline = [check(row["prompt"], row["chosen"]) for row in chosen]
    lines = [f"{'':10} {'true accuracy':>16} {'mean quality':>13} {'win rate vs chosen':>20}"]
    for name, values in {**quality, "(chosen)": baseline}.items():
        wins = [0.5 * (1 + (ours > theirs) - (ours < theirs)) for ours, theirs in zip(values, baseline, strict=True)]
        right = [float(value == 1) for value in values]
        lines.append(f"{name:10} {percent(right):>16} {sum(values) / len(values):>13.3f} {percent(wins):>20}")
    return "\n".join(lines)


def percent(values: list[float]) -> str:
    """The mean and the half-width of its normal 95 % interval."""
    n = len(values)
    mean = sum(values) / n
    half_width = 1.96 * (sum((value - mean) ** 2 for value in values) / n / n) ** 0.5
    return f"{100 * mean:.1f} % ± {100 * half_width:.1f}"


if __name__ == "__main__":
    main()
