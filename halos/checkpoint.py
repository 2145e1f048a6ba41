"""Saving and loading: `policy.pt`, the Hugging Face export beside it, and directories that are replaced whole.

A checkpoint directory is written beside and then renamed, so that at every moment `LATEST` is a whole checkpoint.
"""

import os
import pickle
import shutil
from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor

from halos.errors import UserError


def save(directory: str, step: int, state: dict[str, torch.Tensor], metrics: dict, export: Callable[[str], None]):
    """Replace `directory` by a new checkpoint: `policy.pt`, and whatever `export(directory)` writes beside it."""
    unfinished = f"{directory}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    torch.save({"step_idx": step, "state": state, "metrics": metrics}, os.path.join(unfinished, "policy.pt"))
    export(unfinished)
    replace_directory(unfinished, directory)


def replace_directory(new: str, directory: str) -> None:
    """Put `new` in the place of `directory`. Between the two renames the old one stands at `{directory}.old`."""
    old = f"{directory}.old"
    if os.path.exists(directory):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(directory, old)
    os.rename(new, directory)
    shutil.rmtree(old, ignore_errors=True)


def full_state(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The whole state dict on the CPU in `dtype`, tied weights still tied."""
    seen: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        key = tensor.data_ptr() if not isinstance(tensor, DTensor) else tensor.to_local().data_ptr()
        if key not in seen or seen[key].shape != whole.shape:
            cast = whole.detach().to("cpu", dtype if whole.is_floating_point() else whole.dtype, copy=True)
            seen[key] = cast
        state[name] = seen[key]
    return state


def load_state(path: str) -> dict[str, torch.Tensor]:
    """The weights in a `policy.pt`, memory-mapped. UserError if it is missing, truncated, or something else."""
    if not os.path.isfile(path):
        raise UserError(
            f"model.load_from: {path} does not exist; give an absolute path, one relative to cache_dir, "
            "a directory in Hugging Face's layout, or a hub name"
        )
    try:
        payload = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        state = payload["state"]
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError, KeyError, TypeError, OSError) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(
            f"{path} is damaged or is no policy.pt of this project ({type(error).__name__}: {reason}); "
            "use another checkpoint, for example a step-N/policy.pt"
        ) from error
    return state
