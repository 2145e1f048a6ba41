"""Launch the processes of a run on this machine, and report the first failure as if there were one process.

torch's elastic agent starts and watches the processes, as under torchrun. This file adds two things: only the first
failure is reported, and signals reach all processes.
"""

import faulthandler
import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import LaunchConfig, elastic_launch
from tqdm import tqdm

from halos import distributed, scratch, secrets, stopping
from halos.errors import Stopped, UserError, causes, disk_full
from halos.files import finished
from halos.locks import Lock
from halos.watching import AT_ONCE, PASSED_ON, watched

# Without GPUs. More than one is slower, but is how the code for many GPUs is tried out on a small machine.
PROCESSES_PER_CORE = 4
PATIENCE = 10  # seconds that processes have to end before they are killed


@contextmanager
def joined() -> Iterator[None]:
    """Join the group for the duration of the block, if torchrun or SLURM has started this process.

    Otherwise this does nothing, and `launch` starts the processes later.
    """
    _adopt_slurm_environment()
    with distributed.group():
        yield


def launch(function: Callable, *args: Any, nproc_per_node: int | None = None, held: Lock | None = None) -> None:
    """Call `function(*args)` in every process of the run, and return when all are done.

    If torchrun or SLURM started this process, it calls the function itself. Otherwise the function is called in
    `nproc_per_node` new processes (default: one per visible GPU, or one without a GPU). A single process is not started
    anew: the call happens here.

    function: importable by name, like everything in `args` (both are pickled)
    held: a lock that the new processes keep as well, should this process end before them
    """
    _adopt_slurm_environment()
    if "RANK" in os.environ:
        _check_number(nproc_per_node)
        with joined():
            function(*args)
        return
    n = _number_of_processes(nproc_per_node)
    if n == 1:
        function(*args)
    else:
        _run_processes(function, args, n, held)


def _check_number(nproc_per_node: int | None) -> None:
    started = os.environ.get("LOCAL_WORLD_SIZE")
    if nproc_per_node and started and str(nproc_per_node) != started:
        raise UserError(
            f"nproc_per_node={nproc_per_node}, but the launcher has started {started} processes on this machine; "
            "leave nproc_per_node=null to it"
        )


def _number_of_processes(nproc_per_node: int | None) -> int:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and nproc_per_node and nproc_per_node > gpus:
        visible = "1 GPU is" if gpus == 1 else f"{gpus} GPUs are"
        raise UserError(f"nproc_per_node={nproc_per_node}, but {visible} visible; use nproc_per_node={gpus}")
    most = PROCESSES_PER_CORE * _cpus()
    if not gpus and nproc_per_node and nproc_per_node > most:
        raise UserError(
            f"nproc_per_node={nproc_per_node}, but no GPU is visible, and more than {most} processes are of no use to "
            f"{_cpus()} CPU cores; use nproc_per_node={_cpus()}, or fewer"
        )
    return nproc_per_node or gpus or 1


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


#### SLURM


def _adopt_slurm_environment() -> None:
    """Translate SLURM's variables into torchrun's, if srun started this process as one of several tasks.

    The batch script itself is not such a task, although SLURM sets most of its variables there too. Under torchrun,
    nothing is changed.
    """
    slurm = os.environ
    if "RANK" in slurm or "SLURM_PROCID" not in slurm or int(slurm.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    n = int(slurm["SLURM_STEP_NUM_TASKS"])
    slurm["LOCAL_RANK"], slurm["LOCAL_WORLD_SIZE"] = slurm.get("SLURM_LOCALID", "0"), str(_tasks_on_each_node(n))
    slurm["RANK"], slurm["WORLD_SIZE"] = slurm["SLURM_PROCID"], str(n)
    nodes = slurm.get("SLURM_STEP_NODELIST") or slurm.get("SLURM_JOB_NODELIST") or "localhost"
    slurm.setdefault("MASTER_ADDR", _first_host(nodes))
    # The port must be the same in all tasks of a step, differ between steps that share a node, and be below the range
    # of ports that operating systems assign.
    job, step = int(slurm.get("SLURM_JOB_ID", "0")), int(slurm.get("SLURM_STEP_ID", "0"))
    slurm.setdefault("MASTER_PORT", str(20000 + (31 * job + step) % 12000))


def _tasks_on_each_node(n: int) -> int:
    """Return the tasks per node, from SLURM's list, such as 4(x2),3 for [4, 4, 3]. Raises UserError if nodes differ."""
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
    """Return the first of SLURM's list of hosts.

    >>> _first_host("gpu-a[03-05,9],gpu-b1")
    'gpu-a03'
    """
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]


#### IN THE LAUNCHER


class _LastWords(NamedTuple):
    """The error report that a failing process writes into the launcher's folder."""

    time: float  # of the failure; the earliest failure is reported
    kind: str  # "bug", "mistake" (a UserError), "stopped", "interrupt" (a signal before that), or "exit" (sys.exit)
    code: int  # its exit code
    message: str
    traceback: str
    lost_others: bool  # a connection broke, because another process failed before


class _End(NamedTuple):
    """How a process ended."""

    rank: int
    exit_code: int  # negative: ended by that signal
    last_words: _LastWords | None


def _run_processes(function: Callable, args: tuple, n: int, held: Lock | None) -> None:
    """Run the processes under torch's elastic agent, without restarts, and report the first failure."""
    work = pickle.dumps((function, args))  # here, so that a pickling error appears before any process starts
    stop, ends = None, []
    with scratch.folder() as folder, _own_environment(n), watched(n, folder) as watch:
        try:
            elastic_launch(_settings(n, folder), _work)(work, folder, held)
        except SignalException as signaled:
            stop = watch.asked or signaled.sigval
        except ChildFailedError as error:
            ends = _ends(watch.processes, error.failures, folder)
    if stop is not None:
        _end_by(stop)
    if ends:
        _report(ends, n, watch.asked)


def _end_by(number: int) -> NoReturn:
    """End as a single process would: by the signal itself, or as its handler decides."""
    sys.stdout.flush()
    signal.raise_signal(number)
    sys.exit(128 + number)


def _settings(n: int, folder: str) -> LaunchConfig:
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # this file reports the errors
    # An ignored signal stays ignored, as with nohup or in a background job.
    handled = [number.name for number in AT_ONCE if signal.getsignal(number) != signal.SIG_IGN]
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        local_addr="localhost",
        run_id=uuid.uuid4().hex,
        max_restarts=0,
        signals_to_handle=",".join(handled),
        shutdown_timeout=PATIENCE,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )


@contextmanager
def _own_environment(n: int) -> Iterator[None]:
    """Give each process its share of the CPUs, and restore the environment at the end of the block."""
    before = dict(os.environ)
    # Without this, every process would start one thread per core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cpus() // n)))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _ends(processes: list[BaseProcess], failures: dict[int, ProcessFailure], folder: str) -> list[_End]:
    """Return how each process ended, in rank order.

    The agent knows this only for the process whose end it noticed first, which may not be the one that failed first.
    """
    codes = {rank: process.exitcode or 0 for rank, process in enumerate(processes)}
    codes |= {rank: failure.exitcode for rank, failure in failures.items()}
    ends = []
    for rank, code in sorted(codes.items()):
        path = os.path.join(folder, f"last_words-{rank}")
        words = None
        if os.path.exists(path):
            with open(path) as file:
                words = _LastWords(**json.load(file))
        ends.append(_End(rank, code, words))
    return ends


def _report(ends: list[_End], n: int, asked: int = 0) -> NoReturn:
    """Report why the first process failed, and end the same way.

    A user's mistake is reported in one line, a bug with its traceback.

    asked: the signal that asked the processes to stop; 0 if none did
    """
    spoken = sorted((end.last_words.time, end.rank, end.last_words) for end in ends if end.last_words)
    causes = [(rank, words) for _, rank, words in spoken if not words.lost_others]
    if causes:
        _end_like(*causes[0], n, asked)
    # The agent ends the other processes with SIGTERM or SIGINT, so these two are not the cause.
    killed = [end for end in ends if end.exit_code < 0 and -end.exit_code not in (signal.SIGTERM, signal.SIGINT)]
    for end in killed[:1]:
        memory = "; did the machine run out of memory?" if -end.exit_code == signal.SIGKILL else ""
        _say(f"process {end.rank} of {n} was killed by {signal.Signals(-end.exit_code).name}{memory}")
        sys.exit(1)  # the others only say that they have lost it
    for end in (end for end in ends if end.exit_code > 0 and not end.last_words):
        if end.exit_code != UserError.code:  # else it could not write its report, and has said its one line itself
            _say(f"process {end.rank} of {n} ended with exit code {end.exit_code}; its own output is above")
        sys.exit(end.exit_code)
    if spoken:
        _end_like(*spoken[0][1:], n, asked)
    if asked:
        _end_by(asked)
    _say(f"a process of {n} was ended by a signal")
    sys.exit(1)


def _end_like(rank: int, words: _LastWords, n: int, asked: int) -> NoReturn:
    if words.kind == "mistake":
        error = UserError(words.message)
        error.add_note(f"in process {rank} of {n}:\n{words.traceback}")  # shown with HYDRA_FULL_ERROR=1
        raise error
    if words.kind == "interrupt":
        _end_by(asked or signal.SIGINT)
    if words.kind == "stopped":
        raise stopping.stopped_by(asked or PASSED_ON, words.message)
    if words.kind == "bug":
        _say(f"process {rank} of {n} failed:\n{words.traceback}")
    elif words.message:
        _say(words.message)
    sys.exit(words.code)


def _say(text: str) -> None:
    sys.stdout.flush()
    print(text.rstrip(), file=sys.stderr, flush=True)


#### IN A WORKER PROCESS


def _work(work: bytes, folder: str, held: Lock | None) -> None:
    """Run the function in a worker process, and write an error report if it fails.

    held: a lock that this process has, as long as it lives, by having been started with it
    """
    threading.Thread(target=_end_with_the_launcher, args=(folder,), daemon=True).start()
    faulthandler.enable()  # prints the Python stack on a crash in native code
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is a semaphore, which would leak in `_give_up`
    try:
        stopping.launcher_folder = folder
        _let_signals_in()
        function, args = pickle.loads(work)
        with distributed.group():
            try:
                function(*args)
            except BaseException as error:
                # Give up before leaving the group: leaving may wait for other ranks, which may wait in a collective.
                _give_up(error, folder)
    except BaseException as error:
        _give_up(error, folder)


def _end_with_the_launcher(folder: str) -> None:
    """End this process when the launcher ends, even in the middle of a collective.

    A launcher that was killed can neither end its processes nor remove its folder.
    """
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    with suppress(OSError):
        scratch.remove(folder)
    os._exit(1)


def _let_signals_in() -> None:
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt_once)
    signal.signal(PASSED_ON, _interrupt_once)  # until the function installs a handler
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, PASSED_ON))


def _interrupt_once(number: int, frame: Any) -> NoReturn:
    """Raise KeyboardInterrupt, once. Ctrl-C arrives twice, from the terminal and from the launcher.

    The second signal must not interrupt the cleanup.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _give_up(error: BaseException, folder: str) -> None:
    """Write the error report for the launcher, and exit without printing anything.

    If every process printed its error, the user would see it once per process.
    """
    words = _last_words(error)
    if not words.code:  # sys.exit(): a normal end, which the agent waits for
        return
    path = os.path.join(folder, f"last_words-{os.environ['RANK']}")
    try:
        with finished(path) as unfinished, open(unfinished, "w") as file:
            json.dump(words._asdict(), file)
    except OSError:
        if os.path.isdir(folder):  # else the launcher is gone; here the disk of its folder is full as well
            with suppress(OSError):
                _say(f"error: {secrets.redact(words.message)}" if words.kind == "mistake" else words.traceback)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(words.code)


def _last_words(error: BaseException) -> _LastWords:
    kind, code, message = "bug", 1, str(error)
    mistake = error if isinstance(error, UserError) else disk_full(error)
    if mistake:
        kind, code, message = "mistake", mistake.code, str(mistake)
    elif isinstance(error, Stopped):
        kind, code = "stopped", error.code
    elif isinstance(error, BrokenPipeError):
        kind, code, message = "exit", 128 + signal.SIGPIPE, ""
    elif isinstance(error, KeyboardInterrupt):
        kind, code = "interrupt", 130
    elif isinstance(error, SystemExit):
        kind = "exit"
        if error.code is None or isinstance(error.code, int):
            code, message = error.code or 0, ""
    text = "".join(traceback.format_exception(error))
    return _LastWords(time.time(), kind, code, message, text, _lost_others(error))


def _lost_others(error: BaseException) -> bool:
    return any(
        isinstance(cause, dist.DistError) or re.search("Connection (closed|reset) by peer", str(cause))
        for cause in causes(error)
    )
