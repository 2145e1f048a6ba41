"""Bytes of an optimizer's state, and of its step, measured on a small matrix."""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # private: see halos/plan/make.py
from torch.utils._pytree import tree_leaves

from halos import optimizers
from halos.muon import Muon
from halos.plan.measure import LiveBytes
from halos.plan.sizes import ModelSizes


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes per byte of the parameters."""

    state: float  # kept between updates
    step: float  # maximum during a step, without the state
    all_at_once: bool  # whether `step` is for all parameters together (foreach), or for one after the other
    matrix: int = 0  # bytes that a step of Muon takes for the largest hidden matrix, which is not sharded then


def optimizer_bytes(
    name: str,
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    cuda: bool,
    is_sharded: bool = False,
    model: ModelSizes | None = None,
) -> OptimizerBytes:
    """Measure an optimizer.

    On a GPU torch.optim steps all parameters at once if the class can, unless its arguments say otherwise.

    model: needed for Muon, which treats hidden matrices in another way
    """
    cls = optimizers.class_of(name)
    kwargs = {key: value for key, value in kwargs.items() if key != "capturable"}  # needs a GPU, takes no memory
    kwargs = optimizers.with_kernel(cls, kwargs, is_sharded)
    if cuda and "foreach" in inspect.signature(cls).parameters and not kwargs.get("fused"):
        kwargs.setdefault("foreach", True)
    found = _measured(cls, kwargs, torch.Size((256, 256)), dtype)
    return _with_matrices(found, kwargs, model, dtype) if cls is Muon and model else found


def _measured(cls: Any, kwargs: dict[str, Any], shape: torch.Size, dtype: torch.dtype, **group: Any) -> OptimizerBytes:
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = cls([{"params": [parameter], **group}], lr=1e-3, **kwargs)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        optimizer.step()
        with LiveBytes() as live:
            optimizer.step()
    state = sum(map(_nbytes, tree_leaves(optimizer.state[parameter])))
    return OptimizerBytes(state / parameter.nbytes, live.peak / parameter.nbytes, bool(kwargs.get("foreach")))


def _nbytes(value: Any) -> int:
    """Bytes of a tensor, those of its parts if it is quantized; 0 for a single number."""
    if not isinstance(value, torch.Tensor) or not value.ndim:
        return 0
    parts: Any = getattr(value, "__tensor_flatten__", None)
    return sum(_nbytes(getattr(value, part)) for part in parts()[0]) if parts else value.nbytes


def _with_matrices(
    rest: OptimizerBytes, kwargs: dict[str, Any], model: ModelSizes, dtype: torch.dtype
) -> OptimizerBytes:
    """Add what Muon takes for the matrices of blocks to what AdamW takes for the rest."""
    shapes = [shape for block in model.blocks for shape in block.shapes if len(shape) == 2]
    hidden, all_elements = sum(shape.numel() for shape in shapes), sum(group.trained.elements for group in model.groups)
    largest = max(shapes, key=lambda shape: shape.numel())
    with FakeTensorMode():  # it may be large
        found = _measured(Muon, kwargs, largest, dtype, hidden=True)
    state = (found.state * hidden + rest.state * (all_elements - hidden)) / all_elements
    return replace(rest, state=state, matrix=round(found.step * largest.numel() * dtype.itemsize))
