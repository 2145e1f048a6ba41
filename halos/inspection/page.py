"""The report as one HTML page, without scripts and without anything from the network. Its style is in page.html."""

import html
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from halos.files import finished
from halos.inspection.alarms import percent
from halos.inspection.facts import common_line, facts, heading, length_table, sizes
from halos.inspection.histogram import histograms
from halos.inspection.numbers import DatasetNumbers, Split
from halos.inspection.report import Report
from halos.inspection.spans import Kind, Shown, Span

SKELETON = Path(__file__).with_name("page.html")

LEGEND = {
    Kind.CONTEXT: "context: read by the model, not trained on",
    Kind.TRAINED: "trained on",
    Kind.END: "end of turn, trained on",
    Kind.SPECIAL: "BOS, EOS and other control tokens in the context",
    Kind.CUT: "cut by truncation",
}


def write(path: str, report: Report, title: str, command: str) -> None:
    """Write the page. Everything that comes from data or from the user is escaped by `tag` or `cell`."""
    body = [tag("h1", title), warnings(report.alarms)]
    for split in report.splits.values():
        body += [tag("h2", f"{split.name}: {type(split.loader).__name__}"), *_split(split)]
    if report.common:
        body += [tag("h2", "Test and train"), tag("p", common_line(report.common), "panel")]
    if report.shown:
        body += [tag("h2", "Tokens of some rows"), legend(), *(row for shown in report.shown for row in _row(shown))]
    body.append(f"<footer>Made by {tag('code', command)}</footer>")
    save(path, title, body)


def save(path: str, title: str, body: list[str]) -> None:
    """Write a page. body: elements, in which all texts are escaped"""
    blanks = {"<!--TITLE-->": html.escape(title), "<!--BODY-->": "\n".join(body)}
    page = re.sub("|".join(blanks), lambda mark: blanks[mark.group()], SKELETON.read_text(encoding="utf-8"))
    # Lone surrogates in texts become character references, which browsers show as U+FFFD.
    with finished(path) as unfinished, open(unfinished, "w", encoding="utf-8", errors="xmlcharrefreplace") as file:
        file.write(page)


def tag(name: str, text: str, css: str = "") -> str:
    attribute = f' class="{css}"' if css else ""
    return f"<{name}{attribute}>{html.escape(text)}</{name}>"


#### NUMBERS


def warnings(alarms: list[str]) -> str:
    if not alarms:
        return tag("p", "No warnings.", "calm")
    lines = "".join(tag("li", line) for line in alarms)
    return f'<section class="alarms">{tag("h2", "Warnings")}<ul>{lines}</ul></section>'


def _split(split: Split) -> Iterator[str]:
    yield table(
        ["dataset", "weight", "rows read", "examples", "pairs", "labelled", "training rows", "prompts cut",
         "responses cut", "control tokens as text", "dropped"],
        map(_dataset, split.datasets),
    )  # fmt: skip
    yield f'<div class="charts">{"".join(histograms(split))}</div>'
    lengths = length_table(split)
    labels = list(next(iter(lengths.values())))
    rows = ([cell(name), *(cell(f"{value[label]:,}") for label in labels)] for name, value in lengths.items())
    counts = ([cell(label), cell(value)] for label, value in facts(split).items())
    yield f'<div class="two">{table(["length", *labels], rows)}{table([], counts)}</div>'
    notes = [f"{dataset.name}: {note}" for dataset in split.datasets for note in dataset.notes]
    notes += [f"{count:,} {what}" for what, count in split.chat.items()]
    if notes:
        yield f"<ul>{''.join(tag('li', note) for note in notes)}</ul>"


def _dataset(dataset: DatasetNumbers) -> list[str]:
    dropped = (f"{count:,} {reason}" for reason, count in dataset.dropped.items())
    counts = (dataset.rows_read, dataset.examples, dataset.pairs, dataset.feedback, dataset.rows)
    return [
        cell(dataset.name),
        cell(f"{dataset.weight:g}"),
        *(cell(f"{count:,}") for count in counts),
        cell(f"{dataset.truncated_prompts:,}", percent(dataset.truncated_prompts, dataset.rows)),
        cell(f"{dataset.truncated_responses:,}", percent(dataset.truncated_responses, dataset.responses)),
        cell(f"{dataset.control:,}"),
        cell("", *dropped) if dataset.dropped else cell("none"),
    ]


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Make a table that scrolls in its own box. rows: of cells"""
    first = f"<tr>{''.join(tag('th', name) for name in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<div class="panel wide" tabindex="0"><table>{first}{body}</table></div>'


def cell(text: str, *notes: str) -> str:
    return f"<td>{html.escape(text)}{''.join(tag('small', note) for note in notes)}</td>"


#### ROWS


def legend() -> str:
    return f'<p class="legend">{"".join(tag("span", text, kind) for kind, text in LEGEND.items())}</p>'


def _row(row: Shown) -> Iterator[str]:
    responses = zip(row.roles, row.responses, strict=True)
    sides = "".join(f'<section class="{role}">{_tokens(role, spans)}</section>' for role, spans in responses)
    width = "two" if len(row.responses) > 1 else "one"
    yield (
        f"<article>{tag('h3', heading(row))}<section>{_tokens('prompt', row.prompt)}</section>"
        f'<div class="sides {width}">{sides}</div></article>'
    )


def _tokens(name: str, spans: list[Span]) -> str:
    box = f'<div class="tokens" tabindex="0" dir="auto">{"".join(map(span, spans))}</div>'
    return f"<h4>{tag('b', name)} {tag('span', sizes(spans))}</h4>{box}"


def span(one: Span) -> str:
    """Make a token's element. A line break is shown as an arrow, and a part of a character as a dot."""
    if one.stands_for > 1:
        return tag("span", one.text, "gap")
    tip = f"{one.id}: {one.text!r}" if one.text else f"{one.id}: part of the character that follows"
    shown = one.text.replace("\n", "↵\n") or "·"
    return f'<span class="{one.kind}" title="{html.escape(tip)}">{html.escape(shown)}</span>'
