"""The picture of losses: loss and gradient weight of one response against its reward, chosen and rejected.

Up to FEW losses share two panels. More have two small panels each, with all others in grey behind.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from halos.files import finished
from halos.loss_card.sweep import REACH, Curve
from halos.pictures import BLUE, GREY, MUTED, ORANGE, STYLE
from halos.tokens import Role

FEW = 6  # losses that can be told apart in one panel
PER_ROW = 4  # losses in a row of small panels
COLORS = {Role.CHOSEN: BLUE, Role.REJECTED: ORANGE}
LINES: dict[Role, Any] = {Role.CHOSEN: "-", Role.REJECTED: (0, (4, 1.6))}
LIMITS = {"losses": (-2.6, 5.2), "weights": (0, 3.2)}  # of panels in units of the start
REWARD = "implied reward, from the start"


def draw(path: str, curves: dict[str, list[Curve]]) -> None:
    """Draw a PNG. curves: those of each loss, by its name"""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        figure = Figure(layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))
        if len(curves) == 1:
            _one(figure, *next(iter(curves.items())))
        else:
            scaled = {name: in_units_of_the_start(own) for name, own in curves.items()}
            (_few if len(curves) <= FEW else _many)(figure, scaled)
        with finished(path) as unfinished:
            figure.savefig(unfinished, dpi=110, format="png")


def in_units_of_the_start(curves: list[Curve]) -> list[Curve]:
    """Curves whose loss is 0 and whose slope against the reward is 1 at the start, so that losses can be compared.

    The unit is the larger slope of chosen and rejected. If both are 0 at the start, it is the largest of all.
    """
    unit = max(one.at_start(one.weights) for one in curves) or max(one.weights.max() for one in curves) or 1.0
    return [
        replace(
            one,
            losses=(one.losses - one.at_start(one.losses)) * one.slope / unit,
            weights=one.weights / unit,
        )
        for one in curves
    ]


#### LAYOUTS


def _one(figure, name: str, curves: list[Curve]) -> None:
    figure.set_size_inches(10.5, 4.2)
    axes = figure.subplots(1, 2)
    for axis, quantity in zip(axes, LIMITS, strict=True):
        for one in curves:
            _line(axis, one, quantity, COLORS[one.role], one.role, 2.0)
        _label(axis, quantity)
    axes[0].legend(frameon=False)
    figure.suptitle(name, x=0.01, ha="left", fontweight="bold")


def _few(figure, curves: dict[str, list[Curve]]) -> None:
    figure.set_size_inches(11.5, 4.8)
    axes = figure.subplots(1, 2)
    for axis, quantity in zip(axes, LIMITS, strict=True):
        for index, (name, own) in enumerate(curves.items()):
            width = 3.4 - 2.0 * index / len(curves)  # so that equal ones are seen
            for one in own:
                _line(axis, one, quantity, f"C{index}", name if one.role is Role.CHOSEN else None, width)
        axis.set_ylim(*LIMITS[quantity])
        _label(axis, quantity, " (slope 1 at the start)" if quantity == "losses" else ", as a multiple of the start's")
    for role, line in LINES.items():
        axes[0].plot([], [], color=MUTED, linestyle=line, label=role)
    axes[0].legend(frameon=False, fontsize=8.5)


def _many(figure, curves: dict[str, list[Curve]]) -> None:
    n_rows = -(-len(curves) // PER_ROW)
    figure.set_size_inches(4.2 * PER_ROW, 1.75 * n_rows + 0.9)
    cells = _cells(figure, n_rows)
    for pair, (name, own) in zip(cells, curves.items(), strict=False):
        reach = min(REACH, max(np.abs(one.rewards).max() for one in own))
        zoom = {"losses": reach / REACH, "weights": 1.0}  # a slope of 1 looks the same in every panel
        for axis, quantity in zip(pair, LIMITS, strict=True):
            _background(axis, quantity, curves.values())
            for one in own:
                _line(axis, one, quantity, COLORS[one.role], one.role, 1.8)
            axis.set_xlim(-reach, reach)
            axis.set_ylim(*(zoom[quantity] * limit for limit in LIMITS[quantity]))
            axis.tick_params(labelsize=7)
            axis.locator_params(nbins=4)
        pair[0].set_title(name)
        pair[1].set_title("gradient weight", color=MUTED, fontweight="normal", fontsize=8)
    for axis in (axis for pair in cells[len(curves) :] for axis in pair):
        axis.axis("off")
    handles = [cells[0][0].plot([], [], color=COLORS[role], linestyle=LINES[role], label=role)[0] for role in LINES]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    title = f"Loss and gradient weight against the {REWARD}: both in units of the start; all other losses in grey"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)


def _cells(figure, n_rows: int) -> list:
    """Pairs of panels, row after row, with a gap between neighbouring pairs."""
    axes = figure.subplots(n_rows, 3 * PER_ROW, squeeze=False, width_ratios=[1, 1, 0.06] * PER_ROW)
    for axis in axes[:, 2::3].flat:
        axis.axis("off")
    return [row[start : start + 2] for row in axes for start in range(0, 3 * PER_ROW, 3)]


#### PARTS


def _background(axis, quantity: str, curves: Iterable[list[Curve]]) -> None:
    from matplotlib.collections import LineCollection

    lines = [np.column_stack((one.rewards, getattr(one, quantity))) for own in curves for one in own]
    axis.add_collection(LineCollection(lines, colors=GREY, linewidths=0.6, zorder=1))


def _line(axis, one: Curve, quantity: str, color: str, label: str | None, width: float) -> None:
    axis.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    values = getattr(one, quantity)
    axis.plot(one.rewards, values, color=color, linestyle=LINES[one.role], linewidth=width, label=label)


def _label(axis, quantity: str, unit: str = "") -> None:
    title = {"losses": "loss", "weights": "gradient weight |dL / d log-prob|"}[quantity]
    axis.set_title(title + unit)
    axis.set_xlabel(REWARD)
    axis.grid(alpha=0.25)
