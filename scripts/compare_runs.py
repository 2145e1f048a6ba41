"""Show that a change of the code changes no number: run the same small trainings with two checkouts, compare all bits.

    python scripts/compare_runs.py record CHECKOUT OUT [--processes 1,2,3] [--only 'dpo-*']
    python scripts/compare_runs.py compare BEFORE AFTER [--allow 'rewards_*/accuracies' ...]
    python scripts/compare_runs.py BEFORE_CHECKOUT AFTER_CHECKOUT     both, with the records in a temporary folder

`record` calls CHECKOUT's own `train.run(config)` for every case of the matrix below, and leaves the run directories in
OUT/processes_N/CASE. It starts Python once per number of processes; all cases take about two minutes on two cores.

`compare` exits with 0 if both records hold the same rows of metrics.jsonl, tensors of checkpoints, data.json and
configs, and else with 1. Keys and files that only AFTER has are listed and accepted. Times are not compared. Only files
are read, so code may move freely inside a checkout.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import glob

import torch
import yaml
from safetensors.torch import load_file

SCRIPTS = os.path.dirname(os.path.abspath(__file__))

#### THE MATRIX

# Two small layers; steps that are visible after one update; a last batch of a single example, which leaves other
# processes without one; evaluations at the start, in the middle and at the end.
COMMON = (
    "model=tiny",
    "datasets=[demo]",
    "model.architecture.hidden_size=32",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.intermediate_size=48",
    "++model.architecture.num_key_value_heads=2",
    "++model.architecture.initializer_range=0.1",
    "model.batch_size=12",
    "model.eval_batch_size=12",
    "n_examples=49",
    "n_eval_examples=25",
    "eval_every=24",
    "do_first_eval=true",
    "optimizer=RMSprop",
    "lr=2e-3",
    "warmup_steps=1",
    "seed=1",
    "minimum_log_interval_secs=1000",
)

ADAMW = ("optimizer=AdamW", "lr=5e-3", "++optimizer_kwargs.weight_decay=0.1")
ACCUMULATED = ("model.gradient_accumulation_steps=2", "n_examples=57")  # 12+12, 12+12, and 9 that are flushed

# For every loss of the checkout.
GENERIC = {
    "packed": (),
    "padded": ("model.packing=false", *ADAMW),
    "forwards": ("model.max_tokens_per_forward=40", *ADAMW),  # about 10 for 12 examples, 3 or 4 on each of 3 processes
    "accumulated": ACCUMULATED,
}

# For one loss each: features of the machinery, not of the loss.
SPECIAL = {
    "ppo-epochs": ("loss.ppo_epochs=3", "lr_scheduler=linear"),
    "ppo-epochs-accumulated-k1": ("loss.ppo_epochs=2", "loss.kl_estimator=k1", *ACCUMULATED),
    "ppo-loaded": ("model.load_from=ppo-packed/LATEST/policy.pt",),
    "dpo-bfloat16": ("model.fsdp_policy_mp=bfloat16",),
    "dpo-average": ("++loss.average_log_prob=true", "model.logps=plain", "model.max_tokens_per_forward=40"),
    "kto-recomputed": ("model.activation_checkpointing=true", *ADAMW),
    "kto-unsharded": ("use_fsdp=false",),
    "cdpo-steps": ("intermediate_checkpoints=true", "lr_scheduler=cosine"),
    "slic-truncated": ("model.max_length=32", "model.max_prompt_length=24"),
    "sft-two-epochs": ("n_epochs=2", "n_examples=null", "model.batch_size=24", "eval_every=72"),
}
NEEDS = {"ppo-loaded": "ppo-packed"}  # a case that starts from the weights of another


def matrix(checkout: str, only: str = "*") -> dict[str, list[str]]:
    """The cases of a checkout, {name: key=value words}, in the order in which they run.

    only: a pattern of names; a case that another one starts from is run with it
    """
    paths = sorted(glob(os.path.join(checkout, "config", "loss", "*.yaml")))
    losses = [os.path.basename(path).removesuffix(".yaml") for path in paths]
    cases = {f"{loss}-{name}": words for loss in losses for name, words in GENERIC.items()}
    cases |= {name: words for name, words in SPECIAL.items() if name.split("-")[0] in losses}
    chosen = {name for name in cases if fnmatchcase(name, only)}
    chosen |= {NEEDS[name] for name in chosen if name in NEEDS}
    return {
        name: [*COMMON, f"loss={name.split('-')[0]}", f"exp_name={name}", *words]
        for name, words in cases.items()
        if name in chosen
    }


#### RECORD


def record(checkout: str, out: str, processes: list[int], only: str = "*") -> None:
    """Run the matrix with the code of a checkout, in one group of processes for each number of them."""
    checkout, out = os.path.abspath(checkout), os.path.abspath(out)
    cases = matrix(checkout, only)
    if not cases:
        sys.exit(f"{checkout} has no case {only}; give a checkout of this project, and for --only a name of the matrix")
    for n in processes:
        folder = os.path.join(out, f"processes_{n}")
        if os.path.exists(folder):
            sys.exit(f"{folder} exists already; record into a new folder")
        os.makedirs(folder)
        with open(os.path.join(folder, "cases.json"), "w") as file:
            json.dump(cases, file, indent=1)
        started = time.monotonic()
        print(f"{checkout}: {len(cases)} cases, {n} processes ... ", end="", flush=True)
        start_group(checkout, folder, n)
        print(f"{time.monotonic() - started:.0f} s", flush=True)


def start_group(checkout: str, folder: str, n: int) -> None:
    """Run `launch_cases` with the checkout's code, and nothing written into the checkout."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((checkout, SCRIPTS)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    code = "import sys, compare_runs; compare_runs.launch_cases(*sys.argv[1:])"
    command = [sys.executable, "-c", code, checkout, folder, str(n)]
    log = os.path.join(folder, "log.txt")
    with open(log, "w") as file:
        failed = subprocess.run(
            command, cwd=checkout, env=environment, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if failed:
        with open(log) as file:
            print(f"\n{''.join(file.readlines()[-40:])}")
        sys.exit(f"the runs with the code of {checkout} failed on {n} processes; all output is in {log}")


def launch_cases(checkout: str, folder: str, n: str) -> None:
    """Start the processes with the checkout's own launcher; called in an interpreter that imports from the checkout."""
    from halos.launch import launch

    launch(train_cases, checkout, folder, nproc_per_node=int(n))


def train_cases(checkout: str, folder: str) -> None:
    """Train every case of folder/cases.json, one after the other. Every process of the group calls this once."""
    from hydra import compose, initialize_config_dir

    import train

    assert os.path.samefile(os.path.dirname(train.__file__), checkout), f"train.py is that of {train.__file__}"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    save_time()
    with open(os.path.join(folder, "cases.json")) as file:
        cases = json.load(file)
    for name, words in cases.items():
        print(f"\n==== {name}", flush=True)
        torch.manual_seed(0)  # whatever a case draws does not depend on the cases before it
        with initialize_config_dir(os.path.join(checkout, "config"), version_base="1.3"):
            config = compose("config", [*words, f"cache_dir={folder}"])
        train.run(config)


def save_time() -> None:
    """Shrink the demo data and draw no curves, which together take longer than all else.

    Where a checkout keeps them in another place, this does nothing: its runs are slower, and more data shows as a
    difference in data.json.
    """
    import halos.demo
    import halos.metrics

    if hasattr(halos.metrics, "draw_curves"):
        halos.metrics.draw_curves = lambda *args: None
    if hasattr(halos.demo, "N_PROMPTS"):
        halos.demo.N_PROMPTS.update(train=100, test=40)


#### COMPARE

CONFIGS = ("data.json", "config.yaml", "config.json", "generation_config.json")
NOT_COMPARED = ("curves.png",)  # drawn from metrics.jsonl, if at all
MISSING = "missing"


@dataclass
class Comparison:
    """Compare one case of two records."""

    case: str  # processes_N/name
    allow: list[str]  # patterns of keys whose values may differ
    rows: int = 0
    values: int = 0
    tensors: int = 0
    differences: list[str] = field(default_factory=list)
    allowed: dict[str, float] = field(default_factory=dict)  # key -> largest difference
    new: set[str] = field(default_factory=set)  # keys, tensors and files that only AFTER has

    def compare_directories(self, before: str, after: str) -> None:
        """Compare all files of two run directories."""
        theirs = set(files_of(after))
        for path in files_of(before):
            if path in theirs:
                self.compare_files(path, os.path.join(before, path), os.path.join(after, path))
            else:
                self.differences.append(f"{path}: {MISSING} in AFTER")
        self.new |= {f"file {path}" for path in theirs.difference(files_of(before))}

    def compare_files(self, path: str, before: str, after: str) -> None:
        name = os.path.basename(path)
        if name == "metrics.jsonl":
            self.compare_rows(path, read_rows(before), read_rows(after))
        elif name in CONFIGS:
            self.compare_values(path, read_config(before), read_config(after))
        elif name in ("policy.pt", "v_head.pt"):  # and not a state's progress.pt, whose contents show in later rows
            (values, tensors), (other_values, other_tensors) = read_checkpoint(before), read_checkpoint(after)
            self.compare_values(path, values, other_values)
            self.compare_tensors(path, tensors, other_tensors)
        elif name.endswith(".safetensors"):
            self.compare_tensors(path, load_file(before), load_file(after))

    def compare_rows(self, path: str, before: list[dict], after: list[dict]) -> None:
        for row, other in zip(before, after, strict=False):
            self.rows += 1
            self.compare_values(f"{path}, step {row.get('step')} ({row.get('mode')})", row, other)
        if len(before) != len(after):
            self.differences.append(f"{path}: {len(before)} rows before, {len(after)} after")

    def compare_values(self, where: str, before: dict, after: dict) -> None:
        for key, value in before.items():
            self.values += 1
            other = after.get(key, MISSING)
            if key in after and (is_time(key) or same(value, other)):
                continue
            if any(fnmatchcase(key, pattern) for pattern in self.allow):
                self.allowed[key] = max(self.allowed.get(key, 0.0), distance(value, other))
            else:
                self.differences.append(f"{where}, {key}: {value!r} before, {other!r} after")
        self.new |= {f"key {key}" for key in after if key not in before}

    def compare_tensors(self, path: str, before: dict, after: dict) -> None:
        for name, tensor in before.items():
            self.tensors += 1
            difference = tensor_difference(tensor, after.get(name))
            if difference:
                self.differences.append(f"{path}, {name}: {difference}")
        self.new |= {f"tensor {name}" for name in after if name not in before}


def compare(before: str, after: str, allow: list[str]) -> list[Comparison]:
    """Compare every case of BEFORE with that of AFTER; a case of AFTER alone is listed as new."""
    theirs = set(cases_of(after))
    comparisons = []
    for case in cases_of(before):
        comparison = Comparison(case, allow)
        if case in theirs:
            comparison.compare_directories(os.path.join(before, case), os.path.join(after, case))
        else:
            comparison.differences.append(f"{MISSING} in AFTER")
        comparisons.append(comparison)
    new = theirs.difference(cases_of(before))
    return comparisons + [Comparison(case, allow, new={"case"}) for case in sorted(new)]


def is_time(key: str) -> bool:
    return key == "examples_per_second" or key.startswith("time/")


def same(one, other) -> bool:
    """Return whether two values are written alike: NaN equals NaN, and 0.0 is not -0.0, nor 1 equal to 1.0."""
    return json.dumps(one) == json.dumps(other)


def distance(one, other) -> float:
    """|one - other|, or inf where one of them is not a number."""
    numbers = all(isinstance(x, int | float) for x in (one, other))
    return abs(one - other) if numbers and not math.isnan(one - other) else math.inf


def tensor_difference(one: torch.Tensor, other: torch.Tensor | None) -> str:
    """How two tensors differ, for people; '' if all of their bits are the same."""
    if other is None:
        return f"{MISSING} in AFTER"
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return f"{one.dtype} {list(one.shape)} before, {other.dtype} {list(other.shape)} after"
    if torch.equal(bits(one), bits(other)):
        return ""
    n_differ = int((bits(one) != bits(other)).any(dim=1).sum())
    largest = (one.double() - other.double()).abs().max()
    return f"{n_differ} of {one.numel()} entries differ, by {largest:.3g} at most"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """(n_entries, bytes of an entry) uint8: as bytes, NaN equals NaN, and 0 differs from -0."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


#### FILES


def cases_of(folder: str) -> list[str]:
    """processes_N/name of every case in a record; folders that start with a dot are caches."""
    paths = glob(os.path.join(folder, "processes_*", "*", ""))
    return sorted(os.path.relpath(path, folder) for path in paths)


def files_of(directory: str) -> list[str]:
    """Relative paths of all files: metrics.jsonl first, where a difference has a step, and then by name."""
    paths = [os.path.relpath(os.path.join(d, name), directory) for d, _, names in os.walk(directory) for name in names]
    return sorted(
        (path for path in paths if os.path.basename(path) not in NOT_COMPARED),
        key=lambda path: (path != "metrics.jsonl", path),
    )


def read_rows(path: str) -> list[dict]:
    with open(path) as file:
        return [json.loads(line) for line in file]


def read_config(path: str) -> dict:
    """A YAML or JSON file with its nested keys joined by dots, without where the record is kept."""
    with open(path) as file:
        content = json.load(file) if path.endswith(".json") else yaml.safe_load(file)
    return {key: value for key, value in flat(content) if key != "cache_dir"}


def flat(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_checkpoint(path: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(values, tensors) of a policy.pt or v_head.pt: its step and metrics, and its weights."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    values = {name: value for name, value in content.items() if name not in ("state", "metrics")}
    return values | content.get("metrics", {}), content["state"]


#### REPORT

SHOWN = 5  # differences of a case


def report(comparisons: list[Comparison]) -> int:
    """Print a table of all cases, then the first differences of each; return the exit code."""
    width = max(len(one.case) for one in comparisons)
    print(f"{'case':{width}}  {'rows':>5} {'values':>7} {'tensors':>7}")
    for one in comparisons:
        result = one.differences[0] if one.differences else "new" if one.new == {"case"} else "identical"
        print(f"{one.case:{width}}  {one.rows:5} {one.values:7} {one.tensors:7}  {result}")
    for one in comparisons:
        for difference in one.differences[:SHOWN]:
            print(f"DIFFERS  {one.case}: {difference}")
        if len(one.differences) > SHOWN:
            print(f"DIFFERS  {one.case}: and {len(one.differences) - SHOWN} more")
    for thing, count in sorted(Counter(thing for one in comparisons for thing in one.new).items()):
        print(f"new      {thing} ({count} cases)")
    for key in sorted({key for one in comparisons for key in one.allowed}):
        found = [one.allowed[key] for one in comparisons if key in one.allowed]
        print(f"allowed  {key} differs in {len(found)} cases, by {max(found):.3g} at most")
    different = sum(bool(one.differences) for one in comparisons)
    totals = (sum(getattr(one, name) for one in comparisons) for name in ("rows", "values", "tensors"))
    print("{} rows, {} values, {} tensors in {} cases: ".format(*totals, len(comparisons)), end="")
    print(f"{different} cases differ" if different else "identical")
    return int(different > 0)


def compare_and_report(before: str, after: str, allow: list[str]) -> int:
    if not cases_of(before):
        sys.exit(f"{before} holds no record; make one: python scripts/compare_runs.py record CHECKOUT {before}")
    return report(compare(before, after, allow))


def main(words: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording, comparing, both = (commands.add_parser(name) for name in ("record", "compare", "both"))
    recording.add_argument("checkout")
    recording.add_argument("out")
    for one in (comparing, both):
        one.add_argument("before")
        one.add_argument("after")
        one.add_argument("--allow", nargs="+", action="extend", default=[], metavar="KEY", help="keys that may differ")
    for one in (recording, both):
        one.add_argument("--processes", default="1,2,3", help="numbers of processes (default: 1,2,3)")
        one.add_argument("--only", default="*", metavar="PATTERN", help="names of cases, such as 'dpo-*'")
    if words and words[0] not in commands.choices and not words[0].startswith("-"):
        words = ["both", *words]
    args = parser.parse_args(words)
    if args.command == "compare":
        return compare_and_report(args.before, args.after, args.allow)
    processes = [int(n) for n in args.processes.split(",")]
    if args.command == "record":
        record(args.checkout, args.out, processes, args.only)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        before, after = os.path.join(folder, "before"), os.path.join(folder, "after")
        record(args.before, before, processes, args.only)
        record(args.after, after, processes, args.only)
        return compare_and_report(before, after, args.allow)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
