"""How much memory of each GPU a run takes, and how much it sends, before there is a GPU: `scripts/plan.py` prints it.

Weights, gradients, and what is gathered of them follow from the shapes of the model's parameters; activations and the
optimizer are measured (`halos/measuring.py`). `Plan.phases` puts these together for each phase of an update: that is
the part to change when the training step changes.

Planned is what PyTorch allocates. The CUDA context, the buffers of NCCL, and the allocator's gaps come on top.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

# A private path, because torch has no public one: its documentation of fake tensors imports it from here.
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from halos import loading, packing
from halos.errors import UserError
from halos.measuring import (
    FLOAT32,
    Activations,
    Group,
    Model,
    OptimizerBytes,
    Setup,
    measure_activations,
    optimizer_bytes,
    sizes,
)


@dataclass(frozen=True)
class Memory:
    """Bytes in one process, by what they are for."""

    parameters: int = 0  # the policy's, as stored
    gradients: int = 0  # reduced ones
    optimizer: int = 0
    reference: int = 0  # its weights, as stored
    gathered: int = 0  # weights in the compute dtype, and gradients that are not reduced yet
    activations: int = 0  # what a forward saves, and what forward and backward compute with

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Plan:
    """What an update takes, of each process."""

    model: Model
    setup: Setup
    activations: Activations
    optimizer: OptimizerBytes

    @property
    def resident(self) -> Memory:
        """What is there between two updates."""
        setup, parameters, reference = self.setup, self._stored(self.model.groups), 0
        if setup.reference:
            reference = sum(group.shard(setup.shards) for group in self.model.language_model)
            reference *= setup.reference.itemsize
        return Memory(parameters=parameters, optimizer=round(parameters * self.optimizer.state), reference=reference)

    def on(self, processes: int, replicas: int) -> "Plan":
        """The plan of the same run on other processes."""
        return replace(self, setup=replace(self.setup, shards=processes // replicas, replicas=replicas))

    def peak(self) -> tuple[str, Memory]:
        """The phase that takes the most."""
        return max(self.phases().items(), key=lambda phase: phase[1].total)

    def phases(self) -> dict[str, Memory]:
        """The most that is there in each phase of an update, in their order."""
        model, setup, a = self.model, self.setup, self.activations
        blocks, last = model.blocks, len(model.blocks) - 1
        head_weight = model.vocab_size * model.hidden_size * setup.compute.itemsize
        root = self._gathered(model.root)  # from the forward to the end of the backward
        arriving = self._arriving(blocks[last])  # after the last forward its buffer waits to be freed, then it is ahead
        body = len(blocks) * a.block.kept + a.shared

        def phase(gathered: int, activations: int, done: Sequence[Group] = ()) -> Memory:
            """done: the groups whose gradients are reduced"""
            gradients = self._stored(model.groups if setup.accumulates else done)
            return replace(self.resident, gradients=gradients, gathered=gathered, activations=activations)

        phases = {
            # The buffer that the root arrived in is freed when the first block is gathered.
            "forward of the embedding": phase(
                root + self._arriving(model.root) + 2 * self._arriving(blocks[0]), a.hidden + a.shared
            ),
            "forward of the last block": phase(
                root + self._gathered(blocks[last]) + arriving, body - a.block.kept + a.block.forward
            ),
            "forward of the final norm": phase(root + arriving, body + a.ends.forward),
            "forward of the head": phase(root + arriving, body + a.ends.kept + a.head.forward + a.critic.forward),
        }
        if setup.reference:
            # A forward that is the only one waits for its backward; of several, none does.
            waiting = (body + a.ends.kept + a.head.kept + a.critic.kept) * (setup.forwards == 1)
            wider = setup.reference.itemsize / setup.compute.itemsize
            running = max(a.block.inference, a.ends.inference, a.head.inference)
            for name, gathered, activations in (
                ("embedding", self._reference_gathered(2, 2), a.hidden + a.shared),
                ("blocks", self._reference_gathered(1, 2), running),
            ):
                memory = phase(root + gathered, waiting + round(activations * wider))
                earlier = memory.gradients if setup.microbatches > 1 else 0
                phases[f"forward of the reference model's {name}"] = replace(memory, gradients=earlier)
        phases["backward of the head"] = phase(
            root + arriving + self._gathered(model.critic, FLOAT32),
            body + a.ends.kept + a.head.backward + a.critic.backward,
        )
        phases["backward of the final norm"] = phase(root + head_weight + arriving, body + a.ends.backward)
        for i in reversed(range(len(blocks))):
            ahead = self._arriving(blocks[i - 1]) if i else 0
            before = self._reducing(blocks[i + 1]) + self._held(blocks[i + 1 :]) if i < last else 0
            phases[f"backward of block {i + 1} of {len(blocks)}"] = phase(
                root + head_weight + self._gathered(blocks[i]) + ahead + before,
                i * a.block.kept + a.shared + a.block.backward,
                done=blocks[i + 1 :],
            )
        phases["backward of the embedding"] = phase(
            root + 2 * head_weight + self._reducing(blocks[0]) + self._held(blocks), a.hidden, done=blocks
        )
        if setup.uses_fsdp:
            gradients = model.root.gathered(setup.shards) * setup.compute.itemsize - self._stored([model.root])
            phases["reduction of the root's gradients"] = phase(  # what they are reduced to may be larger
                self._reducing(model.root) + max(0, gradients) + self._held(model.groups), 0, done=model.groups
            )
        phases["step of the optimizer"] = self._step(phase(0, 0, done=model.groups))
        return phases

    def _step(self, memory: Memory) -> Memory:
        setup = self.setup
        largest = max(-(-s[0] // setup.shards) * s[1:].numel() for group in self.model.groups for s in group.shapes)
        of = memory.parameters if self.optimizer.all_at_once else largest * setup.stored.itemsize
        return replace(memory, optimizer=memory.optimizer + round(of * self.optimizer.step))

    def _stored(self, groups: Iterable[Group]) -> int:
        """Bytes of a process's shards; of weights, or of their gradients, which have the same dtype."""
        return sum(group.shard(self.setup.shards) for group in groups) * self.setup.stored.itemsize

    def _gathered(self, group: Group, itemsize: int | None = None) -> int:
        """Bytes of a group that computes; without FSDP it does with the weights themselves."""
        return group.gathered(self.setup.shards) * (itemsize or self.setup.compute.itemsize) * self.setup.uses_fsdp

    def _arriving(self, group: Group) -> int:
        """Bytes of the buffer in which a group is gathered, ahead of its use; one process needs none."""
        return self._gathered(group) * (self.setup.shards > 1)

    def _reducing(self, group: Group) -> int:
        """Bytes of the float32 copy of a group's gradients that is sent; FSDP holds it until the next group's."""
        return group.gathered(self.setup.shards) * FLOAT32 * self.setup.uses_fsdp

    def _held(self, done: Iterable[Group]) -> int:
        """Bytes of float32 gradients that replicas reduced, where another dtype is stored: freed after the backward."""
        if self.setup.replicas == 1 or self.setup.stored == torch.float32:
            return 0
        return sum(group.shard(self.setup.shards) for group in done) * FLOAT32

    def _reference_gathered(self, roots: int, blocks: int) -> int:
        """Bytes of the reference's root and a block, so many times: as weights, and in the buffer of their arrival."""
        setup, n = self.setup, self.setup.shards
        if setup.world_size == 1 or setup.reference is None:
            return 0
        if n == 1:
            roots = blocks = 1
        root, block = self.model.root.gathered(n), self.model.blocks[-1].gathered(n)
        return (roots * root + blocks * block) * setup.reference.itemsize

    def wire(self) -> dict[str, float]:
        """Bytes that each process sends per update, by purpose; it receives as many.

        In a ring of n processes each passes on (n - 1) / n of what is gathered or reduced, twice that where all reduce.
        """
        setup, model = self.setup, self.model
        n, replicas = setup.shards, setup.replicas
        blocks = sum(block.gathered(n) for block in model.blocks)
        root, critic = model.root.gathered(n), model.critic.gathered(n)
        # Blocks are gathered for the forward and for the backward, the root once for both. Where a microbatch takes
        # several forwards, each runs without gradient before.
        times = 2 if setup.forwards == 1 else 3
        weights = (times * blocks + root) * setup.compute.itemsize + times * critic * FLOAT32
        reference = (blocks + root) * setup.reference.itemsize if setup.reference else 0
        gradients = (blocks + root + critic) * FLOAT32
        ring, all_reduce = (n - 1) / n, 2 * (replicas - 1) / replicas
        of_a_forward = {
            "weights": weights * ring,
            "reference weights": reference * ring,
            "gradients": gradients * ring,
            "gradients among replicas": gradients / n * all_reduce,
        }
        return {name: setup.forwards * setup.microbatches * sent for name, sent in of_a_forward.items()}


def make_plan(
    config: DictConfig,
    lm_config: PreTrainedConfig,
    gpus: int,
    replicas: int,
    *,
    forwards: int = 1,
    device: str = "cuda",
    layout: packing.Layout | None = None,
    n_targets: int | None = None,
) -> Plan:
    """The plan of a run on `gpus` processes, `replicas` groups of which hold all weights.

    forwards: of each process per microbatch
    layout, n_targets: of a forward; None: max_tokens_per_forward tokens in sequences of max_length, all of them targets
    """
    _refuse_what_is_not_planned(config)
    where = torch.device(device)
    stored, compute = getattr(torch, config.model.policy_dtype), loading.compute_dtype(config, where)
    layout = layout or full_layout(config.model.max_tokens_per_forward, config.model.max_length)
    setup = Setup(
        shards=gpus // replicas,
        replicas=replicas,
        stored=stored,
        compute=compute,
        reference=loading.reference_dtype(config, where) if config.loss.use_reference_model else None,
        layout=layout,
        n_targets=n_targets or sum(layout.q_lengths),
        forwards=forwards,
        microbatches=config.model.gradient_accumulation_steps,
        checkpointing=config.model.activation_checkpointing,
        cuda=where.type == "cuda",
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        lm = AutoModelForCausalLM.from_config(lm_config, dtype=compute, trust_remote_code=config.trust_remote_code)
        v_head = loading.load_value_head(config, lm) if config.loss.get("use_value_head", False) else None
        model = sizes(lm, config.model.block_name, v_head)
        activations = measure_activations(lm, model, setup, v_head)
    kwargs: Any = OmegaConf.to_container(config.optimizer_kwargs)
    return Plan(model, setup, activations, optimizer_bytes(config.optimizer, kwargs, stored, setup.cuda))


def full_layout(n_tokens: int, max_length: int) -> packing.Layout:
    """Sequences of max_length, and what is left, without shared prompts."""
    starts = range(0, n_tokens, max_length)
    return packing.Layout([(start, min(start + max_length, n_tokens), 0, 0) for start in starts])


def _refuse_what_is_not_planned(config: DictConfig) -> None:
    for key, value, instead in (("packing", False, "auto"), ("logps", "plain", "fused")):
        if config.model[key] == value:
            shown = str(value).lower()
            raise UserError(
                f"model.{key}={shown} is for checking, and is not planned; leave it out (model.{key}={instead})"
            )
