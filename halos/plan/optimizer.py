"""Bytes of an optimizer's state, and of its step, measured on a small matrix."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from halos.plan.measure import LiveBytes


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes per byte of the parameters."""

    state: float  # kept between updates
    step: float  # maximum during a step, without the state
    all_at_once: bool  # whether `step` is for all parameters together (foreach), or for one after the other


def optimizer_bytes(name: str, kwargs: dict[str, Any], dtype: torch.dtype, cuda: bool) -> OptimizerBytes:
    """Measure an optimizer of torch.optim.

    On a GPU torch.optim steps all parameters at once if the class can, unless its arguments say otherwise.
    """
    cls = getattr(torch.optim, name)
    kwargs = {key: value for key, value in kwargs.items() if key != "capturable"}  # needs a GPU, takes no memory
    parameter = nn.Parameter(torch.zeros(256, 256, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    if cuda and "foreach" in inspect.signature(cls).parameters and not kwargs.get("fused"):
        kwargs.setdefault("foreach", True)
    optimizer = cls([parameter], lr=1e-3, **kwargs)
    optimizer.step()
    with LiveBytes() as live:
        optimizer.step()
    state = [x.nbytes for x in tree_leaves(optimizer.state[parameter]) if isinstance(x, torch.Tensor) and x.ndim]
    return OptimizerBytes(sum(state) / parameter.nbytes, live.peak / parameter.nbytes, bool(kwargs.get("foreach")))
