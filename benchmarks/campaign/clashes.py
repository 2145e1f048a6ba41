"""Two commands at once in one place, and a disk that is full from a random moment on."""

import os
import resource
import time

from benchmarks.campaign import forks, runs
from benchmarks.campaign.commands import Commands, Whole, calls_of, samples_of, verdicts_of, write_judge
from benchmarks.campaign.forks import Changes, Ended
from benchmarks.campaign.kills import compare_runs, look_at_killed, look_for_leftovers
from benchmarks.campaign.tally import Case
from halos import manifest

SMALLEST = 50  # bytes that a file may have on the full disk


class Clashes:
    """The cases of two commands at once. Their results must be those of one command alone."""

    def __init__(self, commands: Commands):
        self.commands = commands

    def runs(self, case: Case, n: int = 1) -> None:
        """Start the same run twice: one makes it, and the other is refused, or comes when it is complete."""
        whole, folder = self.commands.whole_run("kto", n), self.commands.folder()
        first = self.commands.start_run(folder, "kto", n)
        _wait_a_little(case, whole)
        second = self.commands.start_run(folder, "kto", case.rng.choice([1, n]))
        ends = first.wait(), second.wait()
        _one_is_refused(case, ends, 2, "is being written by", "already holds a run")
        compare_runs(case, folder, whole)

    def samplers(self, case: Case) -> None:
        whole, folder = self.commands.whole_samples(), self.commands.folder()
        ends = _twice(case, whole, lambda: self.commands.start_sampling(folder))
        if any(end.code for end in ends):  # else the second came when the first was complete
            _one_is_refused(case, ends, 2, "is in use by another eval.py")
        if samples_of(folder) != whole.result:
            case.fault("different", "the samples are not those of a command alone")
        look_for_leftovers(case, folder)

    def judges(self, case: Case) -> None:
        whole, folder = self.commands.whole_verdicts(), self.commands.folder()
        write_judge(folder)
        ends = _twice(case, whole, lambda: self.commands.start_judging(folder))
        if any(end.code for end in ends):
            _one_is_refused(case, ends, 5, "is in use by another compare.py")
        if verdicts_of(folder) != whole.result:
            case.fault("different", "the result is not that of a command alone")
        if again := len(calls_of(folder)) - len(set(calls_of(folder))):
            case.fault("repeated", "verdicts were asked for twice", again)

    def tokenizers(self, case: Case) -> None:
        """Start two runs with other names and one empty token cache: both go on, and the cache is whole."""
        whole, folder = self.commands.whole_run("kto", 1), self.commands.folder()
        words = runs.words_of(folder, "kto")
        names = ("run", "other")
        children = [forks.start(self.commands.train, [*words, f"exp_name={name}"], folder) for name in names]
        if all([case.check_end(child.wait(), (0,)) for child in children]):
            compare_runs(case, folder, whole)
        entries = sorted(os.listdir(os.path.join(folder, ".tokens")))
        if entries != sorted(os.listdir(os.path.join(whole.folder, ".tokens"))):
            case.fault("different", f"the cache has {entries}")
        for entry in entries:
            manifest.check(os.path.join(folder, ".tokens", entry))


def _twice(case: Case, whole: Whole, start) -> tuple[Ended, Ended]:
    first = start()
    _wait_a_little(case, whole)
    second = start()
    return first.wait(), second.wait()


def _wait_a_little(case: Case, whole: Whole) -> None:
    """Half of the time not at all, else a part of the time that the command takes."""
    time.sleep(case.rng.choice([0, 1]) * case.rng.random() * whole.seconds)


def _one_is_refused(case: Case, ends: tuple[Ended, Ended], code: int, *reasons: str) -> None:
    for end in ends:
        case.check_end(end, (0, code))
    refused = [end for end in ends if end.code == code]
    if len(refused) != 1 or not any(reason in refused[0].err for reason in reasons):
        codes = f"exit codes {ends[0].code} and {ends[1].code}"
        case.fault("codes", f"one of two should be refused: {codes}; {ends[1].err[-300:]}")


class FullDisks:
    """The cases of a disk that is full from a random change of a file on. Then there is room again."""

    def __init__(self, commands: Commands):
        self.commands = commands

    def run(self, case: Case, n: int = 1) -> None:
        loss = case.rng.choice(runs.LOSSES)
        whole, folder = self.commands.whole_run(loss, n), self.commands.folder()
        full = Changes(folder, case.rng.randrange(whole.changes), fill_disk)
        self._check_message(case, self.commands.start_run(folder, loss, n, full.prepare).wait())
        look_at_killed(case, folder)
        look_for_leftovers(case, folder)
        if case.check_end(self.commands.start_run(folder, loss, n, resume=True).wait(), (0,)):
            compare_runs(case, folder, whole)

    def sampling(self, case: Case) -> None:
        self._command(case, self.commands.whole_samples(), self.commands.start_sampling, samples_of)

    def judging(self, case: Case) -> None:
        self._command(case, self.commands.whole_verdicts(), self.commands.start_judging, verdicts_of)

    def _command(self, case: Case, whole: Whole, start, result_of) -> None:
        folder = self.commands.folder()
        write_judge(folder)
        full = Changes(folder, case.rng.randrange(whole.changes), fill_disk)
        self._check_message(case, start(folder, full.prepare).wait())
        look_for_leftovers(case, folder)
        if case.check_end(start(folder).wait(), (0,)) and result_of(folder) != whole.result:
            case.fault("different", "the result differs from that of a command alone")

    def _check_message(self, case: Case, ended: Ended) -> None:
        if case.check_end(ended) and ended.code and "cannot be written" not in ended.err:
            case.fault("lines", ended.err)


def fill_disk() -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLEST, hard))
