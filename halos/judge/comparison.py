"""One comparison from its settings to its numbers: read pairs, make judges, ask them, compute and write the results.

`compare` is the whole of compare.py behind its flags. `make_judges` decides what each --judge is; change it to add a
kind of judge.
"""

import os

from halos import secrets
from halos.errors import UserError
from halos.judge.chat import ChatJudge, published_price
from halos.judge.functions import FunctionJudge, is_python
from halos.judge.journal import Journal
from halos.judge.judges import Judge
from halos.judge.prompts import PromptTemplate, load_template
from halos.judge.reward import PREFIX, RewardJudge
from halos.judge.run import judge_all
from halos.judge.samples import Pair, lengths, read_pairs, read_verdicts, sample_pairs
from halos.judge.servers import OPENAI_URL, check_address, find_key
from halos.judge.settings import Settings
from halos.judge.units import billing, plan, replies_of, scores_of, units_of


def compare(settings: Settings, command: str | None = None) -> dict:
    """Judge every pair that has no verdict yet, write the results, and return them.

    command: what the page shows as its origin; by default the call of this function
    Returns the summary of `statistics.summarize` with "calls" of `units.billing`; an empty one with dry_run.
    Raises UserError (its `code` is the exit code of compare.py) for bad input, and Stop for a run that has not ended.
    Works in a notebook too, where an event loop is running already. No secret is in what it writes, shows or raises.
    """
    with secrets.kept(settings.base_url):
        return _compare(settings, command or _call(settings))


def _compare(settings: Settings, command: str) -> dict:
    from halos.judge import feedback, outputs, statistics, table  # scipy takes a while to import

    pairs = _pairs_of(settings)
    anchor = read_verdicts(settings.length_anchor) if settings.length_anchor else None
    judges = make_judges(settings)
    outputs.check_paths(settings)
    units = units_of(pairs, judges, settings.order == "both", settings.seed)
    with Journal(settings.journal_directory, read_only=settings.dry_run or settings.stats_only) as journal:
        print(plan(judges, units, journal), flush=True)
        if settings.dry_run:
            return {}
        if not settings.stats_only:
            judge_all(pairs, judges, units, journal, settings)
        scores = scores_of(pairs, judges, units, journal)
        summary = statistics.summarize(scores, *lengths(pairs), [pair.human for pair in pairs], anchor)
        summary["calls"] = billing(judges, units, journal)
        print(table.table(summary, settings.candidate_key, settings.baseline))
        table.write_all(settings, pairs, scores, summary, replies_of(units, journal), command)
        if settings.export_feedback:
            feedback.export_feedback(settings.export_feedback, pairs, statistics.pair_scores(scores))
    return summary


def _pairs_of(settings: Settings) -> list[Pair]:
    keys = settings.candidate_key, settings.baseline, settings.history_key, settings.human
    pairs = sample_pairs(read_pairs(settings.file, *keys, settings.file2), settings.max_comp, settings.seed)
    n_prompts = len({pair.prompt for pair in pairs})
    if n_prompts < len(pairs):
        print(f"{len(pairs)} pairs of {n_prompts} prompts: intervals count pairs as independent, and may be too narrow")
    return pairs


def _call(settings: Settings) -> str:
    """The call of `compare` as Python, with the settings that are not the defaults."""
    return f"compare(Settings({', '.join(f'{name}={value!r}' for name, value in settings.changed().items())}))"


#### JUDGES


def make_judges(settings: Settings) -> list[Judge]:
    """One judge per name in `settings.judge`. Raises UserError if one lacks anything, before any call."""
    template = load_template(settings.template)
    check_address(settings.base_url or OPENAI_URL)
    prices: list[tuple[float, float] | None] = [*settings.price] or [None]
    prices = prices * len(settings.judge) if len(prices) == 1 else prices
    return [_make_judge(name, price, template, settings) for name, price in zip(settings.judge, prices, strict=True)]


def _make_judge(name: str, price: tuple[float, float] | None, template: PromptTemplate, settings: Settings) -> Judge:
    if is_python(name):
        return FunctionJudge(name, scores=settings.judge_kind == "score")
    if name.startswith(PREFIX):
        return RewardJudge(name)
    if settings.judge_kind == "score":
        raise UserError(
            f"--judge_kind score is for Python functions, and --judge {name} is a model; give pkg.module:function"
        )
    base_url = check_address(settings.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL)
    price = price or published_price(name, base_url)
    if settings.max_cost is not None and price is None:
        raise UserError(f"--max_cost {settings.max_cost:g}: no price of {name} is known; give --price IN,OUT")
    api_key = find_key(base_url)
    if not api_key and base_url == OPENAI_URL and not (settings.dry_run or settings.stats_only):
        remedy = "set it, or give the --base_url of another server, or a Python function as --judge"
        raise UserError(f"--judge {name}: OPENAI_API_KEY is not set; {remedy}")
    return ChatJudge(
        name, settings.mode, template, base_url, api_key or "none", price, settings.concurrency, settings.timeout
    )
