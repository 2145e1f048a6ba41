"""The states that a run resumes from: `{run_dir}/states/step-N/`, written in the background, and read back.

A state holds everything that the next step depends on: trained weights, optimizer and critic, sharded as they are in
memory (torch.distributed.checkpoint), and in `progress.pt` the rest: the position in the data, the schedule, counters,
the random generators of every rank, checksums of frozen weights. A state with a manifest is complete.
`halos/checkpoint.py` writes what people use.
"""

import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from halos import adapters, distributed, files, manifest
from halos.errors import UserError
from halos.files import UNFINISHED
from halos.models import PolicyModel
from halos.run_dir import STATES

PROGRESS = "progress.pt"
# torch says this at every save of a single process, which needs no group.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def directory_of(run_dir: str) -> str:
    return os.path.join(run_dir, STATES)


def complete(run_dir: str) -> list[str]:
    """Return the paths of the complete states of a run, the newest first. Their files are not verified."""
    directory = directory_of(run_dir)
    names = os.listdir(directory) if os.path.isdir(directory) else []
    steps = sorted((int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d+", name)), reverse=True)
    paths = [os.path.join(directory, f"step-{step}") for step in steps]
    return [path for path in paths if manifest.is_complete(path)]


def newest(run_dir: str) -> str | None:
    """Return the newest state whose files are what was written, with a warning for each newer one; None without one."""
    for path in complete(run_dir):
        try:
            manifest.check(path)
        except manifest.Damaged as damage:
            print(f"warning: {damage}; the state before it is used")
        else:
            return path
    return None


def remove(path: str) -> None:
    """Remove a state. If this process is killed meanwhile, it is whole, or the next start removes the rest of it."""
    unfinished = path + UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    os.rename(path, unfinished)
    os.remove(os.path.join(unfinished, manifest.NAME))
    shutil.rmtree(unfinished)


class StateWriter:
    """Writes states in the background: training waits for the copy to main memory alone. All ranks call its methods.

    keep: number of states that stay; older ones are removed once a newer one is complete. 0: none are written
    """

    def __init__(self, run_dir: str, keep: int):
        self.run_dir = run_dir
        self.keep = keep
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="states")
        self.writing: Future | None = None
        self.frozen: list[int] | None = None  # what `adapters.frozen_sums` finds
        # The background thread's collectives must not meet those of training.
        self.group = dist.new_group(backend="gloo") if distributed.world_size() > 1 else None

    def write(self, policy: PolicyModel, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
        """Start to write the state `step-{progress["updates"]}`. Raises what the write before has raised."""
        if not self.keep:
            return
        self.wait()
        path = os.path.join(directory_of(self.run_dir), f"step-{progress['updates']}")
        tensors, settings = _split(policy, optimizer)
        if self.frozen is None:
            self.frozen = adapters.frozen_sums(policy)
        rest = {**progress, "optimizer": settings, "rng": distributed.gather_objects(rng_state())}
        rest["frozen"] = self.frozen
        with self._whole(path):
            if distributed.is_main():
                shutil.rmtree(path + UNFINISHED, ignore_errors=True)
                os.makedirs(path + UNFINISHED)
                # Opened here, because torch's own error does not say why a file cannot be written.
                with open(os.path.join(path + UNFINISHED, PROGRESS), "wb") as file:
                    torch.save(rest, file)
            distributed.barrier()
            alone = distributed.world_size() == 1
            saved = dcp.async_save(tensors, checkpoint_id=path + UNFINISHED, process_group=self.group, no_dist=alone)
        assert isinstance(saved, Future)
        self.writing = self.executor.submit(self._finish, saved, path)

    def wait(self) -> None:
        """Wait until the state that is being written is complete, on all ranks."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()
            distributed.barrier()

    def close(self) -> None:
        self.executor.shutdown(wait=True)

    def _finish(self, saved: Future, path: str) -> None:
        with self._whole(path):
            saved.result()  # when all ranks have written
            if distributed.is_main():
                manifest.write(path + UNFINISHED)
                files.replace_directory(path + UNFINISHED, path)
                for old in complete(self.run_dir)[self.keep :]:
                    remove(old)

    @contextmanager
    def _whole(self, path: str) -> Iterator[None]:
        """Leave nothing of a state that could not be written, and say in the error which one it was."""
        try:
            with files.writing(path):
                yield
        except BaseException:
            if distributed.is_main():
                shutil.rmtree(path + UNFINISHED, ignore_errors=True)
            raise


def load(path: str, policy: PolicyModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load weights and optimizer in place and set the random generators; return the progress that was written.

    The number of ranks may differ from when the state was written. Raises UserError if frozen weights, which a state
    does not hold, are other ones now.
    """
    progress = torch.load(os.path.join(path, PROGRESS), map_location="cpu", weights_only=True)
    if progress.pop("frozen", []) != adapters.frozen_sums(policy):
        raise UserError(
            f"resume=true, but the base has other weights than when {path} was written, and its adapter was trained on "
            "those; restore the files of the base, or train under another exp_name"
        )
    tensors, _ = _split(policy, optimizer)
    dcp.load(tensors, checkpoint_id=path, no_dist=distributed.world_size() == 1)
    state: Any = get_optimizer_state_dict(policy, optimizer)["state"]
    own: Any = {"state": _filled(state, tensors["optimizer"]), "param_groups": progress.pop("optimizer")}
    set_optimizer_state_dict(policy, optimizer, own)
    rngs = progress.pop("rng")
    if distributed.rank() < len(rngs):
        set_rng_state(rngs[distributed.rank()])
    return progress


def _split(policy: PolicyModel, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the tensors of policy and optimizer, not copied, and the optimizer's settings.

    A tied weight is there once, and frozen weights are not. An optimizer that has not stepped yet gets its state.
    """
    kept = {name: x for name, x in policy.state_dict(keep_vars=True).items() if not _is_frozen(x)}
    weights = {id(tensor): (name, tensor.detach()) for name, tensor in kept.items()}
    state: Any = get_optimizer_state_dict(policy, optimizer)
    numbers = {name: {key: _as_floats(x) for key, x in own.items()} for name, own in state["state"].items()}
    return {"policy": dict(weights.values()), "optimizer": numbers}, state["param_groups"]


def _is_frozen(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _is_quantized(value: Any) -> bool:
    """Return whether this is a state of torchao's optimizers, of 8 or 4 bits a number."""
    return isinstance(value, torch.Tensor) and type(distributed.local(value)).__name__.startswith("OptimState")


def _as_floats(value: Any) -> Any:
    """Return quantized numbers as floats. Quantizing them again may round a few to a neighbour."""
    return distributed.with_local(value, distributed.local(value).dequantize()) if _is_quantized(value) else value


def _filled(state: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """Return what was loaded, quantized where the optimizer's state is."""
    for name, own in state.items():
        for key, value in own.items():
            if _is_quantized(value):
                distributed.local(value).copy_(distributed.local(loaded[name][key]))
            else:
                own[key] = loaded[name][key]
    return state


def rng_state() -> dict[str, Any]:
    """Return the states of this process's random generators, as numbers: tensors cannot be gathered as objects."""
    kind, keys, *rest = cast(tuple, np.random.get_state(legacy=True))
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    numpy = (kind, keys.tolist(), *rest)
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state().tolist(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
