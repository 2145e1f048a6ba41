"""The launcher's watch over its processes: which they are, and the signals that it passes on to them."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException

from halos import stopping

AT_ONCE = (signal.SIGHUP, signal.SIGQUIT)  # end the run at once
PASSED_ON = signal.SIGUSR1  # what every process gets for the first of stopping.REQUESTS; a second one ends the run


class Watch:
    """The processes of a run, in rank order, and the signal by which this launcher was asked to stop them."""

    def __init__(self, n: int, folder: str):
        self.n = n
        self.folder = folder
        self.processes: list[BaseProcess] = []
        self.asked = 0
        self.asked_at = 0.0
        self.others = set(multiprocessing.active_children())

    def look(self, done: threading.Event) -> None:
        while not done.wait(0.05):
            if len(self.processes) < self.n:
                found = [process for process in multiprocessing.active_children() if process not in self.others]
                self.processes[:] = sorted(found, key=lambda process: int(process.name.rpartition("-")[2]))

    def pass_on(self, number: int, frame: Any) -> None:
        """Ask processes that train to stop: they finish their step and save. End others, and all at a second signal."""
        is_second = self.asked and time.monotonic() - self.asked_at > stopping.ECHO
        trains = stopping.is_announced(self.folder)
        if not self.asked:
            self.asked, self.asked_at = number, time.monotonic()
        elif not is_second:
            return
        if is_second or not (trains or number == PASSED_ON):  # torch's agent ends them
            raise SignalException("stopped", signal.SIGTERM if is_second else signal.Signals(number))
        for process in self.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, PASSED_ON)


@contextmanager
def watched(n: int, folder: str) -> Iterator[Watch]:
    """Watch the processes that are started in the block, and pass requests to stop on to them.

    Signals are blocked in a new process while it imports, because they would print a traceback or kill it; `launch`
    unblocks them. The launcher's main thread blocks them too; the thread that looks for new processes receives them.
    The agent changes signal handlers; all are restored at the end.
    """
    watch, done = Watch(n, folder), threading.Event()
    before = {number: signal.getsignal(number) for number in (*AT_ONCE, *stopping.REQUESTS)}
    thread = threading.Thread(target=watch.look, args=(done,), daemon=True)
    thread.start()
    resource_tracker.ensure_running()  # else the first process starts it, and starting it unblocks SIGINT
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, PASSED_ON))
    for number in stopping.REQUESTS:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, watch.pass_on)
    try:
        yield watch
    finally:
        done.set()
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
