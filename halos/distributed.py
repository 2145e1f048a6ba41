"""Devices and process groups; nothing else touches torch.distributed."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor


def default_device() -> torch.device:
    """Where models live: the GPU of this process if it has one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_mesh(device_type: str) -> DeviceMesh:
    """All processes in one dimension. FSDP needs a group even for one process: then it is made here, without a
    launcher or a port."""
    if not dist.is_initialized():
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device_type, (dist.get_world_size(),))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered, any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
