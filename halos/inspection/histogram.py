"""Histograms of lengths as inline SVG: what is in them, and where max_length and max_prompt_length are."""

import html
from collections.abc import Iterator

import numpy as np

from halos.inspection.facts import lengths
from halos.inspection.numbers import Split

WIDTH, HEIGHT = 420, 90  # of the bars, in units of the picture
MARGIN = 20  # for the numbers under the bars, and for the label of a limit above them
BINS = 40
NEAR = 2.5  # a limit is drawn if it is at most so many times the longest length of a histogram


def histograms(split: Split) -> Iterator[str]:
    """Yield a figure for each kind of length. Those of chosen and rejected end at the same length."""
    limits = {
        "prompt": ("max_prompt_length", split.loader.max_prompt_length),
        "prompt + response": ("max_length", split.loader.max_length),
    }
    found = lengths(split)
    responses = np.concatenate([found[role] for role in ("chosen", "rejected") if role in found])
    for name, values in found.items():
        yield histogram(name, values, _edge(responses if name in ("chosen", "rejected") else values), limits.get(name))


def _edge(values: np.ndarray) -> int:
    """Return where a histogram ends: nearly at the longest, so that a few very long ones do not squeeze the rest."""
    return max(BINS, int(np.quantile(values, 0.995)))


def histogram(name: str, values: np.ndarray, edge: int, limit: tuple[str, int] | None) -> str:
    """Draw one histogram. Lengths beyond the edge are in the last bar.

    limit: name and value of a limit, which is drawn as a line
    """
    if limit and edge < limit[1] <= NEAR * edge:
        edge = limit[1] + limit[1] // BINS
    counts, _ = np.histogram(np.minimum(values, edge), BINS, (0, edge))
    bars = "".join(_bar(i, n / counts.max()) for i, n in enumerate(counts.tolist()) if n)
    caption = f"{name}: median {int(np.median(values)):,}, longest {int(values.max()):,} tokens"
    line = ""
    if limit:
        over = int((values > limit[1]).sum())
        caption += f"; {over:,} ({100 * over / len(values):.1f} %) over {limit[0]}={limit[1]:,}"
        line = _limit(*limit, WIDTH * limit[1] / edge) if limit[1] <= edge else ""
    more = "+" if values.max() > edge else ""
    axis = "".join(_tick(x, f"{int(edge * x):,}{more if x == 1 else ''}") for x in (0, 0.25, 0.5, 0.75, 1))
    box = f"0 0 {WIDTH} {HEIGHT + 2 * MARGIN}"
    css = name.replace(" + ", "-")
    picture = f'<svg viewBox="{box}" role="img" aria-label="{html.escape(caption)}">{bars}{axis}{line}</svg>'
    return f'<figure class="panel {css}">{picture}<figcaption>{html.escape(caption)}</figcaption></figure>'


def _bar(index: int, share: float) -> str:
    width, height = WIDTH / BINS, max(1.5, HEIGHT * share)
    x, y = index * width, MARGIN + HEIGHT - height
    return f'<rect x="{x + 0.5:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height:.1f}"/>'


def _tick(share: float, label: str) -> str:
    anchor = "start" if share == 0 else "end" if share == 1 else "middle"
    return f'<text x="{WIDTH * share:.1f}" y="{MARGIN + HEIGHT + 14}" text-anchor="{anchor}">{label}</text>'


def _limit(name: str, value: int, x: float) -> str:
    anchor = "end" if x > WIDTH / 2 else "start"
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{MARGIN - 6}" y2="{MARGIN + HEIGHT}"/>'
    label = f'<text class="limit" x="{x:.1f}" y="{MARGIN - 9}" text-anchor="{anchor}">{name} {value:,}</text>'
    return line + label
