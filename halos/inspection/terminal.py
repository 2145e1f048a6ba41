"""The report in the terminal: warnings first, then numbers, then a few rows with coloured tokens.

Without colours, the tokens that are trained on stand in brackets, and those that are cut between `~`.
"""

import os
import sys
from collections.abc import Iterator
from itertools import groupby

from halos.inspection.alarms import percent
from halos.inspection.facts import common_line, facts, heading, length_table, sizes
from halos.inspection.numbers import DatasetNumbers, Split
from halos.inspection.report import Report
from halos.inspection.spans import Kind, Shown, Span

COLORS = {
    Kind.CONTEXT: "2",  # dim
    Kind.TRAINED: "32",  # green
    Kind.END: "1;30;43",  # black on yellow
    Kind.SPECIAL: "35",  # magenta
    Kind.CUT: "9;31",  # struck through, red
}
BRACKETS = {Kind.TRAINED: "[{}]", Kind.END: "[{}]", Kind.CUT: "~{}~"}
ROWS = 2  # rows that are shown; the page has all
RUN = 400  # characters of a run of one kind that are shown, half of them at each end


def has_colors() -> bool:
    """Colours are for terminals, and for those who have not set NO_COLOR (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def text(report: Report, colors: bool) -> str:
    """Return the whole report."""
    paint = _in_color if colors else _plain
    lines = [paint("1;33", "WARNING ") + printable(line) for line in report.alarms] or ["no warnings"]
    for split in report.splits.values():
        lines += ["", paint("1", f"{split.name}: {type(split.loader).__name__}"), *map(printable, numbers(split))]
    if report.common:
        lines += ["", paint("1", "test and train"), f"  {common_line(report.common)}"]
    for row in report.shown[:ROWS]:
        lines += ["", paint("1", printable(heading(row))), *_row(row, colors)]
    if report.shown:
        legend = (paint(COLORS[kind], kind) if colors else BRACKETS.get(kind, "{}").format(kind) for kind in Kind)
        lines += ["", "tokens: " + "  ".join(legend)]
    return "\n".join(lines)


def _in_color(code: str, text: str) -> str:
    return f"\033[{code}m{text}\033[0m" if text else text


def _plain(code: str, text: str) -> str:
    return text


#### NUMBERS


def numbers(split: Split) -> Iterator[str]:
    for dataset in split.datasets:
        yield from _dataset(dataset)
    for name, lengths in length_table(split).items():
        yield f"  {name:24}" + "".join(f"  {label} {value:,}" for label, value in lengths.items())
    for label, value in facts(split).items():
        yield f"  {label:48}{value}"


def _dataset(dataset: DatasetNumbers) -> Iterator[str]:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in dataset.dropped.items()) or "none"
    yield (
        f"  {dataset.name}: {dataset.rows_read:,} rows read, {dataset.examples:,} examples, {dataset.pairs:,} pairs, "
        f"{dataset.feedback:,} labelled responses, weight {dataset.weight:g}; dropped: {dropped}"
    )
    yield (
        f"    {dataset.rows:,} training rows per epoch; cut: {dataset.truncated_prompts:,} prompts "
        f"({percent(dataset.truncated_prompts, dataset.rows)}), {dataset.truncated_responses:,} responses "
        f"({percent(dataset.truncated_responses, dataset.responses)}); control tokens written as text in "
        f"{dataset.control:,} examples"
    )
    yield from (f"    {note}" for note in dataset.notes)


#### ROWS


def _row(row: Shown, colors: bool) -> Iterator[str]:
    for name, spans in [("prompt", row.prompt), *zip(row.roles, row.responses, strict=True)]:
        yield f"-- {name}, {sizes(spans)}"
        yield "".join(_runs(spans, colors))


def _runs(spans: list[Span], colors: bool) -> Iterator[str]:
    for kind, run in groupby(spans, key=lambda span: span.kind):
        text = printable("".join(span.text for span in run))
        if len(text) > RUN:
            text = f"{text[: RUN // 2]} ... {text[-RUN // 2 :]}"
        yield _in_color(COLORS[kind], text) if colors else BRACKETS.get(kind, "{}").format(text)


def printable(text: str) -> str:
    """Escape control characters, which could change the terminal; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
