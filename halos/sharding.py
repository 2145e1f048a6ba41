"""Prepare a model for training: activation checkpointing, compilation, and FSDP, in the order that they require."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from halos import distributed, packing
from halos.errors import UserError, did_you_mean


def mesh_of(config: Any, device: torch.device) -> DeviceMesh:
    """Return the device mesh for FSDP: by default sharded within a node and replicated across nodes.

    With `use_fsdp: false` each shard group has one rank, which holds the whole model.
    """
    world_size = distributed.world_size()
    replicas = config.hsdp_replicas or distributed.n_nodes()
    if not config.use_fsdp:
        replicas = world_size
    if world_size % replicas:
        raise UserError(
            f"hsdp_replicas={replicas} does not divide the {world_size} processes of this run; use one of "
            f"{', '.join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)}"
        )
    return distributed.device_mesh(device.type, replicas)


def prepare_policy(
    policy: Any,
    compute_dtype: torch.dtype,
    *,
    activation_checkpointing: bool | str = False,
    block_name: str | None = None,
    compile: bool = False,
    mesh: DeviceMesh | None = None,
) -> None:
    """Apply activation checkpointing, compilation of each block, and FSDP, in place.

    FSDP shards the stored weights over the mesh and casts them to `compute_dtype` in each forward pass. It reduces
    gradients in float32 for the optimizer. So one process uses FSDP as well, for mixed precision.

    activation_checkpointing: True recomputes blocks; "selective" recomputes all of a block but its attention
    policy: a `models.PolicyModel` on its device, or with parameters on the meta device that are filled later
    mesh: None for one process, which needs FSDP only to compute in another dtype than the weights are stored in
    """
    if activation_checkpointing:
        checkpoint_blocks(policy.lm, keeps_attention=activation_checkpointing == "selective")
    if mesh is None and any(p.dtype != compute_dtype for p in policy.lm.parameters()):
        mesh = distributed.device_mesh(policy.lm.device.type)
    blocks = find_blocks(policy.lm, block_name) if block_name or compile or mesh is not None else []
    if compile:
        packing.keep_attention_uncompiled()
        for block in blocks:
            block.compile()
    if mesh is not None:
        precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=precision)
        if policy.v_head is not None:  # its own unit, because it computes in float32
            fully_shard(policy.v_head, mesh=mesh, mp_policy=MixedPrecisionPolicy())
        fully_shard(policy, mesh=mesh, mp_policy=precision)
    policy.train()


def checkpoint_blocks(lm: PreTrainedModel, keeps_attention: bool) -> None:
    """Recompute each block in the backward pass, all of it or all but the output of its attention."""
    # There is no dropout, so no state of a random generator has to be copied for every block.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if keeps_attention:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    # Older versions of transformers have only the second name.
    enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
    enable(settings)


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what kernels of attention return: one call for each segment of a pack on a CPU, one for all on a GPU."""
    name = operator.name()
    is_attention = name.startswith("aten::_scaled_dot_product_") or name == "torch_attn::_varlen_attn"
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


def prepare_reference(reference: Any, block_name: str | None, mesh: DeviceMesh) -> None:
    """Apply FSDP to a model without backward passes: its root is also resharded right after each forward pass."""
    for block in find_blocks(reference.lm, block_name):
        fully_shard(block, mesh=mesh)
    fully_shard(reference, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def evaluating(policy: torch.nn.Module) -> Iterator[None]:
    """Inside, the policy is in evaluation mode; afterwards it is what training needs."""
    policy.eval()
    yield
    policy.train()
    reshard(policy)


def reshard(policy: Any) -> None:
    """Free the weights that FSDP keeps gathered at the root after a forward pass without a backward pass.

    Until then parameters() are plain tensors in the compute dtype, and the optimizer must not get those.
    """
    if is_sharded(policy):
        policy.reshard()


def find_blocks(lm: PreTrainedModel, block_name: str | None) -> list[torch.nn.Module]:
    """Return the transformer blocks: modules of class `block_name`, or of the classes that the model itself names."""
    # Private, because transformers has no public name for it. Its own FSDP integration reads the same attribute.
    names = {block_name} if block_name else set(lm._no_split_modules or ())
    blocks = [module for module in lm.modules() if type(module).__name__ in names]
    if not blocks:
        # Blocks are repeated, so the candidates for the error message are the modules inside module lists.
        lists = (module for module in lm.modules() if isinstance(module, torch.nn.ModuleList))
        classes = {type(child).__name__ for children in lists for child in children}
        raise UserError(
            f"model.block_name={block_name} is not a module of {type(lm).__name__}; "
            f"{did_you_mean(str(block_name), classes)}"
        )
    return blocks
