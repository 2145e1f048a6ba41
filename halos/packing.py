"""Lay out examples as model inputs: one packed sequence without padding, in which responses share their prompt.

    [prompt | response 1 | response 2 | prompt | response 1 | ...]

Each response attends to its prompt and to itself, and its positions continue after the prompt. `pack` builds this
layout, and `packed_attention` reads it. transformers calls `packed_attention` in every layer, with the layout as a
keyword argument, so no model code is changed. `pad` is the plain alternative with the same `Inputs`: one sequence per
response. Change this file to add an attention kernel or another layout.

Shape suffixes: T tokens of the pack, H heads, G key/value heads, D head size.
"""

import importlib.util
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from halos.tokens import TokenizedExample

ATTENTION = "halos_packed"


@dataclass(frozen=True)
class Inputs:
    """Model inputs, and the response tokens whose log-probs are requested."""

    input_ids: torch.Tensor  # (batch, seq_len); packed: (1, T)
    position_ids: torch.Tensor  # like input_ids
    attention_mask: torch.Tensor | None  # like input_ids; None when packed
    layout: "Layout | None"  # None when padded
    targets: torch.Tensor  # (n_targets,) response tokens, response after response
    target_positions: torch.Tensor  # (n_targets,) position in input_ids.flatten() whose state is read for each target
    rows: torch.Tensor  # (n_targets,) index of the response that each target belongs to
    n_rows: int  # number of responses

    def to(self, device: torch.device | str) -> "Inputs":
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: moved(value, device) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **values | {"layout": self.layout and self.layout.to(device)})

    def sum_by_row(self, per_token: torch.Tensor) -> torch.Tensor:
        """Sum over the tokens of each response: (n_targets,) -> (n_responses,)."""
        return per_token.new_zeros(self.n_rows).index_add(0, self.rows, per_token)


class Layout:
    """Which tokens attend to which in a pack.

    Segment i has the queries [start, end). They attend causally to each other, and to all tokens of the shared prompt,
    [prefix_start, prefix_end). The prefix is empty for the response right after its prompt: both are one segment.
    """

    def __init__(self, segments: list[tuple[int, int, int, int]], device: torch.device | str = "cpu"):
        self.segments = segments
        self.device = torch.device(device)

    def to(self, device: torch.device | str) -> "Layout":
        return self if torch.device(device) == self.device else Layout(self.segments, device)

    # Computed once per pack, not once per layer.
    @cached_property
    def q_lengths(self) -> list[int]:
        return [end - start for start, end, _, _ in self.segments]

    @cached_property
    def k_lengths(self) -> list[int]:
        return [end - start + pe - ps for start, end, ps, pe in self.segments]

    @cached_property
    def cu_seq_q(self) -> torch.Tensor:
        return self._cumulative(self.q_lengths)

    @cached_property
    def cu_seq_k(self) -> torch.Tensor:
        return self._cumulative(self.k_lengths)

    @cached_property
    def key_index(self) -> torch.Tensor:
        """(n_keys,) positions of the keys: for each segment its prefix, then the segment itself."""
        parts = [np.arange(*span) for start, end, ps, pe in self.segments for span in ((ps, pe), (start, end))]
        return moved(torch.from_numpy(np.concatenate(parts)), self.device)

    def _cumulative(self, lengths: list[int]) -> torch.Tensor:
        return moved(torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32), self.device)


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a tensor of the CPU to a device. A copy to a GPU is queued there, and the CPU does not wait for it."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pack(examples: list[TokenizedExample], at_targets: bool = False) -> Inputs:
    """Lay out examples as one sequence [1, T]. Equal prompts are laid out once, even those of different examples.

    The last token of a response predicts nothing, so it is a target but not an input.

    at_targets: read the state at each target instead of the state that predicts it; then the last token is an input
    """
    assert all(len(example.prompt) for example in examples), "the first response token is predicted by the prompt"
    prompts = [example.prompt for example in examples for _ in example.responses]
    responses = [response for example in examples for response in example.responses]
    rows_of_prompt: dict[bytes, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of_prompt.setdefault(prompt.tobytes(), []).append(row)

    tokens, positions, segments, length = [], [], [], 0
    read_at = [np.empty(0, np.int64)] * len(responses)
    for rows in rows_of_prompt.values():
        prompt, prompt_start = prompts[rows[0]], length
        prompt_end = prompt_start + len(prompt)
        for row in rows:
            own = responses[row] if at_targets else responses[row][:-1]
            is_first = row == rows[0]
            start = prompt_end if is_first else length
            end = start + len(own)
            tokens += [prompt, own] if is_first else [own]
            positions.append(np.arange(0 if is_first else len(prompt), len(prompt) + len(own)))
            at_own = np.arange(start, end)
            read_at[row] = at_own if at_targets else np.concatenate(([prompt_end - 1], at_own))
            if is_first:  # the prompt and its first response are one plain causal sequence
                segments.append((prompt_start, end, 0, 0))
            elif end > start:
                segments.append((start, end, prompt_start, prompt_end))
            length = end
    return Inputs(
        input_ids=_long(np.concatenate(tokens))[None],
        position_ids=_long(np.concatenate(positions))[None],
        attention_mask=None,
        layout=Layout(segments),
        **_targets(examples, read_at),
    )


def pad(examples: list[TokenizedExample], pad_token_id: int, at_targets: bool = False) -> Inputs:
    """Lay out one sequence per response, each with its own copy of the prompt, right-padded to the longest.

    at_targets: as in `pack`
    """
    pairs = [(example.prompt, response) for example in examples for response in example.responses]
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    input_ids = torch.full((len(pairs), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    read_at = []
    for row, (prompt, response) in enumerate(pairs):
        sequence = _long(np.concatenate((prompt, response)))
        input_ids[row, : len(sequence)] = sequence
        attention_mask[row, : len(sequence)] = 1
        read_at.append(row * width + np.arange(len(prompt), len(sequence)) - (not at_targets))
    return Inputs(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(len(pairs), -1),
        attention_mask=attention_mask,
        layout=None,
        **_targets(examples, read_at),
    )


def _targets(examples: list[TokenizedExample], read_at: list[np.ndarray]) -> dict:
    """The response tokens that count, in the order of the responses."""
    responses = [response for example in examples for response in example.responses]
    masks = [mask for example in examples for mask in example.masks]
    if any(mask is not None for mask in masks):
        keep = [slice(None) if mask is None else mask for mask in masks]
        responses = [response[kept] for response, kept in zip(responses, keep, strict=True)]
        read_at = [positions[kept] for positions, kept in zip(read_at, keep, strict=True)]
    rows = np.repeat(np.arange(len(responses)), [len(response) for response in responses])
    return {
        "targets": _long(np.concatenate(responses)),
        "target_positions": _long(np.concatenate(read_at)),
        "rows": _long(rows),
        "n_rows": len(responses),
    }


def _long(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))


class Unit(NamedTuple):
    """Examples with equal prompts that stay together, so that their prompt runs once."""

    indices: list[int]  # of the examples, in their order
    n_tokens: int  # packed tokens; the prompt counts once


def units_by_prompt(examples: list[TokenizedExample], max_tokens: int) -> list[Unit]:
    """Put examples with equal prompts together, up to `max_tokens` packed tokens. Ordered by their first examples."""
    units: list[Unit] = []
    open_units: dict[bytes, int] = {}  # prompt -> its last unit, to which more can be added
    for index, example in enumerate(examples):
        prompt = example.prompt.tobytes()
        own = example.n_tokens - len(example.prompt)
        last = open_units.get(prompt)
        if last is not None and units[last].n_tokens + own <= max_tokens:
            units[last] = Unit([*units[last].indices, index], units[last].n_tokens + own)
        else:
            open_units[prompt] = len(units)
            units.append(Unit([index], example.n_tokens))
    return units


def split_by_tokens(examples: Sequence[TokenizedExample | Unit], max_tokens: int) -> list[list[int]]:
    """Split `examples` into groups of at most `max_tokens` packed tokens, as lists of indices.

    A longer example is a group of its own.
    """
    runs: list[list[int]] = []
    room = 0
    for index, example in enumerate(examples):
        if not runs or example.n_tokens > room:
            runs.append([])
            room = max_tokens
        runs[-1].append(index)
        room -= example.n_tokens
    return runs


def balanced_shares(examples: Sequence[TokenizedExample | Unit], n: int) -> list[list[int]]:
    """Split `examples` into n shares with nearly equal numbers of tokens. Returns indices, in the examples' order.

    The longest example goes first, always to the share with the fewest tokens. The largest share is then at most 4/3 of
    the best possible.
    """
    shares: list[list[int]] = [[] for _ in range(n)]
    tokens = [0] * n
    for index in sorted(range(len(examples)), key=lambda i: -examples[i].n_tokens):
        least = min(range(n), key=tokens.__getitem__)
        shares[least].append(index)
        tokens[least] += examples[index].n_tokens
    return [sorted(share) for share in shares]


def schedule(examples: list[TokenizedExample], n: int, max_tokens: int) -> list[list[list[int]]]:
    """Plan the forward passes of n ranks: for each rank a list of forward passes, each a list of example indices.

    Examples with equal prompts come into one forward pass, where their prompt runs once, if that makes the whole
    shorter. All ranks take part in every forward pass, so every rank has equally many. A rank with less to do has empty
    ones at the end.
    """
    alone = [Unit([index], example.n_tokens) for index, example in enumerate(examples)]
    # A unit larger than a rank's part would keep one rank busy while the others wait.
    part = -(-sum(unit.n_tokens for unit in units_by_prompt(examples, max_tokens)) // n)
    plans = [_plan(units, n, max_tokens) for units in (alone, units_by_prompt(examples, min(part, max_tokens)))]
    return min(plans, key=lambda plan: _duration(examples, plan))


def _plan(units: list[Unit], n: int, max_tokens: int) -> list[list[list[int]]]:
    shares = [[units[i] for i in share] for share in balanced_shares(units, n)]
    runs = [
        [[index for i in run for index in share[i].indices] for run in split_by_tokens(share, max_tokens)]
        for share in shares
    ]
    most = max(map(len, runs))
    return [own + [[]] * (most - len(own)) for own in runs]


def _duration(examples: list[TokenizedExample], plan: list[list[list[int]]]) -> int:
    """Number of tokens of the longest rank in each forward pass, summed: the others wait for it."""
    passes = zip(*plan, strict=True)
    return sum(max(packed_tokens(examples[i] for i in run) for run in of_ranks) for of_ranks in passes)


def packed_tokens(examples: Iterable[TokenizedExample]) -> int:
    """Number of tokens of one forward pass: equal prompts count once."""
    prompts: dict[bytes, int] = {}
    own = 0
    for example in examples:
        prompts[example.prompt.tobytes()] = len(example.prompt)
        own += example.n_tokens - len(example.prompt)
    return own + sum(prompts.values())


#### ATTENTION


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Compute attention within the segments of a pack, as transformers calls it: (1, H, T, D) in, (1, T, H, D) out.

    sliding_window: a token attends to itself and the `sliding_window - 1` tokens before it
    softcap: soft cap of the scores, as in Gemma 2
    """
    if layout is None:
        raise RuntimeError(f"{type(module).__name__} does not hand the layout of a pack down to its attention")
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise RuntimeError(
            f"{type(module).__name__} adds attention sinks or a position bias, which packing does not support"
        )
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and (softcap is None or _flash_attn_is_installed()):
        out_THD = _varlen(query, key, value, layout, scaling, sliding_window, softcap)
        return out_THD[None], None
    out = _segment_by_segment(query, key, value, layout, scaling, sliding_window, softcap)
    return out.transpose(1, 2).contiguous(), None


def _segment_by_segment(query, key, value, layout, scaling, sliding_window, softcap) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # One gather and one split. With a slice per segment, the backward pass would fill a full-size tensor for each.
    queries = query.split(layout.q_lengths, dim=2)
    keys, values = (x.index_select(2, layout.key_index).split(layout.k_lengths, dim=2) for x in (key, value))
    parts = zip(queries, keys, values, strict=True)
    return torch.cat([_causal(q, k, v, scaling, sliding_window, softcap) for q, k, v in parts], dim=2)


def _causal(query, key, value, scaling, sliding_window, softcap) -> torch.Tensor:
    """Compute causal attention of the last queries of a sequence to all of its keys."""
    n_q, n_k = query.shape[2], key.shape[2]
    windowed = sliding_window is not None and n_k > sliding_window
    if n_q == n_k and not windowed and softcap is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    # Aligned at the lower right: the last query sees every key. `is_causal` with n_q < n_k aligns at the upper left.
    mask = torch.ones(n_q, n_k, dtype=torch.bool, device=query.device).tril(n_k - n_q)
    if windowed:
        mask = mask.triu(n_k - n_q - sliding_window + 1)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def _varlen(query, key, value, layout, scaling, sliding_window, softcap):
    """Compute attention for all segments in one kernel call: (1, H, T, D) -> (T, H, D).

    Keys are gathered with their prefixes, and autograd sums the gradients of a shared prompt. Flash kernels align
    causally at the lower right, as `_causal` does.
    """
    q_THD = query[0].transpose(0, 1)
    k_THD, v_THD = (x[0].transpose(0, 1).index_select(0, layout.key_index) for x in (key, value))
    left = -1 if sliding_window is None else sliding_window - 1
    lengths = (layout.cu_seq_q, layout.cu_seq_k, max(layout.q_lengths), max(layout.k_lengths))
    if softcap is not None:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q_THD, k_THD, v_THD, *lengths, softmax_scale=scaling, causal=True, window_size=(left, 0), softcap=softcap
        )
    from torch.nn.attention.varlen import varlen_attn

    groups = q_THD.shape[1] // k_THD.shape[1]
    options = {"enable_gqa": groups > 1} if _varlen_takes_groups() else {}
    if groups > 1 and not options:
        k_THD, v_THD = k_THD.repeat_interleave(groups, dim=1), v_THD.repeat_interleave(groups, dim=1)
    return varlen_attn(q_THD, k_THD, v_THD, *lengths, scale=scaling, window_size=(left, 0), **options)


@cache
def _varlen_takes_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def keep_attention_uncompiled() -> None:
    """Exclude the attention from torch.compile, which would recompile for every layout and give up after a few."""
    AttentionInterface.register(ATTENTION, torch.compiler.disable(packed_attention))


def _flash_attn_is_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


# No mask is registered under this name, so that transformers makes none and does not look for one in position_ids. It
# would take the jump at a second response for a new document, and wait for the device to know.
AttentionInterface.register(ATTENTION, packed_attention)
