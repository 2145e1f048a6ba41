"""Write files that users keep.

A file is written completely or not at all. An existing file is renamed, not overwritten.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def finished(path: str) -> Iterator[str]:
    """Yield a temporary path in the same directory, and rename it to `path` when the block ends.

    If the block fails, the temporary file is removed.
    """
    unfinished = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def set_aside(path: str) -> str | None:
    """Rename `path` to the first free `path.bak-N` and return that name. Return None if `path` does not exist.

    Every overwrite that a user asks for works this way: existing files are moved, never deleted.
    """
    if not os.path.lexists(path):
        return None
    number = 1
    while os.path.lexists(f"{path}.bak-{number}"):
        number += 1
    os.rename(path, f"{path}.bak-{number}")
    return f"{path}.bak-{number}"


def make_room(path: str) -> None:
    """Call `set_aside` and print the new name."""
    previous = set_aside(path)
    if previous:
        print(f"the earlier {path} is now {previous}")
