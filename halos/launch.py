"""Starting the processes of a run on this machine, and making one end of theirs.

`launch` is torch's own elastic agent without restarts; what is added is who speaks when it fails: the process that
failed first, and it alone.
"""

import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import LaunchConfig, elastic_launch

from halos import distributed
from halos.errors import UserError


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
        raise UserError(f"nproc_per_node={nproc_per_node}, but {gpus} GPUs are visible; use nproc_per_node={gpus}")
    return nproc_per_node or gpus or 1


def _adopt_slurm_environment() -> None:
    """In one of several tasks that srun has started (and no torchrun within them), say so as torchrun would.

    The batch script itself is no such task, although most of SLURM's variables are set there, too.
    """
    slurm = os.environ
    if "RANK" in slurm or int(slurm.get("SLURM_STEP_NUM_TASKS", "1")) < 2 or "SLURM_PROCID" not in slurm:
        return
    n, nodes = int(slurm["SLURM_STEP_NUM_TASKS"]), int(slurm.get("SLURM_STEP_NUM_NODES", "1"))
    first = slurm.get("SLURM_STEP_NODELIST") or slurm.get("SLURM_JOB_NODELIST") or "localhost"
    if re.search(r"[\[,]", first):  # node[01-16]: SLURM's own tool knows how to read it
        first = subprocess.run(["scontrol", "show", "hostnames", first], capture_output=True, text=True).stdout.split()[
            0
        ]
    slurm["RANK"], slurm["WORLD_SIZE"] = slurm["SLURM_PROCID"], str(n)
    slurm["LOCAL_RANK"], slurm["LOCAL_WORLD_SIZE"] = slurm.get("SLURM_LOCALID", "0"), str(n // nodes)
    slurm.setdefault("MASTER_ADDR", first)
    # The same port in all tasks of a job, and different ones for jobs that share a node.
    slurm.setdefault("MASTER_PORT", str(20000 + int(slurm.get("SLURM_JOB_ID", "0")) % 20000))


#### THE LAUNCHER'S SIDE


def _run_processes(function: Callable, args: tuple, n: int) -> None:
    # Without this every process would start as many threads as there are cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n)))
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what there is to say is said here
    with tempfile.TemporaryDirectory() as folder, _signals():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=n,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port
            local_addr="localhost",
            run_id=uuid.uuid4().hex,
            max_restarts=0,
            shutdown_timeout=10,  # seconds that processes have to end before they are killed
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, _worker)(function, args, folder)
        except ChildFailedError as error:
            _report(error.failures, folder, n)
        except SignalException as stop:
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + stop.sigval)


@contextmanager
def _signals() -> Iterator[None]:
    """The agent takes over SIGINT, SIGTERM and others to end its workers; SIGUSR1 is passed on to them. Both are given
    back afterwards."""
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
    before = {name: signal.getsignal(name) for name in names}
    signal.signal(signal.SIGUSR1, _pass_on)
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _pass_on(number: int, frame: Any) -> None:
    for process in multiprocessing.active_children():
        if process.pid:
            os.kill(process.pid, number)


def _report(failures: dict[int, ProcessFailure], folder: str, n: int) -> NoReturn:
    """Say why the first process failed, and end as it did: a user's mistake in one line, a bug with its traceback."""
    records = sorted(_records(folder), key=lambda record: record["time"])
    noticed, failure = next(iter(failures.items()))
    if records and not records[0]["lost_others"] and failure.exitcode >= 0:
        first = records[0]
        if first["user_error"]:
            raise UserError(first["message"])
        _say(f"process {first['rank']} of {n} failed:\n{first['traceback']}")
    else:
        silent = sorted(set(range(n)) - {record["rank"] for record in records})
        who, how = (noticed, failure.exitcode) if failure.exitcode < 0 or not silent else (silent[0], 0)
        by = f" by {signal.Signals(-how).name}" if how < 0 else ""
        _say(f"process {who} of {n} was killed{by} and could not say why; did the machine run out of memory?")
        for record in records[:1]:
            _say(f"process {record['rank']} then failed:\n{record['traceback']}")
    sys.exit(1)


def _say(text: str) -> None:
    sys.stdout.flush()
    print(text.rstrip(), file=sys.stderr, flush=True)


def _records(folder: str) -> list[dict]:
    records = []
    for name in os.listdir(folder):
        if name.startswith("failure-"):
            with open(os.path.join(folder, name)) as file:
                records.append(json.load(file))
    return records


#### A PROCESS'S SIDE


def _worker(function: Callable, args: tuple, folder: str) -> None:
    try:
        with distributed.group():
            try:
                function(*args)
            except BaseException as error:
                # Here, and not after the group is left: that may wait for the others, who wait in a collective.
                _give_up(error, folder)
    except BaseException as error:
        _give_up(error, folder)


def _give_up(error: BaseException, folder: str) -> NoReturn:
    """Leave word for the launcher, and end without a word to people, who would hear it from every process."""
    code = 2 if isinstance(error, UserError) else 1
    if isinstance(error, KeyboardInterrupt):
        code = 130
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    else:
        _record(error, folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _record(error: BaseException, folder: str) -> None:
    rank = int(os.environ["RANK"])
    record = {
        "rank": rank,
        "time": time.time(),
        "user_error": isinstance(error, UserError),
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        # A connection that broke is not where the trouble began.
        "lost_others": isinstance(error, dist.DistError) or "Connection closed by peer" in str(error),
    }
    unfinished = os.path.join(folder, f"unfinished-{rank}")
    with open(unfinished, "w") as file:
        json.dump(record, file)
    os.rename(unfinished, os.path.join(folder, f"failure-{rank}"))
