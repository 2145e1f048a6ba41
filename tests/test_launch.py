"""Starting processes and ending them: each way in which one can fail, each signal, each environment.

launch_workers.py has the functions that the processes run. Every wait has a limit of at most a minute, so that a test
fails instead of hanging: a collective that never returns would wait for half an hour.
"""

import glob
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import launch_workers
from halos import distributed, scratch, sharding
from halos import launch as launch_module
from halos.commands import report_user_errors
from halos.errors import Stopped, UserError
from halos.launch import launch
from helpers import PROJECT

SCRIPT = os.path.join(PROJECT, "tests", "launch_workers.py")
# The environment of a process that torchrun starts.
TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "busy",
}

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def facts(folder, name: str) -> list[dict]:
    """Read what the processes wrote with `leave` under a name, in the order of their ranks."""
    paths = sorted(path for path in glob.glob(f"{folder}/{name}-*") if "unfinished" not in path)
    return [json.loads(open(path).read()) for path in paths]


def forget(folder) -> None:
    """Delete what processes have written so far."""
    for path in glob.glob(f"{folder}/*-[0-9]*"):
        os.remove(path)


def wait_for(condition, seconds: float = 60):
    """Wait until the condition returns a true value, and return it. The limit only prevents hanging."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)
    return value


@contextmanager
def limited(seconds: int = 60):
    """Raise TimeoutError after so many seconds, so that a test fails instead of hanging."""

    def stop(number, frame):
        raise TimeoutError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(autouse=True)
def no_environment(tmp_path, monkeypatch):
    """Remove the variables of launchers; check at the end that signal handlers are as before, and no file is left."""
    if dist.is_initialized():  # the group of one process that FSDP needed in a test of another file
        dist.destroy_process_group()
    before = dict(os.environ)
    for name in before:
        if name in TORCHRUN or name.startswith("SLURM_"):
            del os.environ[name]
    os.environ["TMPDIR"] = str(tmp_path / "temporary")
    os.mkdir(os.environ["TMPDIR"])
    monkeypatch.setattr("tempfile.tempdir", None)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert not os.listdir(tmp_path / "temporary")
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def usr1():
    """The signals that reach this process's own handler of SIGUSR1."""
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(signal.SIGUSR1, before)


#### RUNNING


def test_every_process_has_its_place(tmp_path, capfd, usr1):
    """Each of two processes has its rank, its output, and its signals; twice from one launcher, as in a sweep.

    Ranks 0 and 1 gather 0.5 and 1.5 from each other. SIGUSR1 to the launcher reaches each process once. The launcher's
    own handler is not called while processes run, and is back afterwards.
    """
    environment = dict(os.environ)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        launch(launch_workers.say_who, str(tmp_path / name), nproc_per_node=2)
        assert os.environ == environment
        out, err = capfd.readouterr()
        assert sorted(out.splitlines()) == ["process 0 writes", "process 1 writes"]
        assert sorted(err.splitlines()) == ["process 0 warns", "process 1 warns"]
        who = facts(tmp_path / name, "who")
        assert [one["rank"] for one in who] == [one["local_rank"] for one in who] == [0, 1]
        for one in who:
            assert one["world_size"] == one["local_world_size"] == 2
            assert one["ranks"] == [0.5, 1.5] and one["threads"] == 1
            assert one["signals"] == [signal.SIGUSR1] and not runs(one["pid"])
    assert not usr1 and not dist.is_initialized()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert usr1 == [signal.SIGUSR1]


@pytest.mark.parametrize("n", [1, None])
def test_one_process_runs_right_here(tmp_path, monkeypatch, n):
    """A single process is this one: no other process is started, and no process group is made."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch_module, "_run_processes", None)
    launch(launch_workers.say_who, str(tmp_path), nproc_per_node=n)
    (who,) = facts(tmp_path, "who")
    assert who["pid"] == os.getpid() and who["world_size"] == 1 and who["ranks"] == [0.5]
    assert not dist.is_initialized()


def test_one_process_per_gpu(monkeypatch):
    started = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(launch_module, "_run_processes", lambda function, args, n, held: started.append(n))
    for n in (None, 2, 4):
        launch(print, nproc_per_node=n)
    assert started == [4, 2, 4]
    with pytest.raises(UserError, match="nproc_per_node=5, but 4 GPUs are visible; use nproc_per_node=4"):
        launch(print, nproc_per_node=5)


def test_threads_are_shared_out(monkeypatch):
    """Each of 2 processes gets 2 of 5 CPUs. A number set by the user stays; afterwards all is as before."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)))
    for before, inside in (("7", "7"), (None, "2")):
        monkeypatch.delenv("OMP_NUM_THREADS")
        if before:
            monkeypatch.setenv("OMP_NUM_THREADS", before)
        with launch_module._own_environment(2):
            assert os.environ["OMP_NUM_THREADS"] == inside
        assert os.environ.get("OMP_NUM_THREADS") == before
        monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_what_cannot_be_pickled_is_a_bug_before_anything_starts(monkeypatch):
    monkeypatch.setattr(launch_module, "elastic_launch", None)
    with pytest.raises(Exception, match="pickle.*<lambda>"):
        launch(lambda: None, nproc_per_node=2)
    with pytest.raises(TypeError, match="cannot pickle 'generator'"):
        launch(launch_workers.say_who, (i for i in range(3)), nproc_per_node=2)


#### FAILING


@pytest.fixture
def failure(tmp_path, capfd):
    """Fail in some way: failure(how, everyone) -> (exit code, stderr). Checks what must hold for every way.

    No process is left, nothing is printed to stdout, and stderr does not contain torch's own reports.
    """

    def fail(how: str, everyone: bool = False):
        with limited(), pytest.raises(SystemExit) as stop, report_user_errors():
            launch(launch_workers.fail, str(tmp_path), how, everyone, nproc_per_node=2)
        assert not any(runs(one["pid"]) for one in facts(tmp_path, "failed"))
        out, err = capfd.readouterr()
        assert not out and "ChildFailedError" not in err and "Terminating process" not in err
        return stop.value.code, err

    return fail


def test_the_first_to_fail_is_reported(failure, tmp_path):
    """Only the traceback of process 1 is printed, although process 0 fails too, when its collective breaks."""
    code, err = failure("bug")
    assert code == 1 and err.startswith("process 1 of 2 failed:\nTraceback (most recent call last):\n")
    assert err.endswith("ValueError: a bug of process 1\n") and err.count("Traceback") == 1
    assert ", in bug\n" in err and "are lost" not in err


def test_a_killed_process_is_named(failure):
    """A killed process, which cannot report anything, is named first; errors of the others come after it."""
    code, err = failure("killed")
    assert code == 1
    assert err.startswith("process 1 of 2 was killed by SIGKILL; did the machine run out of memory?\n")
    assert "failed" not in err.splitlines()[0]


@pytest.mark.parametrize("everyone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_users_mistake_is_one_line(failure, everyone):
    """A UserError is one line and exit code 2: from both processes at once, or from one while the other waits."""
    assert failure("mistake", everyone) == (2, "error: lr=-1 is negative; use a positive one\n")


@pytest.mark.slow
def test_sys_exit_is_the_commands_own(failure):
    """sys.exit(3) in a process ends the command with code 3 and no output, as it does with a single process."""
    assert failure("exit") == (3, "")


@pytest.mark.slow
def test_the_words_of_sys_exit_are_said_once(failure):
    assert failure("exit with words", everyone=True) == (1, "enough\n")


@pytest.mark.slow
def test_other_ends(failure, tmp_path):
    """Other ends are reported, too: a crash, os._exit, and an early exit.

    A crash in native code is reported with the name of its signal and a traceback. os._exit is reported with its code.
    If one process exits early without an error, the error of the process that loses it is reported.
    """
    code, err = failure("crash")
    assert code == 1 and "process 1 of 2 was killed by SIGSEGV\n" in err and ", line" in err and "in crash\n" in err
    code, err = failure("silent")
    assert code == 7 and err == "process 1 of 2 ended with exit code 7; its own output is above\n"
    code, err = failure("exit without code")
    assert code == 1 and err.startswith("process 0 of 2 failed:\nTraceback") and "are lost" in err


@pytest.mark.slow
def test_sys_exit_without_code_is_success(tmp_path):
    launch(launch_workers.fail, str(tmp_path), "exit without code", True, nproc_per_node=2)
    assert len(facts(tmp_path, "failed")) == 2


@pytest.mark.slow
def test_a_function_that_processes_cannot_import_is_a_bug(capfd, monkeypatch):
    """A function that exists only in this process can be pickled here, but not imported in the others."""
    monkeypatch.setattr(launch_workers, "here_only", lambda: None, raising=False)
    launch_workers.here_only.__qualname__ = launch_workers.here_only.__name__ = "here_only"
    launch_workers.here_only.__module__ = "launch_workers"
    with pytest.raises(SystemExit) as stop:
        launch(launch_workers.here_only, nproc_per_node=2)
    err = capfd.readouterr().err
    assert stop.value.code == 1 and err.count("Traceback") == 1 and "here_only" in err


def raised(error: BaseException, cause: BaseException | None = None) -> launch_module._LastWords:
    try:
        raise error from cause
    except BaseException as caught:
        return launch_module._last_words(caught)


def test_last_words():
    """The last words of a failing process say how it ended, and whether it only lost the connection to the others."""
    said = [raised(error) for error in (ValueError("a"), UserError("b"), KeyboardInterrupt(), SystemExit(3))]
    assert [one.kind for one in said] == ["bug", "mistake", "interrupt", "exit"]
    assert [one.code for one in said] == [1, 2, 130, 3]
    assert [one.message for one in said] == ["a", "b", "", ""]
    assert said[0].traceback.startswith("Traceback") and said[0].traceback.endswith("ValueError: a\n")
    assert [raised(SystemExit(code)).code for code in (None, 0, "words")] == [0, 0, 1]
    assert raised(SystemExit("words")).message == "words"
    assert not any(one.lost_others for one in said)
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:54321")
    assert raised(lost).lost_others and raised(ValueError("no batch"), lost).lost_others
    assert raised(dist.DistNetworkError("")).lost_others


def words(rank: int, time: float, exit_code: int, **fields) -> launch_module._End:
    """Make a process's end as the launcher knows it: rank, exit code, and last words."""
    values = {"kind": "bug", "code": exit_code, "message": "", "traceback": f"told by {rank}", "lost_others": False}
    said = None if fields.pop("silent", exit_code <= 0) else launch_module._LastWords(time, **{**values, **fields})
    return launch_module._End(rank, exit_code, said)


@pytest.mark.parametrize(
    "processes, code, said",
    {
        "the earliest": ([words(0, 5, 1), words(1, 3, 1)], 1, "process 1 of 2 failed:\ntold by 1"),
        "a broken connection is never the cause": (
            [words(0, 3, 1, lost_others=True), words(1, 5, 1)],
            1,
            "process 1 of 2 failed:\ntold by 1",
        ),
        "unless there is no other": (
            [words(0, 3, 1, lost_others=True), words(1, 2, 1, lost_others=True)],
            1,
            "process 1 of 2 failed:\ntold by 1",
        ),
        "the agent killed 0, which would not end, after the bug of 1": (
            [words(0, 6, -9), words(1, 5, 1)],
            1,
            "process 1 of 2 failed:\ntold by 1",
        ),
        "the agent ended 0 itself, somebody killed 1, and 2 had an error for it": (
            [words(0, 6, -15), words(1, 5, -9), words(2, 4.9, 1, lost_others=True)],
            1,
            "process 1 of 3 was killed by SIGKILL; did the machine run out of memory?",
        ),
        "silence, and others that lost a process": (
            [words(0, 3, 1, lost_others=True), words(1, 4, 9, silent=True)],
            9,
            "process 1 of 2 ended with exit code 9; its own output is above",
        ),
    }.values(),
)
def test_who_is_to_blame(capfd, processes, code, said):
    with pytest.raises(SystemExit) as stop:
        launch_module._report(processes, len(processes))
    assert stop.value.code == code and capfd.readouterr().err == said + "\n"


def test_a_mistakes_traceback_is_kept_for_who_asks():
    with pytest.raises(UserError) as mistake:
        launch_module._report([words(0, 1, 0), words(1, 1, 2, kind="mistake", message="no such file")], 2)
    assert str(mistake.value) == "no such file" and mistake.value.__notes__ == ["in process 1 of 2:\ntold by 1"]
    with pytest.raises(KeyboardInterrupt):
        launch_module._report([words(0, 1, 130, kind="interrupt")], 2)
    for asked, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)):
        with pytest.raises(Stopped, match="stopped after 7 updates") as stopped:
            launch_module._report([words(0, 1, 75, kind="stopped", message="stopped after 7 updates")], 2, asked)
        assert stopped.value.code == code


#### SIGNALS


class Command:
    """launch_workers.py as a user runs it: in its own process group, as a terminal starts a command."""

    def __init__(self, tmp_path, *words, **environment):
        environment = {**os.environ, "PYTHONPATH": PROJECT, **environment}
        command = [sys.executable, SCRIPT, *map(str, words)]
        self.folder, self.streams = tmp_path, (tmp_path / "out", tmp_path / "err")
        with open(self.streams[0], "w") as out, open(self.streams[1], "w") as err:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=err, process_group=0)

    def pids(self, name: str = "waits") -> list[int]:
        """Wait until both processes have written the file `name`, and return their process ids."""
        return wait_for(lambda: len(found := facts(self.folder, name)) == 2 and [one["pid"] for one in found])

    def ends(self, pids: list[int], code: int, err: str | None) -> None:
        """Assert that the command ends with this exit code and stderr, and that its processes end, too.

        Unless the launcher dies by a signal (code < 0), its processes end before it does.
        """
        assert self.process.wait(60) == code, self.streams[1].read_text()
        if code >= 0:
            assert not any(map(runs, pids))
        wait_for(lambda: not any(map(runs, pids)))
        assert not self.streams[0].read_text()
        assert err is None or self.streams[1].read_text() == err


@pytest.fixture
def command(tmp_path):
    commands = []
    yield lambda *words, **environment: commands.append(Command(tmp_path, *words, **environment)) or commands[-1]
    for one in commands:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def test_ctrl_c(command, tmp_path):
    """Ctrl-C goes to the launcher and its processes, as from a terminal. Both processes run their `finally` block.

    Process 0 hangs in a collective until process 1 has ended.
    """
    one = command(2, "wait", tmp_path)
    pids = one.pids()
    os.killpg(one.process.pid, signal.SIGINT)
    one.ends(pids, 130, "interrupted\n")
    assert len(facts(tmp_path, "tidied")) == 2


def test_a_killed_launcher_leaves_nobody(command, tmp_path):
    """If the launcher is killed, its processes end, too. Python may print that it cleans up after the launcher."""
    one = command(2, "wait", tmp_path)
    pids = one.pids()
    one.process.kill()
    one.ends(pids, -signal.SIGKILL, None)


KNOWN_LAUNCHERS: set[str] = set()


def left_on_this_machine(folder) -> set[str]:
    """Return the files of launchers whose temporary folder is in this one, and those of their semaphores."""
    names = os.listdir(folder / "temporary")
    launchers = {name.removeprefix(".").removesuffix(".lock") for name in (*names, *KNOWN_LAUNCHERS)}
    KNOWN_LAUNCHERS.update(launchers)
    return {name for name in (*names, *os.listdir(scratch.SEMAPHORES)) if any(one in name for one in launchers)}


@pytest.mark.skipif(not os.path.isdir(scratch.SEMAPHORES), reason="this system keeps semaphores elsewhere")
def test_the_next_start_removes_what_a_killed_group_left(command, tmp_path):
    """SIGKILL of launcher and processes together left a folder in /tmp and nine semaphores in /dev/shm, for ever.

    The next start removes them, and leaves those of a living launcher alone.
    """
    for name in ("killed", "living"):
        (tmp_path / name).mkdir()
    killed, living = (command(2, "wait", tmp_path / name) for name in ("killed", "living"))
    killed.folder, living.folder = tmp_path / "killed", tmp_path / "living"
    pids = killed.pids() + living.pids()
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.process.wait(60)
    wait_for(lambda: not any(map(runs, pids[:2])))
    both = left_on_this_machine(tmp_path)
    assert len([name for name in both if name.startswith(scratch.PREFIX)]) == 2
    launch(launch_workers.come, str(tmp_path), nproc_per_node=2)
    left = left_on_this_machine(tmp_path)
    (alive,) = [name for name in left if name.startswith(scratch.PREFIX)]
    assert left == {name for name in both if alive in name} and any(name.startswith("sem.") for name in left)
    os.killpg(living.process.pid, signal.SIGTERM)
    living.process.wait(60)
    assert not left_on_this_machine(tmp_path)


@pytest.mark.slow
def test_an_interrupt_of_the_launcher_alone(command, tmp_path):
    """SIGINT to the launcher alone ends its processes; here in the second run of a sweep."""
    (tmp_path / "first").mkdir()
    one = command(2, "come", tmp_path / "first", "wait", tmp_path)
    pids = one.pids()
    one.process.send_signal(signal.SIGINT)
    one.ends(pids, 130, "interrupted\n")
    assert len(facts(tmp_path / "first", "came")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_of_the_launcher(command, tmp_path, number):
    """The launcher ends its processes, and then ends by the signal that it got, as a single process does."""
    one = command(2, "wait", tmp_path)
    pids = one.pids()
    one.process.send_signal(number)
    one.ends(pids, -number, "")


@pytest.mark.slow
def test_signals_while_processes_import(command, tmp_path):
    """While processes import, SIGUSR1 ends the run as it ends a single process, and Ctrl-C prints one line."""
    one = command(2, "wait", tmp_path, LAUNCH_WORKERS_IMPORT_UNTIL=str(tmp_path / "one"))
    pids = one.pids("imports")
    os.kill(one.process.pid, signal.SIGUSR1)
    (tmp_path / "one").touch()
    one.ends(pids, -signal.SIGUSR1, "")
    forget(tmp_path)
    one = command(2, "wait", tmp_path, LAUNCH_WORKERS_IMPORT_UNTIL=str(tmp_path / "two"))
    pids = one.pids("imports")
    os.killpg(one.process.pid, signal.SIGINT)
    (tmp_path / "two").touch()
    one.ends(pids, 130, "interrupted\n")


@pytest.mark.slow
def test_stubborn_processes(command, tmp_path):
    """Processes that ignore all signals are killed after a second Ctrl-C. The agent gives them 10 seconds."""
    assert launch_module._settings(2, str(tmp_path)).shutdown_timeout == 10
    one = command(2, "wait_stubbornly", tmp_path)
    pids = one.pids()
    for _ in range(2):
        os.killpg(one.process.pid, signal.SIGINT)
        time.sleep(2)
    one.ends(pids, 130, "interrupted\n")


@pytest.mark.slow
def test_nohup_holds_for_all(command, tmp_path):
    """An ignored SIGHUP stays ignored in all processes; otherwise logging out would end a run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    one = command(2, "wait", tmp_path)
    signal.signal(signal.SIGHUP, before)
    pids = one.pids()
    os.killpg(one.process.pid, signal.SIGHUP)
    time.sleep(2)
    assert one.process.poll() is None and all(map(runs, pids))
    os.killpg(one.process.pid, signal.SIGINT)
    one.ends(pids, 130, "interrupted\n")


#### ENVIRONMENTS


@pytest.fixture
def busy_port():
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({}, ["MASTER_ADDR:MASTER_PORT=127.0.0.1:", "EADDRINUSE", "use a free port"]),
        ({"WORLD_SIZE": "2"}, ["MASTER_ADDR:MASTER_PORT=127.0.0.1:", "EADDRINUSE", "use a free port"]),
        ({"MASTER_PORT": None}, ["MASTER_ADDR:MASTER_PORT=127.0.0.1:None", "MASTER_PORT expected"]),
        ({"MASTER_PORT": "99999"}, ["MASTER_PORT=127.0.0.1:99999"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK=2 does not fit WORLD_SIZE=2"]),
        ({"RANK": "one"}, ["RANK=one in the environment is not a number"]),
        ({"RANK": "-1"}, ["RANK=-1 in the environment is not a number"]),
        ({"WORLD_SIZE": None}, ["WORLD_SIZE=nothing in the environment", "start with torchrun or srun"]),
        ({"LOCAL_WORLD_SIZE": "2"}, ["LOCAL_WORLD_SIZE=2 does not fit WORLD_SIZE=1"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK=1 does not fit LOCAL_WORLD_SIZE=1"]),
    ],
)
def test_a_bad_environment_is_one_line(monkeypatch, capfd, busy_port, changes, parts):
    for name, value in {**TORCHRUN, "MASTER_PORT": str(busy_port), **changes}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop, report_user_errors():
        distributed.is_main()  # as train.py asks before it launches
        launch(print, "never")
    out, err = capfd.readouterr()
    last = err.splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("error: ") and out == ""
    assert not [line for line in err.splitlines()[:-1] if not line.startswith("[W")]  # torch's own, from C++
    for part in parts:
        assert part in last


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {**TORCHRUN, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="LOCAL_RANK=2, but this process sees 2 GPUs; start one process per GPU"):
        launch(print)


def test_more_processes_than_cores_can_use(monkeypatch):
    """nproc_per_node=999 started 999 processes, each of which takes half a gigabyte to import torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3)))
    with pytest.raises(UserError, match="nproc_per_node=13, but no GPU is visible, and more than 12 processes"):
        launch(print, nproc_per_node=13)
    assert launch_module._number_of_processes(12) == 12


def test_a_number_that_the_launcher_contradicts(monkeypatch):
    """Under torchrun, nproc_per_node must agree with the number of processes that torchrun has started."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="nproc_per_node=2, but the launcher has started 1 processes on this machine"):
        launch(print, nproc_per_node=2)


def test_replicas_that_do_not_divide_the_processes(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 6)
    with pytest.raises(UserError, match="hsdp_replicas=4 does not divide the 6 processes .*; use one of 1, 2, 3, 6"):
        sharding.mesh_of(SimpleNamespace(hsdp_replicas=4, use_fsdp=True), torch.device("cpu"))


def test_a_group_is_left_at_the_end(monkeypatch, tmp_path, busy_port):
    """A process that torchrun started is in a process group while the function runs, and leaves it afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in {**TORCHRUN, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    seen = []
    launch(lambda: seen.append((dist.is_initialized(), distributed.world_size(), os.getpid())))
    assert seen == [(True, 1, os.getpid())] and not dist.is_initialized()


def step_of(rank: int, **more) -> dict[str, str]:
    """Return the variables of task `rank` under `srun --nodes 2 --ntasks-per-node 3` that launch() reads."""
    return {
        "SLURM_JOB_ID": "1234567",
        "SLURM_STEP_ID": "2",
        "SLURM_NTASKS": "6",
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
        "SLURM_STEP_NODELIST": "gpu-a[03-05,9],gpu-b1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % 3),
        **more,
    }


def adopted(**variables) -> list[str | None]:
    for name in list(os.environ):
        if name in TORCHRUN or name.startswith("SLURM_"):
            del os.environ[name]
    os.environ.update(variables)
    launch_module._adopt_slurm_environment()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return [os.environ.get(name) for name in names]


def test_slurms_tasks_are_adopted():
    """The port is 20000 + 3579, the same in each task: 31 * 1234567 + 2 = 38271579, which is 3579 modulo 12000."""
    assert adopted(**step_of(0)) == ["0", "0", "6", "3", "gpu-a03", "23579"]
    assert adopted(**step_of(4)) == ["4", "1", "6", "3", "gpu-a03", "23579"]
    old = {key: value for key, value in step_of(4).items() if key != "SLURM_STEP_TASKS_PER_NODE"}
    assert adopted(**old)[3] == "3"
    assert adopted(**step_of(4), MASTER_ADDR="10.0.0.7", MASTER_PORT="555")[4:] == ["10.0.0.7", "555"]


def test_ports_of_steps_differ():
    """30 steps of each of 100 jobs have 3000 different ports, all below 32768, where Linux's own range begins.

    31 * job + step differs for each, and spans 3100 numbers, which fit into 12000.
    """
    ports = {
        int(adopted(**step_of(0, SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)))[5])
        for job in range(5000, 5100)
        for step in range(30)
    }
    assert len(ports) == 3000 and 1024 < min(ports) and max(ports) < 32768


@pytest.mark.parametrize(
    "nodes, first",
    {
        "n1": "n1",
        "n1,n2": "n1",
        "n[01-16]": "n01",
        "n[7,9-12]": "n7",
        "a,n[1-2]": "a",
        "r[1-2]n[3-4].cluster": "r1n3.cluster",
        "gpu-a[03]-ib,gpu-b1": "gpu-a03-ib",
    }.items(),
)
def test_the_first_host(nodes, first):
    assert launch_module._first_host(nodes) == first


def test_what_is_not_a_task_of_several_is_left_alone():
    """Nothing is adopted under torchrun within a task, in a batch script (no variables of a step), or for one task."""
    torchrun = {"RANK": "7", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}
    assert adopted(**step_of(1), **torchrun) == [*torchrun.values(), None, None]
    script = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "4(x2)"}
    assert adopted(**script) == [None] * 6
    assert adopted(**step_of(0, SLURM_STEP_NUM_TASKS="1")) == [None] * 6
    assert adopted() == [None] * 6


def test_nodes_with_different_numbers_of_tasks_are_refused():
    """Nodes with 3 and 2 tasks are refused: they cannot be replicas, and each would compute another layout."""
    for text in ("3,2", ""):
        with pytest.raises(UserError, match="5 tasks on 2 nodes .*use srun --ntasks-per-node"):
            adopted(**step_of(0, SLURM_STEP_NUM_TASKS="5", SLURM_STEP_TASKS_PER_NODE=text))
    with pytest.raises(UserError, match=r"8 tasks on 4 nodes \(3\(x2\),1\(x2\)\)"):
        more = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_TASKS_PER_NODE": "3(x2),1(x2)"}
        adopted(**step_of(0, **more))


#### OTHER LAUNCHERS


def test_two_tasks_of_slurm_meet(tmp_path):
    """Two SLURM tasks, on two nodes that are both this machine, form one process group."""
    common = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1"}
    job = str(os.getpid())
    tasks = []
    for rank in range(2):
        more = step_of(rank, **common, SLURM_LOCALID="0", SLURM_JOB_ID=job)
        environment = {**os.environ, "PYTHONPATH": PROJECT, **more}
        tasks.append(subprocess.Popen([sys.executable, SCRIPT, "1", "say_who", str(tmp_path)], env=environment))
    assert [task.wait(60) for task in tasks] == [0, 0]
    who = facts(tmp_path, "who")
    assert [one["pid"] for one in who] == [task.pid for task in tasks]
    assert [(one["rank"], one["local_rank"], one["local_world_size"]) for one in who] == [(0, 0, 1), (1, 0, 1)]
    assert all(one["ranks"] == [0.5, 1.5] for one in who)


@pytest.mark.slow
def test_two_nodes_of_torchrun_meet(tmp_path):
    """Two torchrun agents on this machine, two processes each, form one group: ranks 0 and 1, and ranks 2 and 3."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1"]
    words += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--log-dir", str(tmp_path / "logs")]
    command = [sys.executable, "-m", "torch.distributed.run", *words, SCRIPT, "0", "say_who", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": PROJECT}
    agents = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [agent.communicate(timeout=120)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    who = facts(tmp_path, "who")
    assert [one["rank"] for one in who] == [0, 1, 2, 3] and [one["local_rank"] for one in who] == [0, 1, 0, 1]
    for one in who:
        assert one["world_size"] == 4 and one["local_world_size"] == 2 and one["ranks"] == [0.5, 1.5, 2.5, 3.5]


#### THE COMMAND

TRAIN = """
    model.architecture.num_hidden_layers=1 model.architecture.hidden_size=32 model.architecture.intermediate_size=64
    model.architecture.num_attention_heads=2 model.batch_size=32 n_examples=32 n_eval_examples=32 eval_every=32
    warmup_steps=0 nproc_per_node=2
"""


@pytest.mark.slow
def test_a_sweep_on_two_processes(tmp_path):
    """A sweep runs two jobs one after the other. Each has one bar, that of rank 0, and prints each line once."""
    words = ["-m", "exp_name=a,b", f"cache_dir={tmp_path}", *TRAIN.split()]
    done = subprocess.run([sys.executable, "train.py", *words], cwd=PROJECT, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # A bar is redrawn in one line, which ends when the bar is done. Spaces cover what an earlier, longer text left.
    assert len(re.findall(rb"tok/s\] *\n", done.stderr)) == 2 and done.stdout.count(b"2 processes on CPU") == 2
    for name in "ab":
        assert done.stdout.count(f"saved to {tmp_path}/{name}/LATEST/policy.pt".encode()) == 1
        with open(tmp_path / name / "metrics.jsonl") as file:
            assert sum(json.loads(line)["mode"] == "train" for line in file) == 1


@pytest.mark.slow
def test_a_sweep_under_another_launcher_ends_with_its_first_failure(tmp_path):
    """Under another launcher, a sweep ends with its first failure. Without one, the second job still runs.

    If only one process had failed, it would be in the second job while the others are still in the first.
    """
    words = ["-m", "exp_name=a,b", "datasets=[nowhere.jsonl]", f"cache_dir={tmp_path}"]
    for environment, n in ({}, 2), (TORCHRUN, 1):
        environment = {**os.environ, **environment}
        command = [sys.executable, "train.py", *words]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 2 and done.stderr.count("error: ") == n, done.stderr
