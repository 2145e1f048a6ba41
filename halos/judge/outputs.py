"""The files that a comparison leaves: checked before anything is paid for, written whole, and nothing of a user's lost.

A file is written beside its place and then moved there; an earlier one is renamed. A device or a pipe, as /dev/stdout
or >(gzip > x), is written to directly, and never moved or replaced.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from halos.errors import UserError
from halos.files import finished, make_room
from halos.judge.settings import Settings

FLAGS = ("results_file", "verdicts", "plot", "report", "export_feedback")
LONGEST_NAME = 240  # bytes; file systems take 255, and an unfinished or earlier file has a longer name


def is_device(path: str) -> bool:
    """Return whether a path is there and no file or directory: a device, a pipe, or a link to what a process has open.

    /dev/stdout leads to a file if the output was sent to one; the link itself must stay all the same.
    """
    if not os.path.exists(path) or os.path.isdir(path):
        return False
    is_link_of_system = os.path.islink(path) and os.path.abspath(path).startswith(("/dev/", "/proc/"))
    return is_link_of_system or not os.path.isfile(path)


@contextmanager
def written(path: str) -> Iterator[str]:
    """Yield a path to write to; the file is at `path` when the block ends, and an earlier one has another name.

    Raises UserError if the block cannot write.
    """
    try:
        if is_device(path):
            yield path
        else:
            with finished(path) as unfinished:
                yield unfinished
                make_room(path)
    except OSError as error:
        raise _unwritten(path, error) from error


def append(path: str, text: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: str, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"{path} cannot be written ({reason}); run again with another path: the verdicts are kept")


#### BEFORE ANYTHING IS PAID FOR


def check_paths(settings: Settings) -> None:
    """Raise UserError if a file that the settings name cannot be written, or is one that they name already."""
    inputs = [settings.file, settings.file2, settings.template, *settings.length_anchor]
    taken = {_place(path): path for path in inputs if path and os.path.exists(path)}
    for flag in FLAGS:
        path = getattr(settings, flag)
        if path is None:
            continue
        _check_path(f"--{flag} {path}", path)
        if is_device(path):
            continue
        if other := taken.get(_place(path)):
            raise UserError(f"--{flag} {path} is {other}, which this command has another use for; give another path")
        if os.path.dirname(_place(path)) == _place(settings.journal_directory):
            raise UserError(f"--{flag} {path} is in the directory of the journal; give another path")
        taken[_place(path)] = f"another output, {path}"


def _place(path: str) -> str:
    return os.path.realpath(path)


def _check_path(flag: str, path: str) -> None:
    directory = os.path.dirname(path) or "."
    if len(os.fsencode(os.path.basename(path))) > LONGEST_NAME:
        raise UserError(f"{flag}: a name of more than {LONGEST_NAME} bytes; give a shorter one")
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: {error.strerror}; give a path that can be written") from error
    is_there = os.path.exists(path)
    if os.path.isdir(path) or not os.path.basename(path) or not os.access(path if is_there else directory, os.W_OK):
        raise UserError(f"{flag} is not a file that can be written; give another path")
