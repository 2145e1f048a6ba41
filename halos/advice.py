"""Lines that are worth reading before the first update, for `BasicTrainer.advice` and its overrides."""

import math
import time
from collections.abc import Iterable

import torch


def warmup(updates: int, warmup_steps: int, lr: float) -> list[str]:
    """Warn of a run that ends before its warm-up does."""
    if updates >= warmup_steps:
        return []
    return [
        f"warning: updates in this run: {updates}, fewer than warmup_steps={warmup_steps}: the learning rate ends at "
        f"{lr * updates / (warmup_steps + 1):.2g}, not at lr={lr:g}; use fewer warmup_steps, or more data"
    ]


def export_rounding(export_dtype: torch.dtype, weights: Iterable[torch.Tensor], lr: float, updates: int) -> list[str]:
    """Warn of a run whose updates are smaller than what the dtype of the export can tell apart.

    An optimizer that divides by the size of gradients, such as Adam or RMSprop, moves a weight by about lr per update.
    """
    squares, n = 0.0, 0
    for weight in weights:
        squares, n = squares + weight.double().square().sum().item(), n + weight.numel()
    typical = math.sqrt(squares / max(1, n))
    step = torch.finfo(export_dtype).eps * 2.0 ** math.floor(math.log2(typical)) if typical else 0.0
    if lr * updates >= step / 2:
        return []
    dtype = str(export_dtype).removeprefix("torch.")
    return [
        f"warning: the export is in {dtype}, where weights of this size ({typical:.2g}) have steps of {step:.1g}; "
        f"{updates} updates with lr={lr:g} move them by about {lr * updates:.1g}, so that most of what is learned is "
        "rounded away in the export (not in policy.pt); model.export_dtype=float32 exports all of it"
    ]


def balance(n_desirable: int, n_undesirable: int, desirable_weight: float, undesirable_weight: float) -> str:
    """Compare KTO's weights with what its paper (https://arxiv.org/abs/2402.01306) recommends.

    There the ratio of desirable_weight * n_desirable to undesirable_weight * n_undesirable is from 1 to 4/3.
    """
    found = f"{n_desirable} desirable and {n_undesirable} undesirable responses per epoch"
    if not n_desirable or not n_undesirable:
        return f"warning: {found}: KTO needs both to tell them apart"
    weighted = desirable_weight * n_desirable, undesirable_weight * n_undesirable
    setting = f"loss.desirable_weight={desirable_weight:g} loss.undesirable_weight={undesirable_weight:g}"
    if weighted[1] <= weighted[0] * (1 + 1e-6) and 3 * weighted[0] <= 4 * weighted[1] * (1 + 1e-6):
        return f"{found}; {setting} are in the range that the KTO paper recommends"
    up, down = n_undesirable / n_desirable, n_desirable / n_undesirable
    remedy = (
        f"loss.desirable_weight from {up:.3g} to {up * 4 / 3:.3g}"
        if up > 1
        else f"loss.undesirable_weight from {down * 3 / 4:.3g} to {down:.3g}"
    )
    return f"{found}; for these the KTO paper recommends {remedy} (the other weight 1), not {setting}"


def slow_dtypes(dtypes: dict[str, torch.dtype], device: torch.device) -> list[str]:
    """Warn of computing on a CPU in a dtype whose matrix products are slow there.

    dtypes: key of the config -> the dtype that it asks for
    """
    slow = {key: dtype for key, dtype in dtypes.items() if dtype != torch.float32}
    if device.type != "cpu" or not slow:
        return []
    rates = {dtype: product_rate(dtype) for dtype in (torch.float32, *slow.values())}
    return [
        f"warning: {key}={str(dtype).removeprefix('torch.')}: this CPU multiplies at {rates[dtype]:,.1f} GFLOP/s in it "
        f"and at {rates[torch.float32]:,.1f} in float32; use {key}=float32"
        for key, dtype in slow.items()
        if rates[dtype] < rates[torch.float32]
    ]


def product_rate(dtype: torch.dtype, size: int = 128) -> float:
    """Measure GFLOP/s of a small matrix product: the best of three, after one that starts the library."""
    a = torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:]) / 1e9
