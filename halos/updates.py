"""The update of the weights: gradients clipped, the optimizer, its schedule, and advice before the first update."""

import math
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn.utils import get_total_norm

from halos import advice, distributed, loading, mishaps, optimizers
from halos.models import PolicyModel
from halos.tokens import TokenizedExample


class Updates:
    """The part of a trainer that decides how gradients change the weights. `BasicTrainer` has the loop around it."""

    policy: PolicyModel
    config: DictConfig
    train_loader: Any
    checks: mishaps.Checks
    divisor: int  # what the gradients since the last update are divided by; 0: there are none

    def clip_gradients(self, n_losses: int, examples: list[TokenizedExample]) -> dict[str, float]:
        """Make the gradients those of the mean of n_losses losses, and scale them down to their largest allowed norms.

        Returns the norms before that, by their names in the log. Raises NotFinite, and does what `checks` has. This is
        the one place of a step where the host waits for the device.
        """
        limits = self.gradient_limits()
        factor = self.divisor / max(1, n_losses)
        on_device = [distributed.whole(get_total_norm(_gradients(module))) * factor for module, _ in limits.values()]
        for norm in on_device:
            self.checks.finite(norm, "the gradient", examples)
        self.divisor = 0
        norms = dict(zip(limits, self.checks.settle(*on_device), strict=True))
        for name, (module, limit) in limits.items():
            scale = factor * min(1.0, limit / (norms[name] + 1e-6))
            if scale != 1.0:
                torch._foreach_mul_([distributed.local(gradient) for gradient in _gradients(module)], scale)
        return norms

    def gradient_limits(self) -> dict[str, tuple[torch.nn.Module, float]]:
        """Return modules and the largest norm of the gradient of each, by the name of that norm in the log."""
        return {"grad_norm": (self.policy.lm, self.config.model.max_grad_norm)}

    def make_optimizer(self) -> torch.optim.Optimizer:
        kwargs: Any = OmegaConf.to_container(self.config.optimizer_kwargs)
        return optimizers.make(self.policy, self.config.optimizer, self.config.lr, kwargs)

    def lr_factor(self, update: int) -> float:
        """Factor of the peak learning rate: linear warm-up, then constant, or cosine or linear down to 0."""
        warmup = self.config.warmup_steps
        if update < warmup:
            return (update + 1) / (warmup + 1)
        progress = min(1.0, (update - warmup) / max(1, self.total_updates() - warmup))
        return {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[self.config.lr_scheduler]

    def total_updates(self) -> int:
        """Updates in this run."""
        return -(-len(self.train_loader) // self.config.model.gradient_accumulation_steps)

    def advice(self) -> list[str]:
        """Return what is worth knowing before the first update, one line each. A loss may add lines of its own."""
        updates, lr = self.total_updates(), self.config.lr
        lines = advice.warmup(updates, self.config.warmup_steps, lr)
        trains_matrices = self.config.optimizer != "SGD" and not self.config.model.use_peft
        if self.policy.export_dtype != self.policy.lm.dtype and trains_matrices:
            matrices = (distributed.local(p.detach()) for p in self.policy.lm.parameters() if p.ndim > 1)
            lines += advice.export_rounding(self.policy.export_dtype, matrices, lr, updates)
        return lines + advice.slow_dtypes(loading.compute_dtypes(self.config, self.policy.device), self.policy.device)


def _gradients(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
