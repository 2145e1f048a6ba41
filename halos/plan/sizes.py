"""Sizes of a model's parameters, in the groups that FSDP gathers together. Only shapes are read, so the tensors may be
on the meta device or fake."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halos import sharding


@dataclass(frozen=True)
class Group:
    """Parameters that FSDP gathers together, and whose gradients it reduces together."""

    shapes: tuple[torch.Size, ...]  # of those that are trained
    frozen: tuple[torch.Size, ...] = ()  # of those that are not

    @property
    def trained(self) -> "Group":
        return Group(self.shapes)

    @property
    def elements(self) -> int:
        return sum(shape.numel() for shape in self.shapes + self.frozen)

    def shard(self, n: int) -> int:
        """Elements that each of n ranks holds. FSDP cuts, and pads, a parameter along its first dimension."""
        return sum(-(-shape[0] // n) * shape[1:].numel() for shape in self.shapes + self.frozen)

    def gathered(self, n: int) -> int:
        """Elements of the whole group, gathered from n ranks, padding included."""
        return n * self.shard(n)


@dataclass(frozen=True)
class ModelSizes:
    """The parameters of a policy, by group."""

    blocks: list[Group]
    root: Group  # embedding, final norm and head; all of it is trained, or nothing
    critic: Group
    vocab_size: int
    hidden_size: int
    softcap: bool  # whether the model caps its logits, as Gemma 2 does

    @property
    def language_model(self) -> list[Group]:
        return [*self.blocks, self.root]

    @property
    def groups(self) -> list[Group]:
        return [*self.language_model, self.critic]


def sizes_of(lm: Any, block_name: str | None, v_head: nn.Module | None = None) -> ModelSizes:
    """Group the parameters of a causal LM, and of a critic if there is one, as `sharding.prepare_policy` does."""
    blocks = sharding.find_blocks(lm, block_name)
    inside = {id(p) for block in blocks for p in block.parameters()}
    head = lm.get_output_embeddings().weight
    return ModelSizes(
        blocks=[group_of(block.parameters()) for block in blocks],
        root=group_of(p for p in lm.parameters() if id(p) not in inside),
        critic=group_of(v_head.parameters() if v_head is not None else ()),
        vocab_size=head.shape[0],
        hidden_size=head.shape[1],
        softcap=getattr(lm.config.get_text_config(), "final_logit_softcapping", None) is not None,
    )


def group_of(parameters: Iterable[torch.Tensor]) -> Group:
    known = list(parameters)
    trained, frozen = (tuple(p.shape for p in known if p.requires_grad is wanted) for wanted in (True, False))
    return Group(trained, frozen)
