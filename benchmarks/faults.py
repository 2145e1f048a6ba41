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

from benchmarks.campaign.clashes import Clashes
from benchmarks.campaign.inputs import SHARES, Inputs
from benchmarks.campaign.kills import Kills
from benchmarks.campaign.steady import memory_and_files, models, stalls
from benchmarks.campaign.tally import COUNTS, Tally, markdown

Case = Callable[[Tally, int], None]
# What a short run has. The rest takes longer, or is among the project's other tests in the same form.
SHORT = ["kill train", "kill while saving a state", "kill sample", "kill judge", "two judges", "full disk, train"]
SHORT += [f"malformed {kind}" for kind in ("sample files", "journals", "partial samples", "states", "token caches")]
SHORT_MALFORMED = 60


def kinds_of(kills: Kills, clashes: Clashes) -> dict[str, tuple[Case, float]]:
    """The kinds of faults but the malformed inputs: what runs a case, and its number relative to --kills."""
    return {
        "kill train": (kills.kill_training, 0.25),
        "kill while exporting": (partial(kills.kill_training, within="LATEST"), 0.12),
        "kill while saving a state": (partial(kills.kill_training, within="/states/"), 0.12),
        "kill train, 2 processes": (partial(kills.kill_training, n=2), 0.15),
        "kill evaluate": (kills.kill_evaluation, 0.12),
        "kill sample": (kills.kill_sampling, 0.12),
        "kill judge": (kills.kill_judging, 0.12),
        "signal train": (kills.signal_training, 0.15),
        "signal train, 2 processes": (partial(kills.signal_training, n=2), 0.05),
        "two runs": (clashes.two_runs, 0.1),
        "two runs, 2 processes": (partial(clashes.two_runs, n=2), 0.02),
        "two samplers": (clashes.two_samplers, 0.06),
        "two judges": (clashes.two_judges, 0.06),
        "two cold token caches": (clashes.two_tokenizers, 0.06),
        "full disk, train": (clashes.full_disk, 0.2),
        "full disk, train, 2 processes": (partial(clashes.full_disk, n=2), 0.03),
        "full disk, sample and judge": (clashes.full_disk_of_others, 0.12),
    }


def campaign(args: argparse.Namespace, root: str) -> list[Tally]:
    """Run all cases that the flags ask for."""
    kills = Kills(args.seed, root)
    tallies = []
    for kind, (run_case, share) in kinds_of(kills, Clashes(kills)).items():
        if args.only and kind not in args.only:
            continue
        numbers = (
            [args.case] if args.case is not None else range(max(1, round(share * args.kills)) if args.kills else 0)
        )
        tallies.append(_cases(Tally(kind), run_case, numbers))
    inputs = Inputs(kills, args.keep)
    for kind, share in SHARES.items():
        if not args.only or f"malformed {kind}" in args.only:
            if n := args.malformed_cases or round(share * args.malformed):
                tallies.append(_said(inputs.all(kind, n, args.case)))
    return [tally for tally in tallies if tally.cases]


def _cases(tally: Tally, run_case: Case, numbers) -> Tally:
    for number in numbers:
        tally.cases += 1
        run_case(tally, number)
    return _said(tally)


def _said(tally: Tally) -> Tally:
    counts = ", ".join(f"{name} {tally.counts[name]}" for name in COUNTS)
    notes = "; ".join(f"{name}: {n}" for name, n in tally.notes.items())
    print(f"{tally.kind}: {tally.cases} cases; {counts} ({notes})", flush=True)
    return tally


def measure(model: str | None, root: str) -> None:
    """Print the memory and the open files of a long run, and how long training waits for a state."""
    folder = os.path.join(root, "long")
    os.makedirs(folder)
    for step, (megabytes, files) in memory_and_files(Kills(0, root).train, folder).items():
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
