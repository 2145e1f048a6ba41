"""What a comparison looks like: a figure of its numbers (`plot`), and a page to browse its pairs (`write_html`).

Both show what `halos/statistics.py` computed. The page's layout, style and behaviour are in assets/report.html.
"""

import base64
import hashlib
import html
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from halos import statistics
from halos.comparisons import JudgeScores, Pair

SKELETON = Path(__file__).parents[1] / "assets" / "report.html"
CHUNK = 100  # pairs in one island of the page's data: what is parsed to show one of them
BLUE, ORANGE, PURPLE, GREEN = "#2b66a8", "#c4691b", "#7a5aa6", "#3d8577"
PALE, GREY, MUTED, INK = "#e6e8ec", "#c6cad0", "#6c737d", "#1b1f26"
FIGURE_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
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


@contextmanager
def _finished(path: str) -> Iterator[str]:
    """A name to write to, in the same directory, that becomes `path` once the block is through; removed if it fails."""
    unfinished = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


#### THE FIGURE


def plot(path: str, title: str, summary: dict, scores: np.ndarray, length_differences: np.ndarray) -> None:
    """A PNG of three panels: the outcomes, the win rate against the difference in length, and the position bias.

    summary: of `statistics.summarize`
    scores: (n_pairs,), the candidate's score in [0, 1]; NaN where a pair is incomplete
    length_differences: (n_pairs,), candidate minus baseline, in characters
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    judges = [(judge["name"], judge) for judge in summary["judges"]]
    several = len(judges) > 1
    rows = [("all judges", summary), *judges] if several else [("", summary)]
    with matplotlib.rc_context(FIGURE_STYLE):
        size = (15, 3.6 + 0.62 * (len(rows) - 1))
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        axes = figure.subplots(1, 3, width_ratios=[1.25, 1, 1.1])
        _draw_outcomes(axes[0], rows)
        _draw_lengths(axes[1], summary["length_controlled"], scores, length_differences)
        _draw_positions(axes[2], judges if several else rows)
        figure.suptitle(_shorten(title, 150), x=0.01, ha="left", fontsize=12.5)
        with _finished(path) as unfinished:
            figure.savefig(unfinished, dpi=130, format="png")


def _draw_outcomes(axis, rows: list[tuple[str, dict]]) -> None:
    """A bar of wins, ties and losses for each row, and under it the win rates with their intervals."""
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
    """Pairs in bins of equal size by the difference in length: mean score and Wilson interval; the fitted curve."""
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
    """For each judge: how often the response shown first won, and what became of pairs judged in both orders."""
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
    """The first slot's share as a distance from 50 %; in words on the other side, where there is room."""
    share, p = 100 * position["first_slot_share"], position["mcnemar_p"]
    axis.plot([50, share], [y, y], color=INK, linewidth=1.6)
    axis.plot(share, y, "o", color=INK, markersize=5.5)
    words = f"{share:.1f} %" if p is None else f"{share:.1f} %, McNemar p = {p:.2g}"
    left = share >= 50
    axis.text(48 if left else 52, y, words, va="center", ha="right" if left else "left", color=INK, fontsize=9)


def _draw_stack(axis, y: float, counts: list[int], colors: tuple[str, ...], height: float) -> None:
    """Counts as shares of their sum, side by side, with the number in each part that has room for it."""
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
    """Under the axis and its label. labels: (marker or line, colour, text)."""
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
    """An empty panel that says why."""
    axis.axis("off")
    lines = "\n".join(textwrap.wrap(_shorten(message, 400), 46))
    axis.text(0, 0.6, lines, transform=axis.transAxes, va="center", color=MUTED)


def _shorten(text: str, width: int) -> str:
    """One line of at most `width` characters that a font can draw: the middle gives way, lone surrogates too."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    if len(text) <= width:
        return text
    half = (width - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


#### THE PAGE


def write_html(
    path: str,
    title: str,
    summary: dict,
    pairs: list[Pair],
    judges: list[JudgeScores],
    reply: Callable[[int, int, int], str | None],
    command: str,
) -> None:
    """One self-contained page: the numbers of `summary`, and a browser of all pairs with every verdict and raw reply.

    reply: (judge, pair, order) -> the raw text of that reply, or why there is none, or None; order 0 shows the
        candidate first. It is called once per asked unit, in the order of the pairs, while the page is being written.
    command: what made the results, shown as it is

    Texts are never part of the markup. They are JSON in <script> islands, `CHUNK` pairs each, which the page's own
    script parses on demand and shows through textContent; the Content-Security-Policy admits that one script, by its
    hash. The page is written island by island, so memory does not grow with the texts.
    """
    skeleton = SKELETON.read_text(encoding="utf-8")
    blanks = {
        "<!--POLICY-->": _policy(skeleton),
        "<!--TITLE-->": html.escape(title),
        "<!--NUMBERS-->": _numbers(summary, command),
    }
    head, tail = skeleton.split("<!--DATA-->")
    # What is filled in is escaped, so no value can hold the mark of another.
    head = re.sub("|".join(blanks), lambda mark: blanks[mark.group()], head)
    # Lone surrogates in names become a character reference, which browsers show as U+FFFD.
    with _finished(path) as unfinished, open(unfinished, "w", encoding="utf-8", errors="xmlcharrefreplace") as file:
        file.write(head)
        file.write(f'<script type="application/json" id="index">{island(_index(pairs, judges))}</script>\n')
        for start in range(0, len(pairs), CHUNK):
            texts = [_texts(pairs[i], i, judges, reply) for i in range(start, min(start + CHUNK, len(pairs)))]
            file.write(f'<script type="application/json" class="pairs">{island(texts)}</script>\n')
        file.write(tail)


def island(value: Any) -> str:
    r"""JSON that can stand inside a <script> element: ASCII without `<`, so nothing in it can end or begin markup.

    >>> island("</script>")
    '"\\u003c/script>"'
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def filters(judges: list[JudgeScores]) -> dict[str, np.ndarray]:
    """The page's filters, each (n_pairs,) bool.

    win, tie, loss: the outcome of pairs that are complete
    disagreement: two orders of one judge, or two judges that each are complete, with different outcomes
    failure: a unit that was asked has no verdict
    """
    outcomes = statistics.outcomes(statistics.pair_scores(judges))
    by_judge = [statistics.outcomes(statistics.pair_scores([judge])) for judge in judges]
    by_order = [statistics.outcomes(judge.scores) for judge in judges]
    disagreement = _differ(np.stack(by_judge, axis=1))
    for orders in by_order:
        disagreement |= _differ(orders)
    failure = np.any([(judge.asked & np.isnan(judge.scores)).any(axis=1) for judge in judges], axis=0)
    by_outcome = {"win": outcomes == 1, "tie": outcomes == 0, "loss": outcomes == -1}
    return {**by_outcome, "disagreement": disagreement, "failure": failure}


def _differ(outcomes: np.ndarray) -> np.ndarray:
    """outcomes: (n_pairs, k), NaN where there is none -> (n_pairs,) bool, whether two of a row are different."""
    missing = np.isnan(outcomes)
    return np.where(missing, -np.inf, outcomes).max(axis=1) > np.where(missing, np.inf, outcomes).min(axis=1)


def _index(pairs: list[Pair], judges: list[JudgeScores]) -> dict:
    """What the page filters and sorts on: an array over the pairs each; bit k of `flags` is the k-th of `filters`."""
    masks = filters(judges)
    flags = sum((mask.astype(int) << bit for bit, mask in enumerate(masks.values())), np.zeros(len(pairs), int))
    return {
        "chunk": CHUNK,
        "filters": list(masks),
        "counts": {name: int(mask.sum()) for name, mask in masks.items()},
        "judges": [{"name": judge.name, "has_positions": judge.has_positions} for judge in judges],
        "rows": [pair.row for pair in pairs],
        "scores": [_number(score) for score in statistics.pair_scores(judges)],
        "differences": [len(pair.candidate) - len(pair.baseline) for pair in pairs],
        "flags": flags.tolist(),
    }


def _texts(pair: Pair, i: int, judges: list[JudgeScores], reply: Callable[[int, int, int], str | None]) -> dict:
    """A pair with each judge's two units, None where a unit was not asked."""
    units = [
        [
            {"score": _number(judge.scores[i, order]), "reply": reply(j, i, order)} if judge.asked[i, order] else None
            for order in (0, 1)
        ]
        for j, judge in enumerate(judges)
    ]
    texts = {"prompt": pair.prompt, "candidate": pair.candidate, "baseline": pair.baseline}
    return {"row": pair.row, **texts, "human": pair.human, "judges": units}


def _number(score: float) -> float | None:
    return None if np.isnan(score) else round(float(score), 6)


def _policy(skeleton: str) -> str:
    """A Content-Security-Policy that admits the skeleton's own script and style and nothing else, from nowhere."""

    def source(tag: str) -> str:
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", skeleton, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    own = f"script-src {source('script')}; style-src {source('style')}"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


#### ITS NUMBERS


def _numbers(summary: dict, command: str) -> str:
    """The page's header: the win rate as a figure, the command, and a table of all numbers, a column for each judge."""
    judges = summary["judges"] if len(summary["judges"]) > 1 else []
    columns = [_column(part) for part in (summary, *judges)]
    rows = [f"<tr><th>{label}</th>{''.join(f'<td>{c[label]}</td>' for c in columns)}</tr>" for label in columns[0]]
    if judges:
        names = ["", "all judges", *(judge["name"] for judge in judges)]
        rows.insert(0, f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in names)}</tr>")
        across = f'<td colspan="{len(columns)}">{_agreement(summary["agreement"])}</td>'
        rows.append(f"<tr><th>Agreement of judges</th>{across}</tr>")
    table = f'<div class="panel wide" tabindex="0"><table>{"".join(rows)}</table></div>'
    made_by = f'<p class="command">Made by <code>{html.escape(command)}</code></p>'
    kind = "numbers many" if judges else "numbers"
    return f'<div class="{kind}"><div class="panel">{_headline(summary)}{made_by}</div>{table}</div>'


def _headline(summary: dict) -> str:
    """The win rate in large figures over a bar of the outcomes, with the interval as a whisker under the bar."""
    if summary["win_rate"] is None:
        return '<h2>Win rate</h2><div class="rate">–</div><p>no pair was judged</p>'
    low, high = (f"{100 * bound:.1f}" for bound in summary["interval"])
    text = f'<div class="rate">{_percent(summary["win_rate"])}</div><p>95 % interval {low} to {high} %</p>'
    counts = {"win": summary["wins"], "tie": summary["ties"], "loss": summary["losses"]}
    nouns = {"win": "wins", "tie": "ties", "loss": "losses"}
    legend = "".join(f'<li class="{name}">{n:,} {name if n == 1 else nouns[name]}</li>' for name, n in counts.items())
    return f'<h2>Win rate</h2>{text}{_bar(counts, summary)}<ul class="legend">{legend}</ul>'


def _bar(counts: dict[str, int], summary: dict) -> str:
    left, parts = 0.0, []
    for name, n in counts.items():
        width = 100 * n / sum(counts.values())
        parts.append(f'<rect class="{name}" x="{left:.3f}%" y="0" width="{width:.3f}%" height="26"/>')
        left += width
    low, high = summary["interval"]
    parts.append('<line class="half" x1="50%" x2="50%" y1="0" y2="52"/>')
    parts.append(f'<line x1="{100 * low:.3f}%" x2="{100 * high:.3f}%" y1="40" y2="40"/>')
    parts.append(f'<circle cx="{100 * summary["win_rate"]:.3f}%" cy="40" r="5"/>')
    return f'<svg class="bar" role="img" aria-label="wins, ties, losses, and the interval">{"".join(parts)}</svg>'


def _column(summary: dict) -> dict[str, str]:
    """label -> cell, of one judge or of all together."""
    controlled, position = summary["length_controlled"], summary["position"]
    share = position["first_slot_share"]
    cells = {
        "Win rate": _cell(
            _estimate(summary["win_rate"], summary["interval"]),
            _note("effective sample size {:,.1f}", summary["n_eff"]),
        ),
        "Length-controlled": _cell(
            _estimate(controlled["win_rate"], controlled["interval"]),
            controlled["reason"],
            _note("slope {:+.2f}", controlled["slope"]),
        ),
        "Wins / ties / losses": _cell(" / ".join(_count(summary[key]) for key in ("wins", "ties", "losses"))),
        "Wins among decided": _cell(
            _estimate(summary["decided_rate"], summary["decided_interval"]),
            _note("sign test p = {:.3g}", summary["sign_test_p"]),
        ),
        "Won by the first slot": _cell(_percent(share), position["reason"] if share is None else None),
        "Orders agree / differ": _cell(
            f"{_count(position['consistent'])} / {_count(position['inconsistent'])}",
            _note("first slot won twice {:,}, second {:,}", position["first_twice"], position["second_twice"]),
            _note("McNemar p = {:.3g}", position["mcnemar_p"]),
            None if share is None else position["reason"],
        ),
        "Pairs judged": _cell(f"{_count(summary['n_judged'])} of {_count(summary['n_pairs'])}", *_failures(summary)),
    }
    return cells if summary["human"] is None else {**cells, "Agreement with people": _human(summary["human"])}


def _human(human: dict) -> str:
    labelled = _note("over {:,} labelled pairs", human["n"])
    kappa = _note("Cohen's kappa {:.3f}", human["kappa"])
    return _cell(_estimate(human["agreement"], human["interval"]), labelled, kappa, human["reason"])


def _failures(summary: dict) -> list[str | None]:
    if not summary["failures"]:
        return []
    worst, best = summary["bounds"] or (None, None)
    failed = _note("{:,} failed, for {:,} missing verdicts", summary["failures"], summary["failed_units"])
    return [failed, f"win rate {_percent(worst)} with these against the candidate, {_percent(best)} with these for it"]


def _agreement(agreement: dict) -> str:
    kind = {"cohen": "Cohen's kappa", "fleiss": "Fleiss' kappa", None: "kappa"}[agreement["kind"]]
    kappa = _note(kind + " {:.3f}", agreement["kappa"]) or "–"
    return _cell(kappa, _note("over {:,} pairs", agreement["n"]), agreement["reason"])


def _cell(text: str, *notes: str | None) -> str:
    return html.escape(text) + "".join(f"<small>{html.escape(note)}</small>" for note in notes if note)


def _note(template: str, *numbers: float | None) -> str | None:
    return None if None in numbers else template.format(*numbers)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}\u00a0%"  # a space that does not break


def _estimate(share: float | None, interval: list[float] | None) -> str:
    if interval is None:
        return _percent(share)
    low, high = interval
    return f"{_percent(share)} [{100 * low:.1f}, {100 * high:.1f}]"


def _count(n: int | None) -> str:
    return "–" if n is None else f"{n:,}"
