"""Units."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from halos.judge.journal import Journal
from halos.judge.judges import Judge, JudgeScores
from halos.judge.samples import Pair, orders

BYTES_PER_TOKEN = 4  # of English; for estimates


@dataclass(frozen=True, slots=True)
class Unit:
    """judge, pair: indices. order: 0 shows the candidate first. size: bytes of the request's texts."""

    judge: int
    pair: int
    order: int
    key: str
    size: int


def units_of(pairs: list[Pair], judges: list[Judge], both_orders: bool, seed: int) -> list[Unit]:
    """Pair by pair, so that a run that was stopped has whole pairs."""
    units = []
    for p, pair in enumerate(pairs):
        for j, judge in enumerate(judges):
            for order in orders(pair, both_orders, seed) if judge.has_positions else (0,):
                request = judge.request(pair, order)
                units.append(Unit(j, p, order, judge.key(request), judge.size(request)))
    return units


def distinct(units: Iterable[Unit]) -> list[Unit]:
    """One unit per key: two equal responses give the same request in both orders."""
    return list({unit.key: unit for unit in units}.values())


def missing(units: list[Unit], journal: Journal) -> list[Unit]:
    """What is still to be asked."""
    return distinct(unit for unit in units if not journal.entry(unit.key).final)


def scores_of(pairs: list[Pair], judges: list[Judge], units: list[Unit], journal: Journal) -> list[JudgeScores]:
    """What the journal holds, as arrays over pairs."""
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
    """(judge, pair, order) -> the raw text of the last reply, or why there is none."""
    keys = {(unit.judge, unit.pair, unit.order): unit.key for unit in units}

    def reply(judge: int, pair: int, order: int) -> str | None:
        key = keys.get((judge, pair, order))
        if key is None:
            return None
        said, entry = journal.reply(key), journal.entry(key)
        return "\n\n".join(text for text in (entry.failed or entry.error, said and said.text) if text) or None

    return reply


def billing(judges: list[Judge], units: list[Unit], journal: Journal) -> dict:
    """What this comparison took, in all its runs: answers, tokens, US dollars, calls possibly billed."""
    entries = [journal.entry(unit.key) for unit in distinct(units)]
    return {
        "answers": sum(entry.answers for entry in entries),
        "tokens": [sum(entry.tokens[side] for entry in entries) for side in (0, 1)],
        "cost": round(spent(judges, units, journal), 6) if any(judge.price for judge in judges) else None,
        "possibly_billed": sum(entry.possibly_billed for entry in entries),
    }


def candidate_score(first_slot: float, order: int) -> float:
    return 1 - first_slot if order else first_slot


def plan(judges: list[Judge], units: list[Unit], journal: Journal) -> str:
    """What is to be done, and what it will cost, a line for each judge; and what may have been billed before."""
    lines = []
    for index, judge in enumerate(judges):
        own = distinct(unit for unit in units if unit.judge == index)
        todo = missing(own, journal)
        line = f"{judge.name}: {len(own)} verdicts, {len(own) - len(todo)} in the journal, {len(todo)} to ask for"
        if judge.expected_tokens:
            tokens = sum(unit.size for unit in todo) / BYTES_PER_TOKEN
            line += f"; about {tokens:,.0f} + {len(todo) * judge.expected_tokens:,} tokens"
            cost = sum(expected_cost(unit, judge) for unit in todo)
            line += f", ${cost:.2f}" if judge.price else "; no price is known (--price IN,OUT)"
        lines.append(line)
    if journal.torn:
        lines.append(f"{journal.path}: the torn last line ({journal.torn} bytes, as a crash leaves it) was cut off")
    if journal.damaged:
        lines.append(f"{journal.path}: damaged lines were skipped: {', '.join(map(str, journal.damaged))}")
    return "\n".join(lines + possibly_billed(units, journal))


def possibly_billed(units: list[Unit], journal: Journal) -> list[str]:
    """Calls that were sent and whose answer was never seen, as where a process was killed: a line, or none."""
    keys = [unit.key for unit in distinct(units) if journal.entry(unit.key).possibly_billed]
    if not keys:
        return []
    n = sum(journal.entry(key).possibly_billed for key in keys)
    shown = ", ".join(key[:12] for key in keys)
    return [f"{n} earlier calls were possibly billed without an answer; keys in {journal.path}: {shown}"]


#### COST


def expected_cost(unit: Unit, judge: Judge) -> float:
    """US dollars, by the size of the texts; 0 for a judge without a price."""
    return dollars(judge, unit.size / BYTES_PER_TOKEN, judge.expected_tokens)


def largest_cost(unit: Unit, judge: Judge) -> float:
    """What a call may cost at most: text in another alphabet takes more tokens, and the output is limited."""
    return dollars(judge, unit.size / 2, judge.max_tokens)


def dollars(judge: Judge, tokens_in: float, tokens_out: float) -> float:
    price_in, price_out = judge.price or (0.0, 0.0)
    return (tokens_in * price_in + tokens_out * price_out) / 1e6


def spent(judges: list[Judge], units: list[Unit], journal: Journal) -> float:
    """What the journal's replies to these units cost, and at most what calls without a reply did."""
    total = 0.0
    for unit in distinct(units):
        entry, judge = journal.entry(unit.key), judges[unit.judge]
        total += dollars(judge, *entry.tokens) + entry.possibly_billed * largest_cost(unit, judge)
    return total
