"""The time of device work, and the rate of a large matrix product: what a training step can reach at most."""

import time
from collections.abc import Callable

import torch


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """Measure the FLOP/s of a product of two random (n, n) matrices: the best of ten, after a warm-up."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds(lambda: a @ b, device)
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Time a call, and the device work that it starts."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
