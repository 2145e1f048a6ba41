"""Positions of tokens: how many a model can read, and rotary frequencies that do not depend on the batch.

`check` compares a model with `model.max_length` before its weights are loaded. `fix_rotary` changes a loaded model.
Change this file for a new kind of positions.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from halos.errors import UserError

DYNAMIC = ("longrope", "dynamic")  # rope types whose frequencies depend on the longest sequence of a batch
FIXED = "fixed"  # not a type of transformers, which therefore leaves the frequencies as they are


def are_enough(lm_config: PreTrainedConfig, max_length: int) -> bool:
    """Return True if `max_length` is within all limits of the config. Then there is nothing else to check."""
    return all(limit is None or max_length <= limit for limit in (_limit(lm_config), _rotary_threshold(lm_config)))


def check(lm: PreTrainedModel, source: str, max_length: int) -> list[str]:
    """Raise UserError if a sequence can be longer than the model can read. Return warnings.

    lm: a model, which may be on the meta device
    source: name of the model in messages
    """
    limit, threshold = _limit(lm.config), _rotary_threshold(lm.config)
    given = f"model.max_length={max_length} is more than"
    if limit is not None and max_length > limit and _has_table(lm, limit):
        raise UserError(f"{given} the {limit} positions of {source}; {_within(limit)}")
    warnings = []
    if threshold is not None and max_length > threshold:
        rotary = _dynamic_modules(lm)
        if not rotary or not all(_can_be_fixed(module, max_length) for module in rotary):
            raise UserError(
                f"{given} the {threshold} tokens up to which {source} has one set of rotary frequencies; beyond, its "
                f"log-probs would depend on the longest sequence of a batch; {_within(threshold)}"
            )
        warnings.append(
            f"{given} the {threshold} tokens of the first set of rotary frequencies of {source}; all sequences, short "
            f"ones too, use the frequencies for {max_length} tokens; to use the first set, {_within(threshold)}"
        )
    if limit is not None and max_length > limit and limit != threshold:
        warnings.append(
            f"{given} max_position_embeddings={limit} of {source}, and the model may read longer sequences badly; "
            f"to cut them, {_within(limit)}"
        )
    return warnings


def fix_rotary(lm: PreTrainedModel, max_length: int) -> None:
    """Fix rotary frequencies that depend on the longest sequence of a batch to those for `max_length` tokens.

    transformers chooses the frequencies of types "longrope" (Phi-3.5, Phi-4-mini) and "dynamic" in each forward pass.
    They change if the batch has a sequence that is longer than the original context, so the log-prob of a short
    sequence would depend on the others. Those for `max_length` are the ones with which a sequence of that length is
    generated. vLLM makes the same choice for longrope, with max_model_len. If no sequence can be longer than the
    original context, nothing changes. The config of the model, which is exported, never changes.
    """
    if is_fixed(lm.config, max_length):
        for module in _dynamic_modules(lm):
            _fix(module, max_length)


def is_fixed(lm_config: PreTrainedConfig, max_length: int) -> bool:
    """Return whether `fix_rotary` changes a model of this config, so that its log-probs depend on `max_length`."""
    threshold = _rotary_threshold(lm_config)
    return threshold is not None and max_length > threshold


def _fix(module: Any, max_length: int) -> None:
    types = _rope_types(module)
    for layer_type, rope_type in types.items():
        if rope_type in DYNAMIC:
            compute = ROPE_INIT_FUNCTIONS[rope_type]
            frequencies, scaling = compute(module.config, None, seq_len=max_length, layer_type=layer_type)
            prefix = f"{layer_type}_" if layer_type else ""
            getattr(module, f"{prefix}inv_freq").copy_(frequencies)
            setattr(module, f"{prefix}attention_scaling", scaling)
            types[layer_type] = FIXED
    module.rope_type = types if isinstance(module.rope_type, dict) else types[None]


def _can_be_fixed(module: nn.Module, max_length: int) -> bool:
    """Return True if `_fix` makes the rotation of the first tokens independent of the last position.

    The test is done on a new module. Some classes, such as the one of Phi-3.5-MoE, compute more from the positions.
    """
    with torch.device("cpu"):
        fresh = type(module)(module.config)
    _fix(fresh, max_length)
    x = torch.zeros(1, 2, 1)
    short, long = torch.tensor([[0, 1]]), torch.tensor([[0, 1, max_length - 1]])
    for layer_type in _rope_types(fresh):
        layer = {} if layer_type is None else {"layer_type": layer_type}
        alone, together = (torch.cat(fresh(x, positions, **layer), dim=-1)[:, :2] for positions in (short, long))
        if not torch.equal(alone, together):
            return False
    return True


def _rope_types(module: nn.Module) -> dict[str | None, str]:
    """Return the rope type per layer type. The only key is None if all layers have one type."""
    kind = getattr(module, "rope_type", None)
    return dict(kind) if isinstance(kind, dict) else {None: str(kind)}


def _dynamic_modules(lm: PreTrainedModel) -> list[nn.Module]:
    return [module for module in lm.modules() if set(DYNAMIC) & set(_rope_types(module).values())]


def _rotary_threshold(lm_config: PreTrainedConfig) -> int | None:
    """Return the number of tokens up to which rotary frequencies are constant; None if they always are."""
    config = lm_config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    sets = [parameters, *(nested for nested in parameters.values() if isinstance(nested, dict))]
    thresholds = []
    for one in sets:
        kind = one.get("rope_type", one.get("type"))
        if kind in ("longrope", "su"):  # the old name, in models with code of their own
            original = one.get("original_max_position_embeddings")
            thresholds.append(original or getattr(config, "original_max_position_embeddings", _limit(lm_config)))
        elif kind == "dynamic":
            thresholds.append(_limit(lm_config))
    return min((threshold for threshold in thresholds if threshold is not None), default=None)


def _limit(lm_config: PreTrainedConfig) -> int | None:
    limit = getattr(lm_config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _has_table(lm: PreTrainedModel, limit: int) -> bool:
    """Return True if positions are read from a table: a learned one (GPT-2, OPT), or sines and cosines (GPT-J)."""
    tokens = lm.get_input_embeddings()
    tables = [module.weight for module in lm.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    tables += [buffer for name, buffer in lm.named_buffers() if name.endswith("embed_positions")]
    return any(limit <= len(table) <= limit + 2 for table in tables)  # OPT has two rows more


def _within(limit: int) -> str:
    return f"use model.max_length={limit} and model.max_prompt_length={limit // 2}"
