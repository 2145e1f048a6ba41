"""What a GPU would run, checked without one: the same calls on the meta device, where tensors have shapes alone.

`is_cuda` is made true for all tensors, so that meta tensors take the GPU's way through packing and log-probs. Fake
tensors on a fake CUDA device would be closer, but a build of torch for CPUs cannot index them or differentiate through
them. Values are checked on a GPU, by `pytest -m gpu`.
"""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import varlen
from transformers import masking_utils

from halos import distributed, logps, packing
from halos.models import PolicyModel
from helpers import random_examples, tiny_lm

# Plain causal, a second response after a shared prompt (5 queries, 11 keys), another prompt.
SEGMENTS = [(0, 10, 0, 0), (10, 15, 0, 6), (15, 30, 0, 0)]
META = torch.device("meta")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Let all tensors say that they are on a GPU. The attribute of the base class is read-only, so it is shadowed."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)


@pytest.fixture
def calls(monkeypatch):
    """The calls of `varlen_attn`, with their arguments by name."""
    seen = []
    attention = varlen.varlen_attn
    signature = inspect.signature(attention)

    def recorded(*args, **kwargs):
        seen.append(signature.bind(*args, **kwargs).arguments)
        return attention(*args, **kwargs)

    recorded.__signature__ = signature
    monkeypatch.setattr(varlen, "varlen_attn", recorded)
    return seen


def attend(n_heads: int, n_kv_heads: int, head_size: int, sliding_window: int | None = None, segments=SEGMENTS):
    """Run the attention of a pack on the meta device in bfloat16. Returns its output, query, key and value."""
    n_tokens = segments[-1][1]
    query, key, value = (
        torch.empty(1, heads, n_tokens, head_size, dtype=torch.bfloat16, device=META, requires_grad=True)
        for heads in (n_heads, n_kv_heads, n_kv_heads)
    )
    layout = packing.Layout(segments, META)
    out, _ = packing.packed_attention(
        torch.nn.Identity(), query, key, value, None, scaling=0.1, layout=layout, sliding_window=sliding_window
    )
    return out, (query, key, value)


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (32, 8)])
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_the_shapes_of_packed_attention(calls, heads, head_size):
    """(1, H, T, D) in, (1, T, H, D) out, in bfloat16, with gradients like the inputs."""
    out, inputs = attend(*heads, head_size)
    assert out.shape == (1, 30, heads[0], head_size) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in inputs)
    (call,) = calls
    assert call["query"].shape == (30, heads[0], head_size)
    assert len(call["key"]) == len(call["value"]) == 10 + (6 + 5) + 15  # each segment with its prefix
    assert call["key"].shape[1] == call["value"].shape[1] == heads[1] or not has_gqa()


def has_gqa() -> bool:
    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def test_the_arguments_of_the_kernel(calls):
    """Lengths are Python integers and int32 cumulative sums, as the kernel wants them; the window is causal."""
    attend(8, 2, 64)
    (call,) = calls
    assert (call["max_q"], call["max_k"]) == (15, 15)
    for name in ("cu_seq_q", "cu_seq_k"):
        assert call[name].dtype == torch.int32 and call[name].shape == (4,) and call[name].device == META
    assert call["scale"] == 0.1 and call["window_size"] == (-1, 0)  # this very tuple is what torch calls causal
    cpu = packing.Layout(SEGMENTS)
    assert cpu.cu_seq_q.tolist() == [0, 10, 15, 30] and cpu.cu_seq_k.tolist() == [0, 10, 21, 36]


def test_the_arguments_of_a_sliding_window(calls):
    """A window of 4 is the token itself and 3 to the left. torch then passes is_causal=False: the right end of the
    window, 0, makes it causal."""
    out, inputs = attend(4, 2, 64, sliding_window=4)
    out.sum().backward()
    assert calls[0]["window_size"] == (3, 0) and inputs[1].grad.shape == inputs[1].shape


def test_the_kernel_takes_what_we_pass():
    """Every parameter that `_varlen` names is in the installed signature.

    On alignment the installed source says: "(-1, 0) for causal attention, or (W, 0) for causal attention with sliding
    window of size W", and no word on unequal lengths. Below it is flash attention 2.1 or later, which aligns at the
    lower right if queries and keys have different lengths: the last query sees all keys. That is what a response after
    a shared prompt needs. The `gpu` tests compare it with the padded forward pass.
    """
    parameters = inspect.signature(varlen.varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    for name in ("scale", "window_size"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert "(-1, 0) for causal attention" in " ".join(varlen.varlen_attn.__doc__.split())


def test_a_kernel_without_grouped_heads(monkeypatch):
    """torch 2.11 has no `enable_gqa`: keys and values are repeated to as many heads as queries."""
    seen = []

    def as_of_old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        seen.append((query.shape[1], key.shape[1], value.shape[1]))
        return torch.empty_like(query) + (key.sum() + value.sum())

    monkeypatch.setattr(varlen, "varlen_attn", as_of_old)
    monkeypatch.setattr(packing, "_varlen_takes_groups", packing._varlen_takes_groups.__wrapped__)  # without its cache
    out, inputs = attend(8, 2, 64)
    out.sum().backward()
    assert seen == [(8, 8, 8)] and inputs[1].grad.shape == (1, 2, 30, 64)


@pytest.mark.parametrize("chunk", [2**27, 100 * 5000])
def test_the_shapes_of_the_head_in_bfloat16(monkeypatch, chunk):
    """Log-probs and entropies are float32, gradients bfloat16, with one chunk of logits and with several."""
    monkeypatch.setitem(logps.CHUNK_ELEMENTS, "cuda", chunk)
    made = {"dtype": torch.bfloat16, "device": META, "requires_grad": True}
    hidden, weight, bias = torch.empty(300, 64, **made), torch.empty(5000, 64, **made), torch.empty(5000, **made)
    targets, entropy = torch.empty(300, dtype=torch.long, device=META), torch.empty(300, device=META)
    out = logps.fused(hidden, weight, targets, bias, 30.0, entropy, 0.5)
    assert out.shape == (300,) and out.dtype == torch.float32
    out.sum().backward()
    for tensor in (hidden, weight, bias):
        assert tensor.grad.shape == tensor.shape and tensor.grad.dtype == torch.bfloat16


def test_the_product_of_the_head_is_float32(monkeypatch):
    """Logits come from `torch.mm(..., out_dtype=torch.float32)`: bfloat16 in, float32 out, exact products."""
    product, seen = torch.mm, []
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: seen.append(kwargs) or product(*args, **kwargs))
    made = {"dtype": torch.bfloat16, "device": META}
    logits = logps.logits_of(torch.empty(7, 64, **made), torch.empty(50, 64, **made), None, None, 1.0)
    assert logits.shape == (7, 50) and logits.dtype == torch.float32 and seen == [{"out_dtype": torch.float32}]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral", "qwen3"])
def test_a_whole_model(monkeypatch, calls, name):
    """Forward and backward pass of a packed batch with shared prompts: the kernel runs once in every layer."""
    # transformers looks at the values of position_ids to build a mask, which packing does not use.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    lm = tiny_lm(name, hidden_size=256, num_attention_heads=4, intermediate_size=512, head_dim=64)
    policy = PolicyModel(lm.to(torch.bfloat16).to(META))
    policy.use_packing(True)
    examples = random_examples(4, (2, 1, 3))
    output = policy(policy.inputs(examples), with_entropy=True)
    assert output.logps.shape == (sum(n for one in examples for n in one.n_targets),)
    assert output.logps.dtype == output.entropy.dtype == torch.float32
    output.logps.sum().backward()
    assert len(calls) == lm.config.num_hidden_layers
    assert all(p.grad.dtype == torch.bfloat16 for p in policy.parameters())


def test_one_gpu_has_a_group_for_main_memory(monkeypatch):
    """The group of a single process on a GPU had NCCL alone. torch writes a state in the background only if the group
    has a backend for the CPU, so a run on one GPU ended with an AssertionError at its first state."""
    seen = []
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: seen.append(backend))
    monkeypatch.setattr(distributed, "init_device_mesh", lambda *args: None)
    distributed.device_mesh("cuda")
    assert dist.BackendConfig(dist.Backend(seen[0])).get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}
