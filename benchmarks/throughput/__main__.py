"""Training speed of this project, of TRL, and of the plain way, on the same batches.

    python -m benchmarks.throughput                                        # a 35M Llama, synthetic lengths
    python -m benchmarks.throughput --loss kto --shapes shp
    python -m benchmarks.throughput --model DIR --data FILE --most_characters 2400 --batch_size 4

A block is a process that runs one way for some steps, and blocks run one after the other: with SmolLM2 and its
optimizer all ways at once would not fit 24 GiB, and no idle process takes a core. A round has one block of each way on
the same batches; every second round goes backwards, so each way runs before and after each other one. First every way
computes a small batch, and all must agree to 1e-3, or nothing is timed: the loss, and mean log-probs and rewards. KTO's
loss is compared between ways with the same KL: TRL's is of mismatched pairs, within a batch, and so is that of two of
ours. Losses of all timed steps are compared too.

All ways have the same weights, float32 (bfloat16 on a GPU, over float32 weights), AdamW with lr 1e-6 and without weight
decay, a gradient norm of at most 10, and no activation checkpointing. OpenMP's threads wait for each other as long as
they do in a run of ours, and in other ways as long as libgomp has it. The first step of a block is a small one that
does not count, and a block beside which others computed is run again.

`share of the matrix rate`: the FLOPs that the step needs at least (6 per weight and unique token, for the head per
response token; 2 for a live reference; attention not counted), over the time and what a large product reaches in the
same block. Results go to benchmarks/RESULTS.md, one section per run.
"""

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile

from benchmarks.throughput import machine, report, work
from benchmarks.throughput.block import WAYS, Block, Result
from benchmarks.workload import SHAPES
from halos import openmp
from halos.errors import UserError
from halos.project_dir import PROJECT

SYNTHETIC_VOCABULARY = 32000
TRIES = 3  # of a block beside which others computed
OTHERS_SPIN = "300000"  # libgomp's default, which halos/openmp.py lowers for this project


class Bench:
    """Runs blocks, and keeps their results in a folder: a block that is there already is not run again."""

    def __init__(self, args: argparse.Namespace, name: str, batches: list[work.Batch], folder: str):
        self.args = args
        self.batches = batches
        self.folder = os.path.join(folder, name)
        os.makedirs(self.folder, exist_ok=True)
        self.save("timed", batches)
        self.save("checked", [batches[0][: 4 if args.loss == "kto" else 2]])

    def save(self, name: str, batches: list[work.Batch]) -> None:
        work.write(batches, os.path.join(self.folder, f"{name}.batches.json"))

    def run(self, way: str, name: str, dtype: str, checks: bool = False) -> Result:
        path = os.path.join(self.folder, f"{name}-{way}")
        for _ in range(TRIES):
            result = self.result(way, path, dtype, checks)
            if checks or self.args.beside_other_work or result.other_load <= machine.BUSY:
                return result
            os.remove(f"{path}.result.json")
            print(f"{name}, {way}: others used {result.other_load:.0%} of the cores; measured again", flush=True)
        raise UserError(
            f"other processes used more than {machine.BUSY:.0%} of this machine's cores in {TRIES} tries of a block; "
            "end them, or give --beside_other_work"
        )

    def result(self, way: str, path: str, dtype: str, checks: bool) -> Result:
        """Return the result of a block, which runs unless it has one."""
        if not os.path.exists(f"{path}.result.json"):
            batches = os.path.join(self.folder, f"{'checked' if checks else 'timed'}.batches.json")
            loss, model, device, beside = (
                getattr(self.args, k) for k in ("loss", "model", "device", "beside_other_work")
            )
            block = Block(way, loss, model, device, dtype, batches, checks, beside or checks)
            with open(f"{path}.json", "w") as file:
                json.dump(dataclasses.asdict(block), file)
            self.start(way, f"{path}.json", f"{path}.result.json")
        with open(f"{path}.result.json") as file:
            return Result(**json.load(file))

    def start(self, way: str, given: str, wanted: str) -> None:
        command = [sys.executable, "-m", "benchmarks.throughput.block", given, wanted]
        environment = dict(os.environ)
        if not way.startswith("ours") and environment.get("GOMP_SPINCOUNT") == openmp.SPINS:
            environment["GOMP_SPINCOUNT"] = OTHERS_SPIN
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        done = subprocess.run(
            [*shlex.split(self.args.prefix), *command], cwd=PROJECT, text=True, env=environment, **pipes
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            reason = lines[-1].removeprefix("benchmarks.throughput: ") if lines else f"exit code {done.returncode}"
            if len(lines) > 1:
                sys.stderr.write(done.stderr)
            raise UserError(reason)

    def check(self) -> float:
        numbers = {way: self.run(way, "check", "float32", checks=True).numbers for way in self.args.ways}
        return report.check_numbers(self.args.loss, numbers)

    def measure(self) -> dict[str, list[Result]]:
        blocks: dict[str, list[Result]] = {way: [] for way in self.args.ways}
        for number in range(self.args.rounds):
            for way in self.args.ways[:: 1 if number % 2 == 0 else -1]:
                result = self.run(way, f"round-{number}", self.args.dtype)
                blocks[way].append(result)
                print(f"round {number + 1}, {way}: {' '.join(f'{s:.2f}' for s in result.seconds)} s", flush=True)
        return blocks


def measure(args: argparse.Namespace, title: str, batches: list[work.Batch], folder: str) -> None:
    bench = Bench(args, title.replace(" ", "-").replace("/", "-"), batches, folder)
    lengths = work.lengths_text(batches)
    print(f"{title}: {lengths}", flush=True)
    checked = bench.check()
    print(f"all ways agree on a batch to {checked:.1e}", flush=True)
    blocks = bench.measure()
    difference = report.check_losses(args.loss, blocks) if args.dtype == "float32" else None
    notes = f"{lengths}. Before timing, all ways agree on a batch to {checked:.1e}. {report.notes(blocks, difference)}"
    table = report.table(args.loss, batches, blocks)
    print(f"{table}\n\n{notes}", flush=True)
    report.write_section(args.results, title, f"{notes}\n\n{table}")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loss", choices=list(WAYS), default="dpo")
    parser.add_argument("--ways", nargs="+", help=f"of {', '.join(WAYS['kto'])}; default: all of the loss")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="of synthetic lengths")
    parser.add_argument("--model", help="a directory in Hugging Face's layout; goes with --data")
    parser.add_argument("--data", help="rows of a known form, or NAME=PATH with a NAME of config/dataset/")
    parser.add_argument("--most_characters", type=int, help="of a prompt with its longest response; longer: left out")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs, or responses with --loss kto, per step")
    parser.add_argument("--steps", type=int, default=5, help="in a block; default 5")
    parser.add_argument("--rounds", type=int, default=2, help="blocks of each way, in both orders; default 2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--title", help="of the section in the results; default: made of the loss and the data")
    parser.add_argument("--results", default=os.path.join(PROJECT, "benchmarks", "RESULTS.md"))
    parser.add_argument("--folder", help="keep the blocks' results here, and go on from those that are there")
    parser.add_argument("--prefix", default="", help="a command in front of each block's: 'taskset -c 0,1'")
    parser.add_argument("--beside_other_work", action="store_true", help="measure even if other processes compute")
    args = parser.parse_args(words)
    args.ways = args.ways or list(WAYS[args.loss])
    args.dtype = "float32" if args.device == "cpu" else "bfloat16"
    if unknown := [way for way in args.ways if way not in WAYS[args.loss]]:
        parser.error(f"--ways {' '.join(unknown)}: {args.loss} has {', '.join(WAYS[args.loss])}")
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together")
    for flag, path in (("--model", args.model), ("--data", (args.data or "").rpartition("=")[2])):
        if path and not os.path.exists(path):
            parser.error(f"{flag} {path}: there is no such file or directory")
    return args


def run(args: argparse.Namespace, folder: str) -> None:
    if args.model:
        options = (args.steps, args.batch_size, args.most_characters, os.path.join(folder, "cache"))
        batches = work.real(args.loss, args.model, args.data, *options)
        names = [os.path.basename(path.rstrip("/")) for path in (args.model, args.data)]
        measure(args, args.title or f"{args.loss} {' '.join(names)}", batches, folder)
        return
    for shape in args.shapes:
        batches = work.synthetic(shape, args.loss, args.steps, args.batch_size, SYNTHETIC_VOCABULARY)
        measure(args, args.title or f"{args.loss} synthetic {shape}", batches, folder)


def main() -> None:
    args = parse()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            run(args, args.folder or temporary)
    except UserError as problem:
        print(f"benchmarks.throughput: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
