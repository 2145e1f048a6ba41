"""Weights for a sharded model: each process reads its part of one tensor after the other, and never holds the whole.

`fill` gives values to a model whose parameters are on the meta device. Where they come from is one of three classes:
files that every process can read a part of, or, for weights that exist in no such file, the main process.
"""

import os
from collections.abc import Callable
from typing import Protocol, cast

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from halos import checkpoint, distributed
from halos.packing_check import cast_weights

Part = tuple[slice, ...]


class Weights(Protocol):
    def read(self, name: str, tensor: torch.Tensor, part: Part) -> torch.Tensor:
        """A part of the weight `name`, which has the shape of `tensor`. Called in the same order in every process."""


class FromPolicyPt:
    """A checkpoint of this project, memory-mapped: of each tensor only the pages of the part are read."""

    def __init__(self, path: str):
        self.state = checkpoint.load_state(path)

    def read(self, name: str, tensor: torch.Tensor, part: Part) -> torch.Tensor:
        return self.state[name][part]


class FromSafetensors:
    """The files of a directory or a hub repository in Hugging Face's layout."""

    def __init__(self, files: dict[str, str], names: dict[str, str]):
        """files: weight -> file; names: name in the model -> name in the files"""
        self.names = names
        self.opened = {path: safe_open(path, framework="pt") for path in set(files.values())}
        self.files = files

    def read(self, name: str, tensor: torch.Tensor, part: Part) -> torch.Tensor:
        name = self.names[name]
        stored = self.opened[self.files[name]].get_slice(name)
        return stored[part] if part else stored[:]


class FromMainProcess:
    """Weights that the main process alone has, and sends tensor by tensor: those drawn at random, and those of
    checkpoints that transformers has to convert."""

    def __init__(self, lm: PreTrainedModel | None, device: torch.device):
        self.state = lm.state_dict() if lm is not None else {}
        self.device = device

    def read(self, name: str, tensor: torch.Tensor, part: Part) -> torch.Tensor:
        if distributed.is_main():
            values = self.state[name].to(self.device, torch.float32)
        else:
            values = torch.empty(tensor.shape, dtype=torch.float32, device=self.device)
        return distributed.broadcast(values.contiguous())[part]


def find_safetensors(source: str, lm: PreTrainedModel) -> FromSafetensors | None:
    """The files of `source` if they hold the weights of `lm` as it names and shapes them; else None.

    A name that is not there may be that of a tied weight which is there under its other name.
    """
    index = _cached(source, SAFE_WEIGHTS_INDEX_NAME)
    if index:
        paths, metadata = get_checkpoint_shard_files(source, index)
        of_file = {os.path.basename(path): path for path in paths}
        files = {name: of_file[file] for name, file in metadata["weight_map"].items()}
    else:
        path = _cached(source, SAFE_WEIGHTS_NAME)
        if not path:
            return None
        with safe_open(path, framework="pt") as opened:
            files = dict.fromkeys(opened.keys(), path)
    state = lm.state_dict(keep_vars=True)
    stored = {id(tensor): name for name, tensor in state.items() if name in files}
    names = {name: stored.get(id(tensor)) for name, tensor in state.items()}
    if not all(names.values()):
        return None
    weights = FromSafetensors(files, {name: other for name, other in names.items() if other})
    for name, tensor in state.items():
        other = weights.names[name]
        if list(tensor.shape) != weights.opened[files[other]].get_slice(other).get_shape():
            return None
    return weights


def _cached(source: str, file: str) -> str | None:
    """The local path of a file of `source`, downloaded if need be; None if there is no such file."""
    return cached_file(
        source, file, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False
    )


def empty_lm(lm_config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """A causal LM whose parameters are on the meta device, in `dtype`, and whose buffers have their values.

    Buffers such as rotary frequencies are in no checkpoint. Only building the model computes them, so that the whole
    of it on the meta device, and `to_empty` later, would leave garbage in them.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        # One that is there already stays the same object: it is tied.
        return parameter if parameter.is_meta else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(cast(Callable[..., None], to_meta))  # its type is wrong
    try:
        with no_init_weights():
            lm = AutoModelForCausalLM.from_config(lm_config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    finally:
        hook.remove()
    lm.tie_weights()
    return cast_weights(lm, dtype)


@torch.no_grad()
def fill(lms: list[PreTrainedModel], weights: Weights, device: torch.device) -> None:
    """Give sharded models of one architecture their parts of `weights`, in one pass over them."""
    states: list[dict[str, torch.Tensor]] = [{} for _ in lms]
    filled: list[dict[int, torch.Tensor]] = [{} for _ in lms]
    own = [lm.state_dict(keep_vars=True) for lm in lms]
    for name in own[0]:
        part = distributed.own_slice(own[0][name])
        if id(own[0][name]) in filled[0]:  # tied: it has its values under another name
            for state, parameters, tensors in zip(states, filled, own, strict=True):
                state[name] = parameters[id(tensors[name])]
            continue
        values = weights.read(name, own[0][name], part)
        for state, parameters, tensors in zip(states, filled, own, strict=True):
            tensor = tensors[name]
            local = values.to(device, tensor.dtype, copy=True).contiguous()
            state[name] = parameters[id(tensor)] = _like(tensor, local)
    for lm, state in zip(lms, states, strict=True):
        lm.load_state_dict(state, assign=True)


def _like(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    values = distributed.with_local(tensor, local)
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
