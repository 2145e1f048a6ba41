"""Kills and signals at random moments of a command, each followed by going on, until the command is complete.

A kill comes after a random time, or just before a random change of a file (a rename, the opening of a file to be
written, ...): the latter hits the moments that the former would miss.
"""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache

from benchmarks.campaign import forks, runs
from benchmarks.campaign.forks import Changes, Child, die
from benchmarks.campaign.tally import Tally, generator
from halos import checkpoint, locks
from halos.errors import UserError

MOST_KILLS = 2  # in a row, before the command is left alone
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75}


class Kills:
    """The cases of one seed, in folders under `root`."""

    def __init__(self, seed: int, root: str):
        self.seed = seed
        self.root = root
        self.train, self.eval, self.compare = runs.programs()
        # The uninterrupted commands, each made once.
        self.whole, self.samples = cache(self._whole), cache(self._samples)
        self.evaluation, self.verdicts = cache(self._evaluation), cache(self._verdicts)

    def _whole(self, loss: str, n: int) -> tuple[str, float, int]:
        """Make the uninterrupted run; return its cache_dir, the seconds after its first step, and its changes."""
        folder = os.path.join(self.root, f"whole-{loss}-{n}")
        os.makedirs(folder)
        changes = Changes(folder)
        child = self.start_training(folder, loss, n, changes.prepare)
        started = _first_step(child, folder)
        ended = child.wait()
        assert ended.code == 0, ended.err
        return folder, time.monotonic() - started, changes.count

    def start_training(
        self, folder: str, loss: str, n: int, *prepare: Callable[[], None], resume: bool = False
    ) -> Child:
        words = runs.words_of(folder, loss, f"nproc_per_node={n}", f"resume={str(resume).lower()}")
        calls = [*prepare, *([runs.two_processes] if n > 1 else [])]
        return forks.start(self.train, words, folder, lambda: [call() for call in calls] and None)

    def folder(self) -> str:
        """An empty folder for the next case."""
        path = os.path.join(self.root, "case")
        shutil.rmtree(path, ignore_errors=True)
        os.makedirs(path)
        return path

    #### TRAINING

    def kill_training(self, tally: Tally, number: int, n: int = 1, within: str = "") -> None:
        """Kill a run one to MOST_KILLS times, and resume it each time. within: kill at changes of such paths only"""
        rng = generator(self.seed, tally.kind, number)
        case = f"--only '{tally.kind}' --case {number}"
        loss = rng.choice(runs.LOSSES)
        whole, seconds, changes = self.whole(loss, n)
        folder = self.folder()
        for resume in range(rng.randint(1, MOST_KILLS)):
            self._kill_once(tally, case, rng, folder, loss, n, bool(resume), seconds, changes, within)
        child = self.start_training(folder, loss, n, resume=True)
        ended = child.wait()
        if tally.check_end(ended, case, (0,)):
            compare_runs(tally, case, folder, whole)

    def _kill_once(self, tally, case, rng, folder, loss, n, resume, seconds, changes, within) -> None:
        before = runs.steps_made(folder)
        at_change = bool(within) or rng.random() < 0.5
        at = rng.randrange(changes if not within else 24)
        killer = Changes(folder, at if at_change else -1, die, within)
        child = self.start_training(folder, loss, n, killer.prepare, resume=resume)
        if not at_change:
            _first_step(child, folder, before if resume else 0)
            time.sleep(rng.uniform(0, 1.1) * seconds)
        self._strike(child, rng, n, at_change)
        ended = child.wait(60)
        tally.notes["kills"] += ended.code != 0  # else it was complete before
        if ended.hung:
            tally.fault("hangs", case, "a process goes on after its kill")
        if not _released(os.path.join(folder, "run")):
            tally.fault("hangs", case, "the processes of a killed run live on")
        self._look(tally, case, rng, folder, ended)

    def _strike(self, child: Child, rng: random.Random, n: int, at_change: bool) -> None:
        if n == 1 or at_change:
            if not at_change:
                child.kill()
            return
        victim = rng.choice(["group", "launcher", "process"])
        if victim == "process":
            workers = _children(child.pid)
            if workers:
                os.kill(rng.choice(workers), signal.SIGKILL)
        else:
            child.kill(group=victim == "group")

    def _look(self, tally: Tally, case: str, rng: random.Random, folder: str, ended) -> None:
        """Look at a run that was killed: everything in it must be readable, and little may be lost."""
        run = os.path.join(folder, "run")
        for problem in runs.unreadable(run):
            tally.fault("unreadable", case, problem)
        if rng.random() < 0.5 and any(name.startswith("LATEST") for name in _names(run)):
            names = [name for name in _names(run) if name.startswith("LATEST")]
            try:
                checkpoint.newest_whole(run)
            except UserError as error:
                if names != ["LATEST.unfinished"]:
                    tally.fault("unreadable", case, str(error))
        kept = max((int(path.rpartition("-")[2]) for path in runs.states.complete(run)), default=0)
        again = runs.steps_made(folder) - kept
        tally.notes["steps made again"] += max(0, again)
        tally.notes["most steps made again"] = max(tally.notes["most steps made again"], again)
        # A state is written in the background while the steps up to the next one are made.
        if again > 2 * runs.SAVE_EVERY:
            tally.fault("lost", case, f"{again} steps are made again", again - 2 * runs.SAVE_EVERY)

    def signal_training(self, tally: Tally, number: int, n: int = 1) -> None:
        """Ask a run to stop at a random moment between its steps, and resume it."""
        rng = generator(self.seed, tally.kind, number)
        case = f"--only '{tally.kind}' --case {number}"
        loss = rng.choice(runs.LOSSES)
        whole, seconds, _ = self.whole(loss, n)
        folder = self.folder()
        child = self.start_training(folder, loss, n)
        _first_step(child, folder, rng.randint(0, runs.STEPS - 3))
        time.sleep(rng.uniform(0, 0.5) * seconds / runs.STEPS)
        sent = rng.choice(list(CODES))
        steps = runs.steps_made(folder)
        child.kill(sent)
        tally.notes["signals"] += 1
        if steps < runs.STEPS - 1:
            tally.check_end(child.wait(), case, (CODES[sent],))
        else:
            child.wait()
        for problem in runs.unreadable(os.path.join(folder, "run")):
            tally.fault("unreadable", case, problem)
        if tally.check_end(self.start_training(folder, loss, n, resume=True).wait(), case, (0,)):
            compare_runs(tally, case, folder, whole)

    #### SAMPLES

    def _samples(self) -> tuple[list, float, int]:
        """The samples of an uninterrupted command, its seconds, and its changes of files."""
        folder = os.path.join(self.root, "samples")
        os.makedirs(folder)
        changes = Changes(folder)
        started = time.monotonic()
        ended = self.sample(folder, changes.prepare).wait()
        assert ended.code == 0, ended.err
        return _read(os.path.join(folder, "run.json")), time.monotonic() - started, changes.count

    def sample(self, folder: str, *prepare) -> Child:
        config = os.path.join(self.whole("kto", 1)[0], "run", "config.yaml")
        words = ["-c", config, "-n", "24", "-b", str(AT_ONCE), f"samples_dir={folder}"]
        return forks.start(self.eval, words, folder, lambda: [call() for call in prepare] and None)

    def kill_sampling(self, tally: Tally, number: int) -> None:
        """Kill eval.py -m sample, and run it again."""
        rng = generator(self.seed, tally.kind, number)
        case = f"--only '{tally.kind}' --case {number}"
        rows, seconds, changes = self.samples()
        folder = self.folder()
        at_change = rng.random() < 0.3
        killer, before = Changes(folder, rng.randrange(changes) if at_change else -1, die), Counted()
        child = self.sample(folder, killer.prepare, before.samples)
        if not at_change:
            time.sleep(rng.uniform(0.2, 1.05) * seconds)
            child.kill()
        tally.notes["kills"] += child.wait().code != 0
        partial, path = os.path.join(folder, "run.partial.jsonl"), os.path.join(folder, "run.json")
        kept = _lines(partial)
        finished = os.path.exists(path)
        if not finished and before.count - kept > AT_ONCE:
            tally.fault("lost", case, f"{before.count} samples were made, and {kept} are kept")
        made = Counted()
        if tally.check_end(self.sample(folder, made.samples).wait(), case, (0,)):
            if _read(path) != rows:
                tally.fault("different", case, "the samples differ from those of an uninterrupted command")
            expected = 2 * len(rows) - (0 if finished and not kept else kept)
            if made.count > expected:
                tally.fault("repeated", case, f"{made.count} samples made, {expected} were missing")
            tally.notes["samples kept"] += kept
        for left in [*runs.leftovers(folder), *([partial] if os.path.exists(partial) else [])]:
            tally.fault("unreadable", case, f"left over: {left}")

    def kill_evaluation(self, tally: Tally, number: int) -> None:
        """Kill eval.py -m eval, and run it again."""
        rng = generator(self.seed, tally.kind, number)
        case = f"--only '{tally.kind}' --case {number}"
        source = self.whole("kto", 1)[0]
        folder = os.path.join(self.folder(), "cache")
        shutil.copytree(source, folder)
        if rng.random() < 0.5:
            shutil.rmtree(os.path.join(folder, ".tokens"))
        words = ["-c", os.path.join(folder, "run", "config.yaml"), "-m", "eval", f"cache_dir={folder}"]
        at_change = rng.random() < 0.6
        killer = Changes(folder, rng.randrange(16) if at_change else -1, die)
        child = forks.start(self.eval, words, folder, killer.prepare)
        if not at_change:
            time.sleep(rng.uniform(0.02, 0.4))
            child.kill()
        tally.notes["kills"] += child.wait().code != 0
        path = os.path.join(folder, "run", "eval.json")
        if os.path.exists(path) and not _is_json(path):
            tally.fault("unreadable", case, f"{path} is torn")
        if tally.check_end(forks.run(self.eval, words, folder), case, (0,)):
            numbers = _without_speed(_read(path)["results"])
            if numbers != _without_speed(self.evaluation()):
                tally.fault("different", case, f"{numbers}")
        for left in runs.leftovers(folder):
            tally.fault("unreadable", case, f"left over: {left}")

    def _evaluation(self) -> dict:
        folder = shutil.copytree(self.whole("kto", 1)[0], os.path.join(self.root, "evaluated"))
        path = os.path.join(folder, "run", "config.yaml")
        ended = forks.run(self.eval, ["-c", path, "-m", "eval", f"cache_dir={folder}"], folder)
        assert ended.code == 0, ended.err
        return _read(os.path.join(folder, "run", "eval.json"))["results"]

    #### VERDICTS

    def judge(self, folder: str, *prepare) -> Child:
        words = ["-f", "samples.json", "-bk", "chosen", "-r", "result.jsonl", "--judge", "judge:longer"]
        words += ["--concurrency", str(CONCURRENCY), "--verdicts", "verdicts.csv"]
        return forks.start(self.compare, words, folder, lambda: [call() for call in prepare] and None)

    def _verdicts(self) -> tuple[dict, str, float, int]:
        folder = os.path.join(self.root, "judged")
        os.makedirs(folder)
        make_judge(folder)
        changes = Changes(folder)
        started = time.monotonic()
        ended = self.judge(folder, changes.prepare).wait()
        assert ended.code == 0, ended.err
        with open(os.path.join(folder, "verdicts.csv")) as file:
            return result_of(folder), file.read(), time.monotonic() - started, changes.count

    def kill_judging(self, tally: Tally, number: int) -> None:
        """Kill compare.py, and run it again."""
        rng = generator(self.seed, tally.kind, number)
        case = f"--only '{tally.kind}' --case {number}"
        result, verdicts, seconds, changes = self.verdicts()
        folder = self.folder()
        make_judge(folder)
        for _ in range(rng.randint(1, MOST_KILLS)):
            at_change = rng.random() < 0.3
            child = self.judge(folder, Changes(folder, rng.randrange(changes) if at_change else -1, die).prepare)
            if not at_change:
                time.sleep(rng.uniform(0.1, 1.05) * seconds)
                child.kill()
            tally.notes["kills"] += child.wait().code != 0
        if tally.check_end(self.judge(folder).wait(), case, (0,)):
            with open(os.path.join(folder, "verdicts.csv")) as file:
                if result_of(folder) != result or file.read() != verdicts:
                    tally.fault("different", case, "the result differs from that of an uninterrupted command")
        with open(os.path.join(folder, "asked.txt")) as file:
            asked = file.read().split("\n")[:-1]
        again = len(asked) - len(set(asked))
        tally.notes["verdicts asked again"] += again
        if again > CONCURRENCY * MOST_KILLS:
            tally.fault("repeated", case, f"{again} verdicts were asked for twice")
        for left in runs.leftovers(folder):
            tally.fault("unreadable", case, f"left over: {left}")


AT_ONCE = 4  # samples
CONCURRENCY = 4  # verdicts
JUDGE = """
import os, time
def longer(prompt, a, b):
    file = os.open("asked.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, repr((prompt, a, b)).encode() + b"\\n")
    os.close(file)
    time.sleep(0.01)
    return 1 if len(a) > len(b) else 2
"""


def make_judge(folder: str, n: int = 30) -> None:
    rng = random.Random(0)
    rows = [
        {"prompt": f"{i}?", "chosen": "c" * rng.randint(1, 99), "policy": "p" * rng.randint(1, 99), "reference": ""}
        for i in range(n)
    ]
    with open(os.path.join(folder, "samples.json"), "w") as file:
        json.dump(rows, file)
    with open(os.path.join(folder, "judge.py"), "w") as file:
        file.write(JUDGE)


def result_of(folder: str) -> dict:
    """The last line of the results without what differs between two commands with the same result."""
    with open(os.path.join(folder, "result.jsonl")) as file:
        line = json.loads(file.read().strip().split("\n")[-1])
    return {name: line.get(name) for name in ("win_rate", "interval", "n_eff", "wins", "losses", "ties", "position")}


class Counted:
    """Counts, across the fork, the samples that a command makes."""

    def __init__(self) -> None:
        self.changes = Changes("/")

    @property
    def count(self) -> int:
        return self.changes.count

    def samples(self) -> None:
        from halos.sample_files import PartialFile

        recorder = PartialFile.recorder

        def counting(partial, keys):
            record = recorder(partial, keys)

            def counted(texts):
                for _ in texts:
                    self.changes._add()
                record(texts)

            return counted

        PartialFile.recorder = counting


#### HELPERS


def compare_runs(tally: Tally, case: str, folder: str, whole: str) -> None:
    """Count how a resumed run differs from the uninterrupted one."""
    found = runs.difference(folder, whole)
    for count, n in (("lost", found.lost), ("repeated", found.repeated), ("different", found.other)):
        if n:
            tally.fault(count, case, str(found), n)
    for left in runs.leftovers(folder):
        tally.fault("unreadable", case, f"left over: {left}")
    for problem in runs.unreadable(os.path.join(folder, "run")):
        tally.fault("unreadable", case, problem)


def _first_step(child: Child, folder: str, steps: int = 0, limit: float = 60) -> float:
    """Wait until the run has made more than so many steps, or has ended. Returns the time."""
    path = os.path.join(folder, "run", "metrics.jsonl")
    deadline = time.monotonic() + limit
    while child.is_alive() and time.monotonic() < deadline:
        if os.path.exists(path):
            with open(path) as file:
                if file.read().count('"mode": "train"') > steps:
                    break
        time.sleep(0.002)
    return time.monotonic()


def _released(path: str, limit: float = 30) -> bool:
    deadline = time.monotonic() + limit
    while os.path.isdir(os.path.dirname(path)) and locks.holder(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _children(pid: int) -> list[int]:
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


def _names(path: str) -> list[str]:
    return os.listdir(path) if os.path.isdir(path) else []


def _lines(path: str) -> int:
    if not os.path.exists(path):
        return 0
    with open(path) as file:
        return file.read().count("\n")


def _read(path: str):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _is_json(path: str) -> bool:
    try:
        _read(path)
    except ValueError:
        return False
    return True


def _without_speed(results: dict) -> dict:
    return {name: value for name, value in results.items() if not re.search("per_second", name)}
