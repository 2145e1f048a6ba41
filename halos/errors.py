"""UserError, for a user's mistake or a full disk: one line with the value, the reason and the remedy. And Stopped."""

import difflib
import errno
from collections.abc import Iterable, Iterator

MOST = 50  # names that a message lists


class UserError(ValueError):
    """A mistake in the user's command, config, or data. Entry points print only the message, and exit with code 2."""

    code = 2


class Stopped(Exception):
    """A run that a signal has asked to end early. Its state is saved. Entry points print only the message."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, or the largest size of a file


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, the one it was raised from or while handling, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def disk_full(error: BaseException) -> UserError | None:
    """Return what to tell the user if the error comes from a full disk; else None."""
    found = [cause for cause in causes(error) if isinstance(cause, OSError) and cause.errno in FULL]
    if not found:
        return None
    first = next((cause for cause in found if cause.filename), found[0])
    return UserError(
        f"{first.filename or 'a file'} cannot be written: {first.strerror}; what was written before is whole, "
        "so make room there and run the command again"
    )


def did_you_mean(name: str, known: Iterable[str], list_all: bool = True) -> str:
    """Return the remedy for an unknown name: the nearest known name, and the list of all known names.

    >>> did_you_mean("kot", ["dpo", "kto"])
    "did you mean 'kto'? (one of: dpo, kto)"
    """
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    parts = [f"did you mean {nearest[0]!r}?"] if nearest else []
    if list_all or not nearest:
        more = f", and {len(known) - MOST} more" if len(known) > MOST else ""
        listing = f"one of: {', '.join(known[:MOST])}{more}"
        parts.append(f"({listing})" if nearest else f"choose {listing}")
    return " ".join(parts)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
