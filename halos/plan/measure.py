"""Bytes of live tensors while a function runs. Works on fake tensors, which have a shape and no data."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Private paths, because torch has no public ones: its documentation imports the first from there.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are still alive (`now`), and their maximum (`peak`)."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.bytes_of: dict[int, int] = {}  # by storage; 0 for one that was there before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._count((args, kwargs), are_new=False)
        output = func(*args, **(kwargs or {}))
        self._count(output, are_new=True)
        return output

    def _count(self, tensors: Any, are_new: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata  # private, because data_ptr() of every fake tensor is 0
                if key not in self.bytes_of:  # a view, or a tensor written in place, has a storage that is counted
                    self.bytes_of[key] = storage.nbytes() if are_new else 0
                    self.now += self.bytes_of[key]
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.bytes_of.pop(key)


@dataclass(frozen=True)
class Measured:
    """Bytes that a part of a model takes: its input and output, what it saves, and what it computes with.

    Excludes its weights. The backward pass includes the gradients of its weights.
    """

    forward: int = 0  # maximum during the forward pass
    kept: int = 0  # between forward and backward pass, without the output, which is the input of the next part
    backward: int = 0  # maximum during the backward pass
    inference: int = 0  # maximum during a forward pass without gradient


def measure(part: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor) -> Measured:
    """Measure a part of a model on an input of the example's shape and dtype."""
    source = torch.empty_like(example, requires_grad=True)
    with LiveBytes() as live:
        output = part(source + 0)  # not `source` itself: a graph keeps its leaves, even if it does not need them
        forward, kept, live.peak = live.peak, live.now - output.nbytes, 0
        output.backward(torch.empty_like(output))
        backward = live.peak - output.nbytes  # the backward pass of the next part has freed the output by then
    del output
    with LiveBytes() as live, torch.no_grad():
        part(source + 0)
    return Measured(forward, kept, backward, inference=live.peak)
