"""The picture of a run's metrics, curves.png. Change this file to add a panel (PANELS)."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable

from halos.files import finished

Point = tuple[float, float]
MOST = 2000  # points of a curve: more than a picture can show

LOGPS = "log-probs (nats per response)"
# The panels of curves.png: title -> its metrics, with * for any ending. What the loss does not report is left out.
PANELS = {
    "loss": ["loss/{mode}"],
    "reward margin": ["rewards_{mode}/margins"],
    "reward accuracy": ["rewards_{mode}/accuracies"],
    "rewards": ["rewards_{mode}/chosen", "rewards_{mode}/rejected"],
    LOGPS: ["logps_{mode}/chosen", "logps_{mode}/rejected"],
    "gradient norm": ["grad_norm"],
    "learning rate": ["lr"],
    "loss per dataset": ["loss/eval/*"],
    "reward margin per dataset": ["rewards_eval/margins/*"],
    "reward accuracy per dataset": ["rewards_eval/accuracies/*"],
    "KL of a batch (nats per response)": ["kl/*", "kl_eval/*"],
    "share of clamped values": ["clamped/*", "clamped_eval/*"],
    "critic: explained variance": ["val/explained_variance", "val_eval/explained_variance"],
    "KL estimate (nats per token)": ["loss/policykl", "loss_eval/policykl"],
    "share of clipped tokens": ["clipfrac/policy", "clipfrac_eval/policy"],
}


class Curve:
    """The points of one metric. Neighbours are averaged where there are too many, so that memory does not grow."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.width = 1  # values that a point is the mean of
        self.latest: list[Point] = []  # fewer than `width`

    def add(self, x: float, y: float) -> None:
        self.latest.append((x, y))
        if len(self.latest) == self.width:
            self.points.append(_mean(self.latest))
            self.latest = []
        if len(self.points) == MOST:
            self.points = [_mean(self.points[i : i + 2]) for i in range(0, MOST, 2)]
            self.width *= 2

    def all_points(self) -> list[Point]:
        return self.points + ([_mean(self.latest)] if self.latest else [])


def _mean(points: list[Point]) -> Point:
    x, y = zip(*points, strict=True)
    return sum(x) / len(x), sum(y) / len(y)


class Series:
    """The curve of every metric in the rows of metrics.jsonl, over examples."""

    def __init__(self, rows: Iterable[dict] = ()):
        self.curves: dict[str, Curve] = defaultdict(Curve)
        for row in rows:
            self.add(row)

    def add(self, row: dict) -> None:
        for key, value in row.items():
            if key not in ("step", "examples", "mode"):
                self.curves[key].add(row["examples"], value)


def draw_curves(run_dir: str, title: str, rows: Series) -> None:
    """Draw curves.png: one panel per kind of metric, training as a line, evaluation as points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = {key: curve.all_points() for key, curve in rows.curves.items()}
    shown = panels(series)
    if not shown:
        return
    columns = min(3, len(shown))
    n_rows = -(-len(shown) // columns)
    # Not by pyplot, which keeps what it has drawn.
    figure = Figure(figsize=(4.6 * columns, 3.2 * n_rows), dpi=110)
    axes = figure.subplots(n_rows, columns, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, (name, keys) in zip(axes.flat, shown.items(), strict=False):
        both = list(dict.fromkeys(_without_mode(key) for key in keys))  # a metric has one color in both modes
        for index, key in enumerate(keys):
            _draw(axis, key, series[key], f"C{both.index(_without_mode(key)) if len(both) > 1 else index}")
        if name == LOGPS:
            _mark_displacement(axis, series.get("displacement/found", []))
        axis.set_title(name)
        axis.set_xlabel("examples")
        axis.locator_params(axis="x", nbins=6)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    with finished(os.path.join(run_dir, "curves.png")) as unfinished:
        FigureCanvasAgg(figure).print_png(unfinished)


def panels(names: Iterable[str]) -> dict[str, list[str]]:
    """The panels of these metrics: title -> the metrics in it."""
    names = list(names)
    known = {
        title: [name for pattern in patterns for one in _in_both_modes(pattern) for name in _matching(one, names)]
        for title, patterns in PANELS.items()
    }
    return {title: found for title, found in known.items() if found} | _panels_of_own_metrics(names)


def _panels_of_own_metrics(names: Iterable[str]) -> dict[str, list[str]]:
    """A panel for each group of metrics that a loss reports and PANELS does not know, such as all of `kl/...`."""
    known = {_group(pattern) for patterns in PANELS.values() for pattern in patterns}
    known |= {"counters", "displacement", "returns"}
    panels = defaultdict(list)
    for name in sorted(names):
        if "/" in name and _group(name) not in known:
            panels[_group(name)].append(name)
    return panels


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The metrics that a pattern means, where they exist."""
    if not pattern.endswith("*"):
        return [pattern] if pattern in names else []
    return sorted(name for name in names if name.startswith(pattern[:-1]))


def _mark_displacement(axis, found: list[Point]) -> None:
    """Colour the part of a run after an evaluation that found likelihood displacement (halos/displacement.py)."""
    first = next((x for x, is_found in found if is_found), None)
    if first is not None:
        axis.axvspan(first, found[-1][0], color="C3", alpha=0.12, label="likelihood displacement")


def _group(name: str) -> str:
    """`kl` of `kl/chosen` and of `kl_eval/chosen`."""
    return _without_mode(name).partition("/")[0]


def _without_mode(name: str) -> str:
    """`kl/chosen` of `kl_eval/chosen`, `loss` of `loss/train`."""
    return re.sub(r"_(train|eval|\{mode\})(?=/)|/(train|eval|\{mode\})$", "", name)


def _in_both_modes(pattern: str) -> list[str]:
    return [pattern.format(mode="train"), pattern.format(mode="eval")] if "{mode}" in pattern else [pattern]


def _draw(axis, key: str, points: list[Point], color: str) -> None:
    x, y = zip(*points, strict=True)
    if "_eval/" in key or key.endswith("/eval"):
        axis.plot(x, y, "o--", color=color, markersize=5, label=key, zorder=3)
        return
    axis.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
    axis.plot(x, _smoothed(y), color=color, linewidth=1.5, label=key)


def _smoothed(values: tuple[float, ...]) -> list[float]:
    """Return the exponential moving average over about a fiftieth of the run."""
    weight = 1 / max(1.0, len(values) / 50)
    out = [values[0]]
    for value in values[1:]:
        out.append(out[-1] + weight * (value - out[-1]))
    return out
