"""Small helpers that a loss, a loader, or an entry point may want."""

import os


def rank0_print(*args, **kwargs) -> None:
    """print() for people: only the first process of a run speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(*args, flush=True, **kwargs)
