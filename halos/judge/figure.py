"""The picture of --plot: outcomes, win rate against length, and position bias, one function per panel.

The numbers come from statistics.py. Change `plot` to add a panel.
"""

import textwrap

import numpy as np

from halos.judge import statistics
from halos.judge.outputs import written
from halos.pictures import BLUE, GREEN, GREY, INK, MUTED, ORANGE, PALE, PURPLE, STYLE


def plot(path: str, title: str, summary: dict, scores: np.ndarray, length_differences: np.ndarray) -> None:
    """Draw a PNG of three panels: outcomes, win rate against the difference in length, and position bias.

    summary: as `statistics.summarize` returns it
    scores: (n_pairs,), score of the candidate in [0, 1]; NaN where a verdict is missing
    length_differences: (n_pairs,), candidate minus baseline, in characters
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    judges = [(judge["name"], judge) for judge in summary["judges"]]
    several = len(judges) > 1
    rows = [("all judges", summary), *judges] if several else [("", summary)]
    with matplotlib.rc_context(STYLE):
        size = (15, 3.6 + 0.62 * (len(rows) - 1))
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        axes = figure.subplots(1, 3, width_ratios=[1.25, 1, 1.1])
        _draw_outcomes(axes[0], rows)
        _draw_lengths(axes[1], summary["length_controlled"], scores, length_differences)
        _draw_positions(axes[2], judges if several else rows)
        figure.suptitle(_shorten(title, 150), x=0.01, ha="left", fontsize=12.5)
        with written(path) as unfinished, open(unfinished, "wb") as file:  # a path would have to be seekable
            figure.savefig(file, dpi=130, format="png")


def _draw_outcomes(axis, rows: list[tuple[str, dict]]) -> None:
    """Draw a bar of wins, ties and losses for each row, and the win rates with their intervals under it."""
    axis.set_title("Outcomes and win rate")
    if not any(row["n_judged"] for _, row in rows):
        return _say(axis, "no pair was judged")
    for y, (_, row) in enumerate(rows):
        counts = [row["wins"], row["ties"], row["losses"]]
        if row["n_judged"]:
            _draw_stack(axis, y - 0.17, counts, (BLUE, GREY, ORANGE), 0.36)
        estimates = [("o", INK, row), ("D", MUTED, row["length_controlled"])]
        for offset, (marker, color, estimate) in zip((0.16, 0.36), estimates, strict=True):
            if estimate["win_rate"] is not None:
                _draw_estimate(axis, y + offset, estimate["win_rate"], estimate["interval"], marker, color)
    labels = [("s", BLUE, "win"), ("s", GREY, "tie"), ("s", ORANGE, "loss"), ("o", INK, "win rate, 95 %")]
    if any(row["length_controlled"]["win_rate"] is not None for _, row in rows):
        labels.append(("D", MUTED, "length-controlled, 95 %"))
    _share_axis(axis, [name for name, _ in rows], "% of judged pairs")
    _legend(axis, labels)


def _draw_estimate(axis, y: float, rate: float, interval: list[float], marker: str, color: str) -> None:
    low, high = interval
    axis.plot([100 * low, 100 * high], [y, y], color=color, linewidth=1.6, solid_capstyle="butt")
    axis.plot(100 * rate, y, marker, color=color, markersize=5.5)
    x, align = (100 * high + 1.5, "left") if high < 0.85 else (100 * low - 1.5, "right")
    axis.text(x, y, f"{100 * rate:.1f} %", va="center", ha=align, color=color, fontsize=9)


def _draw_lengths(axis, controlled: dict, scores: np.ndarray, differences: np.ndarray) -> None:
    """Draw mean score and Wilson interval of pairs in bins of equal size by the difference in length; and the fit."""
    from scipy.special import expit

    axis.set_title("Win rate against length")
    judged = np.isfinite(scores)
    scores, differences = scores[judged], np.asarray(differences, dtype=float)[judged]
    if not len(scores):
        return _say(axis, "no pair was judged")
    order = np.argsort(differences, kind="stable")
    n_bins = int(np.clip(len(scores) // 12, 1, 10))
    for members in np.array_split(order, n_bins):
        center, mean = np.median(differences[members]), scores[members].mean()
        low, high = statistics.wilson(mean, statistics.effective_n(scores[members]))
        axis.plot([center, center], [100 * low, 100 * high], color=BLUE, linewidth=1.6, alpha=0.55)
        axis.plot(center, 100 * mean, "o", color=BLUE, markersize=5.5)
    labels = [("o", BLUE, f"{n_bins} bins of {len(scores) // n_bins} pairs" if n_bins > 1 else f"{len(scores)} pairs")]
    if controlled["win_rate"] is not None:
        left, right = axis.get_xlim()
        x = np.linspace(left, right, 300)
        logits = controlled["intercept"] + controlled["slope"] * np.tanh(x / differences.std(ddof=1))
        axis.plot(x, 100 * expit(logits), color=INK, linewidth=1.2)
        labels.append(("-", INK, "fit"))
    else:
        why = "\n".join(textwrap.wrap(f"no fit: {controlled['reason']}", 40))
        axis.text(0.03, 0.06, why, transform=axis.transAxes, color=MUTED, fontsize=8.5, backgroundcolor="white")
    axis.axhline(50, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=0)
    axis.axvline(0, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=0)
    axis.set(ylim=(-3, 103), xlabel="candidate minus baseline, characters", ylabel="win rate, %")
    axis.locator_params(axis="x", nbins=6)
    _legend(axis, labels)


def _draw_positions(axis, rows: list[tuple[str, dict]]) -> None:
    """Draw for each judge how often the first slot won, and whether the two orders of a pair agree."""
    axis.set_title("Position")
    positions = [row["position"] for _, row in rows]
    if all(position["first_slot_share"] is None for position in positions):
        return _say(axis, positions[0]["reason"] or "nothing was judged")
    for y, position in enumerate(positions):
        if position["first_slot_share"] is not None:
            _draw_share(axis, y - 0.2, position)
        if position["consistent"] is None:
            axis.text(1, y + 0.17, _shorten(position["reason"] or "", 60), va="center", color=MUTED, fontsize=9)
            continue
        first, second = position["first_twice"], position["second_twice"]
        counts = [position["consistent"], position["inconsistent"] - first - second, first, second]
        _draw_stack(axis, y + 0.17, counts, (GREY, PALE, PURPLE, GREEN), 0.36)
    _share_axis(axis, [name for name, _ in rows], "% of decided verdicts; of pairs judged in both orders")
    pairs = [("s", GREY, "orders agree"), ("s", PALE, "one order tied")]
    pairs += [("s", PURPLE, "first slot twice"), ("s", GREEN, "second slot twice")]
    _legend(axis, [("o", INK, "won by the first slot"), *pairs])


def _draw_share(axis, y: float, position: dict) -> None:
    """Draw the first slot's share as a distance from 50 %, and write it on the other side, where there is room."""
    share, p = 100 * position["first_slot_share"], position["mcnemar_p"]
    axis.plot([50, share], [y, y], color=INK, linewidth=1.6)
    axis.plot(share, y, "o", color=INK, markersize=5.5)
    words = f"{share:.1f} %" if p is None else f"{share:.1f} %, McNemar p = {p:.2g}"
    left = share >= 50
    axis.text(48 if left else 52, y, words, va="center", ha="right" if left else "left", color=INK, fontsize=9)


def _draw_stack(axis, y: float, counts: list[int], colors: tuple[str, ...], height: float) -> None:
    """Draw counts side by side as shares of their sum, with the number in each part that has room for it."""
    left = 0.0
    for n, color in zip(counts, colors, strict=True):
        width = 100 * n / sum(counts)
        axis.barh(y, width, height, left=left, color=color, edgecolor="white", linewidth=0.8)
        if width > 2 + 1.6 * len(f"{n:,}"):
            ink = INK if color in (GREY, PALE) else "white"
            axis.text(left + width / 2, y, f"{n:,}", ha="center", va="center", color=ink, fontsize=9)
        left += width


def _share_axis(axis, names: list[str], label: str) -> None:
    axis.axvline(50, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=0)
    axis.set(xlim=(0, 100), ylim=(len(names) - 0.4, -0.5), xlabel=label)
    axis.set_yticks(range(len(names)), [_shorten(name, 26) for name in names], color=INK)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)


def _legend(axis, labels: list[tuple[str, str, str]]) -> None:
    """Draw a legend under the axis and its label. labels: (marker, or "-" for a line, colour, text)."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    handles = [
        Line2D(
            [], [], color=color, linestyle="-" if mark == "-" else "", marker="" if mark == "-" else mark, label=text
        )
        for mark, color, text in labels
    ]
    below = ScaledTranslation(0, -0.5, axis.figure.dpi_scale_trans)
    place = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": axis.transAxes + below}
    spacing = {"borderpad": 0, "borderaxespad": 0, "handletextpad": 0.3, "columnspacing": 1.4}
    axis.legend(handles=handles, frameon=False, fontsize=8.5, ncols=3, **place, **spacing)


def _say(axis, message: str) -> None:
    """Leave the panel empty and write why."""
    axis.axis("off")
    lines = "\n".join(textwrap.wrap(_shorten(message, 400), 46))
    axis.text(0, 0.6, lines, transform=axis.transAxes, va="center", color=MUTED)


def _shorten(text: str, width: int) -> str:
    """Make one line of at most `width` characters, without its middle if need be, and without lone surrogates."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    if len(text) <= width:
        return text
    half = (width - 1) // 2
    return f"{text[:half]}…{text[-half:]}"
