"""UserError, for a user's mistake: one line with the value, the reason and the remedy. Stopped, for a run that ends."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the user's command, config, or data. Entry points print only the message, and exit with code 2."""

    code = 2


class Stopped(Exception):
    """A run that a signal has asked to end early. Its state is saved. Entry points print only the message."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def did_you_mean(name: str, known: Iterable[str], list_all: bool = True) -> str:
    """Return the remedy for an unknown name: the nearest known name, and the list of all known names.

    >>> did_you_mean("kot", ["dpo", "kto"])
    "did you mean 'kto'? (one of: dpo, kto)"
    """
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    parts = [f"did you mean {nearest[0]!r}?"] if nearest else []
    if list_all or not nearest:
        listing = f"one of: {', '.join(known)}"
        parts.append(f"({listing})" if nearest else f"choose {listing}")
    return " ".join(parts)
