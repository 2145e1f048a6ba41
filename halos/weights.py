"""Fill a sharded model with weights. Each rank reads its part of one tensor after another, never the whole model.

`fill` gives values to a model whose parameters are on the meta device. Three classes provide them: two for files of
which every rank can read a part, and one for weights that only rank 0 has. A fourth adds the values of a new adapter to
one of these. Change this file to add another source of weights.
"""

from collections.abc import Callable
from typing import Protocol, cast

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from halos import adapters, checkpoint, distributed, weight_files
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


class WithAdapter:
    """Weights of a base model and of a new adapter, for `fill`."""

    def __init__(self, base: Weights, seed: int):
        self.base, self.seed = base, seed

    def read(self, name: str, tensor: torch.Tensor, part: Part) -> torch.Tensor:
        if adapters.is_of_adapter(name):
            return adapters.first_values(name, tensor.shape, self.seed)[part]
        return self.base.read(adapters.plain_name(name), tensor, part)


def find_safetensors(source: str, lm: PreTrainedModel) -> FromSafetensors | None:
    """Return the files of `source` if they hold the weights of `lm`; else None.

    The weights may have the model's names, or names that transformers knows how to rename. The result is None if there
    are no such files, if a weight is missing or has another shape, or if weights would have to be converted.
    """
    files = weight_files.files_of(source)
    state = lm.state_dict(keep_vars=True)
    names, converted = weight_files.names_in_files(files, lm)
    if converted or names.keys() != state.keys():
        return None
    weights = FromSafetensors(files, names)
    shapes = all(list(tensor.shape) == weights.stored(name).get_shape() for name, tensor in state.items())
    return weights if shapes else None


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
