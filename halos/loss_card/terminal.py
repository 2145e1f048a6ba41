"""The card of a loss as text: a line for each check, and under it what is wrong or why that is right."""

import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

from halos.config_keys import shown
from halos.loss_card.card import Finding, Status
from halos.loss_card.subject import Subject

COLORS = {Status.PASSED: "32", Status.FAILED: "1;31", Status.DECLARED: "33", Status.INAPPLICABLE: "2"}
WORDS = {
    Status.PASSED: "passed",
    Status.FAILED: "FAILED",
    Status.DECLARED: "declared",
    Status.INAPPLICABLE: "not applicable",
}
NAMES = ("name", "trainer", "dataloader")  # keys that the description has in another form
WIDTH = 118  # characters of a line
INDENTED: dict[str, Any] = {"initial_indent": "  ", "subsequent_indent": "  "}  # of the description
INDENT = " " * 25  # of what stands under a check


def has_colors() -> bool:
    """Colours are for terminals, and for those who have not set NO_COLOR (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def text(label: str, loss: Subject, findings: list[Finding], colors: bool) -> str:
    """Return the whole card."""
    lines = [_painted("1", label, colors), *textwrap.wrap(description(loss), WIDTH, **INDENTED)]
    for one in findings:
        lines += _lines(one, loss, colors)
    return "\n".join([*lines, f"  {counts(findings)}"])


def description(loss: Subject) -> str:
    """The classes of a loss, and its hyperparameters as they are typed."""
    words = [f"{key}={shown(loss.settings[key])}" for key in map(str, loss.settings) if key not in NAMES]
    return ", ".join([loss.trainer.__name__, loss.loader.__name__, " ".join(words)])


def counts(findings: list[Finding]) -> str:
    """`17 passed, 1 FAILED, 2 not applicable`."""
    found = Counter(one.status for one in findings)
    return ", ".join(f"{found[status]} {WORDS[status]}" for status in Status if found[status])


def _lines(one: Finding, loss: Subject, colors: bool) -> Iterator[str]:
    status = _painted(COLORS[one.status], f"{one.status:8}", colors)
    first, *more = textwrap.wrap(one.value, WIDTH - len(INDENT)) or [""]
    yield f"  {status}  {one.check:11}  {first}".rstrip()
    why = f"{loss.trainer.__name__} says: {one.why}" if one.status is Status.DECLARED else one.why
    for line in more + textwrap.wrap(why, WIDTH - len(INDENT)):
        yield INDENT + line


def _painted(code: str, text: str, colors: bool) -> str:
    return f"\033[{code}m{text}\033[0m" if colors else text
