"""Measure the load of other processes, the memory of a process, and the rate of matrix products."""

import os
import resource
import time

from halos.errors import UserError

BUSY = 0.10  # share of all cores that others may use
PATIENCE = 30.0  # seconds to wait for a quiet machine


class OtherLoad:
    """Share of all cores that other processes have used since the start or the last call, from /proc/stat."""

    def __init__(self):
        self.before = _seconds()

    def __call__(self) -> float:
        before, self.before = self.before, _seconds()
        wall, busy, own = (now - then for now, then in zip(self.before, before, strict=True))
        return max(0.0, busy - own) / max(wall * (os.cpu_count() or 1), 1e-9)


def _seconds() -> tuple[float, float, float]:
    """Return (wall clock, CPU time of all processes, CPU time of this one), in seconds."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, file.readline().split()[1:])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    ticks = user + nice + system + irq + softirq + steal
    return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), usage.ru_utime + usage.ru_stime


def wait_until_quiet(patience: float = PATIENCE, busy: float = BUSY) -> None:
    """Raise UserError if other processes still use the machine after `patience` seconds."""
    if not os.path.exists("/proc/stat"):
        return
    deadline = time.monotonic() + patience
    while True:
        load = OtherLoad()
        time.sleep(1)
        used = load()
        if used <= busy:
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"other processes use {used:.0%} of this machine's cores, more than {busy:.0%}, so times would mean "
                "nothing; end them, or give --beside_other_work"
            )


def peak_memory(device) -> int:
    """Return the most bytes that this process has held: on a GPU its tensors, else everything."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
