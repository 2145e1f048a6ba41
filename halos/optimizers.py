"""The optimizer of a run: a class of torch.optim, Muon, or one of torchao with a state of few bits.

Change this file to add an optimizer, or to change which parameters it treats how.
"""

import importlib.util
import inspect
from typing import Any

import torch
from torch import nn

from halos import distributed
from halos.errors import UserError
from halos.muon import Muon

# Of torchao.optim, whose states have 8 or 4 bits a number.
OF_TORCHAO = ("Adam8bit", "Adam4bit", "AdamFp8", "AdamW8bit", "AdamW4bit", "AdamWFp8")
NOT_IN_TORCH = ("Muon", *OF_TORCHAO)
CHOICES_OF_KERNEL = {"fused", "foreach", "differentiable"}  # arguments by which a user chooses


def class_of(name: str) -> Any:
    """Return the class that `optimizer: name` stands for."""
    if name == "Muon":
        return Muon
    if name not in OF_TORCHAO:
        return getattr(torch.optim, name)
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"optimizer={name} is in torchao, which is not installed; pip install torchao")
    import torchao.optim

    return getattr(torchao.optim, name)


def make(policy: Any, name: str, lr: float, kwargs: dict[str, Any]) -> torch.optim.Optimizer:
    """Make the optimizer of a `models.PolicyModel`. Weight decay spares vectors (norms and biases)."""
    cls = class_of(name)
    is_sharded = any(distributed.local(p) is not p for p in policy.parameters())
    return cls(groups(policy, hidden=cls is Muon), lr=lr, **with_kernel(cls, kwargs, is_sharded))


def groups(policy: Any, hidden: bool) -> list[dict[str, Any]]:
    """Parameters as an optimizer wants them: matrices, of which Muon moves the hidden ones, and vectors."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) is many] for many in (True, False))
    inside = hidden_matrices(policy) if hidden else set()
    found: list[dict[str, Any]] = [
        {"params": [p for p in matrices if id(p) in inside], "hidden": True},
        {"params": [p for p in matrices if id(p) not in inside]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in found if group["params"]]  # an adapter has no vectors


def hidden_matrices(policy: Any) -> set[int]:
    """Ids of the language model's matrices that map hidden states to hidden states: no table, no head, no critic."""
    ends = [module for module in policy.lm.modules() if isinstance(module, nn.Embedding)]
    ends += [policy.lm.get_output_embeddings()]
    outside = {id(module.weight) for module in ends if module is not None}
    return {id(p) for p in policy.lm.parameters() if p.ndim == 2 and id(p) not in outside}


def with_kernel(cls: type[torch.optim.Optimizer], kwargs: dict[str, Any], is_sharded: bool) -> dict[str, Any]:
    """Add `fused: True`, one kernel for the whole step, if the class has it and the user has not chosen.

    torch has it for shards of Adam and AdamW only. Otherwise the class itself chooses: foreach on a GPU.
    """
    known = inspect.signature(cls).parameters
    if "fused" not in known or CHOICES_OF_KERNEL & kwargs.keys():
        return kwargs
    if is_sharded and not issubclass(cls, torch.optim.Adam):  # AdamW is a subclass
        return kwargs
    return {**kwargs, "fused": True}
