"""Locks between processes, so that one writes at a time.

The lock of a path is on the file `.NAME.lock` beside it, so the path itself can be renamed while it is locked. The
kernel holds the lock for as long as a process has the file open, and releases it however the process ends. The file
says who has the lock, for messages only.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any

from halos.files import writing

PATIENCE = 1.0  # seconds to wait for a lock whose holder may be about to end
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class Held(Exception):  # noqa: N818  it says what is the case, and callers explain what is wrong with it
    """Another process has the lock. The text says which one."""


class Lock:
    """A lock that this process has, until `release` or its end. A process that is spawned with it has it as well."""

    def __init__(self, descriptor: int, name: str | None = None):
        self.descriptor = descriptor
        self.name = name  # of its file, which is removed at the end; None: another process may have the lock as well

    def release(self) -> None:
        if self.name and is_file_of(self.descriptor, self.name):
            os.remove(self.name)
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor, self.name = -1, None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __reduce__(self):
        self.name = None
        return _inherited, (DupFd(self.descriptor),)


def _inherited(duplicate: Any) -> Lock:
    return Lock(duplicate.detach())


def lock_file(path: str) -> str:
    """Return the file of the lock of `path`. It is the same for every way to write the path of its directory."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), f".{name}.lock")


def take(path: str, on_wait: Callable[[str], None] | None = None) -> Lock:
    """Take the lock of `path`, whose directory is made if it does not exist. Raises Held if another process has it.

    on_wait: wait for the lock as long as it takes, and first call this with who has it
    """
    name = lock_file(path)
    os.makedirs(os.path.dirname(name), exist_ok=True)
    lock = Lock(os.open(name, os.O_RDWR | os.O_CREAT, 0o666))
    try:
        if not _try(lock, name, 0 if on_wait else PATIENCE):
            if on_wait is None:
                raise Held(_holder(name))
            on_wait(_holder(name))
            fcntl.flock(lock.descriptor, fcntl.LOCK_EX)
        if not is_file_of(lock.descriptor, name):  # who had it has removed its file
            lock.release()
            return take(path, on_wait)
        who = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(lock.descriptor, 0)
        with writing(name):
            os.pwrite(lock.descriptor, json.dumps(who).encode(), 0)
        lock.name = name
    except BaseException:
        lock.release()
        raise
    return lock


def is_file_of(descriptor: int, path: str) -> bool:
    """Return whether an open file is the one that the path names now: it may have been removed or renamed."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def holder(path: str) -> str | None:
    """Return who has the lock of `path`; None if nobody has it."""
    name = lock_file(path)
    if not os.path.isfile(name):
        return None
    with Lock(os.open(name, os.O_RDWR)) as lock:
        return None if _try(lock, name, patience=0) else _holder(name)


def _try(lock: Lock, name: str, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            reason = f"the file system of {name} has no locks ({error.strerror})"
            print(f"warning: {reason}; see to it that no other process writes there", file=sys.stderr, flush=True)
            return True


def _holder(name: str) -> str:
    try:
        with open(name, encoding="utf-8") as file:
            who = json.load(file)
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
