"""Win rates from a judge, with their uncertainty: which of two responses to a prompt is better?

    python compare.py -f samples/kto_llama7b.json -mc 512 -bk chosen -ck policy -r result.jsonl

The file is what eval.py wrote. The judge is a model behind an OpenAI-compatible server (OPENAI_API_KEY, --base_url), or
a Python function. If a command was stopped, run it again to go on: docs/judging.md.
"""

import argparse
import os
import shlex
import sys

from halos import secrets
from halos.commands import FlagParser, boolean, report_user_errors
from halos.judge import Settings, compare
from halos.judge.settings import CHOICES


def parser() -> FlagParser:
    """The flags. A flag that is not given keeps the default of its field in Settings."""
    flags = FlagParser(description=__doc__, argument_default=argparse.SUPPRESS)
    add = flags.add_argument_group("what is compared").add_argument
    add("-f", "--file", required=True, help="samples: the .json that eval.py writes, .jsonl, or .parquet")
    add("-f2", "--file2", help="take the baseline of each prompt from this file")
    add("-ck", "--candidate_key", help="key of the response that is tested (policy)")
    add("-bk", "--baseline_key", help="key of the one it is compared with (reference; with -f2 the candidate's)")
    add("-hk", "--history_key", help="key of the prompt; messages of a row stand in for its prompt (prompt)")
    add("-mc", "--max_comp", type=int, help="compare a seeded sample of this many prompts (all)")
    add("-s", "--seed", type=int, help="of the sample, and of the order with --order one (0)")
    add("--human", metavar="KEY", help="key with a person's choice: candidate, baseline or tie")

    words = "verdicts on rewrites of the baseline's own responses, a file of --verdicts; may be given several times"
    add("--length_anchor", action="append", metavar="CSV", help=words)

    add = flags.add_argument_group("who judges, and how").add_argument
    add(
        "--judge",
        action="append",
        metavar="NAME",
        help="a model, pkg.module:function, or reward:DIR; several may be given",
    )
    add("--judge_kind", choices=CHOICES["judge_kind"], help="what a Python function judges (pairwise)")
    add("--base_url", help="of an OpenAI-compatible server (OPENAI_BASE_URL, or OpenAI)")
    add("--mode", choices=CHOICES["mode"], help="how the verdict is asked for (json)")
    add("--template", help="a Jinja file over prompt, first, second, fence, instruction; or pkg.module:Class")
    add("--order", choices=CHOICES["order"], help="judge each pair in both positions, or in one (both)")

    add = flags.add_argument_group("how fast, and for how much").add_argument
    add("--concurrency", type=int, help="calls in flight (32)")
    add("-st", "--sleep_time", type=float, help="least seconds between calls (0)")
    add("--rpm", type=float, help="calls per minute")
    add("--tpm", type=float, help="tokens per minute")
    add("--timeout", type=float, help="seconds for one call (60)")
    add("--price", type=price, action="append", metavar="IN,OUT", help="dollars per million tokens; one, or per judge")
    add("--max_cost", type=float, help="stop before this many dollars are spent; resumable")
    add("--max_fail", type=float, help="share of verdicts that may fail (0.01)")

    add = flags.add_argument_group("what comes out").add_argument
    add("-r", "--results_file", help="a JSON line is appended to it (results.jsonl)")
    add("--cache", metavar="DIR", help="the journal's directory (judgments/ beside the results file)")
    add("--verdicts", metavar="CSV", help="write the lengths and the preference of each pair")
    add("--plot", metavar="PNG", help="draw the results")
    add("--report", metavar="HTML", help="write a page to browse all prompts, responses and verdicts")
    add("--export_feedback", metavar="JSONL", help="write the decided pairs as training data: prompt, chosen, rejected")
    add("--dry_run", action="store_true", help="print the number of calls and their cost, and stop")
    add("--stats_only", action="store_true", help="compute the results from the journal, without any call")
    add("-v", "--verbose", type=boolean, nargs="?", const=True, help="print every verdict (false)")
    return flags


def price(text: str) -> tuple[float, float]:
    try:
        price_in, price_out = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not IN,OUT, as in 0.75,4.50") from error
    return price_in, price_out


def main(argv: list[str] | None = None) -> None:
    """Compare as the flags say. argv: the words after the program's name; by default those of this process."""
    words = sys.argv[1:] if argv is None else argv
    program = ["halos-compare"] if os.path.basename(sys.argv[0]) == "halos-compare" else ["python", "compare.py"]
    with report_user_errors(), secrets.kept(*words):
        flags = vars(parser().parse_args(words))
        lists = {name: tuple(value) for name, value in flags.items() if isinstance(value, list)}
        compare(Settings(**{**flags, **lists}), command=shlex.join([*program, *words]))


if __name__ == "__main__":
    main()
