"""Small helpers for losses, loaders, and entry points."""

import os

import torch


def rank0_print(*args, **kwargs) -> None:
    """Print on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(*args, flush=True, **kwargs)


def discounted_sums(terms: torch.Tensor, factor: float) -> torch.Tensor:
    """Sum future terms with a discount: (n, T) -> (n, T).

    Entry t is the sum over k >= t of factor^(k - t) * terms[:, k]. It is computed as one product with a triangular (T,
    T) matrix: this is exact, and avoids a loop over T that would launch kernels one by one.
    """
    step = torch.arange(terms.shape[1], device=terms.device)
    ahead = step[:, None] - step  # k - t for row k and column t
    weights = torch.where(ahead >= 0, torch.tensor(factor, device=terms.device) ** ahead.clamp(min=0), 0.0)
    return terms @ weights
