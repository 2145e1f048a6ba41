"""Run commands of the project in forked children of a process that has imported everything, and see how they end."""

import fcntl
import io
import mmap
import os
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

PIPE_SIZE = 1 << 20  # bytes that a child can write before somebody reads them
LIMIT = 60.0  # seconds after which a command hangs


@dataclass
class Ended:
    """How a command ended. code: negative if a signal ended it"""

    code: int
    out: str
    err: str
    hung: bool = False

    @property
    def says_one_line(self) -> bool:
        return len(self.err_lines) == 1 and self.err_lines[0].startswith("error:")

    @property
    def err_lines(self) -> list[str]:
        """The lines of stderr without progress bars and warnings."""
        lines = self.err.replace("\r", "\n").split("\n")
        noise = ("%|", "/s]", "?it", "ex/s", "call/s", "it/s")
        return [
            line
            for line in lines
            if line.strip(" \x1b[A") and not any(mark in line for mark in noise) and not line.startswith("warning:")
        ]


@dataclass
class Child:
    """A command that runs. Its process group is its own, so that all of its processes can be killed."""

    pid: int
    words: list[str]
    pipes: tuple[int, int]
    started: float = field(default_factory=time.monotonic)
    status: int | None = None

    def is_alive(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is None

    def kill(self, number: int = signal.SIGKILL, group: bool = False) -> None:
        if self.is_alive():
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, limit: float = LIMIT) -> Ended:
        """Wait for the end; a command that takes longer than `limit` seconds hangs, and is killed."""
        descriptor = os.pidfd_open(self.pid) if self.status is None else -1
        try:
            ready = descriptor < 0 or bool(select.select([descriptor], [], [], limit)[0])
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        if not ready:
            os.killpg(self.pid, signal.SIGKILL)
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]
        out, err = (_drained(pipe) for pipe in self.pipes)
        return Ended(os.waitstatus_to_exitcode(self.status), out, err, hung=not ready)


def start(program: Callable[[], None], words: list[str], folder: str, prepare: Callable[[], None] | None = None):
    """Start `program` with `words` as its command line and `folder` as its working directory.

    prepare: called in the child before the program
    """
    pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(2)]
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _be_the_command(program, words, folder, prepare, [write for _, write in pipes])
    for read, write in pipes:
        os.close(write)
        os.set_blocking(read, False)
    return Child(pid, words, (pipes[0][0], pipes[1][0]))


def run(program, words: list[str], folder: str, prepare=None, limit: float = LIMIT) -> Ended:
    return start(program, words, folder, prepare).wait(limit)


def _be_the_command(program, words, folder, prepare, pipes) -> None:
    """Run the program as a new interpreter would, without its imports."""
    code = 1
    try:
        os.setpgid(0, 0)
        for pipe, descriptor in zip(pipes, (1, 2), strict=True):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
            os.dup2(pipe, descriptor)
        sys.stdout, sys.stderr = (io.TextIOWrapper(open(n, "wb", 0), write_through=True) for n in (1, 2))
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        sys.argv = [program.__module__ + ".py", *words]
        if prepare:
            prepare()
        program()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.__excepthook__(*sys.exc_info())
    finally:
        threading._shutdown()  # threads that are not daemons are waited for
        os._exit(code)


def _drained(pipe: int) -> str:
    data = b""
    try:
        while block := os.read(pipe, PIPE_SIZE):
            data += block
    except BlockingIOError:
        pass  # a process of the command lives on
    finally:
        os.close(pipe)
    return data.decode("utf-8", "replace")


#### AT THE N-TH CHANGE OF A FILE

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree", "open")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Changes:
    """Counts the changes of files under `root` in a command, and acts at a given one, just before it happens.

    `prepare` is for `start`. The count is shared with the child.
    """

    def __init__(self, root: str, at: int = -1, action: Callable[[], None] = lambda: None, within: str = ""):
        self.root = os.path.realpath(root)
        self.at = at
        self.action = action
        self.within = within  # count only paths that contain this
        self.shared = mmap.mmap(-1, 8)

    @property
    def count(self) -> int:
        return struct.unpack("q", self.shared[:8])[0]

    def prepare(self) -> None:
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple) -> None:
        if event in CHANGES and self._is_ours(event, args):
            before = self.add()
            if before == self.at:
                self.action()

    def add(self, n: int = 1) -> int:
        """Add to the count. Returns what it was before."""
        before = self.count
        self.shared[:8] = struct.pack("q", before + n)
        return before

    def _is_ours(self, event: str, args: tuple) -> bool:
        path = args[0]
        if not isinstance(path, str | bytes) or (event == "open" and not (args[2] or 0) & WRITES):
            return False
        path = os.path.abspath(os.fsdecode(path))
        return path.startswith(self.root) and self.within in path


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
