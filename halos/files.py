"""Write files that users keep.

A file is written completely or not at all. An existing file is renamed, not overwritten.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from halos.errors import UserError


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


def require_writable(directory: str, key: str) -> None:
    """Raise UserError if no file can be made in a directory. Where it does not exist yet, its parent is tried.

    key: where the directory was configured
    """
    place = os.path.abspath(directory)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    try:  # really, since os.access allows root everything
        with tempfile.TemporaryFile(dir=place):
            return
    except NotADirectoryError:
        reason = "is not a directory"
    except OSError as error:
        reason = f"may not be written ({error.strerror})"
    raise UserError(f"{key}={directory} cannot be used, since {place} {reason}; use another {key}=DIR")


def require_file(path: str, key: str) -> None:
    """Raise UserError if `path` cannot become a file: its directory, what is there now, and its name."""
    require_writable(os.path.dirname(path) or ".", key)
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{key}={path} is not a file, but a directory or a device; give the path of a file")
