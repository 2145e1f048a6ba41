"""Write files that users keep.

A file or directory is written completely or not at all, also when the machine loses power: it is written beside its
place, flushed to the disk, and renamed. An existing file is renamed, not overwritten.
"""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from halos.errors import UserError, causes

UNFINISHED, OLD = ".unfinished", ".old"  # endings of what is to come, and of what was

# What file systems answer that cannot flush a directory. They flush it by themselves.
CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


@contextmanager
def finished(path: str) -> Iterator[str]:
    """Yield a temporary path in the same directory, and rename it to `path` when the block ends.

    If the block fails, the temporary file is removed.
    """
    unfinished = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}{UNFINISHED}")
    try:
        with writing(path):
            yield unfinished
            sync(unfinished)
            os.replace(unfinished, path)
            sync(os.path.dirname(path) or ".")
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Name the path in an error of the operating system that names none, such as that of a write to a full disk.

    The error of safetensors, which has the number of such an error in its text only, becomes an OSError.
    """
    try:
        yield
    except Exception as error:
        for cause in causes(error):
            if isinstance(cause, OSError) and cause.errno and cause.filename is None:
                cause.filename = path
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), path) from error
        raise


def sync(path: str) -> None:
    """Flush a file or a directory to the disk. What a directory holds are names: files have to be flushed as well."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (os.path.isdir(path) and error.errno in CANNOT_SYNC):
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: str) -> None:
    """Flush a directory with everything under it."""
    for path, _, names in os.walk(directory):
        for name in names:
            sync(os.path.join(path, name))
        sync(path)


def replace_directory(new: str, directory: str) -> None:
    """Replace `directory` with `new`. Between the two renames the old directory is at `{directory}.old`.

    new: `{directory}.unfinished`, so that `finish_replacement` finds it if this process is killed
    """
    sync_tree(new)
    old = directory + OLD
    if os.path.exists(directory):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(directory, old)
    os.rename(new, directory)
    sync(os.path.dirname(directory) or ".")
    shutil.rmtree(old, ignore_errors=True)


def finish_replacement(directory: str, is_complete: Callable[[str], bool]) -> None:
    """Do what `replace_directory` would have done next when its process was killed, and remove what it left.

    is_complete: whether a directory was written to its end
    """
    new, old = directory + UNFINISHED, directory + OLD
    if not os.path.lexists(directory):
        source = new if is_complete(new) else old
        if os.path.isdir(source):
            os.rename(source, directory)
            sync(os.path.dirname(directory) or ".")
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)


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
