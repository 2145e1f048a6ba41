"""What a user's mistake becomes: one line with the value, the reason, and the remedy, and exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user typed or supplied. Entry points show its message alone and exit with its code, 2."""

    code = 2


def did_you_mean(name: str, known: Iterable[str], list_all: bool = True) -> str:
    """The remedy in an error about an unknown name: the nearest known one, and the list of them all.

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
