"""Asking judges about every pair, once: units, pace, retries, cost, and how a run can end.

A unit is one pair in one order before one judge. Its key identifies the request, and the journal says what is known of
it; `judge_all` asks for what is missing. There is one retry loop (`Run.settle`), and one gate that every call passes
(halos/gate.py): it holds the number in flight, the pace, pauses that a server asked for, and the budget.
"""

import asyncio
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from halos.comparisons import JudgeScores, Pair, orders
from halos.errors import UserError
from halos.gate import Gate, Limits
from halos.journal import Journal
from halos.judge import Judge, Reply, Stop, Unanswerable, Unavailable

MAX_TRIES = 8  # calls in a row that a server does not answer, before a unit is given up for this run
MAX_RATE_LIMITS = 100  # the same for rate limits, which say that the server is well
MAX_ASKS = 4  # replies without a verdict, before a unit has failed for good
BACKOFF = 0.5, 30.0  # seconds: the first wait, and the longest
MAX_PAUSE = 600.0  # seconds; a server that asks for a longer pause has a quota
MIN_FAILURES = 10  # before a run is stopped in its middle for them
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


# ---- Cost


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


# ---- The run


class Run:
    def __init__(
        self, pairs: list[Pair], judges: list[Judge], units: list[Unit], journal: Journal, limits: Limits, verbose: bool
    ):
        self.pairs, self.judges, self.units, self.journal, self.limits = pairs, judges, units, journal, limits
        self.verbose = verbose
        self.gate = Gate(limits, spent(judges, units, journal))
        self.failures: dict[str, str] = {}  # key -> reason
        self.scores: list[float] = []  # of the candidate, for the bar

    async def run(self, todo: list[Unit], bar: tqdm) -> None:
        """Settle each judge's first unit alone, for it finds out what the server takes, and then all others at once."""
        self.bar = bar
        first = list({unit.judge: unit for unit in reversed(todo)}.values())
        sync = asyncio.create_task(self.journal.sync_regularly())
        try:
            for unit in first:
                await self.judges[unit.judge].open()
            with self.signals():
                await self.work_through(first, 1)
                await self.work_through([unit for unit in todo if unit not in first], self.limits.concurrency)
        finally:
            sync.cancel()
            for judge in self.judges:
                await judge.close()
        self.gate.check()

    async def work_through(self, todo: list[Unit], n_workers: int) -> None:
        units = iter(todo)
        self.workers = [asyncio.create_task(self.work(units)) for _ in range(n_workers)]
        for ended in await asyncio.gather(*self.workers, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended

    async def work(self, todo: Iterator[Unit]) -> None:
        try:
            for unit in todo:
                self.gate.check()
                await self.settle(unit)
        except UserError as reason:  # Stop, or a journal that cannot be written
            self.gate.stop(reason)
        except Exception:
            self.gate.stop(Stop(1, "a bug"))  # which `work_through` raises in full
            raise

    async def settle(self, unit: Unit) -> None:
        """Ask until there is a verdict, or a reason to give up."""
        judge, journal = self.judges[unit.judge], self.journal
        request = judge.request(self.pairs[unit.pair], unit.order)
        reply = journal.reply(unit.key)
        errors = rate_limits = 0
        while True:
            verdict = None if reply is None else judge.verdict(reply)
            if verdict is not None:
                journal.verdict(unit.key, verdict)
                return self.settled(unit, verdict)
            if journal.entry(unit.key).answers >= MAX_ASKS:
                return self.fail(unit, f"no verdict in {MAX_ASKS} replies", final=True)
            try:
                reply = await self.ask(unit, judge, request, reply)
            except Unanswerable as error:
                return self.fail(unit, str(error), error.final)
            except Unavailable as error:
                rate_limits += error.rate_limited
                errors += not error.rate_limited
                if errors == MAX_TRIES or rate_limits == MAX_RATE_LIMITS:
                    return self.fail(unit, str(error), final=False)
                self.bar.set_postfix_str(f"trying again: {str(error)[:60]}")
                await self.gate.pause(self.wait_after(error, errors + rate_limits))

    async def ask(self, unit: Unit, judge: Judge, request, unread: Reply | None) -> Reply:
        """One call, with its lines in the journal."""
        tokens = unit.size / BYTES_PER_TOKEN + judge.max_tokens
        cost = largest_cost(unit, judge)
        attempt = self.journal.entry(unit.key).sent + 1
        async with self.gate.call(tokens, cost):
            sent_at = time.monotonic()
            row = self.pairs[unit.pair].row
            self.journal.sent(unit.key, attempt=attempt, judge=judge.name, row=row, order=unit.order)
            try:
                reply = await judge.ask(request, unread)
            except (Unavailable, Unanswerable, Stop) as error:
                billed = isinstance(error, Unavailable) and error.billed
                self.journal.error(unit.key, str(error), billed)
                self.gate.spent += cost * billed
                if isinstance(error, Unavailable) and error.rate_limited:
                    self.gate.rate_limited(sent_at, error.retry_after)
                raise
            self.journal.got(unit.key, reply, attempt)
            self.gate.spent += dollars(judge, *reply.usage) if reply.usage else expected_cost(unit, judge)
            if reply.broken:
                raise Unavailable(f"the answer is no chat completion: {reply.text[:80]!r}")
            self.gate.answered()
            return reply

    def wait_after(self, error: Unavailable, n: int) -> float:
        """Seconds: what the server asks for, or exponential backoff with full jitter."""
        if error.retry_after is not None and error.retry_after > MAX_PAUSE:
            raise Stop(3, f"{error}: the server asks to wait {error.retry_after:.0f} s; run the command again then")
        first, longest = BACKOFF
        jitter = random.uniform(0, min(longest, first * 2**n))
        if error.rate_limited and error.retry_after is not None:
            return 0.0  # the gate holds everyone
        return max(error.retry_after or 0.0, jitter)

    def settled(self, unit: Unit, verdict: float) -> None:
        score = candidate_score(verdict, unit.order)
        self.scores.append(score)
        if self.verbose:
            pair, first = self.pairs[unit.pair], ("candidate", "baseline")[unit.order]
            name = self.judges[unit.judge].name
            self.bar.write(f"row {pair.row}, {first} first, {name}: {score:g} for the candidate")
        self.show()

    def fail(self, unit: Unit, reason: str, final: bool) -> None:
        """final: it is written down as unanswerable; otherwise another run asks again."""
        if final:
            self.journal.failed(unit.key, reason)
        self.failures[unit.key] = reason
        self.show()
        if len(self.failures) > max(MIN_FAILURES, self.limits.max_fail * len(self.units)):
            raise self.too_many_failures(self.failures)

    def check_failures(self) -> None:
        """At the end: those of earlier runs that are final count too."""
        earlier = {unit.key: self.journal.entry(unit.key).failed for unit in self.units}
        failures = {key: reason for key, reason in earlier.items() if reason} | self.failures
        if len(failures) > self.limits.max_fail * len(self.units):
            raise self.too_many_failures(failures)

    def too_many_failures(self, failures: dict[str, str]) -> Stop:
        *_, last = failures.values()
        return Stop(
            4,
            f"{len(failures)} of {len(self.units)} verdicts failed, more than --max_fail {self.limits.max_fail:g}; "
            f"the last: {last}; run the command again to ask for what is missing, or allow more",
        )

    def show(self) -> None:
        parts = [f"win rate {100 * sum(self.scores) / len(self.scores):.1f} %"] if self.scores else []
        if any(judge.price for judge in self.judges):
            parts.append(f"${self.gate.spent:.2f}")
        self.bar.set_postfix_str(", ".join(parts), refresh=False)
        self.bar.update()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C lets the calls in flight end, for they are paid; a second one drops them."""
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            if self.gate.reason is None:
                self.gate.stop(Stop(130, "interrupted; run the same command again to go on, nothing is paid twice"))
                self.bar.write(f"waiting for {self.gate.in_flight} calls in flight; Ctrl-C again drops them")
            else:
                for worker in self.workers:
                    worker.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def judge_all(
    pairs: list[Pair], judges: list[Judge], units: list[Unit], journal: Journal, limits: Limits, verbose: bool = False
) -> None:
    """Ask for every verdict that the journal lacks. Raises Stop where that did not come to its end."""
    run = Run(pairs, judges, units, journal, limits, verbose)
    todo, total = missing(units, journal), len(distinct(units))
    bar = tqdm(total=total, initial=total - len(todo), desc="judging", unit="call", dynamic_ncols=True, mininterval=0.5)
    with bar:
        asyncio.run(run.run(todo, bar))
    run.check_failures()
