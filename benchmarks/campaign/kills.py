"""Kills and signals at random moments of a command, each followed by going on, until the command is complete.

A kill comes after a random time, or just before a random change of a file (a rename, the opening of a file to be
written, ...): the latter hits the moments that the former would miss.
"""

import os
import shutil
import signal
import time

from benchmarks.campaign import runs
from benchmarks.campaign.commands import (
    CALLS_AT_ONCE,
    SAMPLES_AT_ONCE,
    Commands,
    Whole,
    calls_of,
    evaluation_of,
    read_json,
    samples_of,
    verdicts_of,
    wait_for_step,
    write_judge,
)
from benchmarks.campaign.forks import Changes, Child, die
from benchmarks.campaign.tally import Case
from halos import checkpoint, locks
from halos.errors import UserError

MOST_KILLS = 2  # in a row, before the command is left alone
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75}


class Kills:
    """The cases of kills. Each goes on with a command that was killed, and compares it with the uninterrupted one."""

    def __init__(self, commands: Commands):
        self.commands = commands

    #### TRAINING

    def run(self, case: Case, n: int = 1, within: str = "") -> None:
        """Kill a run with n processes, and resume it. within: kill at changes of paths that contain this"""
        loss = case.rng.choice(runs.LOSSES)
        whole = self.commands.whole_run(loss, n)
        folder = self.commands.folder()
        for resume in range(case.rng.randint(1, MOST_KILLS)):
            self._kill_run(case, whole, folder, loss, n, within, bool(resume))
            look_at_killed(case, folder)
        self._resume(case, whole, folder, loss, n)

    def _kill_run(self, case: Case, whole: Whole, folder: str, loss: str, n: int, within: str, resume: bool) -> None:
        steps = runs.steps_made(folder) if resume else 0
        at_change = bool(within) or case.rng.random() < 0.5
        at = case.rng.randrange(24 if within else whole.changes)
        killer = Changes(folder, at if at_change else -1, die, within)
        child = self.commands.start_run(folder, loss, n, killer.prepare, resume=resume)
        if not at_change:
            wait_for_step(child, folder, steps)
            time.sleep(case.rng.uniform(0, 1.1) * whole.seconds)
            _strike(child, case.rng.choice(["group", "launcher", "process"]) if n > 1 else "launcher", case)
        ended = child.wait()
        case.tally.notes["kills"] += ended.code != 0  # else it was complete before
        if ended.hung or not _released(os.path.join(folder, "run")):
            case.fault("hangs", "a process of a killed run goes on")
        elif n == 1 and ended.code not in (0, -signal.SIGKILL):
            case.fault("codes", f"exit code {ended.code}; {ended.err[-500:]}")

    def _resume(self, case: Case, whole: Whole, folder: str, loss: str, n: int) -> None:
        if case.check_end(self.commands.start_run(folder, loss, n, resume=True).wait(), (0,)):
            compare_runs(case, folder, whole)

    def signal_run(self, case: Case, n: int = 1) -> None:
        """Ask a run to stop at a random moment between its steps, and resume it."""
        loss = case.rng.choice(runs.LOSSES)
        whole = self.commands.whole_run(loss, n)
        folder = self.commands.folder()
        child = self.commands.start_run(folder, loss, n)
        wait_for_step(child, folder, case.rng.randint(0, runs.STEPS - 3))
        time.sleep(case.rng.uniform(0, 0.5) * whole.seconds / runs.STEPS)
        number, steps = case.rng.choice(list(CODES)), runs.steps_made(folder)
        child.kill(number)
        case.tally.notes["signals"] += 1
        # At the end of a run, a signal does what it does to any program.
        case.check_end(child.wait(), (CODES[number],) if steps < runs.STEPS - 1 else (0, CODES[number], -number))
        look_at_killed(case, folder)
        self._resume(case, whole, folder, loss, n)

    #### SAMPLES AND EVALUATIONS

    def sampling(self, case: Case) -> None:
        """Kill eval.py -m sample, and run it again: it makes what is missing, and only that."""
        whole, folder = self.commands.whole_samples(), self.commands.folder()
        made, made_again = SamplesMade(), SamplesMade()
        self._kill(case, whole, lambda *calls: self.commands.start_sampling(folder, *calls, made.count), folder)
        path, partial = (os.path.join(folder, f"run{ending}") for ending in (".json", ".partial.jsonl"))
        kept, complete = _lines(partial), os.path.exists(path)
        if not complete and made.total - kept > SAMPLES_AT_ONCE:
            case.fault("lost", f"{made.total} samples were made, and {kept} are kept")
        if case.check_end(self.commands.start_sampling(folder, made_again.count).wait(), (0,)):
            if samples_of(folder) != whole.result:
                case.fault("different", "the samples differ from those of an uninterrupted command")
            if made_again.total > (missing := 2 * len(whole.result) - kept):
                case.fault("repeated", f"{made_again.total} samples were made, and {missing} were missing")
        look_for_leftovers(case, folder, partial)

    def evaluation(self, case: Case) -> None:
        """Kill eval.py -m eval, and run it again. Half of the cases have no token cache at first."""
        whole, folder = self.commands.whole_evaluation(), os.path.join(self.commands.folder(), "cache")
        shutil.copytree(self.commands.whole_run("kto", 1).folder, folder)
        if case.rng.random() < 0.5:
            shutil.rmtree(os.path.join(folder, ".tokens"))
        self._kill(case, whole, lambda *calls: self.commands.start_evaluation(folder, *calls), folder, earliest=0.1)
        if os.path.exists(path := os.path.join(folder, "run", "eval.json")):
            try:
                read_json(path)
            except ValueError:
                case.fault("unreadable", f"{path} is torn")
        if case.check_end(self.commands.start_evaluation(folder).wait(), (0,)):
            if (numbers := evaluation_of(folder)) != whole.result:
                case.fault("different", f"{numbers} instead of {whole.result}")
        look_for_leftovers(case, folder)

    #### VERDICTS

    def judging(self, case: Case) -> None:
        """Kill compare.py, and run it again: no verdict is asked for twice but those in flight."""
        whole, folder = self.commands.whole_verdicts(), self.commands.folder()
        write_judge(folder)
        kills = case.rng.randint(1, MOST_KILLS)
        for _ in range(kills):
            self._kill(case, whole, lambda *calls: self.commands.start_judging(folder, *calls), folder)
        if case.check_end(self.commands.start_judging(folder).wait(), (0,)) and verdicts_of(folder) != whole.result:
            case.fault("different", "the result differs from that of an uninterrupted command")
        again = len(calls_of(folder)) - len(set(calls_of(folder)))
        case.tally.notes["verdicts asked for again"] += again
        if again > CALLS_AT_ONCE * kills:
            case.fault("repeated", f"{again} verdicts were asked for twice")
        look_for_leftovers(case, folder)

    def _kill(self, case: Case, whole: Whole, start, folder: str, earliest: float = 0.2) -> None:
        """Start a command and kill it: 30 % of the time at a change of a file, else after a part of its time."""
        at_change = case.rng.random() < 0.3
        killer = Changes(folder, case.rng.randrange(max(1, whole.changes)) if at_change else -1, die)
        child: Child = start(killer.prepare)
        if not at_change:
            time.sleep(case.rng.uniform(earliest, 1.05) * whole.seconds)
            child.kill()
        case.tally.notes["kills"] += child.wait().code != 0


class SamplesMade:
    """Counts, across the fork, the samples that a command makes."""

    def __init__(self) -> None:
        self.changes = Changes("/")

    @property
    def total(self) -> int:
        return self.changes.count

    def count(self) -> None:
        """In the child: count every sample before it is written."""
        from halos.sample_files import PartialFile

        recorder = PartialFile.recorder

        def counting(partial, keys):
            record = recorder(partial, keys)

            def counted(texts):
                self.changes.add(len(texts))
                record(texts)

            return counted

        PartialFile.recorder = counting


#### WHAT IS LEFT


def look_at_killed(case: Case, folder: str) -> None:
    """Look at a run that was killed: everything in it must be readable, and little may be lost."""
    run = os.path.join(folder, "run")
    for problem in runs.unreadable(run):
        case.fault("unreadable", problem)
    if case.rng.random() < 0.5:  # as eval.py does; else the resumed run is the first to come
        _find_checkpoint(case, run)
    kept = max((int(path.rpartition("-")[2]) for path in runs.states.complete(run)), default=0)
    again = runs.steps_made(folder) - kept
    notes = case.tally.notes
    notes["most steps made again"] = max(notes["most steps made again"], again)
    # A state is written in the background while the steps up to the next one are made.
    if again > 2 * runs.SAVE_EVERY:
        case.fault("lost", f"{again} steps are made again", again - 2 * runs.SAVE_EVERY)


def _find_checkpoint(case: Case, run: str) -> None:
    names = os.listdir(run) if os.path.isdir(run) else []
    if not any(name in ("LATEST", "LATEST.old") for name in names):
        return
    try:
        checkpoint.newest_whole(run)
    except UserError as error:
        case.fault("unreadable", str(error))


def compare_runs(case: Case, folder: str, whole: Whole) -> None:
    """Count how a resumed run differs from the uninterrupted one."""
    found = runs.difference(folder, whole.folder)
    for count, n in (("lost", found.lost), ("repeated", found.repeated), ("different", found.other)):
        if n:
            case.fault(count, str(found), n)
    look_for_leftovers(case, folder)
    for problem in runs.unreadable(os.path.join(folder, "run")):
        case.fault("unreadable", problem)


def look_for_leftovers(case: Case, folder: str, *more: str) -> None:
    for left in [*runs.leftovers(folder), *(path for path in more if os.path.exists(path))]:
        case.fault("unreadable", f"left over: {left}")


def _lines(path: str) -> int:
    if not os.path.exists(path):
        return 0
    with open(path) as file:
        return file.read().count("\n")


#### PROCESSES


def _strike(child: Child, victim: str, case: Case) -> None:
    workers = _workers(child.pid) if victim == "process" else []
    if workers:
        os.kill(case.rng.choice(workers), signal.SIGKILL)
    else:
        child.kill(group=victim == "group")


def _workers(pid: int) -> list[int]:
    """The processes that a launcher has forked, without multiprocessing's resource tracker."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            pids = [int(word) for word in file.read().split()]
    except OSError:
        return []
    return [child for child in pids if "resource_tracker" not in _command_line(child)]


def _command_line(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:
        return "resource_tracker"


def _released(path: str, limit: float = 30) -> bool:
    """Wait until no process has the lock of a run directory."""
    deadline = time.monotonic() + limit
    while locks.holder(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
