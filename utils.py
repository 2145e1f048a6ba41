"""Small pure helpers that a loss, a loader, or an entry point may want."""

import os

import torch


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where `mask` is true; 0, with a gradient of 0, where it never is (`empty.mean()` is NaN)."""
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def rank0_print(*args, **kwargs) -> None:
    """print() for people: only the first process of a run speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(*args, flush=True, **kwargs)
