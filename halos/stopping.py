"""Signals that ask a run to stop: it finishes its step, saves its state, and ends with an exit code of its own."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from halos import distributed
from halos.errors import Stopped

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REQUEUE = 75  # exit code of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h
# Ctrl-C reaches a process of torchrun twice, from the terminal and from torchrun: within these seconds, one request.
ECHO = 1.0


def stopped_by(number: int, message: str) -> Stopped:
    """The end of a run by a signal. SIGUSR1, by which a cluster announces the end of its time, has REQUEUE as its code;
    the others have the usual ones, so that a job which was cancelled is not started again."""
    return Stopped(message, REQUEUE if number == signal.SIGUSR1 else 128 + number)


# The folder of the launcher that started this process. Such a process hears of all requests by SIGUSR1, and ignores
# Ctrl-C, which the terminal sends to every process.
launcher_folder: str | None = None


def is_announced(folder: str) -> bool:
    """Return whether a process of the launcher with this folder is in a StopRequest."""
    return os.path.exists(os.path.join(folder, "stops_when_asked"))


class StopRequest:
    """Keeps the first SIGINT, SIGTERM or SIGUSR1 in `signal`, 0 before. A second one ends the process at once.

    Use it as a context; the handlers before are restored at its end. An ignored signal stays ignored, as with nohup.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.received_at = 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number, handler in self.handlers().items():
                self.before[number] = signal.signal(number, handler)
        if launcher_folder:
            open(os.path.join(launcher_folder, "stops_when_asked"), "w").close()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handlers(self) -> dict[int, Any]:
        if launcher_folder:
            return {signal.SIGUSR1: self.handle, signal.SIGINT: signal.SIG_IGN}
        return {number: self.handle for number in REQUESTS if signal.getsignal(number) != signal.SIG_IGN}

    def handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self.received_at = number, now
            if distributed.is_main():
                print("\nthe run stops after this step and saves; a second signal ends it at once", flush=True)
        elif now - self.received_at > ECHO:
            os._exit(128 + number)  # not by an exception: a state that is being written would be waited for
