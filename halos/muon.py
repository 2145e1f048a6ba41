"""Muon (https://kellerjordan.github.io/posts/muon/) for hidden matrices, and AdamW for all other parameters.

torch.optim.Muon takes matrices only, and orthogonalizes in bfloat16 what each rank holds. Here the update of a sharded
matrix is that of the whole matrix, on any number of ranks.
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from halos import distributed

A, B, C = 3.4445, -4.7750, 2.0315  # the quintic that torch.optim.Muon iterates, too

# How the lr of a matrix follows from lr and its shape. With match_rms_adamw (https://arxiv.org/abs/2502.16982) an
# update is as large as one of AdamW, so that both can have the same lr and weight decay.
ADJUSTMENTS = {
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
}


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `hidden: True` move along the orthogonalized momentum of their matrices instead.

    adamw_lr_ratio: lr of the parameters that AdamW moves / lr; below 1 with adjust_lr_fn="original"
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        adamw_lr_ratio: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool | None = None,
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(f"adjust_lr_fn={adjust_lr_fn} is not one of {', '.join(ADJUSTMENTS)}")
        if not 1 <= ns_steps < 100:
            raise ValueError(f"Invalid ns_steps value: {ns_steps}")
        self.momentum, self.nesterov, self.ns_steps, self.adjust_lr_fn = momentum, nesterov, ns_steps, adjust_lr_fn
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        for group in self.param_groups:
            group.setdefault("hidden", False)
            group["lr"] *= 1.0 if group["hidden"] else adamw_lr_ratio

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        try:  # AdamW sees its own groups only
            self.param_groups = [group for group in groups if not group["hidden"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["hidden"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        matrices = [p for p in group["params"] if p.grad is not None]
        for parameter, update in zip(matrices, orthogonalized(self._momenta(matrices), self.ns_steps), strict=True):
            lr = group["lr"] * ADJUSTMENTS[self.adjust_lr_fn](*parameter.shape)
            weights = distributed.local(parameter)
            weights.mul_(1 - group["lr"] * group["weight_decay"])
            weights.add_(update[distributed.own_slice(parameter)], alpha=-lr)

    def _momenta(self, matrices: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The direction of each matrix before it is orthogonalized, sharded like the matrix."""
        for parameter in matrices:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["step"] = torch.zeros(())  # not used: AdamW looks for it in every state that it loads
                state["momentum_buffer"] = torch.zeros_like(parameter)
            gradient: Any = parameter.grad
            gradient, mean = distributed.local(gradient), distributed.local(state["momentum_buffer"])
            mean.lerp_(gradient, 1 - self.momentum)
            direction = gradient.lerp(mean, self.momentum) if self.nesterov else mean
            yield distributed.with_local(parameter, direction)


def orthogonalized(matrices: Iterator[torch.Tensor], steps: int) -> Iterator[torch.Tensor]:
    """The whole update of each matrix, on all ranks: each rank computes every n-th, and sends it to the others."""
    rank, n = distributed.rank(), distributed.world_size()
    own: Any = None
    while group := list(islice(matrices, n)):
        for owner, matrix in enumerate(group):  # every rank must reach this: gathering is a collective
            whole = distributed.whole(matrix.to(compute_dtype(matrix)))
            own = whole if owner == rank else own
        if rank < len(group):  # only now, else the ranks would compute one after the other
            own = orthogonal(own, steps)
        for owner, matrix in enumerate(group):
            yield distributed.broadcast(own if owner == rank else _empty_whole(matrix), owner)


def _empty_whole(matrix: torch.Tensor) -> torch.Tensor:
    return torch.empty(matrix.shape, dtype=compute_dtype(matrix), device=matrix.device)


def compute_dtype(matrix: torch.Tensor) -> torch.dtype:
    """bfloat16 on GPUs, as in torch.optim.Muon; a CPU may multiply it a hundred times slower than float32."""
    return torch.bfloat16 if matrix.is_cuda else torch.float32


def orthogonal(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """A matrix with the same singular vectors, and singular values close to 1 (0.7 to 1.2 after 5 steps)."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).contiguous()
