"""A run: ask for every verdict that the journal lacks, with retries, failures, and Ctrl-C.

There is one retry loop, `Run.settle`, and every call passes the gate (gate.py). The constants say how often and how
long a call is tried again. A unit is described in units.py.
"""

import asyncio
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from halos import secrets
from halos.errors import UserError
from halos.judge.gate import Gate
from halos.judge.journal import NO_VERDICT, Journal
from halos.judge.judges import Judge, Reply, Stop, Unanswerable, Unavailable
from halos.judge.samples import Pair
from halos.judge.settings import Settings
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

MAX_TRIES = 8  # calls in a row without an answer, before this run gives a unit up
MAX_RATE_LIMITS = 100  # the same for rate limits, which say that the server is well
MAX_ASKS = 4  # replies without a verdict, before this run gives a unit up
BACKOFF = 0.5, 30.0  # seconds: the first wait, and the longest
MAX_PAUSE = 600.0  # seconds; a server that asks for a longer pause has a quota
MIN_FAILURES = 10  # failed units, before a run is stopped in its middle for them
SIGNALS = signal.SIGINT, signal.SIGTERM


class Run:
    """One run over the units that have no verdict yet.

    failures: key -> reason, of the units that this run gave up
    scores: the candidate's scores so far, for the progress bar
    """

    def __init__(self, pairs: list[Pair], judges: list[Judge], units: list[Unit], journal: Journal, settings: Settings):
        self.pairs, self.judges, self.units, self.journal, self.settings = pairs, judges, units, journal, settings
        self.gate = Gate(settings, spent(judges, units, journal))
        self.todo = missing(units, journal)
        self.failures: dict[str, str] = {}
        self.scores: list[float] = []
        self.workers: list[asyncio.Task] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        total = len(distinct(units))
        progress = {"total": total, "initial": total - len(self.todo), "desc": "judging", "unit": "call"}
        self.bar = tqdm(**progress, dynamic_ncols=True, mininterval=0.5)

    async def run(self) -> None:
        """Settle all units. The first unit of each judge goes alone, since its call finds out what the server takes."""
        self.loop = asyncio.get_running_loop()
        first = list({unit.judge: unit for unit in reversed(self.todo)}.values())
        sync = asyncio.create_task(self.keep_synced())
        try:
            for unit in first:
                await self.judges[unit.judge].open()
            with self.signals():
                await self.work_through(first, 1)
                await self.work_through([unit for unit in self.todo if unit not in first], self.settings.concurrency)
        finally:
            sync.cancel()
            for judge in self.judges:
                await judge.close()
        self.gate.check()

    async def keep_synced(self) -> None:
        try:
            await self.journal.sync_regularly()
        except UserError as reason:
            self.gate.stop(reason)

    async def work_through(self, todo: list[Unit], n_workers: int) -> None:
        units = iter(todo)
        self.workers = [asyncio.create_task(self.work(units)) for _ in range(n_workers)]
        for ended in await asyncio.gather(*self.workers, return_exceptions=True):
            if isinstance(ended, BaseException) and not isinstance(ended, asyncio.CancelledError):
                raise ended

    async def work(self, todo: Iterator[Unit]) -> None:
        """Settle one unit after another. A UserError stops the whole run; so does a bug, which is raised."""
        try:
            for unit in todo:
                self.gate.check()
                await self.settle(unit)
        except UserError as reason:  # Stop, or a journal that cannot be written
            self.gate.stop(reason)
        except asyncio.CancelledError:  # by a second Ctrl-C, which has given its reason; otherwise by the judge itself
            self.gate.stop(Stop(4, "a judge cancelled the task in which it was called; correct the function"))
            raise
        except BaseException:
            self.gate.stop(Stop(1, "a bug"))  # `work_through` raises the bug itself
            raise

    #### ONE UNIT

    async def settle(self, unit: Unit) -> None:
        """Ask until there is a verdict, or a reason to give up."""
        judge, journal = self.judges[unit.judge], self.journal
        request = judge.request(self.pairs[unit.pair], unit.order)
        reply = journal.reply(unit.key)
        errors = rate_limits = asked = 0
        while True:
            verdict = None if reply is None else judge.verdict(reply)
            if verdict is not None:
                journal.verdict(unit.key, verdict)
                return self.settled(unit, verdict)
            if reply is not None and asked >= MAX_ASKS:
                last = reply.note or f"{secrets.redact(reply.text)[:60]!r}"
                journal.failed(unit.key, reason := f"{NO_VERDICT}{MAX_ASKS} replies, the last: {last}", final=False)
                return self.fail(unit, reason)
            try:
                reply = await self.ask(unit, judge, request, reply)
                asked += 1
            except Unanswerable as error:
                if error.final:
                    journal.failed(unit.key, str(error), final=True)
                return self.fail(unit, str(error))
            except Unavailable as error:
                rate_limits += error.rate_limited
                errors += not error.rate_limited
                if errors == MAX_TRIES or rate_limits == MAX_RATE_LIMITS:
                    return self.fail(unit, str(error))
                self.bar.set_postfix_str(f"trying again: {str(error)[:60]}")
                await self.gate.pause(self.wait_after(error, errors + rate_limits))

    async def ask(self, unit: Unit, judge: Judge, request: Any, unread: Reply | None) -> Reply:
        """Make one call and write what came of it into the journal. Raises what `Judge.ask` raises."""
        tokens = unit.size / BYTES_PER_TOKEN + judge.max_tokens
        cost = largest_cost(unit, judge)
        attempt = self.journal.entry(unit.key).sent + 1
        async with self.gate.call(tokens, cost):
            sent_at = self.gate.clock.now()
            row = self.pairs[unit.pair].row
            self.journal.sent(unit.key, attempt=attempt, judge=judge.name, row=row, order=unit.order)
            try:
                reply = await judge.ask(request, unread)
            except (Unavailable, Unanswerable, Stop) as error:
                secrets.cleanse(error)
                self.note_error(unit, error, sent_at, cost)
                raise
            self.journal.got(unit.key, reply, attempt)
            self.gate.spent += dollars(judge, *reply.usage) if reply.usage else expected_cost(unit, judge)
            if reply.broken:
                raise Unavailable(f"the answer is not a chat completion: {secrets.redact(reply.text)[:80]!r}")
            self.gate.answered()
            return reply

    def note_error(self, unit: Unit, error: Exception, sent_at: float, cost: float) -> None:
        """Write a failed call into the journal. `cost` is counted as spent if the call may have been billed."""
        billed = isinstance(error, Unavailable) and error.billed
        self.journal.error(unit.key, str(error), billed)
        self.gate.spent += cost * billed
        if isinstance(error, Unavailable) and error.rate_limited:
            self.gate.rate_limited(sent_at, error.retry_after)

    def wait_after(self, error: Unavailable, n: int) -> float:
        """Seconds until the next try, after `n` errors: what the server asks for, or exponential, with full jitter."""
        if error.retry_after is not None and error.retry_after > MAX_PAUSE:
            raise Stop(3, f"{error}: the server asks to wait {error.retry_after:.0f} s; run the command again then")
        first, longest = BACKOFF
        jitter = random.uniform(0, min(longest, first * 2**n))
        if error.rate_limited and error.retry_after is not None:
            return 0.0  # the gate holds all calls
        return max(error.retry_after or 0.0, jitter)

    def settled(self, unit: Unit, verdict: float) -> None:
        """Show a verdict."""
        score = candidate_score(verdict, unit.order)
        self.scores.append(score)
        if self.settings.verbose:
            pair, first = self.pairs[unit.pair], ("candidate", "baseline")[unit.order]
            name = self.judges[unit.judge].name
            self.bar.write(f"row {pair.row}, {first} first, {name}: {score:g} for the candidate")
        self.show()

    #### FAILURES

    def fail(self, unit: Unit, reason: str) -> None:
        """Give a unit up in this run. Raises Stop if too many units have failed."""
        self.failures[unit.key] = reason
        self.show()
        if len(self.failures) > max(MIN_FAILURES, self.settings.max_fail * len(self.units)):
            raise self.too_many_failures(self.failures)

    def check_failures(self) -> None:
        """At the end, raise Stop if too many units have no verdict, those that failed for good earlier included."""
        entries = {unit.key: self.journal.entry(unit.key) for unit in self.units}
        failures = {key: entry.failed or "not asked" for key, entry in entries.items() if entry.score is None}
        failures |= self.failures
        if len(failures) > self.settings.max_fail * len(self.units):
            raise self.too_many_failures(failures)

    def too_many_failures(self, failures: dict[str, str]) -> Stop:
        *_, last = failures.values()
        n = sum(not self.journal.entry(key).final for key in failures)
        again = f"run the command again to ask for {n} of them again"
        remedy = again if n else "no run can repair these: leave their rows out"
        return Stop(
            4,
            f"{len(failures)} of {len(self.units)} verdicts failed, more than --max_fail {self.settings.max_fail:g}; "
            f"the last: {last}; {remedy}, or allow more",
        )

    def show(self) -> None:
        """Advance the progress bar by one unit."""
        parts = [f"win rate {100 * sum(self.scores) / len(self.scores):.1f} %"] if self.scores else []
        if any(judge.price for judge in self.judges):
            parts.append(f"${self.gate.spent:.2f}")
        self.bar.set_postfix_str(", ".join(parts), refresh=False)
        self.bar.update()

    #### CTRL-C

    def interrupt(self) -> None:
        """Stop the run: let the calls in flight end, since they are paid for. A second time, drop them."""
        if self.gate.reason is None:
            self.gate.stop(Stop(130, "interrupted; run the same command again to go on, nothing is paid twice"))
            self.bar.write(f"waiting for {self.gate.in_flight} calls in flight; Ctrl-C again drops them")
        else:
            for worker in self.workers:
                worker.cancel()

    def interrupt_from_outside(self) -> None:
        """`interrupt`, called by another thread than that of the run."""
        if self.loop is None:
            return self.interrupt()
        with suppress(RuntimeError):  # the loop is closed: the run has ended meanwhile
            self.loop.call_soon_threadsafe(self.interrupt)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, Ctrl-C and SIGTERM mean `interrupt`. Python allows handlers in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            loop.add_signal_handler(number, self.interrupt)
        try:
            yield
        finally:
            for number, handler in previous.items():
                loop.remove_signal_handler(number)
                if handler is not None:
                    signal.signal(number, handler)


def judge_all(pairs: list[Pair], judges: list[Judge], units: list[Unit], journal: Journal, settings: Settings) -> None:
    """Ask for every verdict that the journal lacks. Raises Stop if verdicts are missing in the end."""
    run = Run(pairs, judges, units, journal, settings)
    with run.bar:
        _in_an_event_loop(run)
    run.check_failures()


def _in_an_event_loop(run: Run) -> None:
    """Run in a new event loop: in this thread, or in another one if a loop is running here, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run.run())
    with ThreadPoolExecutor(max_workers=1) as pool:
        ended = pool.submit(lambda: asyncio.run(run.run()))
        while True:
            try:
                return ended.result()
            except KeyboardInterrupt:
                run.interrupt_from_outside()
