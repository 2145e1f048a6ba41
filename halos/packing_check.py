"""Check at the start of every run that packing is exact for this model.

Packed log-probs of a few short sequences are compared with the padded forward pass of the same model. In float32 they
must agree to 1e-5 relative; a model that treats a pack in its own way shows it there. Then the check is repeated in the
dtype and with the kernels of the run: the error of packed against padded float32 may be at most twice the error of
padded. A model that disagrees, or cannot read a pack at all, runs on padded batches.
"""

import numpy as np
import torch
from transformers import PreTrainedModel

from halos import distributed, sharding
from halos.errors import UserError
from halos.tokens import Role, TokenizedExample

FLOAT32_TOLERANCE, BFLOAT16_FACTOR = 1e-5, 2.0


def is_wanted(packing: str | bool) -> bool:
    """Return False if `model.packing` is false: then nothing needs to be checked."""
    return packing not in (False, "false")


def choose(
    policy, packing: str | bool, dtype: torch.dtype, float32: tuple[torch.Tensor, torch.Tensor | str] | None
) -> tuple[bool, str]:
    """Decide whether to pack. Returns the decision and the reason in one line.

    policy: a `models.PolicyModel`, prepared to compute in `dtype`
    packing: auto, true (a disagreement is an error), or false
    float32: `in_float32(policy)`, computed before the policy was prepared; None if there is nothing to check
    """
    if float32 is None:
        return False, "model.packing=false"
    agrees, reason = _verdict(policy, dtype, *float32)
    agrees = all(distributed.gather_objects(agrees))  # ranks must agree; a kernel may round differently on each
    if not agrees and packing in (True, "true"):
        raise UserError(f"model.packing=true, but this model cannot be packed ({reason}); use model.packing=auto")
    return agrees, reason


def _verdict(policy, dtype: torch.dtype, oracle: torch.Tensor, packed: torch.Tensor | str) -> tuple[bool, str]:
    if isinstance(packed, str):
        return False, packed
    error, allowed = _largest(packed - oracle), FLOAT32_TOLERANCE * _largest(oracle)
    if dtype != torch.float32 and error <= allowed:
        packed = _packed_logps(policy)
        if isinstance(packed, str):
            return False, packed
        allowed = BFLOAT16_FACTOR * _largest(probe_logps(policy, packs=False) - oracle)
        error = _largest(packed - oracle)
    return error <= allowed, f"packed and padded log-probs differ by {error:.1e}, allowed {allowed:.1e}"


def in_float32(policy) -> tuple[torch.Tensor, torch.Tensor | str]:
    """Compute padded and packed log-probs of the probe in float32. If packing fails, the second is the error message.

    The weights are unchanged afterwards, since float32 holds every bfloat16 value. A sharded model must be one whose
    FSDP computes in float32.
    """
    stored = policy.lm.dtype
    if stored == torch.float32 or sharding.is_sharded(policy):
        return probe_logps(policy, packs=False), _packed_logps(policy)
    cast_weights(policy.lm, torch.float32)
    try:
        return probe_logps(policy, packs=False), _packed_logps(policy)
    finally:
        cast_weights(policy.lm, stored)


def _packed_logps(policy) -> torch.Tensor | str:
    try:
        return probe_logps(policy, packs=True)
    # An unknown model may raise any exception here. It means that packing fails, not that the run fails.
    except Exception as problem:
        return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"


def _largest(values: torch.Tensor) -> float:
    return values.abs().max().item()


@torch.no_grad()
def probe_logps(policy, packs: bool) -> torch.Tensor:
    """Compute (n_targets,) float64 log-probs of the probe, or scores of a reward model. Restores the policy's state."""
    before = policy.packs, policy.training
    policy.use_packing(packs)
    policy.eval()
    try:
        output = policy(policy.inputs(probe_examples(policy.vocab_size)))
        return (output.logps if len(output.logps) else output.values).double()
    finally:
        policy.use_packing(before[0])
        policy.train(before[1])
        sharding.reshard(policy)


def probe_examples(vocab_size: int) -> list[TokenizedExample]:
    """Return seeded random examples: a pair, a single response, and three responses to one prompt.

    One of the three has a single token.
    """
    rng = np.random.default_rng(0)
    shapes = [(9, (7, 12)), (5, (6,)), (17, (1, 8, 30))]
    examples = []
    for prompt, responses in shapes:
        ids = [rng.integers(0, vocab_size, n).astype(np.int32) for n in (prompt, *responses)]
        examples.append(TokenizedExample(ids[0], tuple(ids[1:]), (Role.CHOSEN,) * len(responses)))
    return examples


def cast_weights(lm: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the parameters. `lm.to(dtype)` would also round the buffers, such as rotary frequencies."""
    for parameter in lm.parameters():
        parameter.data = parameter.data.to(dtype)
    return lm
