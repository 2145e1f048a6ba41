"""Batches that are prepared ahead; metrics and times that are read late."""

import json
import threading
import time

import pytest
import torch

from halos.loggers import Loggers
from halos.metrics import MetricsLog
from halos.mishaps import Checks, NotFinite
from halos.prefetch import ahead
from halos.scalars import Scalars, Stopwatch

CPU = torch.device("cpu")


def test_one_item_is_computed_ahead():
    """While item 0 is used, item 1 is computed, and item 2 is not: it could need the memory of another batch."""
    computed: list[int] = []
    items = ahead((computed.append(n) or n for n in range(5)), CPU)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while computed != [0, 1] and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert computed == [0, 1]
    assert list(items) == [1, 2, 3, 4] and computed == [0, 1, 2, 3, 4]


def test_an_error_is_raised_where_its_item_would_be():
    def items():
        yield 1
        raise ValueError("row 2 is broken")

    coming = ahead(items(), CPU)
    assert next(coming) == 1
    with pytest.raises(ValueError, match="row 2"):
        next(coming)


def test_a_closed_iterator_leaves_no_thread():
    coming = ahead(iter(range(100)), CPU)
    next(coming)
    coming.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_scalars_are_read_by_name():
    """A statistic that is undefined is left out; a NaN that was measured is not. Whole numbers stay exact."""
    scalars = Scalars()
    scalars.add("loss", torch.tensor(0.25, requires_grad=True))
    scalars.add("tokens", torch.tensor(2**40 + 1))
    scalars.add("measured", torch.tensor(float("nan")))
    scalars.add("undefined", torch.tensor(float("nan")), undefined_if_nan=True)
    sent = scalars.send()
    values = sent.read()
    assert values.pop("measured") != 0 and values == {"loss": 0.25, "tokens": 2**40 + 1}


def test_times_of_a_phase_are_added():
    stopwatch = Stopwatch(CPU)
    for _ in range(2):
        with stopwatch("forward"):
            time.sleep(0.02)
    for _ in stopwatch.waiting("data", [1, 2]):
        pass
    times = stopwatch.lap().read()
    assert set(times) == {"time/forward", "time/data"}
    assert 0.04 <= times["time/forward"] < 1 and 0 <= times["time/data"] < 0.01
    assert stopwatch.lap().read() == {}


def test_the_first_check_that_fails_is_raised():
    checks = Checks()
    checks.finite(torch.ones(3), "the loss", [])
    checks.finite(torch.tensor([1.0, float("inf")]), "the gradient", [])
    checks.finite(torch.tensor(float("nan")), "the third", [])
    with pytest.raises(NotFinite, match="the gradient is not finite"):
        checks.settle()
    assert checks.settle(torch.tensor(3.0), torch.tensor(0.5)) == [3.0, 0.5]  # those before are done with


@pytest.mark.parametrize("late", [False, True])
def test_a_late_line_is_the_same_line(tmp_path, late):
    """The line of an update is written at the next one if late, at once if not; before an evaluation in any case."""
    log = MetricsLog(str(tmp_path), 24, 1000.0, Loggers(), late=late)
    written = lambda: [json.loads(line)["step"] for line in open(tmp_path / "metrics.jsonl")]  # noqa: E731
    log.training_step(1, 8, lambda: {"loss/train": 1.0}, 1.0)
    assert written() == ([] if late else [1])
    log.training_step(2, 16, lambda: {"loss/train": 2.0}, 1.0)
    assert written() == ([1] if late else [1, 2])
    log.evaluation(2, 16, {"loss/eval": 1.5})
    assert written() == [1, 2, 2]
    log.training_step(3, 24, lambda: {"loss/train": 3.0}, 1.0)
    assert log.flush() == (tmp_path / "metrics.jsonl").stat().st_size
    assert written() == [1, 2, 2, 3]
    log.close()
