"""Units: what is to be judged, what the journal knows of it, and what it costs.

A unit is one pair in one order before one judge. Its key identifies the request to the judge; the journal keeps calls
and verdicts under that key. Everything here is a function of the units and the journal, and makes no call.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from halos import secrets
from halos.judge.journal import Journal
from halos.judge.judges import Judge, JudgeScores
from halos.judge.samples import Pair, orders

BYTES_PER_TOKEN = 4  # of English text; for estimates
MOST_DAMAGED = 20  # damaged lines of the journal that are named


@dataclass(frozen=True, slots=True)
class Unit:
    """One pair in one order before one judge.

    judge, pair: indices; order: 0 shows the candidate first, 1 the baseline; size: bytes of the request's texts
    """

    judge: int
    pair: int
    order: int
    key: str
    size: int


def units_of(pairs: list[Pair], judges: list[Judge], both_orders: bool, seed: int) -> list[Unit]:
    """List all units pair by pair, so that a stopped run leaves whole pairs."""
    units = []
    for p, pair in enumerate(pairs):
        for j, judge in enumerate(judges):
            for order in orders(pair, both_orders, seed) if judge.has_positions else (0,):
                request = judge.request(pair, order)
                units.append(Unit(j, p, order, judge.key(request), judge.size(request)))
    return units


def distinct(units: Iterable[Unit]) -> list[Unit]:
    """Keep one unit per key. If both responses of a pair are equal, its two orders have the same key."""
    return list({unit.key: unit for unit in units}.values())


def missing(units: list[Unit], journal: Journal) -> list[Unit]:
    """List the units, one per key, that have neither a verdict nor a final failure."""
    return distinct(unit for unit in units if not journal.entry(unit.key).final)


def candidate_score(first_slot: float, order: int) -> float:
    """Turn the score of the first slot into the candidate's."""
    return 1 - first_slot if order else first_slot


def scores_of(pairs: list[Pair], judges: list[Judge], units: list[Unit], journal: Journal) -> list[JudgeScores]:
    """Collect the verdicts in the journal as arrays over pairs, one JudgeScores per judge."""
    everyone = [
        JudgeScores(judge.name, np.full((len(pairs), 2), np.nan), np.zeros((len(pairs), 2), bool), judge.has_positions)
        for judge in judges
    ]
    for unit in units:
        said = everyone[unit.judge]
        said.asked[unit.pair, unit.order] = True
        score = journal.entry(unit.key).score
        if score is not None:
            said.scores[unit.pair, unit.order] = candidate_score(score, unit.order)
    return everyone


def replies_of(units: list[Unit], journal: Journal) -> Callable[[int, int, int], str | None]:
    """Make a function (judge, pair, order) -> raw text of the last reply, after the reason for a failure.

    It returns None for a unit that was not asked, and for one of which nothing is known.
    """
    keys = {(unit.judge, unit.pair, unit.order): unit.key for unit in units}

    def reply(judge: int, pair: int, order: int) -> str | None:
        key = keys.get((judge, pair, order))
        if key is None:
            return None
        said, entry = journal.reply(key), journal.entry(key)
        texts = (entry.failed or entry.error, said and said.text)
        return secrets.redact("\n\n".join(text for text in texts if text)) or None  # journals may be older than secrets

    return reply


def plan(judges: list[Judge], units: list[Unit], journal: Journal) -> str:
    """Say what is to be asked and its expected cost, one line per judge; then what is odd in the journal."""
    lines = [_plan_line(judge, [unit for unit in units if unit.judge == j], journal) for j, judge in enumerate(judges)]
    if journal.torn:
        lines.append(f"{journal.path}: the torn last line ({journal.torn} bytes, as a crash leaves it) was cut off")
    if journal.damaged:
        shown = [f"line {number} ({problem})" for number, problem in [*journal.damaged.items()][:MOST_DAMAGED]]
        more = f", and {len(journal.damaged) - MOST_DAMAGED} more" * (len(journal.damaged) > MOST_DAMAGED)
        lines.append(f"{journal.path}: damaged lines are not used: {', '.join(shown)}{more}")
    return "\n".join(lines + possibly_billed(units, journal))


def _plan_line(judge: Judge, units: list[Unit], journal: Journal) -> str:
    own, todo = distinct(units), missing(units, journal)
    line = f"{judge.name}: {len(own)} verdicts, {len(own) - len(todo)} in the journal, {len(todo)} to ask for"
    if judge.expected_tokens:
        tokens = sum(unit.size for unit in todo) / BYTES_PER_TOKEN
        line += f"; about {tokens:,.0f} + {len(todo) * judge.expected_tokens:,} tokens"
        cost = sum(expected_cost(unit, judge) for unit in todo)
        line += f", ${cost:.2f}" if judge.price else "; no price is known (--price IN,OUT)"
    return line


#### COST


def billing(judges: list[Judge], units: list[Unit], journal: Journal) -> dict:
    """Sum up all runs of this comparison: {answers, tokens: [in, out], cost: US dollars or None, possibly_billed}."""
    entries = [journal.entry(unit.key) for unit in distinct(units)]
    return {
        "answers": sum(entry.answers for entry in entries),
        "tokens": [sum(entry.tokens[side] for entry in entries) for side in (0, 1)],
        "cost": round(spent(judges, units, journal), 6) if any(judge.price for judge in judges) else None,
        "possibly_billed": sum(entry.possibly_billed for entry in entries),
    }


def possibly_billed(units: list[Unit], journal: Journal) -> list[str]:
    """List, in one line or none, calls that may have been billed without an answer, as when a process was killed."""
    keys = [unit.key for unit in distinct(units) if journal.entry(unit.key).possibly_billed]
    if not keys:
        return []
    n = sum(journal.entry(key).possibly_billed for key in keys)
    shown = ", ".join(key[:12] for key in keys)
    return [f"{n} earlier calls were possibly billed without an answer; keys in {journal.path}: {shown}"]


def spent(judges: list[Judge], units: list[Unit], journal: Journal) -> float:
    """US dollars that these units have cost so far; a call without an answer counts with its largest cost."""
    total = 0.0
    for unit in distinct(units):
        entry, judge = journal.entry(unit.key), judges[unit.judge]
        total += dollars(judge, *entry.tokens) + entry.possibly_billed * largest_cost(unit, judge)
    return total


def expected_cost(unit: Unit, judge: Judge) -> float:
    """US dollars for one call, estimated from the size of its texts; 0 for a judge without a price."""
    return dollars(judge, unit.size / BYTES_PER_TOKEN, judge.expected_tokens)


def largest_cost(unit: Unit, judge: Judge) -> float:
    """US dollars for one call at most. Texts in other alphabets take more tokens per byte; the reply has a limit."""
    return dollars(judge, unit.size / 2, judge.max_tokens)


def dollars(judge: Judge, tokens_in: float, tokens_out: float) -> float:
    price_in, price_out = judge.price or (0.0, 0.0)
    return (tokens_in * price_in + tokens_out * price_out) / 1e6
