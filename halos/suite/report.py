"""table.md and table.json: the rows of each size, and what their comparisons say."""

import os
from dataclasses import asdict

from halos.files import finished
from halos.suite import figure, plan
from halos.suite.contrasts import Estimate
from halos.suite.findings import Comparison, Findings
from halos.suite.settings import Suite

HEADS = {
    "right": "right, %",
    "win": "win rate, %",
    "order": "pairs in order, %",
    "chosen": "chosen, nats",
    "rejected": "rejected, nats",
    "length": "characters",
}
SHARES = ("right", "win", "order")


def write(suite: Suite, found: Findings, settings: dict) -> None:
    """Write the table and the picture of what is finished, in place of those of fewer seeds."""
    path = os.path.join(suite.out, "table.md")
    with finished(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        file.write(markdown(found, settings))
    content = {"seeds": found.seeds, "measure": found.measure, "base": found.base, "aa_same": found.same}
    content |= {"settings": settings, "rows": plain(found.rows), "budgets": budgets(found)}
    content |= {"comparisons": [asdict(one) for one in found.comparisons]}
    plan.write_json(os.path.join(suite.out, "table.json"), content)
    figure.draw(os.path.join(suite.out, "suite.png"), found)


def plain(rows: dict) -> dict:
    return {
        size: {row: {name: asdict(x) for name, x in of.items()} for row, of in y.items()} for size, y in rows.items()
    }


def budgets(found: Findings) -> dict[str, dict[str, dict]]:
    """Return the budget of the last stage of each row: size -> row -> updates, examples and tokens."""
    return {size: {row: of_row[0]["budget"] for row, of_row in by_row.items()} for size, by_row in found.runs.items()}


#### MARKDOWN


def markdown(found: Findings, settings: dict) -> str:
    parts = [part for size in found.rows for part in (f"## {size}", table_of_rows(found, size, settings[size]))]
    answers = [part for size in found.rows for part in (f"### {size}", table_of_comparisons(found, size))]
    n = len(found.comparisons)
    note = f"Difference in {HEADS[found.measure]} (points), over {found.seeds} seeds and the same prompts; "
    note += f"intervals hold for all {n} comparisons together (95 %, Bonferroni). "
    note += "`smallest` would have been found with probability 0.8."
    same = [] if found.same is None else [f"One row under two names: no difference in {100 * found.same:.0f} of 100."]
    return "\n\n".join([*parts, "## Comparisons", note, *answers, *same]) + "\n"


def table_of_rows(found: Findings, size: str, settings: dict) -> str:
    measures = list(next(iter(found.rows[size].values())))
    head = ["row", *(HEADS[name] for name in measures), "settings"]
    base = [[BASE, *(shown_mean(found.base[size], name) for name in measures), ""]] if size in found.base else []
    lines = [
        [row.upper(), *(shown(name, of_row[name]) for name in measures), f"`{' '.join(settings[row])}`"]
        for row, of_row in found.rows[size].items()
    ]
    return as_table([head, *base, *lines])


BASE = "(base)"


def shown_mean(means: dict[str, float], name: str) -> str:
    return "" if name not in means else f"{means[name] * (100 if name in SHARES else 1):.1f}"


def shown(name: str, estimate: Estimate) -> str:
    """Return a mean and half of its interval."""
    scale = 100 if name in SHARES else 1
    return f"{scale * estimate.mean:.1f} ± {scale * (estimate.high - estimate.mean):.1f}"


def table_of_comparisons(found: Findings, size: str) -> str:
    head = ["question", "difference", "points", "interval", "smallest", "better"]
    ours = [one for one in found.comparisons if one.size == size]
    return as_table([head, *(line_of(one) for one in ours)])


def line_of(comparison: Comparison) -> list[str]:
    x = comparison.found
    name = f"{bracketed(comparison.one)} - {bracketed(comparison.other)}".upper()
    mean, low, high, smallest = (f"{100 * value:.1f}" for value in (x.mean, x.low, x.high, x.smallest))
    better = comparison.one if x.mean > 0 else comparison.other
    answer = bracketed(better).upper() if x.differs else "no difference seen"
    return [comparison.question, name, mean, f"[{low}, {high}]", smallest, answer]


def bracketed(name: str) -> str:
    return f"({name})" if " - " in name else name


def as_table(lines: list[list[str]]) -> str:
    rows = [lines[0], ["---", *["---:"] * (len(lines[0]) - 1)], *lines[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
