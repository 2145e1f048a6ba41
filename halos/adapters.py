"""LoRA (https://arxiv.org/abs/2106.09685) through peft: small trained matrices beside the frozen weights of the blocks.

A linear layer with weights W computes W x + (alpha / rank) B A x. A and B are trained, in float32, and B is 0 at the
start. With the adapter off the model is its base, so it is its own reference model. Checkpoints hold the merged
weights W + (alpha / rank) B A, and the adapter beside them. Change this file to add another kind of adapter.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halos import distributed, sharding
from halos.errors import UserError, did_you_mean

NAME = "default"  # of the only adapter, as peft calls it
FILE = "adapter_model.safetensors"


#### ADDING AN ADAPTER


def find_targets(lm: PreTrainedModel, settings: DictConfig) -> list[str]:
    """Return the full names of the linear layers that get an adapter. Raises UserError for an unknown name.

    Those are in the blocks. The head cannot be one of them: its weights are read without its forward pass.

    lm: may be on the meta device
    settings: the config's `model`
    """
    blocks = sharding.find_blocks(lm, settings.block_name)
    inside = {id(module) for block in blocks for module in block.modules()}
    modules = [(name, module) for name, module in lm.named_modules() if id(module) in inside]
    linear = [name for name, module in modules if isinstance(module, nn.Linear | Conv1D)]
    known = {_last_part(name) for name in linear}
    if not known:
        raise UserError(f"model.use_peft=true: {type(lm).__name__} has no linear layers in its blocks; train all of it")
    wanted = known if settings.lora.targets is None else set(settings.lora.targets)
    for name in sorted(wanted - known):
        raise UserError(
            f"model.lora.targets={name} is not a linear layer in the blocks of {type(lm).__name__}; "
            f"{did_you_mean(name, known)}"
        )
    return [name for name in linear if _last_part(name) in wanted]


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def add(lm: PreTrainedModel, settings: DictConfig, seed: int, base_name: str | None = None) -> None:
    """Freeze a causal LM and add a new adapter, in place. On the meta device the adapter stays without values.

    settings: the config's `model`
    seed: what the adapter's first values depend on
    base_name: where people who load the adapter find the base
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = find_targets(lm, settings)
    lora = LoraConfig(
        r=settings.lora.rank,
        lora_alpha=settings.lora.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        fan_in_fan_out=isinstance(lm.get_submodule(targets[0]), Conv1D),  # it stores weights as (inputs, outputs)
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )
    inject_adapter_in_model(lora, lm, NAME, low_cpu_mem_usage=True)  # on the meta device: nothing is drawn or cast
    for name, parameter in list(lm.named_parameters()) if lm.device.type != "meta" else ():
        if is_of_adapter(name):
            values = first_values(name, parameter.shape, seed).to(lm.device)
            lm.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(values)


def is_of_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def plain_name(name: str) -> str:
    """Return the name that a frozen parameter has in a model without adapter."""
    return name.replace(".base_layer.", ".")


def first_values(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Return what training starts from: B is 0, and A is uniform as in a new linear layer, by seed and name."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


#### THE MODEL WITH AND WITHOUT IT


def layers(lm: nn.Module) -> dict[str, Any]:
    """Return the layers with an adapter, by the name that their weights have in a model without one."""
    return {f"{name}.weight": module for name, module in lm.named_modules() if hasattr(module, "lora_A")}


class WithoutAdapter:
    """A policy as its own reference model: the adapter is off in each of its forward passes."""

    v_head = None

    def __init__(self, policy: Any):
        self.policy = policy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with off(self.policy.lm):
            return self.policy(*args, **kwargs)._replace(values=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)


@contextmanager
def off(lm: nn.Module) -> Iterator[None]:
    """Make a model compute what its base does, inside the block. A model without adapter stays as it is."""
    found = layers(lm).values()
    # Private, because peft's enable_adapters() freezes and unfreezes parameters, and a backward pass may be waiting.
    for layer in found:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in found:
            layer._disable_adapters = False


def describe(lm: nn.Module) -> str:
    """Return how many parameters are trained, for the terminal; nothing without an adapter."""
    found = list(layers(lm).values())
    if not found:
        return ""
    trained = sum(parameter.numel() for parameter in lm.parameters() if parameter.requires_grad)
    return f", {trained:,} of them trained (LoRA of rank {found[0].r[NAME]} in {len(found)} layers)"


def frozen_sums(model: nn.Module) -> list[int]:
    """Return a checksum of each frozen parameter, equal on any number of ranks. All ranks must call this."""
    frozen = (distributed.whole(p.detach()) for p in model.parameters() if not p.requires_grad)
    return [int(weights.contiguous().view(torch.int16).sum(dtype=torch.int64)) for weights in frozen]


#### CHECKPOINTS


def plain_state(lm: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict under the names of a model without adapter, and without the adapter. Nothing is copied."""
    state = lm.state_dict(keep_vars=True)
    return {plain_name(name): tensor for name, tensor in state.items() if not is_of_adapter(name)}


def merged(weight: torch.Tensor, layer: Any) -> torch.Tensor:
    """Return W + (alpha / rank) B A, a new float32 tensor. All ranks must call this.

    weight: W, gathered
    """
    a, b = (distributed.whole(part[NAME].weight.detach()) for part in (layer.lora_A, layer.lora_B))
    change = layer.scaling[NAME] * (b @ a)
    return weight.float() + (change.T if layer.fan_in_fan_out else change)


def own_state(lm: nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors on the CPU, gathered; empty without an adapter, and on other ranks than 0."""
    state = {}
    for name, tensor in lm.state_dict(keep_vars=True).items():
        if is_of_adapter(name):
            state[name] = distributed.whole(tensor.detach()).to("cpu", copy=True)
    return state if distributed.is_main() else {}


def write(directory: str, lm: Any, state: dict[str, torch.Tensor]) -> None:
    """Write an adapter in peft's layout: adapter_config.json and adapter_model.safetensors.

    state: `own_state(lm)`
    """
    from peft import get_peft_model_state_dict

    os.makedirs(directory)
    # Else peft would ask the hub for the base's config.
    named = get_peft_model_state_dict(lm, state, adapter_name=NAME, save_embedding_layers=False)
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in named.items()}
    save_file(tensors, os.path.join(directory, FILE), metadata={"format": "pt"})
    lm.peft_config[NAME].save_pretrained(directory)
