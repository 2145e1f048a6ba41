"""Memory of each rank in each phase of an update. Change `Plan.phases` when the training step changes.

Weights, gradients and gathered copies follow from the shapes of the parameters; activations and the optimizer are
measured. All numbers are bytes that PyTorch allocates: the CUDA context, the buffers of NCCL and the gaps of the
allocator come on top.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from halos.plan.activations import FLOAT32, Activations
from halos.plan.optimizer import OptimizerBytes
from halos.plan.setup import Setup
from halos.plan.sizes import Group, ModelSizes

Phases = Iterator[tuple[str, "Memory"]]
Rows = Iterator[tuple[str, int, int]]  # part of the reference's forward pass, gathered weights, activations


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by purpose."""

    parameters: int = 0  # of the policy, as stored
    gradients: int = 0  # reduced
    optimizer: int = 0
    reference: int = 0  # weights of the reference model, as stored
    gathered: int = 0  # weights in the compute dtype, and gradients before they are reduced
    activations: int = 0  # what a forward pass saves, and what forward and backward pass compute with

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Plan:
    """Memory of each rank during an update."""

    model: ModelSizes
    setup: Setup
    activations: Activations
    optimizer: OptimizerBytes

    def on(self, gpus: int, replicas: int) -> "Plan":
        """The plan of the same run on another number of GPUs."""
        return replace(self, setup=replace(self.setup, shards=gpus // replicas, replicas=replicas))

    def peak(self) -> tuple[str, Memory]:
        """The phase that takes the most memory."""
        return max(self.phases().items(), key=lambda phase: phase[1].total)

    def phases(self) -> dict[str, Memory]:
        """The maximum in each phase of an update, in the order of the phases."""
        return dict([*self._forward(), *self._reference_forward(), *self._backward(), *self._update()])

    @property
    def resident(self) -> Memory:
        """Memory between two updates."""
        setup, reference = self.setup, 0
        trained = self._trained(self.model.groups)
        frozen = sum(Group(group.frozen).shard(setup.shards) for group in self.model.groups) * setup.stored.itemsize
        if setup.reference and not setup.adapter:
            reference = sum(group.shard(setup.shards) for group in self.model.language_model)
            reference *= setup.reference.itemsize
        optimizer = round(trained * self.optimizer.state)
        return Memory(parameters=trained + frozen, optimizer=optimizer, reference=reference)

    #### PHASES

    def _forward(self) -> Phases:
        a, blocks, root = self.activations, self.model.blocks, self._root
        # The buffer in which the root arrives is freed when the first block is gathered.
        arriving = self._arriving(self.model.root) + 2 * self._arriving(blocks[0])
        yield "forward of the embedding", self._phase(root + arriving, a.hidden + a.shared)
        gathered = root + self._gathered(blocks[-1]) + self._last_arriving
        yield "forward of the last block", self._phase(gathered, self._body - a.block.kept + a.block.forward)
        yield "forward of the final norm", self._phase(root + self._last_arriving, self._body + a.ends.forward)
        head = self._body + a.ends.kept + a.head.forward + a.critic.forward
        yield "forward of the head", self._phase(root + self._last_arriving, head)

    def _reference_forward(self) -> Phases:
        setup, a = self.setup, self.activations
        if not setup.reference:
            return
        # A graph is kept for the backward pass only if the policy has a single forward pass.
        waiting = (self._body + a.ends.kept + a.head.kept + a.critic.kept) * (setup.forwards == 1)
        wider = setup.reference.itemsize / setup.compute.itemsize
        for name, gathered, activations in self._without_adapter() if setup.adapter else self._second_model():
            memory = self._phase(self._root + gathered, waiting + round(activations * wider))
            earlier = memory.gradients if setup.microbatches > 1 else 0
            yield f"forward of the reference model's {name}", replace(memory, gradients=earlier)

    def _second_model(self) -> Rows:
        a = self.activations
        yield "embedding", self._reference_gathered(2, 2), a.hidden + a.shared
        running = max(a.block.inference, a.ends.inference, a.head.inference)
        yield "blocks", self._reference_gathered(1, 2), running

    def _without_adapter(self) -> Rows:
        """The policy again, whose root is gathered. Its last block is freed only when the first one has arrived."""
        a, block, arriving = self.activations, self._gathered(self.model.blocks[-1]), self._last_arriving
        yield "embedding", block + 2 * arriving, a.hidden + a.shared
        yield "blocks", block + arriving, a.block.inference
        yield "head", arriving, max(a.ends.inference, a.head.inference)

    def _backward(self) -> Phases:
        model, a, root, head_weight = self.model, self.activations, self._root, self._head_weight
        gathered = root + self._last_arriving
        critic, head = self._gathered(model.critic, FLOAT32), a.head.backward + a.critic.backward
        yield "backward of the head", self._phase(gathered + critic, self._body + a.ends.kept + head)
        yield "backward of the final norm", self._phase(gathered + head_weight, self._body + a.ends.backward)
        n = len(model.blocks)
        for i in reversed(range(n)):
            yield f"backward of block {i + 1} of {n}", self._backward_of_block(i)
        reduced = self._reducing(model.blocks[0]) + self._held(model.blocks)
        yield "backward of the embedding", self._phase(root + 2 * head_weight + reduced, a.hidden, done=model.blocks)
        if self.setup.uses_fsdp:
            # The stored gradients may be larger than those that are still to be reduced.
            gradients = model.root.trained.gathered(self.setup.shards) * self.setup.compute.itemsize
            gradients = max(0, gradients - self._trained([model.root])) + self._held(model.groups)
            reduction = self._phase(self._reducing(model.root) + gradients, 0, done=model.groups)
            yield "reduction of the root's gradients", reduction

    def _backward_of_block(self, i: int) -> Memory:
        blocks, a = self.model.blocks, self.activations
        ahead = self._arriving(blocks[i - 1]) if i else 0
        later = blocks[i + 1 :]
        reduced = self._reducing(later[0]) + self._held(later) if later else 0
        gathered = self._root + self._head_weight + self._gathered(blocks[i]) + ahead + reduced
        return self._phase(gathered, i * a.block.kept + a.shared + a.block.backward, done=later)

    def _update(self) -> Phases:
        setup, memory = self.setup, self._phase(0, 0, done=self.model.groups)
        largest = max(-(-s[0] // setup.shards) * s[1:].numel() for group in self.model.groups for s in group.shapes)
        at_once = memory.gradients if self.optimizer.all_at_once else largest * setup.trained.itemsize
        optimizer = memory.optimizer + max(round(at_once * self.optimizer.step), self.optimizer.matrix)
        yield "step of the optimizer", replace(memory, optimizer=optimizer)

    def _phase(self, gathered: int, activations: int, done: Sequence[Group] = ()) -> Memory:
        """done: groups whose gradients have been reduced"""
        gradients = self._trained(self.model.groups if self.setup.accumulates else done)
        return replace(self.resident, gradients=gradients, gathered=gathered, activations=activations)

    #### BYTES OF GROUPS

    @property
    def _root(self) -> int:
        """The gathered root, from the first forward pass to the end of the backward pass."""
        return self._gathered(self.model.root)

    @property
    def _head_weight(self) -> int:
        """The gradient of the head's weight before it is reduced; an adapter leaves the head as it is."""
        elements = self.model.vocab_size * self.model.hidden_size if not self.model.root.frozen else 0
        return elements * self.setup.compute.itemsize

    @property
    def _body(self) -> int:
        """Activations that all blocks save."""
        return len(self.model.blocks) * self.activations.block.kept + self.activations.shared

    @property
    def _last_arriving(self) -> int:
        """The last block's buffer: freed late after the forward pass, and filled ahead of the backward pass."""
        return self._arriving(self.model.blocks[-1])

    def _trained(self, groups: Iterable[Group]) -> int:
        """This rank's shards of trained weights, or of their gradients, which have the same dtype."""
        return sum(group.trained.shard(self.setup.shards) for group in groups) * self.setup.trained.itemsize

    def _gathered(self, group: Group, itemsize: int | None = None) -> int:
        """The gathered copy of a group that computes. Without FSDP the weights themselves compute."""
        return group.gathered(self.setup.shards) * (itemsize or self.setup.compute.itemsize) * self.setup.uses_fsdp

    def _arriving(self, group: Group) -> int:
        """The buffer in which a group is gathered ahead of its use. A single shard needs none."""
        return self._gathered(group) * (self.setup.shards > 1)

    def _reducing(self, group: Group) -> int:
        """The float32 copy of a group's gradients that is sent. FSDP holds it until that of the next group."""
        return group.trained.gathered(self.setup.shards) * FLOAT32 * self.setup.uses_fsdp

    def _held(self, done: Iterable[Group]) -> int:
        """Float32 gradients reduced among replicas, if another dtype is stored. Freed after the backward pass."""
        if self.setup.replicas == 1 or self.setup.trained == torch.float32:
            return 0
        return sum(group.trained.shard(self.setup.shards) for group in done) * FLOAT32

    def _reference_gathered(self, roots: int, blocks: int) -> int:
        """So many copies of the reference's root and of a block: as weights, and in the buffers of their arrival."""
        setup, n = self.setup, self.setup.shards
        if setup.world_size == 1 or setup.reference is None:
            return 0
        if n == 1:
            roots = blocks = 1
        root, block = self.model.root.gathered(n), self.model.blocks[-1].gathered(n)
        return (roots * root + blocks * block) * setup.reference.itemsize
