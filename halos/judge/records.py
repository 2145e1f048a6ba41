"""Lines of the journal: which fields each kind has, of which type, and in which range.

A line is used only if `problem_with` finds nothing. Fields that nothing is computed from are not checked, and fields of
later versions are allowed.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from halos.judge.completions import is_count

KINDS = ("sent", "got", "error", "verdict")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_usage(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(is_count, value)))


# kind -> field -> (what it must be, in words and as a check); a field with a question mark may be null or absent
Check = tuple[str, Callable[[Any], bool]]
KEY: Check = ("a key", lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{32}", value)))
TEXT: Check = ("a text", _is_text)
BOOL: Check = ("true or false", _is_bool)
FIELDS: dict[str, dict[str, Check]] = {
    "sent": {"attempt?": ("a positive number", lambda n: _is_number(n) and n >= 1)},
    "got": {
        "text": TEXT,
        "usage": ("null or two numbers of tokens", _is_usage),
        "latency": ("a number of seconds", lambda n: _is_number(n) and n >= 0),
        "id?": TEXT,
        "finish?": TEXT,
        "p_first?": ("between 0 and 1", _is_share),
        "broken": BOOL,
        "note?": TEXT,
    },
    "error": {"reason": TEXT, "billed": BOOL},
    "verdict": {"score?": ("between 0 and 1", _is_share), "failed?": TEXT, "final?": BOOL},
}


def kind_of(record: dict) -> str:
    return next(kind for kind in KINDS if kind in record)


def problem_with(record: Any) -> str | None:
    """Say what is wrong with a line of the journal; None if it can be used."""
    if not isinstance(record, dict):
        return "not an object"
    kinds = [kind for kind in KINDS if kind in record]
    if len(kinds) != 1:
        return f"not one of {', '.join(KINDS)}"
    (kind,) = kinds
    for field, (wanted, fits) in {kind: KEY, **FIELDS[kind]}.items():
        name = field.removesuffix("?")
        if name != field and record.get(name) is None:
            continue
        if name not in record:
            return f"{name} is missing"
        if not fits(record[name]):
            return f"{name} is {_shown(record[name])}, not {wanted}"
    if kind == "verdict" and (record.get("score") is None) == (record.get("failed") is None):
        return "not one of score and failed"
    return None


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.30}"
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a value of type {type(value).__name__}"
