"""Small helpers that a loss, a loader, or an entry point may want."""

import os

import torch


def rank0_print(*args, **kwargs) -> None:
    """print() for people: only the first process of a run speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(*args, flush=True, **kwargs)


def discounted_sums(terms: torch.Tensor, factor: float) -> torch.Tensor:
    """(n, T) -> (n, T): at t, the sum over k >= t of factor^(k - t) * terms[:, k].

    One product with a triangular (T, T) matrix: exact, and no loop over T that starts kernels one by one.
    """
    step = torch.arange(terms.shape[1], device=terms.device)
    ahead = step[:, None] - step  # k - t for row k and column t
    weights = torch.where(ahead >= 0, torch.tensor(factor, device=terms.device) ** ahead.clamp(min=0), 0.0)
    return terms @ weights
