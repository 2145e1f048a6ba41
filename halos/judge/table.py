"""What a comparison leaves: a table for the terminal, a line in the results file, a picture, and a page."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from datetime import datetime

from halos.errors import UserError
from halos.files import make_room
from halos.judge import figure, statistics
from halos.judge.judges import JudgeScores
from halos.judge.page import estimate, write_html
from halos.judge.samples import Pair, lengths


def check_paths(args: argparse.Namespace) -> None:
    """Before anything is paid: the results file, --plot and --report can be written."""
    for flag in ("results_file", "plot", "report"):
        path = getattr(args, flag)
        if path is None:
            continue
        directory = os.path.dirname(path) or "."
        try:
            os.makedirs(directory, exist_ok=True)
        except OSError as error:
            raise UserError(f"--{flag} {path}: {error.strerror}; give a path that can be written") from error
        if os.path.isdir(path) or not os.access(path if os.path.exists(path) else directory, os.W_OK):
            raise UserError(f"--{flag} {path} is no file that can be written; give another path")


# ---- The table


def table(summary: dict, candidate: str, baseline: str) -> str:
    """The numbers that a person wants first, one a line, each with its uncertainty or the reason why it is missing."""
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


# ---- Files


def line(args: argparse.Namespace, pairs: list[Pair], summary: dict) -> dict:
    """A line of the results file: the keys of the original script, and `summary` beside them.

    `total` and the wins count pairs that were judged; `lengths` are words, one number per sample.
    """

    def side(key: str, file: str, wins: int, texts: list[str]) -> dict:
        return {"name": key, "wins": wins, "lengths": [len(text.split()) for text in texts], "file": file}

    settings = ("judge_kind", "mode", "template", "order", "max_comp", "base_url")
    return {
        "date": str(datetime.now()),
        "total": summary["n_judged"],
        "seed": args.seed,
        "expname": args.file,
        "candidate": side(args.candidate_key, args.file, summary["wins"], [pair.candidate for pair in pairs]),
        "baseline": side(
            args.baseline_key, args.file2 or args.file, summary["losses"], [pair.baseline for pair in pairs]
        ),
        **summary,
        "settings": {name: getattr(args, name) for name in settings},
    }


def write_all(
    args: argparse.Namespace,
    pairs: list[Pair],
    scores: list[JudgeScores],
    summary: dict,
    reply: Callable[[int, int, int], str | None],
) -> None:
    """The picture and the page, where they are wanted, and then the line, unless --stats_only finds verdicts missing.

    An earlier picture or page is set aside.
    """
    title = f"{args.file}: {args.candidate_key} against {args.baseline_key}"
    ours, theirs = lengths(pairs)
    if args.plot:
        make_room(args.plot)
        figure.plot(args.plot, title, summary, statistics.pair_scores(scores), ours - theirs)
    if args.report:
        make_room(args.report)
        command = shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])
        write_html(args.report, title, summary, pairs, scores, reply, command)
    complete = summary["failed_units"] <= args.max_fail * sum(int(one.asked.sum()) for one in scores)
    if complete:
        with open(args.results_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line(args, pairs, summary)) + "\n")
    else:
        print(f"{summary['failed_units']} verdicts are missing: no line is added to {args.results_file}")
    written = [path for path in (args.results_file if complete else None, args.plot, args.report) if path]
    print(f"written to {', '.join(written)}" if written else "nothing was written")
