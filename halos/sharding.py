"""What is done to a model before it trains, in the order in which it must be done."""

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from halos import distributed
from halos.errors import UserError, did_you_mean


def prepare_policy(
    policy: Any, compute_dtype: torch.dtype, activation_checkpointing: bool, block_name: str | None
) -> None:
    """Activation checkpointing, then FSDP if the weights are kept in another dtype than they compute in; in place.

    FSDP keeps the float32 weights, casts them for each forward, and gives the optimizer float32 gradients; so it is
    the mixed precision of one process, too.

    policy: a `models.PolicyModel` on its device
    """
    if activation_checkpointing:
        # Older transformers has only the second name.
        enable = getattr(policy.lm, "activation_checkpointing_enable", None) or policy.lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if policy.lm.dtype != compute_dtype:
        mesh = distributed.device_mesh(policy.lm.device.type)
        precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
        for module in find_blocks(policy.lm, block_name):
            fully_shard(module, mesh=mesh, mp_policy=precision)
        if policy.v_head is not None:  # apart, since it computes in float32
            fully_shard(policy.v_head, mesh=mesh, mp_policy=MixedPrecisionPolicy())
        fully_shard(policy, mesh=mesh, mp_policy=precision)
    policy.train()


def reshard(policy: Any) -> None:
    """Free the weights that FSDP keeps gathered at the root after a forward without a backward: until then parameters()
    are plain tensors in the compute dtype, which an optimizer must not be given."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


def find_blocks(lm: PreTrainedModel, block_name: str | None) -> list[torch.nn.Module]:
    """The transformer blocks: modules of the class `block_name`, or of those that the model itself names."""
    names = {block_name} if block_name else set(lm._no_split_modules or ())
    blocks = [module for module in lm.modules() if type(module).__name__ in names]
    if not blocks:
        classes = {type(module).__name__ for module in lm.modules()}
        raise UserError(
            f"model.block_name={block_name} is no module of {type(lm).__name__}; "
            f"{did_you_mean(str(block_name), classes)}"
        )
    return blocks
