"""Counts of what went wrong, one row per kind of fault; the goal for every count is 0."""

import random
import sys
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.campaign.forks import Ended

COUNTS = {
    "tracebacks": "a Python traceback",
    "codes": "another exit code than documented",
    "lines": "an error that is not one line",
    "hangs": "no end within a minute",
    "lost": "missing steps, samples or verdicts",
    "repeated": "repeated ones, beyond what was in flight",
    "different": "results that are not those of an uninterrupted command",
    "unreadable": "damaged or left-over files",
}


@dataclass
class Tally:
    """Counts of the cases of one kind."""

    kind: str
    cases: int = 0
    counts: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)  # numbers that are no faults, such as steps made again


class Case:
    """A case of a kind, with a random generator of its own, so that it can be run alone."""

    def __init__(self, tally: Tally, number: int, seed: int = 0, more: str = ""):
        self.tally = tally
        self.rng = random.Random(f"{seed}/{tally.kind}/{number}")
        self.alone = f"--seed {seed} --only '{tally.kind}' --case {number}{more}"
        tally.cases += 1

    def fault(self, count: str, what: str, n: int = 1) -> None:
        """Count a fault, and say how to run its case alone."""
        assert count in COUNTS
        self.tally.counts[count] += n
        print(f"FAULT {self.tally.kind}, {count}: {what[:1500]}\n  alone: {self.alone}", file=sys.stderr, flush=True)

    def check_end(self, ended: Ended, codes: tuple[int, ...] = (0, 2)) -> bool:
        """Count what is wrong with the end of a command; return whether nothing is."""
        before = self.tally.counts.total()
        said = f"exit code {ended.code}; {ended.err[-1200:]}"
        if ended.hung:
            self.fault("hangs", said)
        elif "Traceback (most recent" in ended.err:
            self.fault("tracebacks", said)
        elif ended.code not in codes:
            self.fault("codes", said)
        elif ended.code > 0 and ended.code not in STOPPED and not ended.says_one_line:
            self.fault("lines", said)
        return self.tally.counts.total() == before


STOPPED = (75, 130, 143)  # exit codes of a command that a signal has ended


def markdown(tallies: list[Tally]) -> str:
    """The table of docs/reliability.md."""
    head = ["fault", "cases", *COUNTS]
    rows = [[tally.kind, tally.cases, *(tally.counts[count] for count in COUNTS)] for tally in tallies]
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, len(head)))])
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
