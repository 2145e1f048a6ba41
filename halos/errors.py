"""UserError, for a user's mistake: one line with the value, the reason and the remedy."""

import difflib
from collections.abc import Iterable

MOST = 50  # names that a message lists


class UserError(ValueError):
    """A mistake in the user's command, config, or data. Entry points print only the message, and exit with code 2."""

    code = 2


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
