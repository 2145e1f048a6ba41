"""How the project's pictures look: colours and matplotlib's settings, without matplotlib itself."""

from typing import Any

BLUE, ORANGE, PURPLE, GREEN = "#2b66a8", "#c4691b", "#7a5aa6", "#3d8577"
PALE, GREY, MUTED, INK = "#e6e8ec", "#c6cad0", "#6c737d", "#1b1f26"
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is not a formula
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
