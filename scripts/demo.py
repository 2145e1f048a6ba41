"""`make demo`: train SFT, then another loss from the SFT weights, on the embedded data, and compare the two.

The script runs the project's own commands and prints them. Its table shows true quality: the answers of the demo data
can be checked, so the judge of compare.py is a function, and no API key is needed. It takes some minutes on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from halos.demo import check  # noqa: E402
from halos.project_dir import PROJECT  # noqa: E402

N_SAMPLES = 512
# Command-line settings of the demo, per loss; everything else is as in config/.
SETTINGS = {
    "sft": ["n_epochs=2", "n_examples=30080", "lr_scheduler=cosine", "eval_every=9600"],
    "kto": ["lr=3e-4", "n_examples=16000", "warmup_steps=20", "lr_scheduler=cosine", "eval_every=3200"],
    "ppo": ["lr=1e-4", "n_examples=16000", "warmup_steps=20", "lr_scheduler=cosine", "eval_every=3200"],
}
JUDGE = ["--judge", "halos.demo:check", "--judge_kind", "score"]
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
    samples, win_rates = {}, {}
    for label, name in (("SFT", sft), (f"SFT+{args.loss.upper()}", aligned)):
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
        file, results = (os.path.join(args.cache_dir, name) for name in (f"{name}.json", "results.jsonl"))
        run("compare.py", "-f", file, "-bk", "chosen", "-r", results, *JUDGE)
        with open(file) as rows, open(results) as lines:
            samples[label], win_rates[label] = json.load(rows), json.loads(lines.readlines()[-1])
    print(table(samples, win_rates))
    print(f"curves: {args.cache_dir}/{{{sft},{aligned}}}/curves.png   {time.monotonic() - started:.0f} s in all")


def run(*command: str) -> None:
    print("$ python " + " ".join(command), flush=True)
    result = subprocess.run([sys.executable, os.path.join(PROJECT, command[0]), *command[1:]])
    if result.returncode:
        sys.exit(result.returncode)


def table(samples: dict[str, list[dict]], win_rates: dict[str, dict]) -> str:
    """Return a table of true accuracy, mean quality, and compare.py's win rate against the chosen response.

    Accuracy and win rate come with their 95 % intervals.
    """
    chosen = next(iter(samples.values()))
    quality = {name: [check(row["prompt"], row["policy"]) for row in rows] for name, rows in samples.items()}
    quality["(chosen)"] = [check(row["prompt"], row["chosen"]) for row in chosen]
    lines = [f"{'':10} {'true accuracy':>16} {'mean quality':>13} {'win rate vs chosen':>22}"]
    for name, values in quality.items():
        right = [float(value == 1) for value in values]
        wins = won(win_rates[name]) if name in win_rates else "-"
        lines.append(f"{name:10} {percent(right):>16} {sum(values) / len(values):>13.3f} {wins:>22}")
    return "\n".join(lines)


def won(line: dict) -> str:
    low, high = line["interval"]
    return f"{100 * line['win_rate']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def percent(values: list[float]) -> str:
    """Return the mean and the half-width of its normal 95 % interval."""
    n = len(values)
    mean = sum(values) / n
    half_width = 1.96 * (sum((value - mean) ** 2 for value in values) / n / n) ** 0.5
    return f"{100 * mean:.1f} % ± {100 * half_width:.1f}"


if __name__ == "__main__":
    main()
