"""How the threads of OpenMP wait for each other. It must be set before torch is imported, so halos/__init__.py does it.

A thread that waits at a barrier spins, and libgomp lets it spin for some milliseconds. If another process needs the
core meanwhile, it is held up, and so is the thread that everybody waits for: two training processes on two cores then
run at a seventh of their speed each, instead of half. A short spin ends in sleep, and gives the core away.
"""

import os

SPINS = "1000"  # of the loop in libgomp, some tens of microseconds
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # of the user: nothing is changed if one is set


def spin_briefly() -> None:
    """Let waiting threads sleep soon, in this process and those that it starts, unless the user has decided."""
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPINS
