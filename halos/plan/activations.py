"""Activations of one forward and backward pass, measured on fake tensors: one block stands for all of them.

The head is the exception. Its chunks of logits depend on the device, so `head_bytes` computes what `logps.fused` takes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from halos import logps, models, packing, sharding
from halos.errors import UserError
from halos.plan.measure import Measured, measure
from halos.plan.setup import Setup
from halos.plan.sizes import ModelSizes, group_of

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Activations:
    """Bytes of activations in one forward and backward pass of one rank."""

    block: Measured
    ends: Measured  # what the body has before its first block and after its last: the final norm
    head: Measured
    critic: Measured
    shared: int  # what all blocks are given, such as the sines and cosines of positions
    hidden: int  # the hidden states between two blocks


def measure_activations(lm: Any, model: ModelSizes, setup: Setup, v_head: nn.Module | None) -> Activations:
    """Measure the first block, and the body without its blocks. Removes the blocks from the model.

    lm: of fake tensors in the compute dtype
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
    del blocks[1:]
    args, kwargs = _arguments_of(block, lambda: body(hidden))
    del blocks[:]
    return Activations(
        block=measure(lambda x: _hidden_states(block(x, *args, **kwargs)), hidden),
        ends=measure(body, hidden),
        head=head_bytes(model, setup),
        critic=measure(v_head, hidden[0].index_select(0, target_positions)) if v_head is not None else Measured(),
        shared=sum(x.nbytes for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)),
        hidden=hidden.nbytes,
    )


def _blocks(lm: Any, model: ModelSizes) -> tuple[nn.Module, nn.ModuleList]:
    """The first block, and the list of all blocks."""
    for module in lm.modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(model.blocks):
            if group_of(module[0].parameters()) == model.blocks[0]:
                return module[0], module
    raise UserError(
        f"{type(lm).__name__} does not keep its blocks in a list, so its memory cannot be planned; try the run itself"
    )


def _arguments_of(block: nn.Module, run: Callable[[], Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments that the block is called with while `run` runs, without its first, the hidden states."""
    given: dict[str, Any] = {}

    def note(_, args, kwargs):
        given.update(args=args, kwargs=kwargs)

    hook = block.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        run()
    hook.remove()
    return given["args"][1:], given["kwargs"]


def _hidden_states(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output  # some blocks return more than hidden states


#### THE HEAD


def head_bytes(model: ModelSizes, setup: Setup) -> Measured:
    """Bytes that `logps.fused` takes: mostly its chunks of logits.

    The gradient of a chunk takes the place of its logits. The whole-number factors below count what a block of them
    needs in addition, and the copies that a softcap makes.
    """
    n, d, vocab = setup.n_targets, model.hidden_size, model.vocab_size
    size, device = setup.compute.itemsize, "cuda" if setup.cuda else "cpu"
    n_chunks = -(-n // max(1, logps.CHUNK_ELEMENTS[device] // vocab))
    rows = -(-n // n_chunks)
    chunk, hidden, weight = rows * vocab * FLOAT32, n * d * size, vocab * d * size
    block = min(rows, max(1, logps.BLOCK_ELEMENTS[device] // vocab)) * vocab * FLOAT32
    several, half = n_chunks > 1, size < FLOAT32
    cast = chunk * size // FLOAT32 if half else 0  # the logits' gradient in the compute dtype
    trains = not model.root.frozen  # else the weight has no gradient
    product = weight * (half and trains)  # the weight's gradient of one chunk, before it is added to the float32 sum
    casts = 0  # copies of weight and hidden states in float32; a GPU multiplies bfloat16 into float32 without them
    if half and not setup.cuda:
        casts, product = (vocab + rows) * d * FLOAT32, product + vocab * d * FLOAT32 * trains
    forward = max(chunk + block, chunk + casts)
    backward = max(chunk + cast, cast + product, several * (chunk + casts))
    if model.softcap:
        forward = max(forward, 3 * chunk)
        backward = max(backward, chunk + 2 * block, several * 3 * chunk)
    gradients = hidden + vocab * d * FLOAT32 * trains
    return Measured(hidden + forward, hidden + chunk, hidden + gradients + backward, inference=hidden + forward)


#### ATTENTION


def attention_on_cuda(module, query, key, value, attention_mask, scaling=None, layout=None, softcap=None, **kwargs):
    """`packing.packed_attention` as it runs on a GPU, for fake tensors, whose device is the CPU.

    The kernel `varlen_attn` saves queries, keys, values, output and a log-sum-exp, but no scores.
    """
    if query.dtype in (torch.bfloat16, torch.float16) and softcap is None:
        out_THD = packing._varlen(query, key, value, layout, scaling, kwargs.get("sliding_window"), None)
        return out_THD[None], None
    return packing.packed_attention(
        module, query, key, value, attention_mask, scaling, layout=layout, softcap=softcap, **kwargs
    )


ON_CUDA = f"{packing.ATTENTION}_on_cuda"
AttentionInterface.register(ON_CUDA, attention_on_cuda)
