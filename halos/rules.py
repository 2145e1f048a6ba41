"""Rules for values of the config: what a value must be, in words and as a test.

`halos/config.py` states the rules of the keys that every run has; a trainer states those of its own hyperparameters:

    class DPOTrainer(PairedPreferenceTrainer):
        rules = {"beta": rules.number(above=0)}
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

NAME_MAX, PATH_MAX = 255, 3800  # bytes that file systems allow for one name, and for a path with what we put behind it


@dataclass(frozen=True)
class Rule:
    expected: str  # completes "beta=-5 must be ..."
    allows: Callable[[Any], bool]

    def or_null(self) -> "Rule":
        comma = "," if " " in self.expected else ""
        return Rule(f"{self.expected}{comma} or null", lambda x: x is None or self.allows(x))


def number(*, above: float | None = None, least: float | None = None, most: float | None = None) -> Rule:
    """A finite number, within these limits."""
    return _number("a number", is_number, above, least, most)


def whole(*, least: int | None = None) -> Rule:
    """A whole number, of at least `least`."""
    return _number("a whole number", is_whole, None, least, None)


def choice(*values: Any) -> Rule:
    """One of several values."""
    shown = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    return Rule(
        f"{', '.join(shown[:-1])} or {shown[-1]}",
        lambda x: any(type(x) is type(value) and x == value for value in values),  # True == 1, but is another value
    )


def is_number(x: Any) -> bool:
    """A number that is finite."""
    return isinstance(x, int | float) and not isinstance(x, bool) and not is_too_large(x) and math.isfinite(x)


def is_too_large(x: Any) -> bool:
    """A whole number that has no place in 64 bits."""
    return isinstance(x, int) and abs(x) >= 2**63


def is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def is_text(x: Any) -> TypeGuard[str]:
    return isinstance(x, str) and bool(x.strip())


def is_writable(text: str) -> bool:
    """Return False for text that no file can hold: NUL and other control characters, half a surrogate pair."""
    return not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", text)


def problem_of_path(path: str, spare: int = 0) -> str | None:
    """Say why no file can have this path. spare: bytes that endings add to the last part"""
    if not is_writable(path) or re.search(r"[\t\r\n]", path):
        return "has control characters"
    longest = max(len(part.encode()) for part in path.split("/")) + spare
    if longest > NAME_MAX or len(path.encode()) > PATH_MAX:
        return f"is too long: a name has at most {NAME_MAX - spare} bytes, a path {PATH_MAX}"
    return None


def _number(
    noun: str, is_one: Callable[[Any], bool], above: float | None, least: float | None, most: float | None
) -> Rule:
    if least is not None and most is not None:
        words = f" from {least:g} to {most:g}"
    else:
        limits = [("above", above), ("of at least", least), ("at most", most)]
        words = " " + " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)

    def allows(x: Any) -> bool:
        if not is_one(x):
            return False
        return (above is None or x > above) and (least is None or x >= least) and (most is None or x <= most)

    return Rule((noun + words).rstrip(), allows)


flag = Rule("true or false", lambda x: isinstance(x, bool))
text = Rule("text", is_text)
names = Rule(
    "a list of names, such as [q_proj,v_proj]", lambda x: isinstance(x, list) and bool(x) and all(map(is_text, x))
)
