"""The campaign of faults: kills, signals, malformed inputs, full disks, commands at once. All counts should be 0.

    python -m benchmarks.faults --kills 100 --malformed 2000 --seed 0

Each case runs in a child that is forked from one process which has imported everything, so that there are some hundreds
of cases a minute. A fault is printed with the words that run its case alone, such as `--only 'kill train' --case 7`.
The table at the end is that of docs/reliability.md. --short takes half a minute.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

from benchmarks.campaign.clashes import Clashes, FullDisks
from benchmarks.campaign.commands import Commands
from benchmarks.campaign.inputs import SHARES, Inputs
from benchmarks.campaign.kills import Kills
from benchmarks.campaign.steady import memory_and_files, models, stalls
from benchmarks.campaign.tally import COUNTS, Case, Tally, markdown

Run = Callable[[Case], None]
# What a short run has. The rest takes longer, or is among the project's other tests in the same form.
SHORT = ["kill train", "kill judge", "two judges"]
SHORT += [f"malformed {kind}" for kind in SHARES]
SHORT_MALFORMED = 40


def kinds_of(commands: Commands) -> dict[str, tuple[Run, float]]:
    """The kinds of faults but the malformed inputs: what runs a case, and the cases relative to --kills."""
    kills, clashes, full_disks = Kills(commands), Clashes(commands), FullDisks(commands)
    return {
        "kill train": (kills.run, 0.25),
        "kill while exporting": (partial(kills.run, within="LATEST"), 0.12),
        "kill while saving a state": (partial(kills.run, within="/states/"), 0.12),
        "kill train, 2 processes": (partial(kills.run, n=2), 0.15),
        "kill evaluate": (kills.evaluation, 0.12),
        "kill sample": (kills.sampling, 0.12),
        "kill judge": (kills.judging, 0.12),
        "signal train": (kills.signal_run, 0.15),
        "signal train, 2 processes": (partial(kills.signal_run, n=2), 0.05),
        "two runs": (clashes.runs, 0.1),
        "two runs, 2 processes": (partial(clashes.runs, n=2), 0.02),
        "two samplers": (clashes.samplers, 0.06),
        "two judges": (clashes.judges, 0.06),
        "two cold token caches": (clashes.tokenizers, 0.06),
        "full disk, train": (full_disks.run, 0.2),
        "full disk, train, 2 processes": (partial(full_disks.run, n=2), 0.03),
        "full disk, sample": (full_disks.sampling, 0.06),
        "full disk, judge": (full_disks.judging, 0.06),
    }


def campaign(args: argparse.Namespace, root: str) -> list[Tally]:
    """Run all cases that the flags ask for."""
    commands, tallies = Commands(root), []
    for kind, (run_case, share) in kinds_of(commands).items():
        n = max(1, round(share * args.kills)) if args.kills else 0
        if n and _is_wanted(kind, args):
            tallies.append(Tally(kind))
            for number in range(n) if args.case is None else [args.case]:
                run_case(Case(tallies[-1], number, args.seed))
            _say(tallies[-1])
    for kind, share in SHARES.items():
        n = args.malformed_cases or round(share * args.malformed)
        if n and _is_wanted(f"malformed {kind}", args):
            tallies.append(Inputs(commands, args.seed, args.keep).all(kind, n, args.case))
            _say(tallies[-1])
    return tallies


def _is_wanted(kind: str, args: argparse.Namespace) -> bool:
    return not args.only or kind in args.only


def _say(tally: Tally) -> None:
    counts = ", ".join(f"{name} {tally.counts[name]}" for name in COUNTS)
    notes = "; ".join(f"{name}: {n}" for name, n in tally.notes.items())
    print(f"{tally.kind}: {tally.cases} cases; {counts} ({notes})", flush=True)


def measure(model: str | None, root: str) -> None:
    """Print the memory and the open files of a long run, and how long training waits for a state."""
    folder = os.path.join(root, "long")
    os.makedirs(folder)
    for step, (megabytes, files) in memory_and_files(Commands(root).train, folder).items():
        print(f"step {step}: {megabytes:.0f} MB, {files} open files")
    for name, policy in models(model).items():
        background, waiting, size = stalls(policy)
        waits = f"training waits {background:.1f} ms, and would wait {waiting:.1f} ms for the disk"
        print(f"a state of {name}, {size / 1e6:.1f} MB: {waits}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=100, help="kills (default: 100); the other faults are in proportion"
    )
    parser.add_argument("--malformed", type=int, default=2000, help="malformed inputs (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a case of most kinds, and some malformed inputs, for CI")
    parser.add_argument("--only", metavar="KIND", nargs="+", help="only these rows of the table")
    parser.add_argument("--case", type=int, help="only the case of this number")
    parser.add_argument("--malformed-cases", type=int, help="malformed inputs of each kind, instead of --malformed")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the folders of malformed inputs that had a fault here")
    parser.add_argument(
        "--measure", action="store_true", help="memory over 3,000 steps, and the stall of a save, instead"
    )
    parser.add_argument("--model", help="with --measure: folder of a model whose state is timed as well")
    args = parser.parse_args()
    if args.short:
        args.kills, args.malformed, args.only = 1, SHORT_MALFORMED, SHORT
    return args


def main() -> None:
    args, started = arguments(), time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        if args.measure:
            return measure(args.model, root)
        tallies = campaign(args, root)
    print("\n" + markdown(tallies))
    print(f"\n{sum(tally.cases for tally in tallies)} cases in {(time.monotonic() - started) / 60:.1f} minutes")
    sys.exit(any(tally.counts.total() for tally in tallies))


if __name__ == "__main__":
    main()
