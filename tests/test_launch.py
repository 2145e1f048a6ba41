"""Starting processes and ending them: every way in which one can fail, every signal, every environment.

What the processes do is in launch_workers.py. Times: a failure must end the run within a minute, as the slowest way to
notice one (a collective that never returns) would take half an hour.
"""

import glob
import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import launch_workers
from halos import distributed, sharding
from halos import launch as launch_module
from halos.commands import report_user_errors
from halos.errors import UserError
from halos.launch import launch
from helpers import PROJECT

SCRIPT = os.path.join(PROJECT, "tests", "launch_workers.py")
# What torchrun says to a process of its own.
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
    """What the processes left under a name, in the order of their ranks."""
    paths = sorted(path for path in glob.glob(f"{folder}/{name}-*") if "unfinished" not in path)
    return [json.loads(open(path).read()) for path in paths]


def forget(folder) -> None:
    """What processes have left so far."""
    for path in glob.glob(f"{folder}/*-[0-9]*"):
        os.remove(path)


def wait_for(condition, seconds: float = 60):
    """Until the condition gives something true, which is returned."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)
    return value


def runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(autouse=True)
def no_environment(tmp_path, monkeypatch):
    """No launcher's variables but the test's own, and a folder for temporary files that must be empty at the end."""
    if dist.is_initialized():  # the group of one that FSDP needed in another file's test
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
    """Signals that reach the launcher's own handler for SIGUSR1, once `launch` has given it back."""
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(signal.SIGUSR1, before)


#### RUNNING


def test_every_process_has_its_place(tmp_path, capfd, usr1):
    """Two processes, and then two more from the same launcher, as in a sweep: ranks 0 and 1 hear 0.5 and 1.5 from each
    other, both are heard, and SIGUSR1 to the launcher reaches each once and leaves the launcher alone."""
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
    """This one: no other is started, and no group is made."""
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
    monkeypatch.setattr(launch_module, "_run_processes", lambda function, args, n: started.append(n))
    for n in (None, 2, 4):
        launch(print, nproc_per_node=n)
    assert started == [4, 2, 4]
    with pytest.raises(UserError, match="nproc_per_node=5, but 4 GPUs are visible; use nproc_per_node=4"):
        launch(print, nproc_per_node=5)


def test_threads_are_shared_out(monkeypatch):
    """5 CPUs for 2 processes: 2 each. What the user has set stays, and afterwards it is as before."""
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
    """failure(how, everyone) -> (exit code, stderr), after a look at what holds for all of them."""

    def fail(how: str, everyone: bool = False):
        with pytest.raises(SystemExit) as stop, report_user_errors():
            launch(launch_workers.fail, str(tmp_path), how, everyone, nproc_per_node=2)
        last = max(one["time"] for one in facts(tmp_path, "failed"))
        assert time.time() - last < 30
        assert not any(runs(one["pid"]) for one in facts(tmp_path, "failed"))
        out, err = capfd.readouterr()
        assert not out and "ChildFailedError" not in err and "Terminating process" not in err
        return stop.value.code, err

    return fail


def test_the_first_to_fail_is_reported(failure, tmp_path):
    """Its traceback and no other, although process 0 fails, too: its collective breaks when process 1 has gone."""
    code, err = failure("bug")
    assert code == 1 and err.startswith("process 1 of 2 failed:\nTraceback (most recent call last):\n")
    assert err.endswith("ValueError: a bug of process 1\n") and err.count("Traceback") == 1
    assert ", in bug\n" in err and "are lost" not in err


def test_a_killed_process_is_named(failure):
    """It cannot speak for itself. What it did to the others is told after that."""
    code, err = failure("killed")
    assert code == 1
    assert err.startswith("process 1 of 2 was killed by SIGKILL; did the machine run out of memory?\n")
    assert "failed" not in err.splitlines()[0]


@pytest.mark.parametrize("everyone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_users_mistake_is_one_line(failure, everyone):
    """From both processes at once, and from one while the other waits for it."""
    assert failure("mistake", everyone) == (2, "error: lr=-1 is negative; use a positive one\n")


@pytest.mark.slow
def test_sys_exit_is_the_commands_own(failure):
    """Without a word, like sys.exit in a program of one process."""
    assert failure("exit") == (3, "")


@pytest.mark.slow
def test_the_words_of_sys_exit_are_said_once(failure):
    assert failure("exit with words", everyone=True) == (1, "enough\n")


@pytest.mark.slow
def test_other_ends(failure, tmp_path):
    """A crash in native code has its signal's name and shows where it was; os._exit is at least noticed; and a process
    that leaves early as if all were well does not make a success of what the other says about it."""
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
    """It can be pickled here, where the module has it, and not found there."""
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
    """What a process that fails says of itself: how it ended, and whether that is only since it lost the others."""
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
    """A process as the launcher knows it at the end."""
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
            "process 1 of 3 was killed by SIGKILL; did the machine run out of memory?\n"
            "then process 2 failed:\ntold by 2",
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


#### SIGNALS


class Command:
    """launch_workers.py as a user runs it, in a process group of its own, as a terminal would start it."""

    def __init__(self, tmp_path, *words, **environment):
        environment = {**os.environ, "PYTHONPATH": PROJECT, **environment}
        command = [sys.executable, SCRIPT, *map(str, words)]
        self.folder, self.streams = tmp_path, (tmp_path / "out", tmp_path / "err")
        with open(self.streams[0], "w") as out, open(self.streams[1], "w") as err:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=err, process_group=0)

    def pids(self, name: str = "waits") -> list[int]:
        """Of its processes, as soon as both have come so far."""
        return wait_for(lambda: len(found := facts(self.folder, name)) == 2 and [one["pid"] for one in found])

    def ends(self, pids: list[int], code: int, err: str | None, seconds: float = 30) -> None:
        assert self.process.wait(seconds) == code, self.streams[1].read_text()
        wait_for(lambda: not any(map(runs, pids)), 0.5 if code >= 0 else seconds)
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
    """As the terminal sends it, to the launcher and its processes. What they do at last, they do once, uninterrupted.

    Process 0 hangs in a collective until process 1 has gone.
    """
    one = command(2, "wait", tmp_path)
    pids = one.pids()
    os.killpg(one.process.pid, signal.SIGINT)
    one.ends(pids, 130, "interrupted\n")
    assert len(facts(tmp_path, "tidied")) == 2


def test_a_killed_launcher_leaves_nobody(command, tmp_path):
    """Python may say that it cleans up after the launcher: no matter."""
    one = command(2, "wait", tmp_path)
    pids = one.pids()
    one.process.kill()
    one.ends(pids, -signal.SIGKILL, None, 10)


@pytest.mark.slow
def test_an_interrupt_of_the_launcher_alone(command, tmp_path):
    """In the second run of a sweep, say."""
    (tmp_path / "first").mkdir()
    one = command(2, "come", tmp_path / "first", "wait", tmp_path)
    pids = one.pids()
    one.process.send_signal(signal.SIGINT)
    one.ends(pids, 130, "interrupted\n")
    assert len(facts(tmp_path / "first", "came")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_of_the_launcher(command, tmp_path, number):
    """It ends by that signal, as it would if it ran alone, and takes the others with it."""
    one = command(2, "wait", tmp_path)
    pids = one.pids()
    one.process.send_signal(number)
    one.ends(pids, -number, "", 10)


@pytest.mark.slow
def test_signals_while_processes_import(command, tmp_path):
    """SIGUSR1 kills nobody, and Ctrl-C is still one line, not a traceback of each import statement."""
    one = command(2, "wait", tmp_path, LAUNCH_WORKERS_IMPORT_SLOWLY=str(tmp_path))
    pids = one.pids("imports")
    os.killpg(one.process.pid, signal.SIGUSR1)
    assert one.pids() == pids
    one.process.kill()
    forget(tmp_path)
    one = command(2, "wait", tmp_path, LAUNCH_WORKERS_IMPORT_SLOWLY=str(tmp_path))
    pids = one.pids("imports")
    os.killpg(one.process.pid, signal.SIGINT)
    one.ends(pids, 130, "interrupted\n")


@pytest.mark.slow
def test_stubborn_processes(command, tmp_path):
    """They are killed after 10 seconds, whatever they ignore, and however often the user asks."""
    for times in (1, 2):
        one = command(2, "wait_stubbornly", tmp_path)
        pids = one.pids()
        for _ in range(times):
            os.killpg(one.process.pid, signal.SIGINT)
            time.sleep(2)
        assert one.process.poll() is None and all(map(runs, pids))
        one.ends(pids, 130, "interrupted\n", 20)
        forget(tmp_path)


@pytest.mark.slow
def test_nohup_holds_for_all(command, tmp_path):
    """An ignored SIGHUP stays ignored, or whoever logs out would end the run that nohup protects."""
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


def test_a_number_that_the_launcher_contradicts(monkeypatch):
    """Under torchrun the number of processes is its matter."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="nproc_per_node=2, but the launcher has started 1 processes on this machine"):
        launch(print, nproc_per_node=2)


def test_replicas_that_do_not_divide_the_processes(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 6)
    with pytest.raises(UserError, match="hsdp_replicas=4 does not divide the 6 processes .*; use one of 1, 2, 3, 6"):
        sharding.mesh_of(SimpleNamespace(hsdp_replicas=4, use_fsdp=True), torch.device("cpu"))


def test_a_group_is_left_at_the_end(monkeypatch, tmp_path, busy_port):
    """A process that torchrun started joins its group for as long as the function runs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in {**TORCHRUN, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    seen = []
    launch(lambda: seen.append((dist.is_initialized(), distributed.world_size(), os.getpid())))
    assert seen == [(True, 1, os.getpid())] and not dist.is_initialized()


def step_of(rank: int, **more) -> dict[str, str]:
    """What srun says to task `rank` of `srun --nodes 2 --ntasks-per-node 3`, as far as it matters."""
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
    """Port: 31 * 1234567 + 2 = 38271579, which is 3579 modulo 12000; the same in each task."""
    assert adopted(**step_of(0)) == ["0", "0", "6", "3", "gpu-a03", "23579"]
    assert adopted(**step_of(4)) == ["4", "1", "6", "3", "gpu-a03", "23579"]
    old = {key: value for key, value in step_of(4).items() if key != "SLURM_STEP_TASKS_PER_NODE"}
    assert adopted(**old)[3] == "3"
    assert adopted(**step_of(4), MASTER_ADDR="10.0.0.7", MASTER_PORT="555")[4:] == ["10.0.0.7", "555"]


def test_ports_of_steps_differ():
    """30 steps of each of 100 jobs: 31 * job + step is another number for each, and 3100 of them fit into 12000. All
    are below 32768, where Linux begins to give out ports to others."""
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
    """torchrun within a task; the batch script, where the job's variables are set but not the step's; one task."""
    torchrun = {"RANK": "7", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}
    assert adopted(**step_of(1), **torchrun) == [*torchrun.values(), None, None]
    script = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "4(x2)"}
    assert adopted(**script) == [None] * 6
    assert adopted(**step_of(0, SLURM_STEP_NUM_TASKS="1")) == [None] * 6
    assert adopted() == [None] * 6


def test_nodes_with_different_numbers_of_tasks_are_refused():
    """5 tasks as 3 and 2: the nodes could not be replicas of each other, and each would believe another layout."""
    for text in ("3,2", ""):
        with pytest.raises(UserError, match="5 tasks on 2 nodes .*use srun --ntasks-per-node"):
            adopted(**step_of(0, SLURM_STEP_NUM_TASKS="5", SLURM_STEP_TASKS_PER_NODE=text))
    with pytest.raises(UserError, match=r"8 tasks on 4 nodes \(3\(x2\),1\(x2\)\)"):
        more = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_TASKS_PER_NODE": "3(x2),1(x2)"}
        adopted(**step_of(0, **more))


#### OTHER LAUNCHERS


def test_two_tasks_of_slurm_meet(tmp_path):
    """On two nodes, both of which are this machine."""
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
    """Two agents on this machine, with two processes each: ranks 0 and 1 on one, 2 and 3 on the other."""
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
    """Two jobs, one after the other, each with one bar, that of process 0, and one line per message."""
    words = ["-m", "exp_name=a,b", f"cache_dir={tmp_path}", *TRAIN.split()]
    done = subprocess.run([sys.executable, "train.py", *words], cwd=PROJECT, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # A bar is drawn over and over in one line, which ends when it is done.
    assert done.stderr.count(b"tok/s]\n") == 2 and done.stdout.count(b"2 processes on CPU") == 2
    for name in "ab":
        assert done.stdout.count(f"saved to {tmp_path}/{name}/LATEST/policy.pt".encode()) == 1
        with open(tmp_path / name / "metrics.jsonl") as file:
            assert sum(json.loads(line)["mode"] == "train" for line in file) == 1


@pytest.mark.slow
def test_a_sweep_under_another_launcher_ends_with_its_first_failure(tmp_path):
    """Without one, the second job still runs. But if one process alone had failed, it would meet the others, who are
    still in the first job, from within the second."""
    words = ["-m", "exp_name=a,b", "datasets=[nowhere.jsonl]", f"cache_dir={tmp_path}"]
    for environment, n in ({}, 2), (TORCHRUN, 1):
        environment = {**os.environ, **environment}
        command = [sys.executable, "train.py", *words]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment, timeout=60)
        assert done.returncode == 2 and done.stderr.count("error: ") == n, done.stderr
