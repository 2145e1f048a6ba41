"""Scalars on a device, and the times of a step: read in one transfer, after the device has gone on."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Scalars:
    """Named scalars, each a tensor of one value, that are read as floats in one transfer."""

    def __init__(self):
        self.tensors: dict[str, torch.Tensor] = {}
        self.undefined_if_nan: set[str] = set()

    def add(self, name: str, value: torch.Tensor, undefined_if_nan: bool = False) -> None:
        self.tensors[name] = value.detach()
        if undefined_if_nan:
            self.undefined_if_nan.add(name)

    def send(self) -> "Sent":
        """Start the transfer. It does not wait for the device."""
        if not self.tensors:
            return Sent([], self.undefined_if_nan, torch.empty(0))
        stacked = torch.stack([value.double().reshape(()) for value in self.tensors.values()])
        return Sent(list(self.tensors), self.undefined_if_nan, stacked)

    def read(self) -> dict[str, float]:
        """Return the values that are defined. Waits for the device."""
        return self.send().read()


class Sent:
    """Scalars on their way to the host."""

    def __init__(self, names: list[str], undefined_if_nan: set[str], values: torch.Tensor):
        self.names = names
        self.undefined_if_nan = undefined_if_nan
        self.values = values
        self.arrived = None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> dict[str, float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        values = dict(zip(self.names, self.values.tolist(), strict=True))
        return {name: x for name, x in values.items() if x == x or name not in self.undefined_if_nan}


#### TIMES


class Stopwatch:
    """The time that each phase of a training step takes. On a GPU, events are recorded, and nothing waits for them."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.spans: dict[str, list[tuple]] = defaultdict(list)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._mark()
        try:
            yield
        finally:
            self.spans[phase].append((start, self._mark()))

    def waiting(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and time how long each is waited for, on the host."""
        iterator, end = iter(items), object()
        while True:
            start = time.perf_counter()
            item = next(iterator, end)
            self.spans[phase].append((start, time.perf_counter()))
            if item is end:
                return
            yield item  # type: ignore[misc]

    def lap(self) -> "Lap":
        """Return the times since the last lap, to be read later."""
        spans, self.spans = self.spans, defaultdict(list)
        return Lap(spans)

    def _mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Lap:
    """The times of one step."""

    def __init__(self, spans: dict[str, list[tuple]]):
        self.spans = spans

    def read(self) -> dict[str, float]:
        """Return `time/{phase}` in seconds. On a GPU this waits until the device has passed the events."""
        return {f"time/{phase}": sum(map(_seconds, spans)) for phase, spans in self.spans.items()}


def _seconds(span: tuple) -> float:
    start, end = span
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000
