"""The FLOPs of a step, counted over its matrix products: no token is computed twice, and no padding."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.workload import body_parameters, dpo_backward, llama, shp_like_pairs
from halos import logps


def product_flops(a, b, *args, **kwargs) -> int:
    """Return 2 n m k, for shapes (n, k) and (k, m)."""
    return 2 * a[0] * a[1] * b[1]


# The counter does not know products that write into a given tensor. It does not count SDPA's flash kernel on a CPU
# either, which is right: the floor is that of the dense layers.
IN_PLACE = {
    torch.ops.aten.mm.out: product_flops,
    torch.ops.aten.addmm_: lambda out, a, b, *args, **kwargs: product_flops(a, b),
}


def executed_over_floor(policy, examples) -> float:
    """Return the executed dense FLOPs over the floor, 6 N_body T_unique + 6 V d T_response.

    Per weight and token, a forward pass takes 2 FLOPs and a backward pass 4.
    """
    t_unique = sum(example.n_tokens for example in examples)
    t_response = sum(len(response) for example in examples for response in example.responses)
    head = policy.lm.get_output_embeddings().weight.numel()
    floor = 6 * body_parameters(policy) * t_unique + 6 * head * t_response
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        dpo_backward(policy, examples)
    return counter.get_total_flops() / floor


@pytest.fixture(scope="module")
def policy():
    return llama(hidden_size=128, layers=6, vocab_size=1024)


@pytest.fixture(scope="module")
def examples(policy):
    return shp_like_pairs(4, policy.vocab_size, max_length=512)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_packed_step_executes_the_floor_and_the_heads_recomputation(policy, examples, chunks, monkeypatch):
    """A packed step executes the floor, plus the logits of all chunks but the last a second time.

    A second computation takes 2 of the 6 FLOPs per weight and token, for (k - 1) / k of the tokens with k chunks. If
    the head's share of the floor is h, the ratio is 1 + h / 3 (k - 1) / k. Chunks differ by a token or two, hence the
    tolerance.
    """
    policy.use_packing(True)
    t_unique = sum(example.n_tokens for example in examples)
    t_response = sum(len(response) for example in examples for response in example.responses)
    monkeypatch.setitem(logps.CHUNK_ELEMENTS, "cpu", -(-t_response // chunks) * policy.vocab_size)
    head = policy.lm.get_output_embeddings().weight.numel() * t_response
    share = head / (head + body_parameters(policy) * t_unique)
    expected = 1 + share / 3 * (chunks - 1) / chunks
    assert executed_over_floor(policy, examples) == pytest.approx(expected, rel=1e-3 if chunks > 1 else 1e-6)
    assert expected < 1.10


def test_padded_step_executes_what_packing_saves(policy, examples):
    """A padded step runs body and head on (number of responses) x (longest sequence) positions.

    These include padding, and a copy of the prompt for each response.
    """
    policy.use_packing(False)
    width = max(len(example.prompt) + len(response) for example in examples for response in example.responses)
    positions = width * sum(len(example.responses) for example in examples)
    t_unique = sum(example.n_tokens for example in examples)
    t_response = sum(len(response) for example in examples for response in example.responses)
    body, head = body_parameters(policy), policy.lm.get_output_embeddings().weight.numel()
    expected = (body + head) * positions / (body * t_unique + head * t_response)
    assert executed_over_floor(policy, examples) == pytest.approx(expected, rel=1e-6)
