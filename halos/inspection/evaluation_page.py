"""The page of an evaluation: its datasets, reward by length, and the worst examples with their texts."""

import html
from collections.abc import Iterator

import torch

from halos.inspection.evaluation import Case, DatasetRow, Response, cases, datasets, length_correlation
from halos.inspection.page import cell, save, table, tag
from halos.records import Records
from halos.tokens import Role

WIDTH, HEIGHT, MARGIN = 860, 260, 20  # of the picture, in its units
RADIUS = 3  # of a point
MOST = 4000  # points that it has


def write(path: str, rows: Records, texts: dict[str, tuple[str, str]], n_shown: int, title: str, command: str) -> None:
    """Write the page. texts: id -> prompt and response, where they are known"""
    body = [tag("h1", title), tag("h2", "Datasets"), dataset_table(rows)]
    if not rows.reward.isnan().all():
        body += [tag("h2", "Reward by length"), *scatter(rows)]
    worst = cases(rows, n_shown, texts)
    if worst:
        body += [tag("h2", "The worst examples"), *map(_case, worst)]
    body.append(f"<footer>Made by {tag('code', command)}</footer>")
    save(path, title, body)


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None or value != value else f"{value:,.{digits}f}"


def dataset_table(rows: Records) -> str:
    head = ["dataset", "responses", "loss", "reward, chosen", "reward, rejected", "pairs with a margin above 0",
            "tokens, chosen", "tokens, rejected"]  # fmt: skip
    return table(head, map(_dataset, datasets(rows)))


def _dataset(row: DatasetRow) -> list[str]:
    wins = "" if row.wins is None else f"{row.wins:.1%}"
    rewards = [cell(number(value)) for value in (row.loss, row.chosen, row.rejected)]
    lengths = [cell(number(value, 1)) for value in (row.tokens_chosen, row.tokens_rejected)]
    return [cell(row.name), cell(f"{row.responses:,}"), *rewards, cell(wins), *lengths]


#### REWARD BY LENGTH


def scatter(rows: Records) -> Iterator[str]:
    """Draw reward against tokens, a point per response; the highest and lowest 0.5 % of each are at the edge."""
    known = rows.only(~rows.reward.isnan() & ~rows.is_role(Role.UNRELATED))
    step = -(-len(known) // MOST)
    x, left, right = _scaled(known.n_tokens.double(), WIDTH - 2 * RADIUS)
    y, low, high = _scaled(known.reward, HEIGHT)
    shown = range(0, len(known), step)
    points = "".join(_point(known.role[i], float(x[i]), float(y[i])) for i in shown)
    labels = _label(0, HEIGHT + 2 * MARGIN - 6, f"{left:,.0f} tokens", "start")
    labels += _label(WIDTH, HEIGHT + 2 * MARGIN - 6, f"{right:,.0f} tokens", "end")
    labels += _label(0, 12, f"reward {high:.3g}", "start") + _label(
        0, HEIGHT + MARGIN - 4, f"reward {low:.3g}", "start"
    )
    caption = "; ".join(_correlation(known, role) for role in (Role.CHOSEN, Role.REJECTED) if role in known.role)
    box = f"0 0 {WIDTH} {HEIGHT + 2 * MARGIN}"
    picture = f'<svg viewBox="{box}" role="img" aria-label="{html.escape(caption)}">{points}{labels}</svg>'
    yield f'<figure class="panel">{picture}<figcaption>{html.escape(caption)}</figcaption></figure>'


def _point(role: str, x: float, y: float) -> str:
    return f'<circle class="{role}" cx="{RADIUS + x:.1f}" cy="{MARGIN + HEIGHT - y:.1f}" r="{RADIUS}"/>'


def _scaled(values: torch.Tensor, size: int) -> tuple[torch.Tensor, float, float]:
    """Return values in units of the picture, and the values at its edges."""
    low, high = (float(torch.quantile(values, q)) for q in (0.005, 0.995))
    return (values.clamp(low, high) - low) / max(high - low, 1e-9) * size, low, high


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _correlation(rows: Records, role: Role) -> str:
    value = length_correlation(rows, role)
    color = {Role.CHOSEN: "blue", Role.REJECTED: "orange"}[role]
    return f"{role} ({color}): correlation of reward and length {'undefined' if value is None else f'{value:.2f}'}"


#### EXAMPLES


def _case(case: Case) -> str:
    margin = "" if case.margin is None else f", margin {number(case.margin)}"
    heading = tag("h3", f"{case.id}{margin}, loss {number(case.loss)}")
    prompt = f"<section>{_text('prompt', '', case.prompt)}</section>" if case.prompt else ""
    sides = "".join(f'<section class="{one.role}">{_side(one)}</section>' for one in case.responses)
    width = "two" if len(case.responses) > 1 else "one"
    return f'<article>{heading}{prompt}<div class="sides {width}">{sides}</div></article>'


def _side(one: Response) -> str:
    against = "" if one.change != one.change else f", {one.change:+.2f} nats against the reference"
    numbers = f"reward {number(one.reward)}, log-prob {number(one.logps, 2)}{against}, {one.n_tokens:,} tokens"
    return _text(one.role, numbers, one.text)


def _text(name: str, numbers: str, text: str) -> str:
    box = f'<div class="tokens" tabindex="0" dir="auto">{html.escape(text.strip())}</div>' if text else ""
    return f"<h4>{tag('b', name)} {tag('span', numbers)}</h4>{box}"
