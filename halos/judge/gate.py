"""What a call to a judge passes before it is sent: the number in flight, the pace, pauses, and the budget."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from halos.errors import UserError
from halos.judge.judges import Stop


@dataclass(frozen=True)
class Limits:
    """How fast, how much, how well.

    concurrency: calls in flight; sleep_time: least seconds between calls; rpm, tpm: calls and tokens per minute
    max_cost: US dollars for this comparison, earlier runs of it included
    max_fail: share of the units that may have no verdict in the end
    """

    concurrency: int = 32
    sleep_time: float = 0.0
    rpm: float | None = None
    tpm: float | None = None
    max_cost: float | None = None
    max_fail: float = 0.01


class Gate:
    """What a call passes before it is sent, one after the other, in the order in which they came.

    A rate limit lowers the number of calls in flight by 30 %, once for all calls that were in flight then, and every
    answer raises it again by a little: one more call per round.
    """

    def __init__(self, limits: Limits, spent: float):
        self.limits, self.spent, self.reserved = limits, spent, 0.0
        self.in_flight = 0
        self.allowed = float(limits.concurrency)
        self.interval = max(limits.sleep_time, 60 / limits.rpm if limits.rpm else 0.0)
        self.next_at = self.resume_at = self.lowered_at = 0.0
        self.queue = asyncio.Lock()
        self.left = asyncio.Event()
        self.stopped = asyncio.Event()
        self.reason: UserError | None = None

    @asynccontextmanager
    async def call(self, tokens: float, cost: float) -> AsyncIterator[None]:
        """Around one call. cost: US dollars that are set aside until it has ended, and its real cost is known."""
        async with self.queue:
            await self._wait_for_room(cost)
            while (seconds := max(self.next_at, self.resume_at) - time.monotonic()) > 0:
                await self.pause(seconds)
            self.check()
            pace = tokens * 60 / self.limits.tpm if self.limits.tpm else 0.0
            self.next_at = max(self.next_at, time.monotonic()) + max(self.interval, pace)
            self.in_flight += 1
            self.reserved += cost
        try:
            yield
        finally:
            self.in_flight -= 1
            self.reserved -= cost
            self.left.set()

    async def _wait_for_room(self, cost: float) -> None:
        while True:
            self.check()
            affordable = self.limits.max_cost is None or self.spent + self.reserved + cost <= self.limits.max_cost
            if affordable and self.in_flight < int(self.allowed):
                return
            if not affordable and self.in_flight == 0:
                raise Stop(
                    3,
                    f"--max_cost {self.limits.max_cost:g}: ${self.spent:.4f} are spent, and the next call may take "
                    f"${cost:.4f}; raise it to go on, nothing is paid twice",
                )
            self.left.clear()
            await self.left.wait()

    def check(self) -> None:
        if self.reason is not None:
            raise self.reason

    def stop(self, reason: UserError) -> None:
        """Let no further call through; those in flight come to their end."""
        self.reason = self.reason or reason
        self.stopped.set()
        self.left.set()

    async def pause(self, seconds: float) -> None:
        """Sleep, and wake up at once where everything stops."""
        try:
            await asyncio.wait_for(self.stopped.wait(), seconds)
        except TimeoutError:
            return
        self.check()

    def answered(self) -> None:
        self.allowed = min(self.allowed + 1 / self.allowed, self.limits.concurrency)

    def rate_limited(self, sent_at: float, retry_after: float | None) -> None:
        """A 429: everyone waits as long as the server says."""
        now = time.monotonic()
        if sent_at >= self.lowered_at:
            self.allowed, self.lowered_at = max(1.0, 0.7 * self.allowed), now
        if retry_after is not None:
            self.resume_at = max(self.resume_at, now + retry_after)
