"""Starting the processes of a run on this machine, and making one end of theirs.

Every process is a fresh Python that imports the function and calls it. This one, the launcher, does nothing but watch
them: the first that fails ends the run and is the only one heard, and a signal to the launcher reaches them all.
"""

import faulthandler
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from halos import distributed
from halos.errors import UserError

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # end the run
PASSED_ON = signal.SIGUSR1  # goes to every process, for the handler that it may have
PATIENCE = 10.0  # seconds that processes have to end before they are killed


def launch(function: Callable, *args: Any, nproc_per_node: int | None = None) -> None:
    """Run `function(*args)` in every process of the run, and return when all are done.

    In a process that torchrun or SLURM has started, that is this one. Else it is one process per visible GPU, or one
    where there is none, or `nproc_per_node`; a single one runs right here.

    function: can be imported by name, as can what is in `args` (they are pickled)
    """
    _adopt_slurm_environment()
    if "RANK" in os.environ:
        with distributed.group():
            function(*args)
        return
    n = _number_of_processes(nproc_per_node)
    if n == 1:
        function(*args)
    else:
        _run_processes(function, args, n)


def _number_of_processes(nproc_per_node: int | None) -> int:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and nproc_per_node and nproc_per_node > gpus:
        visible = "1 GPU is" if gpus == 1 else f"{gpus} GPUs are"
        raise UserError(f"nproc_per_node={nproc_per_node}, but {visible} visible; use nproc_per_node={gpus}")
    return nproc_per_node or gpus or 1


#### SLURM


def _adopt_slurm_environment() -> None:
    """In one of several tasks that srun has started (and no torchrun within them), say so as torchrun would.

    The batch script itself is no such task, although most of SLURM's variables are set there, too.
    """
    slurm = os.environ
    if "RANK" in slurm or "SLURM_PROCID" not in slurm or int(slurm.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    n = int(slurm["SLURM_STEP_NUM_TASKS"])
    slurm["LOCAL_RANK"], slurm["LOCAL_WORLD_SIZE"] = slurm.get("SLURM_LOCALID", "0"), str(_tasks_on_each_node(n))
    slurm["RANK"], slurm["WORLD_SIZE"] = slurm["SLURM_PROCID"], str(n)
    nodes = slurm.get("SLURM_STEP_NODELIST") or slurm.get("SLURM_JOB_NODELIST") or "localhost"
    slurm.setdefault("MASTER_ADDR", _first_host(nodes))
    # The same in all tasks of a step, different for steps that share a node, and below the ports that systems give out.
    job, step = int(slurm.get("SLURM_JOB_ID", "0")), int(slurm.get("SLURM_STEP_ID", "0"))
    slurm.setdefault("MASTER_PORT", str(20000 + (31 * job + step) % 12000))


def _tasks_on_each_node(n: int) -> int:
    """From SLURM's list, such as 4(x2),3 for [4, 4, 3]; nodes that differ are refused."""
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts = {int(count) for count in re.findall(r"(?:^|,)(\d+)", text)} or {n // nodes}
    if len(counts) > 1 or n % nodes:
        raise UserError(
            f"srun has started {n} tasks on {nodes} nodes ({text or 'unevenly'}), and every node must have as many as "
            "the others; use srun --ntasks-per-node"
        )
    return counts.pop()


def _first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts.

    >>> _first_host("gpu-a[03-05,9],gpu-b1")
    'gpu-a03'
    """
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]


#### THE LAUNCHER'S SIDE


class _LastWords(NamedTuple):
    """What a process that fails tells the launcher."""

    time: float  # of the failure: the earliest is the one to report
    kind: str  # "bug", "mistake" (a UserError), "interrupt" (Ctrl-C), or "exit" (sys.exit)
    code: int  # its exit code
    message: str
    traceback: str
    lost_others: bool  # a connection broke, which is not where the trouble began


@dataclass(eq=False)
class _Process:
    rank: int
    process: SpawnProcess
    inbox: connection.Connection
    last_words: _LastWords | None = None
    ended_at: float = math.inf
    signals_sent: set[int] = field(default_factory=set)

    @property
    def exit_code(self) -> int | None:
        return self.process.exitcode

    @property
    def killed_by(self) -> int | None:
        """The signal that ended it, if not one of the launcher's."""
        number = -(self.exit_code or 0)
        return number if number > 0 and number not in self.signals_sent else None

    def send(self, number: int) -> None:
        if self.exit_code is None and self.process.pid:
            os.kill(self.process.pid, number)
            if number != PASSED_ON:
                self.signals_sent.add(number)


def _run_processes(function: Callable, args: tuple, n: int) -> None:
    work = pickle.dumps((function, args))  # here, so that what cannot be pickled is known before anything is started
    processes: list[_Process] = []
    stop = None
    with _noting_signals() as noted:
        # Where the processes meet. The system chooses a free port, and it stays taken until all of them have ended.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        try:
            _start(processes, work, n, store.port)
            stop = _watch(processes, noted)
        finally:
            _end(processes, noted, signal.SIGINT if stop == signal.SIGINT else signal.SIGTERM)
    stop = stop or next((number for number in noted if number in STOPPING), None)
    if stop:
        # End as a single process would have: by the signal itself, or as its handler wants it.
        sys.stdout.flush()
        signal.raise_signal(stop)
        sys.exit(128 + stop)
    if any(process.exit_code for process in processes):
        _report(processes)


@contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Inside, signals do nothing but add to a list. Those that are ignored stay so: nohup, a job in the background."""
    noted: list[int] = []
    before = {}
    for number in (*STOPPING, PASSED_ON):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(processes: list[_Process], work: bytes, n: int, port: int) -> None:
    """Add n started processes to the list."""
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # the first process would start it, and starting it lets SIGINT through
    # A signal would print a traceback, or kill, in the seconds of importing; `_work` lets them in. SIGTERM may kill.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, PASSED_ON))
    try:
        for rank in range(n):
            inbox, outbox = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(work, outbox), name=f"rank {rank}")
            with _environment_of(rank, n, port):
                process.start()
            outbox.close()  # the process's copy is the only one, so the inbox ends when it does
            processes.append(_Process(rank, process, inbox))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _environment_of(rank: int, n: int, port: int) -> Iterator[None]:
    """Inside, the environment is that of a process that torchrun would start here."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    values = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the launcher holds the store, not rank 0
        # Without this every process would start as many threads as there are cores.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cpus // n)),
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _watch(processes: list[_Process], noted: list[int]) -> int | None:
    """Until all are done, one has failed, or a signal asks to stop, which is returned."""
    while True:
        while noted:
            number = noted.pop(0)
            if number in STOPPING:
                return number
            for process in processes:
                process.send(number)
        _listen(processes, 0.1)
        codes = [process.exit_code for process in processes]
        if any(codes) or None not in codes:
            return None


def _listen(processes: list[_Process], seconds: float) -> None:
    """Wait for a process to end or to say why it will, at most so long, and take note of it."""
    inboxes = {process.inbox: process for process in processes if not process.inbox.closed}
    sentinels = [process.process.sentinel for process in processes if process.exit_code is None]
    for ready in connection.wait([*inboxes, *sentinels], seconds):
        if isinstance(ready, connection.Connection):
            try:
                inboxes[ready].last_words = ready.recv()
            except (EOFError, OSError):
                pass  # it ended without a word
            ready.close()
    for process in processes:
        if process.ended_at == math.inf and process.exit_code is not None:
            process.ended_at = time.time()


def _end(processes: list[_Process], noted: list[int], number: int) -> None:
    """Ask those that still run to end, by a signal, and kill what runs on: after a while, or when asked once more."""
    for process in processes:
        process.send(number)
    deadline, asked = time.monotonic() + PATIENCE, len(noted)
    while any(process.exit_code is None for process in processes):
        if time.monotonic() > deadline or any(number in STOPPING for number in noted[asked:]):
            for process in processes:
                process.send(signal.SIGKILL)
            deadline = math.inf
        _listen(processes, 0.1)
    _listen(processes, 0)


def _report(processes: list[_Process]) -> NoReturn:
    """Say why the first process failed, and end as it did: a user's mistake in one line, a bug with its traceback."""
    n = len(processes)
    ended = sorted(processes, key=lambda process: process.ended_at)
    spoken = sorted((words.time, process.rank, words) for process in processes if (words := process.last_words))
    causes = [(rank, words) for _, rank, words in spoken if not words.lost_others]
    silent = [process for process in ended if (process.exit_code or 0) > 0 and not process.last_words]
    for process in ended:
        if number := process.killed_by:
            memory = "; did the machine run out of memory?" if number == signal.SIGKILL else ""
            _say(f"process {process.rank} of {n} was killed by {signal.Signals(number).name}{memory}")
            for _, rank, words in spoken[:1]:
                _say(f"then process {rank} failed:\n{words.traceback}")
            sys.exit(1)
    if causes:
        _end_like(*causes[0], n)
    if silent:
        code = silent[0].exit_code
        _say(f"process {silent[0].rank} of {n} ended with exit code {code}, and said no more than what is above")
        sys.exit(code)
    _, rank, words = spoken[0]
    _end_like(rank, words, n)


def _end_like(rank: int, words: _LastWords, n: int) -> NoReturn:
    if words.kind == "mistake":
        error = UserError(words.message)
        error.add_note(f"in process {rank} of {n}:\n{words.traceback}")  # for who asks for tracebacks
        raise error
    if words.kind == "interrupt":
        raise KeyboardInterrupt
    if words.kind == "bug":
        _say(f"process {rank} of {n} failed:\n{words.traceback}")
    elif words.message:
        _say(words.message)
    sys.exit(words.code)


def _say(text: str) -> None:
    sys.stdout.flush()
    print(text.rstrip(), file=sys.stderr, flush=True)


#### A PROCESS'S SIDE


def _work(work: bytes, outbox: connection.Connection) -> None:
    """What a started process does: its part of the run, and last words if that fails."""
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    faulthandler.enable()  # a crash in native code shows where Python was
    try:
        _let_signals_in()
        function, args = pickle.loads(work)
        with distributed.group():
            try:
                function(*args)
            except BaseException as error:
                # Here, and not after the group is left: that may wait for the others, who wait in a collective.
                _give_up(error, outbox)
    except BaseException as error:
        _give_up(error, outbox)


def _end_with_the_launcher() -> None:
    """A launcher that was killed cannot end its processes. They notice, even in the middle of a collective."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os._exit(1)


def _let_signals_in() -> None:
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt_once)
    signal.signal(PASSED_ON, signal.SIG_IGN)  # until the function has a handler for it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, PASSED_ON))


def _interrupt_once(number: int, frame: Any) -> NoReturn:
    """Ctrl-C comes twice, from the terminal and from the launcher; the second must not interrupt the tidying up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _give_up(error: BaseException, outbox: connection.Connection) -> NoReturn:
    """Leave word for the launcher, and end without a word to people, who would hear it from every process."""
    words = _last_words(error)
    with suppress(OSError):  # the launcher is gone
        if words.code:
            outbox.send(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(words.code)


def _last_words(error: BaseException) -> _LastWords:
    kind, code, message = "bug", 1, str(error)
    if isinstance(error, UserError):
        kind, code = "mistake", 2
    elif isinstance(error, KeyboardInterrupt):
        kind, code = "interrupt", 130
    elif isinstance(error, SystemExit):
        kind = "exit"
        if error.code is None or isinstance(error.code, int):
            code, message = error.code or 0, ""
    text = "".join(traceback.format_exception(error))
    return _LastWords(time.time(), kind, code, message, text, _lost_others(error))


def _lost_others(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, dist.DistError) or re.search("Connection (closed|reset) by peer", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
