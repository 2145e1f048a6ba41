"""How much memory of each GPU a run takes, and how much it sends, before there is a GPU: `scripts/plan.py` prints it.

Weights, gradients, and what is gathered of them follow from the shapes of the model's parameters. Activations are
measured: the model runs with fake tensors, which have a shape and no data, one block of it and what surrounds the
blocks. What an optimizer keeps is asked of the optimizer. `Plan.phases` puts these together for each phase of an
update: that is the part to change when the training step changes.

Planned is what PyTorch allocates. The CUDA context, the buffers of NCCL, and the allocator's gaps come on top.
"""

import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig

from halos import logps, models, packing, sharding
from halos.errors import UserError

FLOAT32 = 4  # bytes: gradients are reduced, and logits are held, in float32

#### SIZES


@dataclass(frozen=True)
class Group:
    """Parameters that FSDP gathers, and whose gradients it reduces, together."""

    shapes: tuple[torch.Size, ...]

    @property
    def elements(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    def shard(self, n: int) -> int:
        """Elements that each of n processes holds: a parameter is cut, and padded, along its first dimension."""
        return sum(-(-shape[0] // n) * shape[1:].numel() for shape in self.shapes)

    def gathered(self, n: int) -> int:
        return n * self.shard(n)


@dataclass(frozen=True)
class Model:
    """The sizes of a policy."""

    blocks: list[Group]
    root: Group  # embedding, final norm, head
    critic: Group
    vocab_size: int
    hidden_size: int
    softcap: bool

    @property
    def language_model(self) -> list[Group]:
        return [*self.blocks, self.root]

    @property
    def groups(self) -> list[Group]:
        return [*self.language_model, self.critic]


def sizes(lm: Any, block_name: str | None, v_head: nn.Module | None = None) -> Model:
    """lm: a causal LM, with whatever tensors"""
    blocks = sharding.find_blocks(lm, block_name)
    inside = {id(p) for block in blocks for p in block.parameters()}
    head = lm.get_output_embeddings().weight
    return Model(
        blocks=[_group(block.parameters()) for block in blocks],
        root=_group(p for p in lm.parameters() if id(p) not in inside),
        critic=_group(v_head.parameters() if v_head is not None else ()),
        vocab_size=head.shape[0],
        hidden_size=head.shape[1],
        softcap=getattr(lm.config.get_text_config(), "final_logit_softcapping", None) is not None,
    )


def _group(parameters: Iterable[torch.Tensor]) -> Group:
    return Group(tuple(p.shape for p in parameters))


#### MEASURING


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still alive, and the most there have been at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.bytes_of: dict[int, int] = {}  # by storage; 0 for those that were there before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._meet((args, kwargs), are_new=False)
        output = func(*args, **(kwargs or {}))
        self._meet(output, are_new=True)
        return output

    def _meet(self, tensors: Any, are_new: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.bytes_of:  # else a view of it, or it was written in place
                    self.bytes_of[key] = storage.nbytes() if are_new else 0
                    self.now += self.bytes_of[key]
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.bytes_of.pop(key)


@dataclass(frozen=True)
class Measured:
    """Bytes that a piece of the model takes: its input and output, what it saves, and what it computes with.

    Its weights are not in them; the gradients of its weights are, in the backward.
    """

    forward: int = 0  # at the most, while it runs
    kept: int = 0  # between its forward and its backward; without its output, which is the next piece's input
    backward: int = 0  # at the most, while its backward runs
    inference: int = 0  # at the most, while it runs without gradient


def measure(piece: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor) -> Measured:
    """What a piece takes for an input like the example."""
    source = torch.empty_like(example, requires_grad=True)
    with LiveBytes() as live:
        output = piece(source + 0)  # a leaf would be kept by its graph, whether it is needed or not
        forward, kept, live.peak = live.peak, live.now - output.nbytes, 0
        output.backward(torch.empty_like(output))
        backward = live.peak - output.nbytes  # which the next piece's backward has freed
    del output
    with LiveBytes() as live, torch.no_grad():
        piece(source + 0)
    return Measured(forward, kept, backward, inference=live.peak)


def attention_on_cuda(module, query, key, value, attention_mask, scaling=None, layout=None, softcap=None, **kwargs):
    """`packing.packed_attention` as it goes on a GPU, for fake tensors, which are on a CPU.

    varlen_attn saves queries, keys, values, output and a log-sum-exp, and no scores, and says so of fake tensors, too.
    """
    if query.dtype in (torch.bfloat16, torch.float16) and softcap is None:
        out_THD = packing._varlen(query, key, value, layout, scaling, kwargs.get("sliding_window"), None)
        return out_THD[None], None
    return packing.packed_attention(
        module, query, key, value, attention_mask, scaling, layout=layout, softcap=softcap, **kwargs
    )


ON_CUDA = f"{packing.ATTENTION}_on_cuda"
AttentionInterface.register(ON_CUDA, attention_on_cuda)
AttentionMaskInterface.register(ON_CUDA, lambda *args, **kwargs: None)


#### THE PIECES OF A FORWARD


@dataclass(frozen=True)
class Setup:
    """How one process takes part in an update."""

    shards: int  # processes that share one copy of all weights
    replicas: int  # such groups of processes
    stored: torch.dtype  # of weights, gradients, and the optimizer's state
    compute: torch.dtype
    reference: torch.dtype | None  # None: no reference model
    layout: packing.Layout  # of a forward's tokens
    n_targets: int  # response tokens among them
    forwards: int  # per microbatch
    microbatches: int  # per update
    checkpointing: bool
    cuda: bool

    @property
    def world_size(self) -> int:
        return self.shards * self.replicas

    @property
    def uses_fsdp(self) -> bool:
        return self.world_size > 1 or self.stored != self.compute

    @property
    def accumulates(self) -> bool:
        """Whether there are gradients before a backward starts."""
        return self.forwards * self.microbatches > 1

    @property
    def n_tokens(self) -> int:
        return sum(self.layout.q_lengths)


@dataclass(frozen=True)
class Activations:
    """Of one forward of one process."""

    block: Measured
    ends: Measured  # from the embedding's output to the first block, and the final norm
    head: Measured
    critic: Measured
    shared: int  # bytes of what every block is given, such as the sines and cosines of positions
    hidden: int  # bytes of the hidden states between two blocks


def measure_activations(lm: Any, model: Model, setup: Setup, v_head: nn.Module | None) -> Activations:
    """Run the first block, which stands for all, and the body without blocks.

    lm: of fake tensors in the compute dtype; it is taken apart
    """
    lm.set_attn_implementation(ON_CUDA if setup.cuda else packing.ATTENTION)
    policy = models.PolicyModel(lm)
    sharding.prepare_policy(policy, setup.compute, activation_checkpointing=setup.checkpointing)
    hidden = torch.empty(1, setup.n_tokens, model.hidden_size, dtype=setup.compute)
    position_ids = torch.arange(setup.n_tokens)[None]
    target_positions = torch.zeros(setup.n_targets, dtype=torch.long)

    def body(hidden: torch.Tensor) -> torch.Tensor:
        inputs = {"position_ids": position_ids, "layout": setup.layout, "use_cache": False}
        return lm.base_model(inputs_embeds=hidden, **inputs).last_hidden_state[0].index_select(0, target_positions)

    block, blocks = _blocks(lm, model)
    given: dict[str, Any] = {}  # to the block by the body

    def note(_, args, kwargs):
        given.update(args=args, kwargs=kwargs)

    hook = block.register_forward_pre_hook(note, with_kwargs=True)
    del blocks[1:]
    with torch.no_grad():
        body(hidden)
    hook.remove()
    del blocks[:]
    args, kwargs = given["args"][1:], given["kwargs"]
    targets_hidden = hidden[0].index_select(0, target_positions)
    return Activations(
        block=measure(lambda x: _tensor(block(x, *args, **kwargs)), hidden),
        ends=measure(body, hidden),
        head=head_bytes(model, setup),
        critic=measure(v_head, targets_hidden) if v_head is not None else Measured(),
        shared=sum(x.nbytes for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)),
        hidden=hidden.nbytes,
    )


def head_bytes(model: Model, setup: Setup) -> Measured:
    """Of `logps.fused`, by reading it: its chunks of logits are what is large.

    Whole-number terms are chunks in float32: logits, their gradient or exponential, and what a softcap makes of them.
    """
    n, d, vocab = setup.n_targets, model.hidden_size, model.vocab_size
    size = setup.compute.itemsize
    n_chunks = -(-n // max(1, logps.CHUNK_ELEMENTS["cuda" if setup.cuda else "cpu"] // vocab))
    rows = -(-n // n_chunks)
    chunk, hidden, weight = rows * vocab * FLOAT32, n * d * size, vocab * d * size
    several, half = n_chunks > 1, size < FLOAT32
    factor = chunk * size // FLOAT32 if several or half else 0  # of the products: the gradient in the compute dtype
    product = weight if half else 0  # which is then added to a float32 sum
    casts = 0  # a GPU multiplies bfloat16 into float32, and adds it to float32, as it is
    if half and not setup.cuda:
        casts, product = (vocab + rows) * d * FLOAT32, product + vocab * d * FLOAT32
    forward = max(2 * chunk, chunk + casts)
    backward = max(2 * chunk + factor, chunk + factor + product, several * (chunk + factor + casts))
    if model.softcap:
        forward, backward = max(forward, 3 * chunk), max(backward, 4 * chunk)
    gradients = hidden + vocab * d * FLOAT32
    return Measured(hidden + forward, hidden + chunk, hidden + gradients + backward, inference=hidden + forward)


def _blocks(lm: Any, model: Model) -> tuple[nn.Module, nn.ModuleList]:
    """The first block, and the list that holds it."""
    for module in lm.modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(model.blocks):
            if _group(module[0].parameters()) == model.blocks[0]:
                return module[0], module
    raise UserError(f"{type(lm).__name__} keeps its blocks in no list; it cannot be planned, only tried")


def _tensor(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output  # some blocks return more than hidden states


#### THE OPTIMIZER


@dataclass(frozen=True)
class OptimizerBytes:
    """Per byte of the parameters."""

    state: float  # kept between steps
    step: float  # more, at the most, during a step
    all_at_once: bool  # `step` is of all parameters together (foreach), else of one after the other


def optimizer_bytes(name: str, kwargs: dict[str, Any], dtype: torch.dtype, cuda: bool) -> OptimizerBytes:
    """Asked of the class itself, with a small matrix.

    On a GPU torch.optim takes the parameters all at once, where the class can and its arguments do not say otherwise.
    """
    cls = getattr(torch.optim, name)
    kwargs = {key: value for key, value in kwargs.items() if key != "capturable"}  # which needs a GPU
    parameter = nn.Parameter(torch.zeros(256, 256, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    if cuda and "foreach" in inspect.signature(cls).parameters and not kwargs.get("fused"):
        kwargs.setdefault("foreach", True)
    optimizer = cls([parameter], lr=1e-3, **kwargs)
    optimizer.step()
    with LiveBytes() as live:
        optimizer.step()
    state = [x.nbytes for x in tree_leaves(optimizer.state[parameter]) if isinstance(x, torch.Tensor) and x.ndim]
    return OptimizerBytes(sum(state) / parameter.nbytes, live.peak / parameter.nbytes, bool(kwargs.get("foreach")))


#### THE PLAN


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
    stored, compute = getattr(torch, config.model.policy_dtype), models.compute_dtype(config, where)
    layout = layout or full_layout(config.model.max_tokens_per_forward, config.model.max_length)
    setup = Setup(
        shards=gpus // replicas,
        replicas=replicas,
        stored=stored,
        compute=compute,
        reference=models.reference_dtype(config, where) if config.loss.use_reference_model else None,
        layout=layout,
        n_targets=n_targets or sum(layout.q_lengths),
        forwards=forwards,
        microbatches=config.model.gradient_accumulation_steps,
        checkpointing=config.model.activation_checkpointing,
        cuda=where.type == "cuda",
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        lm = AutoModelForCausalLM.from_config(lm_config, dtype=compute, trust_remote_code=config.trust_remote_code)
        v_head = models.load_value_head(config, lm) if config.loss.get("use_value_head", False) else None
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
