"""Functions that run in the processes of tests/test_launch.py. This file imports little, since every process does it.

`python launch_workers.py N FUNCTION FOLDER ...` launches functions of this file one after the other, each in N
processes, as a command of the project would. N is 0 if another launcher has started this process.
"""

import json
import multiprocessing
import os
import signal
import sys
import time

import torch

from halos import distributed
from halos.errors import UserError
from halos.launch import launch

FOREVER = 600  # seconds; longer than any test waits


def leave(folder: str, name: str, **facts) -> None:
    """Write facts about this process to a file in the folder. The file appears only when it is complete."""
    path = os.path.join(folder, f"{name}-{os.environ.get('RANK', 'none')}")
    with open(path + ".unfinished", "w") as file:
        json.dump({"pid": os.getpid(), **facts}, file)
    os.rename(path + ".unfinished", path)


def say_who(folder: str) -> None:
    """Report the rank of this process, what it gathers from the others, and the signals that the launcher passes on."""
    signals = []
    started_by_launch = multiprocessing.parent_process() is not None
    if started_by_launch:
        signal.signal(signal.SIGUSR1, lambda number, frame: signals.append(number))
    n, rank = distributed.world_size(), distributed.rank()
    ranks = distributed.gather_rows([torch.tensor([rank + 0.5])], [torch.tensor([rank])], n)
    if started_by_launch:
        if rank == 0:
            os.kill(os.getppid(), signal.SIGUSR1)
        wait_until(lambda: signals)
    for stream, does in (sys.stdout, "writes"), (sys.stderr, "warns"):
        stream.write(f"process {rank} {does}\n")  # in one call, because print may write in several
        stream.flush()
    leave(
        folder,
        "who",
        rank=rank,
        world_size=n,
        local_rank=distributed.local_rank(),
        local_world_size=distributed.local_world_size(),
        ranks=ranks.tolist(),
        threads=torch.get_num_threads(),
        signals=signals,
    )


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def fail(folder: str, how: str, everyone: bool = False) -> None:
    """Fail in process 1, or in all; the others wait in a collective, and raise a ValueError when it breaks."""
    distributed.barrier()
    if everyone or distributed.rank() == 1:
        leave(folder, "failed")
        FAILURES[how]()
    try:
        distributed.gather_rows([torch.ones(1)], [torch.tensor([0])], 2)
    except RuntimeError as error:
        leave(folder, "noticed", message=str(error))
        raise ValueError("the others are lost") from error


def bug() -> None:
    raise ValueError("a bug of process 1")


def mistake() -> None:
    raise UserError("lr=-1 is negative;\nuse a positive one")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash() -> None:
    """Crash as a bug in native code does."""
    os.kill(os.getpid(), signal.SIGSEGV)


def end_silently() -> None:
    os._exit(7)


FAILURES = {
    "bug": bug,
    "mistake": mistake,
    "killed": be_killed,
    "crash": crash,
    "silent": end_silently,
    "exit": lambda: sys.exit(3),
    "exit with words": lambda: sys.exit("enough"),
    "exit without code": lambda: sys.exit(),
}


def come(folder: str) -> None:
    leave(folder, "came")


def wait(folder: str) -> None:
    """Wait: process 0 in a collective for the others, and the others for a signal."""
    distributed.barrier()
    leave(folder, "waits")
    try:
        if distributed.rank() == 0:
            distributed.barrier()
        time.sleep(FOREVER)
    finally:
        time.sleep(0.5)
        leave(folder, "tidied")


def wait_stubbornly(folder: str) -> None:
    """Ignore all requests to stop, so that only SIGKILL ends this process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    leave(folder, "waits")
    time.sleep(FOREVER)


def main() -> None:
    from halos.commands import report_user_errors

    n, *words = sys.argv[1:]
    import launch_workers

    with report_user_errors():
        for name, folder in zip(words[::2], words[1::2], strict=True):
            launch(getattr(launch_workers, name), folder, nproc_per_node=int(n) or None)


if __name__ == "__main__":
    main()
else:
    # For tests of signals that arrive while a process is still importing.
    if os.environ.get("LAUNCH_WORKERS_IMPORT_UNTIL") and "RANK" in os.environ:
        leave(os.path.dirname(os.environ["LAUNCH_WORKERS_IMPORT_UNTIL"]), "imports")
        wait_until(lambda: os.path.exists(os.environ["LAUNCH_WORKERS_IMPORT_UNTIL"]))
