"""The page of --report: the numbers of a comparison, and a browser of its pairs with every verdict and raw reply.

The numbers come from statistics.py. Layout, style and behaviour of the page are in page.html; change `_column`
to show another number.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from halos.judge import statistics
from halos.judge.judges import JudgeScores
from halos.judge.outputs import written
from halos.judge.samples import Pair

SKELETON = Path(__file__).with_name("page.html")
CHUNK = 100  # pairs in one island of data; the page parses a whole island to show one of its pairs


def write_html(
    path: str,
    title: str,
    summary: dict,
    pairs: list[Pair],
    judges: list[JudgeScores],
    reply: Callable[[int, int, int], str | None],
    command: str,
) -> None:
    """Write one self-contained page: the numbers of `summary`, and all pairs with every verdict and raw reply.

    summary: as `statistics.summarize` returns it
    reply: (judge, pair, order) -> raw text of the reply, or why there is none, or None; order 0 shows the candidate
        first. Called once per unit that was asked, pair by pair, while the page is being written.
    command: shown as the origin of the results

    Texts are never part of the markup. They are JSON in <script> islands of `CHUNK` pairs. The page's own script parses
    them on demand and shows them through textContent. The Content-Security-Policy admits that one script, by its hash.
    The page is written island by island, so that memory does not grow with the texts.
    """
    skeleton = SKELETON.read_text(encoding="utf-8")
    blanks = {
        "<!--POLICY-->": _policy(skeleton),
        "<!--TITLE-->": html.escape(title),
        "<!--NUMBERS-->": _numbers(summary, command),
    }
    head, tail = skeleton.split("<!--DATA-->")
    # Values are escaped, so that no value contains the mark of another one.
    head = re.sub("|".join(blanks), lambda mark: blanks[mark.group()], head)
    # Lone surrogates in names become character references, which browsers show as U+FFFD.
    with written(path) as unfinished, open(unfinished, "w", encoding="utf-8", errors="xmlcharrefreplace") as file:
        file.write(head)
        file.write(f'<script type="application/json" id="index">{island(_index(pairs, judges))}</script>\n')
        for start in range(0, len(pairs), CHUNK):
            texts = [_texts(pairs[i], i, judges, reply) for i in range(start, min(start + CHUNK, len(pairs)))]
            file.write(f'<script type="application/json" class="pairs">{island(texts)}</script>\n')
        file.write(tail)


def island(value: Any) -> str:
    r"""Write JSON for the inside of a <script> element: ASCII without `<`, so that nothing in it begins or ends markup.

    >>> island("</script>")
    '"\\u003c/script>"'
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def filters(judges: list[JudgeScores]) -> dict[str, np.ndarray]:
    """Compute the page's filters, name -> (n_pairs,) bool.

    win, tie, loss: the outcome of pairs with all their verdicts
    disagreement: two orders of one judge, or two judges with all their verdicts, have different outcomes
    failure: a verdict that was asked for is missing
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
    """Find the rows of (n_pairs, k) outcomes, NaN if missing, in which two differ: (n_pairs,) bool."""
    missing = np.isnan(outcomes)
    return np.where(missing, -np.inf, outcomes).max(axis=1) > np.where(missing, np.inf, outcomes).min(axis=1)


def _index(pairs: list[Pair], judges: list[JudgeScores]) -> dict:
    """Collect what the page filters and sorts on, as arrays over pairs. Bit k of `flags` is the k-th of `filters`."""
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
    """Collect the texts of a pair, and each judge's verdict and reply in both orders; None where it was not asked."""
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
    """Make a Content-Security-Policy that admits the skeleton's own script and style, and nothing else."""

    def source(tag: str) -> str:
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", skeleton, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    own = f"script-src {source('script')}; style-src {source('style')}"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


#### THE NUMBERS ON THE PAGE


def _numbers(summary: dict, command: str) -> str:
    """Make the page's header: the win rate, the command, and a table of all numbers with a column per judge."""
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
    """Make the win rate in large figures, and a bar of the outcomes with the interval as a whisker under it."""
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
    """Make the cells {label: HTML} of one judge, or of all judges together."""
    controlled, position = summary["length_controlled"], summary["position"]
    share = position["first_slot_share"]
    cells = {
        "Win rate": _cell(
            estimate(summary["win_rate"], summary["interval"]),
            _note("effective sample size {:,.1f}", summary["n_eff"]),
        ),
        "Length-controlled": _cell(
            estimate(controlled["win_rate"], controlled["interval"]),
            controlled["reason"],
            _note("slope {:+.2f}", controlled["slope"]),
        ),
        "Wins / ties / losses": _cell(" / ".join(_count(summary[key]) for key in ("wins", "ties", "losses"))),
        "Wins among decided": _cell(
            estimate(summary["decided_rate"], summary["decided_interval"]),
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
    return _cell(estimate(human["agreement"], human["interval"]), labelled, kappa, human["reason"])


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
    return "–" if share is None else f"{100 * share:.1f}\u00a0%"  # a no-break space


def estimate(share: float | None, interval: list[float] | None) -> str:
    """Format a share and its interval, both in [0, 1], in percent with no-break spaces; None becomes a dash."""
    if interval is None:
        return _percent(share)
    low, high = interval
    return f"{_percent(share)} [{100 * low:.1f}, {100 * high:.1f}]"


def _count(n: int | None) -> str:
    return "–" if n is None else f"{n:,}"
