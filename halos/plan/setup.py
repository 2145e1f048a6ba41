"""How the ranks of a run share its weights and its batches."""

from dataclasses import dataclass

import torch
from omegaconf import DictConfig

from halos import packing
from halos.errors import UserError

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Setup:
    """How one rank takes part in an update."""

    shards: int  # ranks that share one copy of all weights
    replicas: int  # groups of ranks that each hold one copy
    stored: torch.dtype  # of weights, and of the gradients and the optimizer's state of those that are trained
    compute: torch.dtype
    reference: torch.dtype | None  # None without a reference model
    layout: packing.Layout  # of the tokens in one forward pass
    n_targets: int  # response tokens among them
    forwards: int  # forward passes per microbatch
    microbatches: int  # per update
    checkpointing: bool | str  # as model.activation_checkpointing
    cuda: bool
    adapter: bool = False  # whether the stored weights are frozen, and a float32 adapter is trained

    @property
    def world_size(self) -> int:
        return self.shards * self.replicas

    @property
    def trained(self) -> torch.dtype:
        """Return the dtype of what is trained, of its gradients and its optimizer's state."""
        return torch.float32 if self.adapter else self.stored

    @property
    def uses_fsdp(self) -> bool:
        return self.world_size > 1 or {self.stored, self.trained} != {self.compute}

    @property
    def accumulates(self) -> bool:
        """Return whether gradients are already there when a backward pass starts."""
        return self.forwards * self.microbatches > 1

    @property
    def n_tokens(self) -> int:
        """Tokens in one forward pass."""
        return sum(self.layout.q_lengths)


def full_layout(n_tokens: int, max_length: int) -> packing.Layout:
    """Sequences of max_length tokens, the last one possibly shorter, without shared prompts."""
    starts = range(0, n_tokens, max_length)
    return packing.Layout([(start, min(start + max_length, n_tokens), 0, 0) for start in starts])


def replicas_of(config: DictConfig, gpus: int, nodes: int | None = None) -> int:
    """Number of groups of ranks that each hold all weights, as `sharding.mesh_of` makes them.

    nodes: None for one per 8 GPUs
    """
    if not config.use_fsdp:
        return gpus
    nodes = nodes or -(-gpus // GPUS_PER_NODE)
    key, replicas = ("hsdp_replicas", config.hsdp_replicas) if config.hsdp_replicas else ("nodes", nodes)
    if gpus % replicas:
        divisors = ", ".join(str(n) for n in range(1, gpus + 1) if gpus % n == 0)
        raise UserError(f"{key}={replicas} does not divide gpus={gpus} into equal groups; use one of {divisors}")
    return replicas
