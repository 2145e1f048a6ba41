"""The gate that every call passes before it is sent: the number in flight, the pace, pauses, and the budget."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from halos.errors import UserError
from halos.judge.judges import Stop
from halos.judge.settings import Settings


class Clock:
    """The time in seconds, and waiting. Tests give the gate a clock of their own, on which waiting takes no time."""

    def now(self) -> float:
        return time.monotonic()

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        """Return when the event is set, after `seconds` at the latest."""
        with suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), seconds)


class Gate:
    """The gate of one run. Calls pass it one after the other, in the order in which they came.

    A rate limit lowers the number of calls in flight by 30 %, once for all calls that were in flight then. Each answer
    raises it again by 1 / number: one more call per round of answers.

    settings: concurrency, sleep_time, rpm, tpm and max_cost are used
    spent: US dollars that earlier runs of this comparison took; `spent` then counts on
    """

    def __init__(self, settings: Settings, spent: float, clock: Clock | None = None):
        self.concurrency, self.tpm, self.max_cost = settings.concurrency, settings.tpm, settings.max_cost
        self.interval = max(settings.sleep_time, 60 / settings.rpm if settings.rpm else 0.0)
        self.spent, self.reserved = spent, 0.0
        self.clock = clock or Clock()
        self.in_flight = 0
        self.allowed = float(settings.concurrency)
        self.next_at = self.resume_at = self.lowered_at = 0.0
        self.queue = asyncio.Lock()
        self.left = asyncio.Event()
        self.stopped = asyncio.Event()
        self.reason: UserError | None = None

    @asynccontextmanager
    async def call(self, tokens: float, cost: float) -> AsyncIterator[None]:
        """Wait for the turn of one call, and count it as in flight inside the block.

        tokens: expected, of request and reply
        cost: at most, in US dollars; set aside until the call has ended and its real cost is known
        Raises Stop if the budget does not allow the call, or the reason why the run was stopped.
        """
        async with self.queue:
            await self._wait_for_room(cost)
            while (seconds := max(self.next_at, self.resume_at) - self.clock.now()) > 0:
                await self.pause(seconds)
            self.check()
            pace = tokens * 60 / self.tpm if self.tpm else 0.0
            self.next_at = max(self.next_at, self.clock.now()) + max(self.interval, pace)
            self.in_flight += 1
            self.reserved += cost
        try:
            yield
        finally:
            self.in_flight -= 1
            self.reserved -= cost
            self.left.set()

    async def _wait_for_room(self, cost: float) -> None:
        """Wait until another call may be in flight and can be paid."""
        while True:
            self.check()
            affordable = self.max_cost is None or self.spent + self.reserved + cost <= self.max_cost
            if affordable and self.in_flight < int(self.allowed):
                return
            if not affordable and self.in_flight == 0:
                raise Stop(
                    3,
                    f"--max_cost {self.max_cost:g}: ${self.spent:.4f} are spent, and the next call may take "
                    f"${cost:.4f}; raise it to go on, nothing is paid twice",
                )
            self.left.clear()
            await self.left.wait()

    def check(self) -> None:
        """Raise the reason why the run was stopped, if it was."""
        if self.reason is not None:
            raise self.reason

    def stop(self, reason: UserError) -> None:
        """Let no further call pass. Calls in flight come to their end. The first reason counts."""
        self.reason = self.reason or reason
        self.stopped.set()
        self.left.set()

    async def pause(self, seconds: float) -> None:
        """Wait `seconds`; wake up and raise the reason at once if the run is stopped."""
        await self.clock.wait(self.stopped, seconds)
        self.check()

    def answered(self) -> None:
        """Count an answer: a little more may be in flight."""
        self.allowed = min(self.allowed + 1 / self.allowed, self.concurrency)

    def rate_limited(self, sent_at: float, retry_after: float | None) -> None:
        """Count a 429 to a call that was sent at `sent_at`: all calls wait `retry_after` seconds, if it says so."""
        now = self.clock.now()
        if sent_at >= self.lowered_at:
            self.allowed, self.lowered_at = max(1.0, 0.7 * self.allowed), now
        if retry_after is not None:
            self.resume_at = max(self.resume_at, now + retry_after)
