"""What a model takes, without having it: sizes from the shapes of its parameters, activations from a run with fake
tensors, which have a shape and no data, and the optimizer's state from the optimizer. `halos/planning.py` adds them up.
"""

import inspect
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Private paths, because torch has no public ones: its documentation imports the first from there.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface

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
                key = storage._cdata  # private, because data_ptr() of every fake tensor is 0
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
