"""Files that people keep: written whole or not at all, and never over one another."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def finished(path: str) -> Iterator[str]:
    """A name to write to, in the same directory, that becomes `path` once the block is through; removed if it fails."""
    unfinished = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def set_aside(path: str) -> str | None:
    """Rename what stands at `path` to the first free `path.bak-N` and return that name; None if nothing was there.

    Every overwrite that a user asks for happens this way: what they made is moved, never deleted.
    """
    if not os.path.lexists(path):
        return None
    number = 1
    while os.path.lexists(f"{path}.bak-{number}"):
        number += 1
    os.rename(path, f"{path}.bak-{number}")
    return f"{path}.bak-{number}"


def make_room(path: str) -> None:
    """`set_aside`, and say so."""
    previous = set_aside(path)
    if previous:
        print(f"the earlier {path} is now {previous}")
