"""The gate: pace, rate limits and budget, on a clock of the test's own, so that the arithmetic is exact."""

import asyncio

import pytest

from comparing import FakeClock
from halos.judge.gate import Gate
from halos.judge.judges import Stop
from halos.judge.settings import Settings


def gate(**limits) -> Gate:
    return Gate(Settings("samples.json", **limits), spent=0.0, clock=FakeClock())


def test_a_rate_limit_lowers_once_for_all_in_flight_and_answers_raise_it():
    limited = gate(concurrency=10)
    sent_at = limited.clock.now()
    limited.clock.time += 1
    limited.rate_limited(sent_at, None)
    limited.rate_limited(sent_at, None)
    assert limited.allowed == 7.0
    for _ in range(7):
        limited.answered()
    assert 7.9 < limited.allowed < 8.0  # one more per round
    for _ in range(100):
        limited.answered()
    assert limited.allowed == 10
    limited.rate_limited(limited.clock.now(), None)  # sent after the first 429
    assert limited.allowed == 7.0


def times_of(limited: Gate, n: int) -> list[float]:
    """Send n calls of 10 tokens one after the other; return when each passes the gate, in seconds from the start."""

    async def calls() -> list[float]:
        started, times = limited.clock.now(), []
        for _ in range(n):
            async with limited.call(tokens=10, cost=0.0):
                times.append(limited.clock.now() - started)
        return times

    return asyncio.run(calls())


def test_a_rate_limit_holds_all_calls():
    """All calls wait as long as the server says, and no longer."""
    limited = gate(concurrency=4)
    limited.rate_limited(limited.clock.now(), 12.5)
    assert times_of(limited, 3) == [12.5, 12.5, 12.5]


@pytest.mark.parametrize("limits", [{"rpm": 120}, {"tpm": 1200}, {"sleep_time": 0.5}, {"rpm": 120, "tpm": 9000}])
def test_pace(limits):
    """120 calls a minute, 1200 tokens a minute at 10 per call, 0.5 s between calls: all mean half a second per call."""
    assert times_of(gate(**limits), 5) == [0, 0.5, 1, 1.5, 2]


def test_a_pause_ends_when_the_run_is_stopped():
    """On the real clock, a pause of an hour ends at once."""

    async def run() -> None:
        stopped = Gate(Settings("samples.json"), spent=0.0)
        waiting = asyncio.create_task(stopped.pause(3600))
        await asyncio.sleep(0)
        stopped.stop(Stop(130, "interrupted"))
        stopped.stop(Stop(2, "a later reason"))
        with pytest.raises(Stop, match="interrupted"):
            await waiting
        with pytest.raises(Stop, match="interrupted"):
            async with stopped.call(tokens=0, cost=0.0):
                pass

    asyncio.run(run())


def test_the_budget_counts_what_is_in_flight():
    """Of $1, a call may take $0.4: two calls can be in flight, and a third one after the first took only $0.3."""

    async def run() -> list[str]:
        limited, said = gate(max_cost=1.0), []

        async def call(name: str, real: float) -> None:
            async with limited.call(tokens=0, cost=0.4):
                said.append(f"{name} sent")
                for _ in range(20):
                    await asyncio.sleep(0)
                limited.spent += real
                said.append(f"{name} paid")

        await asyncio.gather(*(call(name, 0.3) for name in "abc"), return_exceptions=True)
        with pytest.raises(Stop, match="max_cost") as stop:
            await call("d", 0.3)
        assert stop.value.code == 3
        return said

    assert asyncio.run(run()) == ["a sent", "b sent", "a paid", "b paid", "c sent", "c paid"]
