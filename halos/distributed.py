"""The process group: ranks, devices, sharded tensors, and collectives.

No other file calls collectives of torch.distributed; `halos/states.py` has torch write and read shards. A run is a
group of processes, one per GPU, or any number on a
CPU. `launch` starts them on this machine. Under torchrun or SLURM, on one node or several, each process is already
started and joins the group that its environment describes. Every collective here returns the same result on all ranks.
"""

import datetime
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

# Private, because a DTensor has no public method that says where its local part lies in the whole.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from halos.errors import UserError

# How long a rank waits for the others in a collective before it ends the run. This is for a rank that hangs: if one
# dies, its launcher ends the run at once. Downloading a model of 65B may take most of an hour.
TIMEOUT = datetime.timedelta(minutes=60)


T = TypeVar("T")


#### THE GROUP


def rank() -> int:
    if dist.is_initialized():
        return dist.get_rank()
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdigit() else 0  # `group` raises the error


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return True on rank 0, the rank that writes files and prints."""
    return rank() == 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def default_device() -> torch.device:
    """Return the device for models: this process's GPU if it has one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def n_nodes() -> int:
    """Return the number of machines in the run. Each has exactly one process with local rank 0."""
    return sum(gather_objects(local_rank() == 0))


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a device.

    Main memory is divided equally among the processes of this machine.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            kilobytes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in file)}
        total = kilobytes["MemAvailable"] * 1024
    return total // local_world_size()


def describe() -> str:
    """Return a short text about the processes and devices of the run."""
    nodes = n_nodes()
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    processes = f"{world_size()} process{'es' if world_size() > 1 else ''}"
    return f"{processes} on {kind}" + (f", {nodes} nodes" if nodes > 1 else "")


@contextmanager
def group() -> Iterator[None]:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, ...) for the duration of the block.

    Without RANK in the environment, or inside a group, this does nothing.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    _check_environment()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
    device = torch.device("cuda", local_rank()) if cuda else None
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT, device_id=device)
    except (RuntimeError, ValueError) as error:  # torch's DistNetworkError among them
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"MASTER_ADDR:MASTER_PORT={address}: the processes cannot meet there ({reason}); "
            "use a free port of the first node, the same in every process"
        ) from error
    yield
    # Skipped after an error. Leaving may wait for the other ranks, and they may wait in a collective. The end of this
    # process wakes them.
    dist.destroy_process_group()


def _check_environment() -> None:
    """Check the launcher's environment variables now. Later this process would wait for ranks that never come."""
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name, "")
        if not text.isdigit():
            raise UserError(
                f"{name}={text or 'nothing'} in the environment is not a number; start with torchrun or srun"
            )
        numbers[name] = int(text)
    for mine, of in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_WORLD_SIZE", "WORLD_SIZE")):
        if numbers[mine] >= numbers[of] + (mine == "LOCAL_WORLD_SIZE"):
            raise UserError(f"{mine}={numbers[mine]} does not fit {of}={numbers[of]}; start all processes alike")
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and numbers["LOCAL_RANK"] >= gpus:
        raise UserError(
            f"LOCAL_RANK={numbers['LOCAL_RANK']}, but this process sees {gpus} GPU{'s' * (gpus != 1)}; "
            "start one process per GPU, and let each see all GPUs of its machine"
        )


#### SHARDS


def device_mesh(device_type: str, replicas: int = 1) -> DeviceMesh:
    """Return a mesh of all ranks: one dimension to shard over, or (replicas, ranks that shard).

    FSDP needs a process group even for one process. In that case the group is made here, without a launcher or a port.
    """
    if not dist.is_initialized():
        # gloo beside NCCL: states are written from main memory, and torch refuses to without a group for the CPU.
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if replicas == 1:
        return init_device_mesh(device_type, (world_size(),))
    return init_device_mesh(device_type, (replicas, world_size() // replicas), mesh_dim_names=("replicate", "shard"))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a sharded tensor; return any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a sharded tensor; it shares memory. Return any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_slice(tensor: torch.Tensor) -> tuple[slice, ...]:
    """Return the slice of the whole tensor that this rank holds; for a tensor that is not sharded, the full slice."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, n) for n in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + n) for n, start in zip(shape, offset, strict=True))


def with_local(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return a tensor sharded like `tensor`, with `local` as this rank's part.

    If `tensor` is not sharded, this returns `local`.
    """
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


#### COLLECTIVES


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather_rows(parts: list[torch.Tensor], rows: list[torch.Tensor], n_rows: int) -> torch.Tensor:
    """Gather one tensor with n_rows entries from the entries that each rank has. No gradient flows through.

    parts: this rank's entries, in pieces
    rows: where the entries of each piece belong; every entry belongs to exactly one rank
    """
    ours, where = torch.cat(parts).detach(), torch.cat(rows)
    everyone = ours.new_zeros(n_rows, *ours.shape[1:]).index_copy(0, where, ours)
    if world_size() > 1:
        dist.all_reduce(everyone)  # a sum of one value and zeros: exact
    return everyone


def largest(*numbers: int) -> list[int]:
    """Return the largest of each of these numbers over all ranks."""
    if world_size() == 1:
        return [int(number) for number in numbers]
    answer = torch.tensor([int(number) for number in numbers])  # on the CPU: no synchronisation with a GPU
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return answer.tolist()


def any_rank(flag: bool) -> bool:
    """Return True if the flag is True on at least one rank."""
    return bool(largest(bool(flag))[0])


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """Return rank 0's value on all ranks."""
    return gather_objects(value if is_main() else None)[0]


def broadcast(tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
    """Overwrite `tensor` with the values of the rank `source`."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def on_main(function: Callable[..., T], *args: Any) -> T | None:
    """Call the function on rank 0, and return its result there. If it raises a UserError, all ranks end.

    Rank 0 raises it; the others exit with its code and no message, so that the user sees it once.
    """
    result, failure = None, None
    if is_main():
        try:
            result = function(*args)
        except UserError as error:
            failure = error
    code = gather_objects(failure.code if failure else None)[0]
    if failure:
        raise failure
    if code:
        sys.exit(code)
    return result


@contextmanager
def first_on_each_node() -> Iterator[None]:
    """Let one process of each machine run the block first, then the others.

    The others find what the first one put into a cache.
    """
    if local_rank() != 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()
