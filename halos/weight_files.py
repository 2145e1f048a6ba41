"""Safetensors files of a base model: which there are, and whether they hold its weights, from their headers alone.

The headers say the name, shape and kind of each tensor, so a damaged or wrong file is found before anything loads.
`halos/weights.py` reads the tensors.
"""

import os
import zipfile
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from halos.datafiles import from_json
from halos.errors import UserError

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # others would be cast without a word
FLOATS = ("F64", "F32", "F16", "BF16", *(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES))


def files_of(source: str, index: str = SAFE_WEIGHTS_INDEX_NAME, single: str = SAFE_WEIGHTS_NAME) -> dict[str, str]:
    """Return the safetensors file of each weight of `source`, a directory or a hub name; empty if it has none."""
    index_path, path = (_cached(source, name) for name in (index, single))
    if index_path:
        with open(index_path, encoding="utf-8") as file:
            content = from_json(file.read())
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not weight_map or not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map")
        paths, _ = get_checkpoint_shard_files(source, index_path)
        of_file = {os.path.basename(path): path for path in paths}
        return {name: of_file[file] for name, file in weight_map.items()}
    return dict.fromkeys(header_of(path), path) if path else {}


def all_of(source: str) -> list[str]:
    """Return the files with the weights of `source`: safetensors, else pickled ones; empty if it has neither."""
    if found := files_of(source):
        return sorted(set(found.values()))
    index, single = (_cached(source, name) for name in (WEIGHTS_INDEX_NAME, WEIGHTS_NAME))
    return sorted(get_checkpoint_shard_files(source, index)[0]) if index else [single] if single else []


def _cached(source: str, file: str) -> str | None:
    """Return the local path of a file of `source`, downloaded if necessary; None if the file does not exist."""
    return cached_file(
        source, file, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False
    )


def names_in_files(files: dict[str, str], lm: PreTrainedModel) -> tuple[dict[str, str], list[str]]:
    """Return name in the model -> name in the files, and the names of weights that transformers must convert.

    A tied weight may have only one of its names in the files; a weight that is not there is left out.
    """
    state = lm.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(lm)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    stored: dict[int, str] = {}  # id(tensor) -> name in the files
    converted = []
    for key in files:
        name, converter = rename_source_key(key, renamings, converters, lm.base_model_prefix, state)
        if converter is not None:
            converted.append(key)
        elif name in state:
            stored[id(state[name])] = key
    return {name: stored[id(tensor)] for name, tensor in state.items() if id(tensor) in stored}, converted


def check(source: str, lm: PreTrainedModel) -> None:
    """Raise an error if the files of a directory or a hub name do not hold the weights of `lm`.

    It is a UserError, or what the reading libraries raise. lm: may be on the meta device
    """
    files = files_of(source) or files_of(source, WEIGHTS_INDEX_NAME, WEIGHTS_NAME)
    if not files:
        raise ValueError(f"it has no {SAFE_WEIGHTS_NAME}, nor another file of weights")
    headers = {path: header_of(path) for path in sorted(set(files.values()))}
    for name, path in files.items():
        if name not in headers[path]:
            raise ValueError(f"{os.path.basename(path)} lacks {name}, which the index says it has")
    names, converted = names_in_files(files, lm)
    for key in converted:
        _check_kind(source, key, headers[files[key]][key][0])
    for name, tensor in sorted(lm.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, torch.nn.Parameter):
            continue  # a buffer
        if name in names:
            key = names[name]
            kind, shape = headers[files[key]][key]
            _check_kind(source, key, kind)
            if shape != tuple(tensor.shape):
                raise wrong_shape(source, key, shape, tensor.shape)
        elif not converted:
            raise UserError(f"{source} lacks the weight {name}; it is not a whole checkpoint")


def header_of(path: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return name -> (kind, shape) of the tensors in a file of weights."""
    if path.endswith(".bin"):
        state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
        return {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in state.items()}
    with safe_open(path, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}


def _check_kind(source: str, name: str, kind: str) -> None:
    if kind not in FLOATS:
        raise UserError(
            f"{source} has {name} of kind {kind}, which is no kind of weight; give a checkpoint that is not quantized"
        )


def wrong_shape(directory: str, name: str, stored: Any, expected: Any) -> UserError:
    return UserError(
        f"{directory} has {name} of shape {tuple(stored)}, but its config.json describes {tuple(expected)}; "
        "its files do not belong together, so copy or download all of them again"
    )
