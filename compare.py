"""Win rates from a judge, with their uncertainty: which of two responses to a prompt is better?

    python compare.py -f samples/kto_llama7b.json -mc 512 -bk chosen -ck policy -r result.jsonl

The file is what eval.py wrote. The judge is a model behind an OpenAI-compatible server (OPENAI_API_KEY, --base_url), or
a Python function. A command that was stopped goes on where it was when it is run again: docs/unit_room.md.
"""

import argparse
import os

from halos.commands import FlagParser, boolean, positive, report_user_errors


def arguments() -> argparse.Namespace:
    parser = FlagParser(description=__doc__)
    add = parser.add_argument_group("what is compared").add_argument
    add("-f", "--file", required=True, help="samples: the .json that eval.py writes, .jsonl, or .parquet")
    add("-f2", "--file2", help="take the baseline of each prompt from this file")
    add("-ck", "--candidate_key", default="policy", help="key of the response that is tested (policy)")
    add("-bk", "--baseline_key", help="key of the one it is compared with (reference; with -f2 the candidate's)")
    add("-hk", "--history_key", default="prompt", help="key of the prompt (prompt)")
    add("-mc", "--max_comp", type=positive(int), help="compare a seeded sample of this many prompts (all)")
    add("-s", "--seed", type=int, default=0, help="of the sample, and of the order with --order one (0)")
    add("--human", metavar="KEY", help="key with a person's choice: candidate, baseline or tie")

    add = parser.add_argument_group("who judges, and how").add_argument
    add("--judge", action="append", metavar="NAME", help="a model, or pkg.module:function; several may be given")
    add("--judge_kind", choices=["pairwise", "score"], default="pairwise", help="what a Python function judges")
    add("--base_url", help="of an OpenAI-compatible server (OPENAI_BASE_URL, or OpenAI)")
    add("--mode", choices=["json", "text", "logprob"], default="json", help="how the verdict is asked for (json)")
    add("--template", help="a Jinja file over prompt, first, second, fence, instruction; or pkg.module:Class")
    add("--order", choices=["both", "one"], default="both", help="judge each pair in both positions, or in one (both)")

    add = parser.add_argument_group("how fast, and for how much").add_argument
    add("--concurrency", type=positive(int), default=32, help="calls in flight (32)")
    add("-st", "--sleep_time", type=positive(float, or_zero=True), default=0.0, help="least seconds between calls (0)")
    add("--rpm", type=positive(float), help="calls per minute")
    add("--tpm", type=positive(float), help="tokens per minute")
    add("--timeout", type=positive(float), default=60.0, help="seconds for one call (60)")
    add("--price", type=price, action="append", metavar="IN,OUT", help="dollars per million tokens; one, or per judge")
    add("--max_cost", type=positive(float), help="stop before this many dollars are spent; resumable")
    add("--max_fail", type=positive(float, or_zero=True), default=0.01, help="share of verdicts that may fail (0.01)")

    add = parser.add_argument_group("what comes out").add_argument
    add("-r", "--results_file", default="results.jsonl", help="a JSON line is appended to it (results.jsonl)")
    add("--cache", metavar="DIR", help="the journal's directory (judgments/ beside the results file)")
    add("--plot", metavar="PNG", help="draw the results")
    add("--report", metavar="HTML", help="write a page to browse all prompts, responses and verdicts")
    add("--dry_run", action="store_true", help="print the number of calls and their cost, and stop")
    add("--stats_only", action="store_true", help="compute the results from the journal, without any call")
    add("-v", "--verbose", type=boolean, nargs="?", const=True, default=False, help="print every verdict (false)")
    return parser.parse_args()


def price(text: str) -> tuple[float, float]:
    try:
        price_in, price_out = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not IN,OUT, as in 0.75,4.50") from error
    return price_in, price_out


def compare(args: argparse.Namespace) -> None:
    from halos.judge import chat, run, samples, statistics, table
    from halos.judge import units as unit_room
    from halos.judge.gate import Limits
    from halos.judge.journal import Journal

    args.baseline_key = args.baseline_key or (args.candidate_key if args.file2 else "reference")
    keys = args.candidate_key, args.baseline_key, args.history_key, args.human
    pairs = samples.sample_pairs(samples.read_pairs(args.file, *keys, args.file2), args.max_comp, args.seed)
    judges = chat.make_judges(args)
    table.check_paths(args)
    units = unit_room.units_of(pairs, judges, args.order == "both", args.seed)
    limits = Limits(**{name: getattr(args, name) for name in Limits.__dataclass_fields__})
    directory = args.cache or os.path.join(os.path.dirname(args.results_file), "judgments")
    with Journal(directory, read_only=args.dry_run or args.stats_only) as journal:
        print(unit_room.plan(judges, units, journal), flush=True)
        if args.dry_run:
            return
        if not args.stats_only:
            run.judge_all(pairs, judges, units, journal, limits, args.verbose)
        scores = unit_room.scores_of(pairs, judges, units, journal)
        summary = statistics.summarize(scores, *samples.lengths(pairs), [pair.human for pair in pairs])
        summary["calls"] = unit_room.billing(judges, units, journal)
        print(table.table(summary, args.candidate_key, args.baseline_key))
        table.write_all(args, pairs, scores, summary, unit_room.replies_of(units, journal))


if __name__ == "__main__":
    with report_user_errors():
        compare(arguments())
