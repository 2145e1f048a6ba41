"""Asking judges about every pair, once: units, pace, retries, cost, and how a run can end.

A unit is one pair in one order before one judge. Its key identifies the request, and the journal says what is known of
it; `judge_all` asks for what is missing. There is one retry loop (`Run.settle`), and one gate that every call passes
(halos/gate.py): it holds the number in flight, the pace, pauses that a server asked for, and the budget.
"""

import asyncio
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from halos.errors import UserError
from halos.judge.gate import Gate, Limits
from halos.judge.journal import Journal
from halos.judge.judges import Judge, Reply, Stop, Unanswerable, Unavailable
from halos.judge.samples import Pair
from halos.judge.units import (
    BYTES_PER_TOKEN,
    Unit,
    candidate_score,
    distinct,
    dollars,
    expected_cost,
    largest_cost,
    missing,
    spent,
)

MAX_TRIES = 8  # calls in a row that a server does not answer, before a unit is given up for this run
MAX_RATE_LIMITS = 100  # the same for rate limits, which say that the server is well
MAX_ASKS = 4  # replies without a verdict, before a unit has failed for good
BACKOFF = 0.5, 30.0  # seconds: the first wait, and the longest
MAX_PAUSE = 600.0  # seconds; a server that asks for a longer pause has a quota
MIN_FAILURES = 10  # before a run is stopped in its middle for them


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
