"""Two commands at once in one place, and a disk that is full from a random moment on."""

import json
import os
import random
import resource
import time

from benchmarks.campaign import forks, runs
from benchmarks.campaign.forks import Changes, Ended
from benchmarks.campaign.kills import Kills, compare_runs, make_judge, result_of
from benchmarks.campaign.tally import Tally, generator
from halos import manifest

SMALLEST = 50  # bytes that a file may have on the full disk


class Clashes:
    """The cases of one seed, beside those of `Kills`, whose uninterrupted commands they are compared with."""

    def __init__(self, kills: Kills):
        self.kills = kills

    #### TWO AT ONCE

    def two_runs(self, tally: Tally, number: int, n: int = 1) -> None:
        """Start the same run twice: one makes it, and the other is refused, or comes when it is complete."""
        rng, case = self._case(tally, number)
        whole, seconds, _ = self.kills.whole("kto", n)
        folder = self.kills.folder()
        first = self.kills.start_training(folder, "kto", n)
        time.sleep(rng.choice([0, 0, rng.uniform(0, 0.6) * seconds]))
        second = self.kills.start_training(folder, "kto", rng.choice([1, n]))
        self._one_goes_on(tally, case, first.wait(), second.wait(), ("is being written by", "already holds a run"))
        compare_runs(tally, case, folder, whole)

    def two_samplers(self, tally: Tally, number: int) -> None:
        rng, case = self._case(tally, number)
        rows, seconds, _ = self.kills.samples()
        folder = self.kills.folder()
        first = self.kills.sample(folder)
        time.sleep(rng.uniform(0, 1) * seconds * rng.choice([0, 1]))
        second = self.kills.sample(folder)
        ends = first.wait(), second.wait()
        if any(end.code for end in ends):
            self._one_goes_on(tally, case, *ends, ("is in use by another eval.py",))
        with open(os.path.join(folder, "run.json")) as file:
            if json.load(file) != rows:
                tally.fault("different", case, "the samples are not those of a command alone")
        for left in runs.leftovers(folder):
            tally.fault("unreadable", case, f"left over: {left}")

    def two_judges(self, tally: Tally, number: int) -> None:
        rng, case = self._case(tally, number)
        result, _, seconds, _ = self.kills.verdicts()
        folder = self.kills.folder()
        make_judge(folder)
        first = self.kills.judge(folder)
        time.sleep(rng.uniform(0, 1) * seconds * rng.choice([0, 1]))
        second = self.kills.judge(folder)
        ends = first.wait(), second.wait()
        if any(end.code for end in ends):
            self._one_goes_on(tally, case, *ends, ("is in use by another compare.py",), (0, 5))
        if result_of(folder) != result:
            tally.fault("different", case, "the result is not that of a command alone")
        with open(os.path.join(folder, "asked.txt")) as file:
            asked = file.read().split("\n")[:-1]
        if len(asked) != len(set(asked)):
            tally.fault("repeated", case, "a verdict was asked for twice", len(asked) - len(set(asked)))

    def two_tokenizers(self, tally: Tally, number: int) -> None:
        """Two runs with other names and one empty token cache: both go on, and the cache is whole."""
        _, case = self._case(tally, number)
        whole = self.kills.whole("kto", 1)[0]
        folder = self.kills.folder()
        words = runs.words_of(folder, "kto")
        children = [forks.start(self.kills.train, [*words, f"exp_name={name}"], folder) for name in ("run", "other")]
        for child in children:
            tally.check_end(child.wait(), case, (0,))
        compare_runs(tally, case, folder, whole)
        entries = os.listdir(os.path.join(folder, ".tokens"))
        if sorted(entries) != sorted(os.listdir(os.path.join(whole, ".tokens"))):
            tally.fault("different", case, f"the cache has {entries}")
        for entry in entries:
            manifest.check(os.path.join(folder, ".tokens", entry))

    def _one_goes_on(self, tally: Tally, case: str, first: Ended, second: Ended, reasons, codes=(0, 2)) -> None:
        for end in (first, second):
            tally.check_end(end, case, codes)
        refused = [end for end in (first, second) if end.code == codes[1]]
        if len(refused) != 1 or not any(reason in refused[0].err for reason in reasons):
            tally.fault(
                "codes", case, f"one of two should be refused: {first.code}, {second.code}; {second.err[-300:]}"
            )

    def _case(self, tally: Tally, number: int) -> tuple[random.Random, str]:
        return generator(self.kills.seed, tally.kind, number), f"--only '{tally.kind}' --case {number}"

    #### A FULL DISK

    def full_disk(self, tally: Tally, number: int, n: int = 1) -> None:
        """From a random change of a file on, no file can have more than SMALLEST bytes. Then there is room again."""
        rng, case = self._case(tally, number)
        loss = rng.choice(runs.LOSSES)
        whole, _, changes = self.kills.whole(loss, n)
        folder = self.kills.folder()
        full = Changes(folder, rng.randrange(changes), fill_disk)
        ended = self.kills.start_training(folder, loss, n, full.prepare).wait()
        if tally.check_end(ended, case, (0, 2)) and ended.code and "cannot be written" not in ended.err:
            tally.fault("lines", case, ended.err)
        for problem in [*runs.unreadable(os.path.join(folder, "run")), *runs.leftovers(folder)]:
            tally.fault("unreadable", case, problem)
        if tally.check_end(self.kills.start_training(folder, loss, n, resume=True).wait(), case, (0,)):
            compare_runs(tally, case, folder, whole)

    def full_disk_of_others(self, tally: Tally, number: int) -> None:
        """The same for a command that samples or judges."""
        rng, case = self._case(tally, number)
        samples = rng.random() < 0.5
        start, whole = (self.kills.sample, self.kills.samples) if samples else (self.kills.judge, self.kills.verdicts)
        whole = whole()
        folder = self.kills.folder()
        make_judge(folder)
        full = Changes(folder, rng.randrange(whole[-1]), fill_disk)
        ended = start(folder, full.prepare).wait()
        if tally.check_end(ended, case, (0, 2)) and ended.code and "cannot be written" not in ended.err:
            tally.fault("lines", case, ended.err)
        for left in runs.leftovers(folder):
            tally.fault("unreadable", case, left)
        with open(os.path.join(folder, "asked.txt"), "a"):
            pass  # the judge itself writes it
        if tally.check_end(start(folder).wait(), case, (0,)):
            made = json.load(open(os.path.join(folder, "run.json"))) if samples else result_of(folder)
            if made != whole[0]:
                tally.fault("different", case, "the result differs from that of a command alone")


def fill_disk() -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLEST, hard))
