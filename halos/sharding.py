"""What is done to a model before it trains, in the order in which it must be done."""

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from halos import distributed, packing
from halos.errors import UserError, did_you_mean


def mesh_of(config: Any, device: torch.device) -> DeviceMesh:
    """The processes of the run as FSDP sees them: sharded within a node, replicated across nodes, unless configured.

    `use_fsdp: false` is the case of shards of one process: each holds the whole model.
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
    activation_checkpointing: bool = False,
    block_name: str | None = None,
    compile: bool = False,
    mesh: DeviceMesh | None = None,
) -> None:
    """Activation checkpointing, compilation of each block, and FSDP; in place.

    FSDP keeps the weights as they are stored, sharded over the mesh, casts them to `compute_dtype` for each forward,
    and gives the optimizer gradients that were reduced in float32; so it is the mixed precision of one process, too.

    policy: a `models.PolicyModel` on its device, or of parameters on the meta device that get their values later
    mesh: None for one process, which needs FSDP only to compute in another dtype than weights are stored in
    """
    if activation_checkpointing:
        # Older transformers has only the second name.
        enable = getattr(policy.lm, "activation_checkpointing_enable", None) or policy.lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if mesh is None and policy.lm.dtype != compute_dtype:
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
        if policy.v_head is not None:  # apart, since it computes in float32
            fully_shard(policy.v_head, mesh=mesh, mp_policy=MixedPrecisionPolicy())
        fully_shard(policy, mesh=mesh, mp_policy=precision)
    policy.train()


def prepare_reference(reference: Any, block_name: str | None, mesh: DeviceMesh) -> None:
    """FSDP for a model that never sees a backward: its root is sharded again right after each forward, too."""
    for block in find_blocks(reference.lm, block_name):
        fully_shard(block, mesh=mesh)
    fully_shard(reference, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)


def reshard(policy: Any) -> None:
    """Free the weights that FSDP keeps gathered at the root after a forward without a backward: until then parameters()
    are plain tensors in the compute dtype, which an optimizer must not be given."""
    if is_sharded(policy):
        policy.reshard()


def find_blocks(lm: PreTrainedModel, block_name: str | None) -> list[torch.nn.Module]:
    """The transformer blocks: modules of the class `block_name`, or of those that the model itself names."""
    # Private, because transformers has no public name for it; it is what its own FSDP integration reads.
    names = {block_name} if block_name else set(lm._no_split_modules or ())
    blocks = [module for module in lm.modules() if type(module).__name__ in names]
    if not blocks:
        # A block is repeated, and no leaf: the candidates are what lists of modules hold.
        lists = (module for module in lm.modules() if isinstance(module, torch.nn.ModuleList))
        classes = {type(child).__name__ for children in lists for child in children}
        raise UserError(
            f"model.block_name={block_name} is no module of {type(lm).__name__}; "
            f"{did_you_mean(str(block_name), classes)}"
        )
    return blocks
