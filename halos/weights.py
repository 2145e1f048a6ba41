"""Fill a sharded model with weights. Each rank reads its part of one tensor after another, never the whole model.

`fill` gives values to a model whose parameters are on the meta device. Three classes provide them: two for files of
which every rank can read a part, and one for weights that only rank 0 has. Change this file to add another source of
weights.
"""

import os
from collections.abc import Callable
from typing import Protocol, cast

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from halos import checkpoint, distributed
from halos.packing_check import cast_weights

Part = tuple[slice, ...]


class Weights(Protocol):
    def read(self, name: str, tensor: torch.Tensor, part: Part) -> torch.Tensor:
        """Return a part of the weight `name`, which has the shape of `tensor`.

        All ranks must call this in the same order.
        """


class FromPolicyPt:
    """A checkpoint of this project, memory-mapped. Only the pages of the requested part are read."""

    def __init__(self, path: str):
        self.state = checkpoint.load_state(path)

    def read(self, name: str, tensor: torch.Tensor, part: Part) -> torch.Tensor:
        return self.state[name][part]


class FromSafetensors:
    """Safetensors files of a directory or a hub repository in Hugging Face's layout."""

    def __init__(self, files: dict[str, str], names: dict[str, str]):
        """files: name in the files -> file; names: name in the model -> name in the files"""
        self.names = names
        self.opened = {path: safe_open(path, framework="pt") for path in set(files.values())}
        self.files = files

    def stored(self, name: str):
        """Return the weight in its file, of which a slice can be read."""
        name = self.names[name]
        return self.opened[self.files[name]].get_slice(name)

    def read(self, name: str, tensor: torch.Tensor, part: Part) -> torch.Tensor:
        return self.stored(name)[part]


class FromMainProcess:
    """Weights that only rank 0 has: random weights, and checkpoints that transformers must convert.

    Rank 0 sends them tensor by tensor.
    """

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
    """Return the files of `source` if they hold the weights of `lm`; else None.

    The weights may have the model's names, or names that transformers knows how to rename. The result is None if there
    are no such files, if a weight is missing or has another shape, or if weights would have to be converted.
    """
    files = _weight_files(source)
    state = lm.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(lm)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    stored: dict[int, str] = {}  # id(tensor) -> name in the files; a tied weight may have only one of its names there
    for key in files:
        name, converter = rename_source_key(key, renamings, converters, lm.base_model_prefix, state)
        if converter is not None:
            return None
        if name in state:
            stored[id(state[name])] = key
    if not all(id(tensor) in stored for tensor in state.values()):
        return None
    weights = FromSafetensors(files, {name: stored[id(tensor)] for name, tensor in state.items()})
    shapes = all(list(tensor.shape) == weights.stored(name).get_shape() for name, tensor in state.items())
    return weights if shapes else None


def files_of(source: str) -> list[str]:
    """Return the files with the weights of `source`: safetensors, else pickled ones; empty if it has neither."""
    if found := _weight_files(source):
        return sorted(set(found.values()))
    index, single = (_cached(source, name) for name in (WEIGHTS_INDEX_NAME, WEIGHTS_NAME))
    return sorted(get_checkpoint_shard_files(source, index)[0]) if index else [single] if single else []


def _weight_files(source: str) -> dict[str, str]:
    """Return the safetensors file of each weight of `source`; empty if it has none."""
    index, single = (_cached(source, name) for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME))
    if index:
        paths, metadata = get_checkpoint_shard_files(source, index)
        of_file = {os.path.basename(path): path for path in paths}
        return {name: of_file[file] for name, file in metadata["weight_map"].items()}
    if not single:
        return {}
    with safe_open(single, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), single)


def _cached(source: str, file: str) -> str | None:
    """Return the local path of a file of `source`, downloaded if necessary; None if the file does not exist."""
    return cached_file(
        source, file, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False
    )


def empty_lm(lm_config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Build a causal LM whose parameters are on the meta device, in `dtype`, and whose buffers have their values.

    No checkpoint contains buffers such as rotary frequencies; only building the model computes them. If the whole model
    were built on the meta device, `to_empty` would leave garbage in them.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        # A parameter that is already on the meta device is tied. It must stay the same object.
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
    """Fill sharded models of one architecture with their parts of `weights`, in one pass over them."""
    states: list[dict[str, torch.Tensor]] = [{} for _ in lms]
    filled: list[dict[int, torch.Tensor]] = [{} for _ in lms]
    own = [lm.state_dict(keep_vars=True) for lm in lms]
    for name in own[0]:
        part = distributed.own_slice(own[0][name])
        if id(own[0][name]) in filled[0]:  # tied: already filled under another name
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
