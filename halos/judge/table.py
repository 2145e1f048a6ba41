"""The results of a comparison: a table in the terminal, a line in the results file, a picture and a page.

`table` is what people read first; `line` is what programs read. The numbers come from statistics.py, and outputs.py
writes the files.
"""

import csv
import json
import math
from collections.abc import Callable
from datetime import datetime

import numpy as np

from halos import secrets
from halos.judge import figure, outputs, statistics
from halos.judge.judges import JudgeScores
from halos.judge.page import estimate, write_html
from halos.judge.samples import VERDICT_COLUMNS, Pair, lengths
from halos.judge.settings import Settings

#### THE TABLE


def table(summary: dict, candidate: str, baseline: str) -> str:
    """Format the main numbers, one per line, each with its uncertainty or the reason why it is missing.

    candidate, baseline: names of the two sides
    """
    rows = [
        (f"{candidate} against {baseline}", f"{summary['n_judged']} of {summary['n_pairs']} prompts judged"),
        ("win rate", _rate(summary["win_rate"], summary["interval"], f"n_eff {summary['n_eff'] or 0:.1f}")),
        ("  length-controlled", _controlled(summary["length_controlled"])),
        ("wins / losses / ties", "{wins} / {losses} / {ties}".format(**summary)),
        ("  of the decided", _rate(summary["decided_rate"], summary["decided_interval"], _p(summary["sign_test_p"]))),
        ("position", _position(summary["position"])),
    ]
    if summary["failures"]:
        worst, best = (f"{100 * bound:.1f}" for bound in summary["bounds"])
        rows.append(("failures", f"{summary['failures']} prompts; with them the win rate is in [{worst}, {best}] %"))
    if len(summary["judges"]) > 1:
        rows += [(f"  {one['name']}", _judge(one)) for one in summary["judges"]]
        rows.append(("judges' agreement", _kappa(summary["agreement"])))
    if summary["human"]:
        human = summary["human"]
        rows.append(("human agreement", f"{estimate(human['agreement'], human['interval'])}; {_kappa(human)}"))
    if "calls" in summary:
        rows.append(("calls", _calls(summary["calls"])))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows).replace("\u00a0", " ")


def _rate(rate: float | None, interval: list[float] | None, note: str = "") -> str:
    return estimate(rate, interval) + f"  {note}" * (rate is not None and bool(note))


def _p(p: float | None) -> str:
    return "" if p is None else f"sign test p = {p:.3g}"


def _controlled(fit: dict) -> str:
    return estimate(fit["win_rate"], fit["interval"]) + (f" ({fit['reason']})" if fit["reason"] else "")


def _position(position: dict) -> str:
    if position["first_slot_share"] is None:
        return f"– ({position['reason']})"
    text = f"the first slot won {100 * position['first_slot_share']:.1f} % of the decided verdicts"
    if position["mcnemar_p"] is not None:
        n = position["inconsistent"] + position["consistent"]
        text += f"; {position['inconsistent']} of {n} pairs inconsistent (McNemar p = {position['mcnemar_p']:.3g})"
    return text


def _judge(one: dict) -> str:
    return f"{estimate(one['win_rate'], one['interval'])}  {one['wins']} / {one['losses']} / {one['ties']}"


def _kappa(agreement: dict) -> str:
    if agreement["kappa"] is None:
        return f"no kappa ({agreement['reason']})"
    name = {"fleiss": "Fleiss'"}.get(agreement.get("kind", ""), "Cohen's")
    return f"{name} kappa {agreement['kappa']:.3f} over {agreement['n']} prompts"


def _calls(calls: dict) -> str:
    tokens_in, tokens_out = calls["tokens"]
    text = f"{calls['answers']} answered, {tokens_in:,} + {tokens_out:,} tokens"
    text += f", ${calls['cost']:.4f}" if calls["cost"] is not None else ""
    return text + f"; {calls['possibly_billed']} possibly billed without an answer" * bool(calls["possibly_billed"])


#### FILES


def line(settings: Settings, pairs: list[Pair], summary: dict) -> dict:
    """Make a line of the results file: the keys of the original script, then those of `summary`.

    `total` and the wins count judged pairs; `lengths` are in words, one number per pair.
    """

    def side(key: str, file: str, wins: int, texts: list[str]) -> dict:
        return {"name": key, "wins": wins, "lengths": [len(text.split()) for text in texts], "file": file}

    ours, theirs = [pair.candidate for pair in pairs], [pair.baseline for pair in pairs]
    kept = ("judge_kind", "mode", "template", "order", "max_comp", "base_url", "length_anchor")
    return {
        "date": str(datetime.now()),
        "total": summary["n_judged"],
        "seed": settings.seed,
        "expname": settings.file,
        "candidate": side(settings.candidate_key, settings.file, summary["wins"], ours),
        "baseline": side(settings.baseline, settings.file2 or settings.file, summary["losses"], theirs),
        **summary,
        "settings": secrets.redacted({name: getattr(settings, name) for name in kept}),
    }


def write_all(
    settings: Settings,
    pairs: list[Pair],
    scores: list[JudgeScores],
    summary: dict,
    reply: Callable[[int, int, int], str | None],
    command: str,
) -> None:
    """Write verdicts, picture and page, if wanted, and then the line, and say what was written.

    An earlier file of these three is renamed. No line is written if more verdicts are missing than `max_fail` allows,
    as with --stats_only before the end of a comparison.
    reply, command: see `page.write_html`
    """
    title = f"{settings.file}: {settings.candidate_key} against {settings.baseline}"
    ours, theirs = lengths(pairs)
    if settings.verdicts:
        _write_verdicts(settings.verdicts, pairs, statistics.pair_scores(scores))
    if settings.plot:
        figure.plot(settings.plot, title, summary, statistics.pair_scores(scores), ours - theirs)
    if settings.report:
        write_html(settings.report, title, summary, pairs, scores, reply, secrets.redact(command))
    complete = summary["failed_units"] <= settings.max_fail * sum(int(one.asked.sum()) for one in scores)
    if complete:
        outputs.append(settings.results_file, json.dumps(line(settings, pairs, summary)) + "\n")
    else:
        print(f"{summary['failed_units']} verdicts are missing: no line is added to {settings.results_file}")
    others = (settings.verdicts, settings.plot, settings.report)
    written = [path for path in (settings.results_file if complete else None, *others) if path]
    print(f"written to {', '.join(written)}" if written else "nothing was written")


def _write_verdicts(path: str, pairs: list[Pair], scores: np.ndarray) -> None:
    """Write a csv with a line per pair, which `samples.read_verdicts` reads. No preference: a verdict is missing."""
    with outputs.written(path) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("row", *VERDICT_COLUMNS))
        for pair, score in zip(pairs, scores.tolist(), strict=True):
            writer.writerow((pair.row, len(pair.candidate), len(pair.baseline), "" if math.isnan(score) else score))
