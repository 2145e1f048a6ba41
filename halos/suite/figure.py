"""suite.png: for each size, what each loss reaches alone and after SFT, with its intervals and its seeds.

Change `draw` to add a panel: one row of panels per measure, one column per size.
"""

from halos.files import finished
from halos.pictures import BLUE, MUTED, ORANGE, PALE, STYLE
from halos.suite.findings import Findings, matrix
from halos.suite.settings import before, loss_of

ALONE, AFTER = ORANGE, BLUE
LABELS = {
    "right": "right answers, %",
    "win": "win rate against the preferred responses, %",
    "order": "held-out pairs in order, %",
}


def draw(path: str, found: Findings) -> None:
    """Draw a PNG of all measures that are shares."""
    import matplotlib
    from matplotlib.figure import Figure

    measures = [name for name in LABELS if name in next(iter(next(iter(found.rows.values())).values()))][:2]
    losses = list(dict.fromkeys(loss_of(row) for rows in found.rows.values() for row in rows if row != "sft"))
    with matplotlib.rc_context(STYLE):
        size = (5.2 * len(found.rows) + 1, 0.55 + (0.9 + 0.42 * len(losses)) * len(measures))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(measures), len(found.rows), squeeze=False, sharex="row", sharey=True)
        for line, measure in zip(axes, measures, strict=True):
            for axis, name in zip(line, found.rows, strict=True):
                _draw_panel(axis, found, name, measure, losses)
        for axis, name in zip(axes[0], found.rows, strict=True):
            axis.set_title(name)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        with finished(path) as unfinished:
            figure.savefig(unfinished, dpi=130, format="png")


def _draw_panel(axis, found: Findings, size: str, measure: str, losses: list[str]) -> None:
    """Draw one measure at one size: a line per loss, with a mark without SFT and one after it."""
    rows = found.rows[size]
    sft = rows["sft"][measure]
    axis.axvspan(100 * sft.low, 100 * sft.high, color=PALE, linewidth=0, zorder=0)
    axis.axvline(100 * sft.mean, color=MUTED, linewidth=1.2, zorder=1, label="SFT alone, 95 %")
    if measure in found.base.get(size, {}):
        axis.axvline(100 * found.base[size][measure], color=MUTED, linewidth=1, linestyle=":", label="base")
    for row, of_row in rows.items():
        if row != "sft":
            is_after = before(row) == "sft"
            y = losses.index(loss_of(row)) + (0.16 if is_after else -0.16)
            seeds = 100 * matrix(found.runs[size][row], measure).mean(axis=1)
            color, label = (AFTER, "after SFT, 95 %") if is_after else (ALONE, "without SFT, 95 %")
            _draw_mark(axis, y, of_row[measure], seeds, color, label)
    axis.set_yticks(range(len(losses)), [loss.upper() for loss in losses])
    axis.set(ylim=(len(losses) - 0.5, -0.5), xlabel=LABELS[measure])
    axis.tick_params(axis="y", length=0)
    _once(axis)


def _draw_mark(axis, y: float, estimate, seeds, color: str, label: str) -> None:
    """Draw a mean with its interval, and its seeds as small strokes."""
    axis.plot([100 * estimate.low, 100 * estimate.high], [y, y], color=color, linewidth=1.8, solid_capstyle="butt")
    axis.plot(seeds, [y] * len(seeds), "|", color=color, markersize=8, markeredgewidth=1)
    axis.plot(100 * estimate.mean, y, "o", color=color, markersize=6.5, label=label)


def _once(axis) -> None:
    """Keep one entry of each label for the legend."""
    known: set[str] = set()
    for line in axis.get_lines():
        label = str(line.get_label())
        line.set_label("_" if label in known else label)
        known.add(label)
