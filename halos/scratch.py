"""The launcher's temporary folder and the semaphores of its processes.

A launcher that is killed together with its processes can remove neither. So they bear a name that the next start finds,
and a lock that tells it whether the launcher lives.
"""

import glob
import multiprocessing
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from halos import locks

PREFIX = "halos-launch-"
SEMAPHORES = "/dev/shm"


@contextmanager
def folder() -> Iterator[str]:
    """Yield a temporary folder. Semaphores for processes that are spawned in the block bear its name."""
    _remove_leftovers()
    name = PREFIX + uuid.uuid4().hex[:12]
    path = os.path.join(tempfile.gettempdir(), name)
    # Private, because multiprocessing has no public way to name a semaphore. Processes inherit it.
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    before = settings["semprefix"]
    with locks.take(path):
        os.mkdir(path, 0o700)
        settings["semprefix"] = f"/{name}"
        try:
            yield path
        finally:
            settings["semprefix"] = before
            shutil.rmtree(path, ignore_errors=True)


def remove(path: str) -> None:
    """Remove the folder of a launcher that is dead, with its semaphores and the file of its lock."""
    shutil.rmtree(path, ignore_errors=True)
    for file in (*glob.glob(f"{SEMAPHORES}/sem.{os.path.basename(path)}-*"), locks.lock_file(path)):
        with suppress(FileNotFoundError):
            os.remove(file)


def _remove_leftovers() -> None:
    """Remove what launchers that are dead have left on this machine."""
    directory = tempfile.gettempdir()
    names = {name.removeprefix(".").removesuffix(".lock") for name in os.listdir(directory)}
    for path in [os.path.join(directory, name) for name in names if name.startswith(PREFIX)]:
        # Those of other users can neither be opened nor removed.
        with suppress(locks.Held, OSError):
            if not locks.holder(path):
                with locks.take(path):
                    remove(path)
