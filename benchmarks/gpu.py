"""Run everything that needs a GPU, and write one table: benchmarks/GPU.md.

    bash benchmarks/gpu.sh                   # on a GPU, in under 9 minutes
    bash benchmarks/gpu.sh --small           # the same logic at a tiny size on a CPU, in about a minute
    bash benchmarks/gpu.sh --only compile    # the rows with this word in their name

Each row runs in a process of its own, so that a row that fails, or runs out of memory, leaves the others alone. The
table is written after every row. It needs no network. What is not installed is named in the table, and so is a row that
the time did not suffice for. Exit code: 0; 1 if a row failed; 2 if nothing could be run.

What a row measures is in `benchmarks/gpu_step.py`; add a row in `rows` below.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

BUDGET = 520  # seconds for everything
NOT_MEASURED = "not measured: `bash benchmarks/gpu.sh`"
NEEDED = {"torch": "torch", "transformers": "transformers", "omegaconf": "omegaconf", "hydra": "hydra-core"}
PEER = "TRL"
PAIRS_OF_PEER = 8  # padded batches of more do not fit 80 GB
GIB = 2**30

HEAD = """# On a GPU

`bash benchmarks/gpu.sh` runs all of this and writes this file ([what the rows are](README.md)).

{machine}

| row | tokens/s | examples/s | peak GiB | share of the rate | times TRL | |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    words: the command, after the interpreter. It writes a JSON object of numbers to the path that ends the command
    least: seconds without which it is not worth starting
    limit: seconds after which it is stopped
    needs: GiB of the device's memory
    peer: a name that a row of TRL shares with those of ours that run the same batches
    writes_json: false for the tests, of whose output the last line is the result
    """

    name: str
    words: tuple[str, ...]
    least: float = 25
    limit: float = 80
    needs: float = 0
    peer: str = ""
    writes_json: bool = True


@dataclass
class Result:
    """The numbers of a row, or the reason why it has none."""

    numbers: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    failed: bool = False


Runner = Callable[[Row, float], Result]


#### THE ROWS


def rows(small: bool) -> list[Row]:
    """Return all rows, the most important first: the last ones are skipped if time is short."""
    tests = ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py")
    found = [Row("tests marked `gpu`", tests, least=30, limit=200, writes_json=False)]
    for loss in ("dpo", "kto"):
        found += [_step(small, loss, checkpointing=way) for way in ("false", "selective", "true")]
        found += [_step(small, loss, n_pairs=str(PAIRS_OF_PEER)), _peer(small, loss)]
    found += _llamas(small)
    found.append(_step(small, "dpo", reference="live"))
    if not small:  # compiling takes longer than all other rows of the small run
        found += [_step(small, "dpo", checkpointing=way, compile="true") for way in ("false", "selective", "true")]
        found.append(_step(small, "kto", compile="true"))
    return found


def _step(small: bool, loss: str, shape: str = "neox-1.4b", needs: float = 0, **settings: str) -> Row:
    """A training step of ours."""
    what = {"checkpointing": "false", "compile": "false", "weights": "float32", "reference": "cached"} | settings
    named = {"false": "off", "true": "on"}
    name = f"{loss.upper()} {shape}, checkpointing {named.get(what['checkpointing'], what['checkpointing'])}"
    name += ", compile on" if what["compile"] == "true" else ""
    name += f", {what['weights']} weights" if what["weights"] != "float32" or shape.startswith("llama") else ""
    name += ", reference live" if what["reference"] == "live" else ""
    words = [f"--{key}={value}" for key, value in ({"loss": loss, "shape": shape} | what).items()]
    words += ["--small"] if small else []
    name += f", batches of {what['n_pairs']}" if "n_pairs" in what else ""
    times = {"least": 45, "limit": 130} if what["compile"] == "true" else {}
    peer = loss if "n_pairs" in what else ""
    return Row(name, ("-m", "benchmarks.gpu_step", *words), needs=0 if small else needs, peer=peer, **times)


def _llamas(small: bool) -> list[Row]:
    """Llama 3 8B. float32 weights, gradients and AdamW take 16 bytes a weight, 120 GiB; in bfloat16 they take 60."""
    shape = "llama-8b"
    return [
        _step(small, "dpo", shape, needs=70, checkpointing="true", weights="bfloat16"),
        _step(small, "kto", shape, needs=70, checkpointing="true", weights="bfloat16"),
        _step(small, "dpo", shape, needs=72, checkpointing="selective", weights="bfloat16"),
        _step(small, "dpo", shape, needs=132, checkpointing="true", weights="float32"),
    ]


def _peer(small: bool, loss: str) -> Row:
    words = ["-m", "benchmarks.gpu_step", f"--loss={loss}", "--peer", f"--n_pairs={PAIRS_OF_PEER}"]
    words += ["--small"] if small else []
    name = f"{PEER}, {loss.upper()} neox-1.4b, batches of {PAIRS_OF_PEER}"
    return Row(name, tuple(words), least=40, limit=110, peer=loss)


#### RUNNING THEM


def run_all(todo: list[Row], run: Runner, show: Callable[[Row, dict[str, Result]], None], memory: float, budget: float):
    """Run the rows one after the other, and return their results by name.

    show: called after each row, with all results so far
    memory: GiB of the device
    budget: seconds for all rows
    """
    results: dict[str, Result] = {}
    deadline = time.monotonic() + budget
    for row in todo:
        left = deadline - time.monotonic()
        if row.needs > memory:
            results[row.name] = Result(note=f"skipped: needs {row.needs:g} GiB, the device has {memory:.0f}")
        elif left < row.least:
            again = "; `bash benchmarks/gpu.sh --only WORD` runs single rows"
            results[row.name] = Result(note=f"skipped: {max(0, left):.0f} of {budget:.0f} s were left{again}")
        else:
            results[row.name] = run(row, min(row.limit, left))
        show(row, results)
    return results


def run(row: Row, limit: float) -> Result:
    """Run a row in a process group of its own, and stop all of it at the limit."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "numbers.json")
        words = [sys.executable, *row.words] + ([path] if row.writes_json else [])
        code, out, errors = _process(words, limit)
        numbers = _read(path)
    if code is None:
        return Result(note=f"failed: stopped after {limit:.0f} s", failed=True)
    if code == 0 and not row.writes_json:
        return Result(note=_last_line(out))
    if code == 0 and numbers:
        return Result(numbers, numbers.pop("note", ""))
    if numbers.get("lacks"):
        return Result(note=f"skipped: {numbers['lacks']}")
    print(errors[-2000:] or out[-2000:], file=sys.stderr, flush=True)
    reason = numbers.get("error") or _last_line(errors if row.writes_json else out) or "without a word"
    return Result(note=f"failed: {reason}" + (f" (signal {-code})" if code < 0 else ""), failed=True)


def _process(words: list[str], limit: float) -> tuple[int | None, str, str]:
    """Return the exit code (None: stopped at the limit), stdout and stderr."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, text=True, errors="replace", start_new_session=True, **pipes) as process:
        try:
            out, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None, "", ""
        return process.returncode, out, errors


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def _last_line(text: str) -> str:
    lines = [line.strip(" =") for line in text.splitlines() if line.strip(" =")]
    return lines[-1][:200] if lines else ""


#### THE TABLE


def table(todo: list[Row], results: dict[str, Result], machine: dict[str, Any] | None) -> str:
    """Return the whole file. Rows without a result are not measured yet.

    machine: what `gpu_step --probe` has found; None: nothing has been run
    """
    lines = [_line(row, results, todo, (machine or {}).get("rate")) for row in todo]
    return HEAD.format(machine=describe(machine)) + "\n".join(lines) + "\n"


def describe(machine: dict[str, Any] | None) -> str:
    if machine is None:
        return "**Nothing here has been measured yet:** no GPU was at hand."
    text = (
        f"{machine['device']}, {machine['memory']:.0f} GiB; torch {machine['torch']}, transformers "
        f"{machine['transformers']}. Measured rate of a {machine['dtype']} product of two matrices of side "
        f"{machine['side']}: {machine['rate'] / 1e12:.3g} TFLOP/s."
    )
    return text + (f" Not installed: {'; '.join(machine['lacks'])}." if machine["lacks"] else "")


def _line(row: Row, results: dict[str, Result], todo: list[Row], rate: float | None) -> str:
    result = results.get(row.name, Result(note=NOT_MEASURED))
    numbers = result.numbers
    cells = [
        row.name,
        _number(numbers.get("tokens_per_second"), ",.0f"),
        _number(numbers.get("examples_per_second"), ".1f"),
        _number(numbers.get("peak_bytes"), ".1f", GIB),
        _number(numbers.get("flops_per_second"), ".2f", rate) if rate else "",
        _number(numbers.get("tokens_per_second"), ".2f", _of_peer(row, results, todo)),
        result.note.replace("|", "/").replace("\n", " "),
    ]
    return "| " + " | ".join(cells) + " |"


def _of_peer(row: Row, results: dict[str, Result], todo: list[Row]) -> float | None:
    """Return the tokens/s of TRL's row for the same loss and shape; None for that row itself."""
    if row.name.startswith(PEER) or not row.peer:
        return None
    peers = (other.name for other in todo if other.name.startswith(PEER) and other.peer == row.peer)
    speeds = [results[name].numbers.get("tokens_per_second") for name in peers if name in results]
    return speeds[0] if speeds else None


def _number(value: float | None, form: str, unit: float | None = 1) -> str:
    return format(value / unit, form) if value is not None and unit else ""


#### THE COMMAND


def probe(small: bool) -> dict[str, Any]:
    """Look at the machine and measure its rate, or end with one line and exit code 2."""
    missing = [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]
    if missing:
        _give_up(f"{', '.join(missing)} not installed in {sys.executable}; use pip install -e . or PYTHON=...")
    words = ("-m", "benchmarks.gpu_step", "--probe", *(["--small"] if small else []))
    found = run(Row("the machine", words), 90)
    if not found.numbers:
        _give_up(found.note.removeprefix("failed: ").removeprefix("skipped: "))
    return found.numbers


def _give_up(reason: str):
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def path_of(whole: bool) -> str:
    """Return where the table is written. A part of it never replaces the whole."""
    folder = os.environ.get("OUT") or os.path.dirname(os.path.abspath(__file__))
    return os.path.join(folder, "GPU.md" if whole else "GPU-part.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models, on the CPU")
    parser.add_argument("--only", metavar="WORD", default="", help="only rows with this in their name")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all rows")
    parser.add_argument("--plan", action="store_true", help="run nothing: print the table of what would be run")
    args = parser.parse_args()
    started = time.monotonic()
    todo = [row for row in rows(args.small) if args.only.lower() in row.name.lower()]
    if not todo:
        _give_up(f"--only {args.only}: no row has this in its name; bash benchmarks/gpu.sh --plan shows them")
    if args.plan:
        print(table(todo, {}, None), end="")
        return
    machine = probe(args.small)
    print(describe(machine), flush=True)
    path = path_of(whole=not args.small and not args.only)

    def show(row: Row, results: dict[str, Result]) -> None:
        print(_line(row, results, todo, machine["rate"]), flush=True)
        with open(path + ".new", "w") as file:
            file.write(table(todo, results, machine))
        os.replace(path + ".new", path)

    left = args.budget - (time.monotonic() - started)
    results = run_all(todo, run, show, machine["memory"], left)
    print(f"\n{table(todo, results, machine)}\n{path}, in {time.monotonic() - started:.0f} s")
    sys.exit(any(result.failed for result in results.values()))


if __name__ == "__main__":
    main()
