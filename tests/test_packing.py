"""Packing: literal layouts, and packed against padded forward passes on each architecture that must pack.

`pad` is the reference: its layouts are compared with literals here, and its forward pass is the model's own.
"""

import logging
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # private: see halos/plan/make.py
from torch.utils._python_dispatch import TorchDispatchMode  # private: see halos/plan/measure.py

from halos import models, packing, sharding
from halos.errors import UserError
from halos.models import PolicyModel
from halos.packing import Layout, balanced_shares, pack, packed_tokens, pad, schedule, split_by_tokens
from halos.packing_check import cast_weights, choose, in_float32, probe_logps
from helpers import ARCHITECTURES, VOCAB, example, random_examples, tiny_lm, tiny_policy

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)

#### LAYOUTS


def shown(inputs) -> dict:
    """Return Inputs as lists."""
    values = {
        name: getattr(inputs, name) for name in ("input_ids", "position_ids", "targets", "target_positions", "rows")
    }
    return {name: value.tolist() for name, value in values.items()} | {"n_rows": inputs.n_rows}


PAIR = example([1, 2, 3], [4, 5, 9], [6, 9])
SINGLE = example([7, 8], [5, 9])


def test_pack_a_pair_and_a_single_response():
    """The pack is [1 2 3 | 4 5 | 6] and [7 8 | 5]. The last token of a response, 9, is a target but not an input.

    The pair's second response continues at position 3, after its prompt, and attends to tokens 0 to 2 and to itself.
    The first token of each response is predicted at the last token of its prompt: index 2 for both of the pair.
    """
    inputs = pack([PAIR, SINGLE])
    assert shown(inputs) == {
        "input_ids": [[1, 2, 3, 4, 5, 6, 7, 8, 5]],
        "position_ids": [[0, 1, 2, 3, 4, 3, 0, 1, 2]],
        "targets": [4, 5, 9, 6, 9, 5, 9],
        "target_positions": [2, 3, 4, 2, 5, 7, 8],
        "rows": [0, 0, 0, 1, 1, 2, 2],
        "n_rows": 3,
    }
    assert inputs.attention_mask is None
    assert inputs.layout.segments == [(0, 5, 0, 0), (5, 6, 0, 3), (6, 9, 0, 0)]


def test_pad_a_pair_and_a_single_response():
    """Three sequences of width 6: [1 2 3 4 5 9], [1 2 3 6 9 .], [7 8 5 9 . .]; sequence i starts at index 6 i."""
    inputs = pad([PAIR, SINGLE], pad_token_id=0)
    assert shown(inputs) == {
        "input_ids": [[1, 2, 3, 4, 5, 9], [1, 2, 3, 6, 9, 0], [7, 8, 5, 9, 0, 0]],
        "position_ids": [[0, 1, 2, 3, 4, 5]] * 3,
        "targets": [4, 5, 9, 6, 9, 5, 9],
        "target_positions": [2, 3, 4, 8, 9, 13, 14],
        "rows": [0, 0, 0, 1, 1, 2, 2],
        "n_rows": 3,
    }
    assert inputs.attention_mask.tolist() == [[1] * 6, [1] * 5 + [0], [1] * 4 + [0] * 2]
    assert inputs.layout is None


def test_one_token_responses():
    """Responses of one token are not in the input: the last token of the prompt predicts them."""
    inputs = pack([example([1, 2], [9], [5], [3, 9])])
    assert shown(inputs) == {
        "input_ids": [[1, 2, 3]],
        "position_ids": [[0, 1, 2]],
        "targets": [9, 5, 3, 9],
        "target_positions": [1, 1, 1, 2],
        "rows": [0, 1, 2, 2],
        "n_rows": 3,
    }
    assert inputs.layout.segments == [(0, 2, 0, 0), (2, 3, 0, 2)]


def test_equal_prompts_apart_in_the_batch_are_laid_out_once():
    """Examples 0 and 2 share their prompt: the pack is [1 2 | 3 | 5 6] and [4]. Targets stay in the batch's order."""
    inputs = pack([example([1, 2], [3, 9]), example([4], [9]), example([1, 2], [5, 6, 9])])
    assert shown(inputs) == {
        "input_ids": [[1, 2, 3, 5, 6, 4]],
        "position_ids": [[0, 1, 2, 2, 3, 0]],
        "targets": [3, 9, 9, 5, 6, 9],
        "target_positions": [1, 2, 5, 1, 3, 4],
        "rows": [0, 0, 1, 2, 2, 2],
        "n_rows": 3,
    }
    assert inputs.layout.segments == [(0, 3, 0, 0), (3, 5, 0, 2), (5, 6, 0, 0)]


def test_a_prompt_that_begins_like_another_is_another():
    inputs = pack([example([1, 2], [9]), example([1, 2, 3], [9])])
    assert inputs.input_ids.tolist() == [[1, 2, 1, 2, 3]]
    assert inputs.layout.segments == [(0, 2, 0, 0), (2, 5, 0, 0)]


def test_n_tokens_is_what_a_pack_holds():
    """n_tokens counts the prompt once, and each response without its last token, as a pack of the example does."""
    for one in random_examples(20, (1, 2, 3)):
        assert one.n_tokens == pack([one]).input_ids.numel()


def test_layout_for_a_variable_length_kernel():
    """Segments have 5, 1, 3 queries and 5, 4, 3 keys: the second has the 3 keys of its prompt before its own."""
    layout = pack([PAIR, SINGLE]).layout
    assert layout.cu_seq_q.tolist() == [0, 5, 6, 9] and layout.cu_seq_q.dtype == torch.int32
    assert layout.cu_seq_k.tolist() == [0, 5, 9, 12] and layout.cu_seq_k.dtype == torch.int32
    assert layout.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]


def test_sums_by_row():
    """The values 1 to 7, with rows 0 0 0 1 1 2 2, have the sums 1 + 2 + 3 = 6, 4 + 5 = 9, 6 + 7 = 13."""
    assert pack([PAIR, SINGLE]).sum_by_row(torch.arange(1.0, 8.0)).tolist() == [6, 9, 13]


@pytest.mark.parametrize(
    ("max_tokens", "runs"),
    [
        (100, [[0, 1, 2, 3, 4]]),
        (12, [[0, 1, 2], [3], [4]]),  # 4 + 4 + 4; 20 alone, although it exceeds the limit; 4
        (11, [[0, 1], [2], [3], [4]]),
        (24, [[0, 1, 2], [3, 4]]),
        (1, [[0], [1], [2], [3], [4]]),
    ],
)
def test_split_by_tokens(max_tokens, runs):
    """Examples of 4, 4, 4, 20, 4 tokens are split in order, into forward passes of at most max_tokens."""
    examples = [example(list(range(n)), [9]) for n in (4, 4, 4, 20, 4)]
    assert [one.n_tokens for one in examples] == [4, 4, 4, 20, 4]
    assert split_by_tokens(examples, max_tokens) == runs


def test_balanced_shares():
    """Examples are assigned from the longest to the shortest, each to the rank that has the fewest tokens.

    2, 9, 4, 6, 3 tokens for two ranks: 9 + 3 = 12 and 6 + 4 + 2 = 12. Each share is in the order of the batch; a single
    share is the batch itself.
    """
    examples = [example(list(range(n)), [9]) for n in (2, 9, 4, 6, 3)]
    assert balanced_shares(examples, 2) == [[1, 4], [0, 2, 3]]
    assert balanced_shares(examples, 1) == [[0, 1, 2, 3, 4]]
    assert balanced_shares(examples[:1], 3) == [[0], [], []]


def test_shares_are_balanced_on_ragged_lengths():
    """For 64 examples of 3 to 26 tokens and 2, 3 or 8 ranks, the largest share is within 3 % of the mean."""
    examples = random_examples(64)
    for n in (2, 3, 8):
        tokens = [sum(examples[i].n_tokens for i in share) for share in balanced_shares(examples, n)]
        assert max(tokens) <= 1.03 * sum(tokens) / n


def test_a_schedule_has_as_many_forwards_everywhere():
    """Every rank has equally many forward passes. Each example is in one of them, and each keeps to the limit.

    A rank with fewer examples has empty forward passes at its end.
    """
    examples = [example([i] * n, [9]) for i, n in enumerate((20, 3, 3, 3, 3, 3, 3))]
    for n in (1, 2, 3, 5, 9):
        per_process = schedule(examples, n, max_tokens=6)
        assert len(per_process) == n and len({len(runs) for runs in per_process}) == 1
        every = [i for runs in per_process for run in runs for i in run]
        assert sorted(every) == list(range(7))
        for runs in per_process:
            assert runs == sorted(runs, key=lambda run: not run)  # the empty ones last
            assert all(sum(examples[i].n_tokens for i in run) <= 6 or run == [0] for run in runs)
    # Two ranks: one has the long example, 20 tokens in one forward pass; the other has six of 3 tokens, in pairs.
    assert schedule(examples, 2, max_tokens=6) == [[[0], [], []], [[1, 2], [3, 4], [5, 6]]]


def test_equal_prompts_stay_together_where_that_is_shorter():
    """Four examples of 10 + 2 tokens with one prompt are 18 tokens together, and 24 in two forward passes.

    In 24 tokens, all are one forward pass with the two others, of 6 tokens each. With room for 15, two of them share
    a prompt: 14 tokens. On two ranks, 2 x 14 beside each other are shorter than 18 and 12. Without equal prompts,
    nothing changes: the examples of 6 tokens come in their order.
    """
    together = [example(list(range(10)), [i, i, i]) for i in range(4)]
    others = [example([20 + i] * 4, [i, i, i]) for i in range(2)]
    mixed = [together[0], others[0], together[1], together[2], others[1], together[3]]
    assert schedule(mixed, 1, max_tokens=30) == [[[0, 2, 3, 5, 1, 4]]]
    assert schedule(mixed, 1, max_tokens=15) == [[[0, 2], [1], [3, 5], [4]]]
    assert schedule(together, 2, max_tokens=30) == [[[0, 2]], [[1, 3]]]
    assert packed_tokens(mixed) == pack(mixed).input_ids.shape[1] == 30
    assert schedule(others, 1, max_tokens=30) == [[[0, 1]]]


def test_a_shared_prompt_does_not_leave_ranks_idle():
    """Eight examples of one prompt are divided over four ranks: 16 tokens each, where one rank would have 64."""
    examples = [example([1] * 8, [i] * 8) for i in range(8)]
    tokens = [sum(packed_tokens(examples[i] for i in run) for run in runs) for runs in schedule(examples, 4, 1000)]
    assert max(tokens) == 8 + 2 * 7


def test_split_by_tokens_of_nothing():
    assert split_by_tokens([], 100) == []


#### ATTENTION AGAINST A DENSE MASK


@pytest.mark.parametrize("sliding_window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("groups", [1, 2])
def test_packed_attention_is_attention_under_a_dense_mask(sliding_window, softcap, groups):
    """Packed attention equals plain attention with a dense mask, which is built from the definition, pair by pair.

    Token i attends to token j if both belong to the same prompt and response, j is not later, and within the window.
    """
    inputs = pack([PAIR, SINGLE, example([1, 2, 3], [5, 5, 5, 9])])
    owners = [{0, 1, 3}] * 3 + [{0}] * 2 + [{1}] + [{3}] * 3 + [{2}] * 3  # the responses that a token belongs to
    positions = inputs.position_ids[0].tolist()
    n = len(positions)
    assert n == len(owners)
    width = sliding_window or n
    mask = torch.tensor(
        [
            [bool(owners[i] & owners[j]) and 0 <= positions[i] - positions[j] < width and j <= i for j in range(n)]
            for i in range(n)
        ]
    )
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 8, generator=generator) for heads in (4, 4 // groups, 4 // groups))
    out, _ = packing.packed_attention(
        torch.nn.Identity(), q, k, v, None, scaling=0.3, layout=inputs.layout, sliding_window=sliding_window,
        softcap=softcap,
    )  # fmt: skip
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = 0.3 * q @ k.transpose(2, 3)
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(out, expected.transpose(1, 2))


#### PACKED = PADDED


def values_and_gradients(policy: PolicyModel, examples, upstream=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return per-token log-probs in the order of the batch, and the gradient of each parameter.

    upstream: gradient of the log-probs; random by default
    """
    policy.zero_grad(set_to_none=True)
    logps = policy(policy.inputs(examples)).logps
    generator = torch.Generator().manual_seed(0)
    logps.backward(torch.randn(len(logps), generator=generator) if upstream is None else upstream)
    gradients = {name: parameter.grad for name, parameter in policy.lm.named_parameters()}
    assert None not in gradients.values()
    return logps.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def assert_same(one, other, tolerance: float = 1e-5) -> None:
    """Compare values and each parameter's gradient: norm of the difference over the norm.

    Some gradients are 0 in exact arithmetic (the bias of a key shifts all scores alike) and only rounding noise here.
    So a parameter's norm counts as at least a hundredth of the norm of all gradients.
    """
    values, gradients = one
    other_values, other_gradients = other
    assert (values - other_values).norm() <= tolerance * other_values.norm()
    assert (values - other_values).abs().max() <= tolerance * other_values.abs().max()
    whole = torch.cat([gradient.flatten() for gradient in other_gradients.values()]).norm()
    for name, gradient in gradients.items():
        expected = other_gradients[name]
        assert (gradient - expected).norm() <= tolerance * max(expected.norm(), whole / 100), name


EXAMPLES = random_examples(7, (2, 1, 3))


@every_architecture
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")  # its new name is not in older transformers
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_packed_is_padded(name, checkpointing):
    """Packed and padded forward passes agree to 1e-5 in values and gradients, in float32.

    Padded batches run with the model's own attention, packs with ours. With checkpointing, each layer runs once forward
    and once again in the backward pass.
    """
    policy = tiny_policy(name)
    padded = values_and_gradients(policy, EXAMPLES)
    assert padded[0].std() > 0.3  # if all log-probs were equal, the test would show nothing
    policy.use_packing(True)
    if checkpointing:
        sharding.prepare_policy(policy, torch.float32, activation_checkpointing=True, block_name=None)
        runs = Counter()
        for layer in policy.lm.base_model.modules():
            if type(layer).__name__ in policy.lm._no_split_modules:
                layer.register_forward_pre_hook(lambda module, args: runs.update(["forward"]))
                list(layer.children())[0].register_forward_pre_hook(lambda module, args: runs.update(["inside"]))
    assert_same(values_and_gradients(policy, EXAMPLES), padded)
    if checkpointing:
        assert runs["inside"] == 2 * 2  # both layers, twice each


class Recorded(TorchDispatchMode):
    """Records the arguments of `varlen_attn` and of its backward pass, by the name of the operation."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "varlen" in func.name():
            self.calls[func.name()] = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [None, 5])
def test_the_call_of_the_kernel_for_packs(window):
    """On fake tensors, as a GPU would run it: a prompt of 3 with responses of 4 and 3 inputs, and another of 5.

    Queries: 7 + 3 + 5. Keys: 7, then 3 of the prompt and 3, then 5.
    """
    layout = Layout([(0, 7, 0, 0), (7, 10, 0, 3), (10, 15, 0, 0)])
    assert layout.cu_seq_q.tolist() == [0, 7, 10, 15] and layout.cu_seq_k.tolist() == [0, 7, 13, 18]
    with FakeTensorMode(allow_non_fake_inputs=True), Recorded() as recorded:
        query = torch.empty(1, 4, 15, 64, dtype=torch.bfloat16, requires_grad=True)
        key, value = (torch.empty(1, 2, 15, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        out = packing._varlen(query, key, value, layout, 0.125, window, None)
        assert out.shape == (15, 4, 64) and out.dtype == torch.bfloat16
        out.sum().backward()
        assert all(x.grad.shape == x.shape for x in (query, key, value))
    q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, windows, grouped, *_ = recorded.calls[
        "torch_attn::_varlen_attn"
    ]
    assert q.shape == (15, 4, 64) and k.shape == v.shape == (18, 2, 64)
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape == (4,)
    assert (max_q, max_k, scale, grouped) == (7, 7, 0.125, True)
    assert (is_causal, list(windows)) == ((True, [-1, 0]) if window is None else (False, [4, 0]))
    assert "torch_attn::_varlen_attn_backward" in recorded.calls


class CountsAttention(TorchDispatchMode):
    """Counts calls of the kernels of attention that go forward."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.calls += name.startswith("aten::_scaled_dot_product_") and "backward" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral"])
def test_selective_checkpointing_runs_attention_once(name):
    """Values and gradients are equal bit by bit, and the attention is not computed again in the backward pass."""
    results, calls = [], []
    for checkpointing in (False, True, "selective"):
        policy = tiny_policy(name, packs=True)
        sharding.prepare_policy(policy, torch.float32, activation_checkpointing=checkpointing)
        with CountsAttention() as counter:
            results.append(values_and_gradients(policy, EXAMPLES))
        calls.append(counter.calls)
    assert calls[1] == 2 * calls[0] and calls[2] == calls[0] > 0
    for values, gradients in results[1:]:
        assert torch.equal(values, results[0][0])
        assert all(torch.equal(gradients[key], results[0][1][key]) for key in gradients)


@every_architecture
def test_responses_do_not_see_each_other(name):
    """If one response of a pack changes, all other log-probs stay equal, bit by bit."""
    policy = tiny_policy(name, packs=True)
    one = example([5, 6, 7, 8], [11, 12, 13, 14, 15], [21, 22, 23, 24])
    other = example([5, 6, 7, 8], [31, 32, 33, 34, 35], [21, 22, 23, 24])
    rest = example([3, 4], [41, 42])
    with torch.no_grad():
        before, after = (policy(policy.inputs([first, rest])).logps for first in (one, other))
    assert not torch.equal(before[:5], after[:5])
    assert torch.equal(before[5:], after[5:])


@every_architecture
def test_shared_prompt_is_repeated_prompt(name):
    """A prompt that is laid out once for its responses gives the same as each response in a pack of its own."""
    policy = tiny_policy(name, packs=True)
    pairs = random_examples(3, (2, 3), seed=1)
    shared = values_and_gradients(policy, pairs)
    upstream = torch.randn(len(shared[0]), generator=torch.Generator().manual_seed(0))
    singles = [example(p.prompt.tolist(), response.tolist()) for p in pairs for response in p.responses]
    parts = [len(single.responses[0]) for single in singles]
    values, total = [], Counter()
    for single, part in zip(singles, upstream.split(parts), strict=True):
        logps, gradients = values_and_gradients(policy, [single], part)
        values.append(logps)
        for key, gradient in gradients.items():
            total[key] = total[key] + gradient
    assert_same(shared, (torch.cat(values), total))


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_order_of_the_batch_does_not_matter(name, packs):
    """A permuted batch gives the permuted sums, and the same gradient of their weighted sum."""
    policy = tiny_policy(name, packs)
    examples = random_examples(6, (1,)) + [example([5, 6, 7], [8, 9]), example([5, 6, 7], [10, 11, 12])]
    order = [6, 3, 0, 7, 5, 1, 4, 2]
    weights = torch.randn(8, generator=torch.Generator().manual_seed(0))

    def run(examples, weights):
        policy.zero_grad(set_to_none=True)
        inputs = policy.inputs(examples)
        sums = inputs.sum_by_row(policy(inputs).logps)
        (sums * weights).sum().backward()
        return sums.detach(), {key: p.grad.clone() for key, p in policy.lm.named_parameters()}

    sums, gradients = run(examples, weights)
    permuted = run([examples[i] for i in order], weights[order])
    assert_same(permuted, (sums[order], gradients))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_fused_head_is_the_plain_head(name):
    """`model.logps: fused` gives the same as `plain` in a packed forward pass."""
    policy = tiny_policy(name, packs=True)
    fused = values_and_gradients(policy, EXAMPLES)
    policy.token_logps = models.logps.plain
    assert_same(fused, values_and_gradients(policy, EXAMPLES))


def test_switching_packing_off_leaves_the_model_as_it_was():
    policy = tiny_policy("llama")
    before = values_and_gradients(policy, EXAMPLES)
    attention = policy.lm.config._attn_implementation
    policy.use_packing(True)
    values_and_gradients(policy, EXAMPLES)
    policy.use_packing(False)
    after = values_and_gradients(policy, EXAMPLES)
    assert policy.lm.config._attn_implementation == attention
    assert torch.equal(before[0], after[0])


def test_a_layout_that_does_not_arrive_is_an_error():
    """A model that does not pass the layout to its attention raises an error, instead of attending to everything."""
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="does not hand the layout of a pack down"):
        packing.packed_attention(torch.nn.Identity(), q, q, q, None)


def test_attention_sinks_are_refused():
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="attention sinks"):
        packing.packed_attention(torch.nn.Identity(), q, q, q, None, layout=Layout([(0, 3, 0, 0)]), s_aux=q)


#### THE CHECK AT THE START OF A RUN

# Models that cannot read a pack correctly, with the fields of their config, and the reason.
UNPACKABLE = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # ALiBi, an attention of its own
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},  # recurrent
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
}


@pytest.fixture(autouse=True)
def quiet():
    """Silence transformers' warnings that these models do not switch their attention; the check reports it, too."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def check(policy, packing, dtype):
    """Check a model as a run does: first in float32, then prepared to compute in `dtype`."""
    float32 = in_float32(policy)
    sharding.prepare_policy(policy, dtype, activation_checkpointing=False, block_name=None)
    return choose(policy, packing, dtype, float32)


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_check_accepts(name, dtype):
    packs, reason = check(tiny_policy(name), "true", dtype)
    assert packs
    assert reason.startswith("packed and padded log-probs differ by ")


@pytest.mark.parametrize("name", UNPACKABLE)
def test_the_check_falls_back_with_a_reason(name):
    """A model that cannot be packed falls back to padded batches, with a reason.

    Its padded log-probs are those of its own logits, response by response.
    """
    policy = PolicyModel(tiny_lm(name, **UNPACKABLE[name])).eval()
    packs, reason = check(policy, "auto", torch.float32)
    assert not packs and reason.startswith("packed and padded log-probs differ by ")
    with torch.no_grad():
        values = policy(policy.inputs([PAIR, SINGLE])).logps.split([3, 2, 2])
        for row, (ids, n_prompt) in enumerate([([1, 2, 3, 4, 5, 9], 3), ([1, 2, 3, 6, 9], 3), ([7, 8, 5, 9], 2)]):
            every = policy.lm(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = torch.stack([every[i - 1, ids[i]] for i in range(n_prompt, len(ids))])
            torch.testing.assert_close(values[row], expected, rtol=1e-4, atol=1e-4)


def test_packing_true_is_an_error_where_it_is_wrong():
    policy = PolicyModel(tiny_lm("falcon", **UNPACKABLE["falcon"]))
    for setting in (True, "true"):
        with pytest.raises(UserError, match="model.packing=true, but this model cannot be packed .*; use .*=auto"):
            check(policy, setting, torch.float32)


def test_packing_false_asks_nothing():
    """With packing=false the check does not use the model: None would raise."""
    for setting in (False, "false"):
        assert choose(None, setting, torch.float32, None) == (False, "model.packing=false")


def test_a_model_that_raises_is_not_packed():
    """A model that raises an error on a pack is not packed, and its error is the reason."""
    policy = tiny_policy("llama")
    forward = policy.lm.base_model.forward

    def broken(*args, layout=None, **kwargs):
        if layout is not None:
            raise NotImplementedError("no such\nkeyword")
        return forward(*args, **kwargs)

    policy.lm.base_model.forward = broken
    assert check(policy, "auto", torch.float32) == (False, "NotImplementedError: no such keyword")


def test_the_check_leaves_no_trace():
    """The check leaves weights, their dtype, training mode, and attention as they were, also with bfloat16 weights."""
    for stored in (torch.float32, torch.bfloat16):
        policy = PolicyModel(cast_weights(tiny_lm("llama"), stored)).train()
        before = {name: tensor.clone() for name, tensor in policy.lm.state_dict().items()}
        attention = policy.lm.config._attn_implementation
        assert choose(policy, "auto", stored, in_float32(policy))[0]
        assert policy.training and not policy.packs and policy.lm.config._attn_implementation == attention
        for name, tensor in policy.lm.state_dict().items():
            assert tensor.dtype == stored and torch.equal(tensor, before[name])


def test_the_float32_rule_is_1e_5_of_the_largest_logprob():
    """A packed log-prob may differ by 0.9e-5 of the largest log-prob, but not by 1.1e-5."""
    policy = tiny_policy("llama").eval()
    oracle, packed = in_float32(policy)
    largest = oracle.abs().max()
    assert (packed - oracle).abs().max() < 2e-6 * largest
    for share, agrees in ((0.9e-5, True), (1.1e-5, False)):
        off = oracle.clone()
        off[3] += share * largest
        assert choose(policy, "auto", torch.float32, (oracle, off))[0] == agrees


def test_the_bfloat16_rule_is_twice_the_error_of_padded_bfloat16():
    """In bfloat16, packed may be off from padded float32 by twice the error of padded bfloat16.

    The model passes with its float32 log-probs as the oracle. With the padded bfloat16 log-probs as the oracle, their
    own error is 0, so 0 is allowed and packed bfloat16 fails.
    """
    policy = tiny_policy("llama").eval()
    oracle, packed = in_float32(policy)
    sharding.prepare_policy(policy, torch.bfloat16, activation_checkpointing=False, block_name=None)
    assert choose(policy, "auto", torch.bfloat16, (oracle, packed))[0]
    padded_bfloat16 = probe_logps(policy, packs=False)
    allowed = 2 * (padded_bfloat16 - oracle).abs().max().item()
    assert allowed > 1e-3
    assert f"allowed {allowed:.1e}" in choose(policy, "auto", torch.bfloat16, (oracle, packed))[1]
    assert not choose(policy, "auto", torch.bfloat16, (padded_bfloat16, padded_bfloat16))[0]


def test_bfloat16_does_not_accept_what_float32_refuses():
    """A model that fails the check in float32 fails in bfloat16, too.

    Bloom's attention never sees a layout. With small weights, the error is below that of bfloat16. In float32 it shows:
    8e-4 nat, where 5e-5 are allowed.
    """
    for dtype in (torch.float32, torch.bfloat16):
        policy = PolicyModel(tiny_lm("bloom", **UNPACKABLE["bloom"], initializer_range=0.02))
        assert not check(policy, "auto", dtype)[0]


def test_bfloat16_close_to_float32_over_a_long_response():
    """The summed log-prob of 512 random tokens, computed in bfloat16, is off by less than 1.2 nats.

    A token has about ln 97 = 4.6 nats, and is off by about 0.013 nat. Errors of random sign sum to sqrt(512) times
    that, 0.3 nat, of which four times is allowed. A systematic error would sum to 512 times, 7 nats.
    """
    policy = tiny_policy("llama", packs=True, max_position_embeddings=1024, initializer_range=0.02).eval()
    ids = torch.randint(VOCAB, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    inputs = policy.inputs([example([1, 2, 3], ids)])
    with torch.no_grad():
        truth = policy(inputs).logps
        sharding.prepare_policy(policy, torch.bfloat16, activation_checkpointing=False, block_name=None)
        half = policy(inputs).logps
    assert half.dtype == torch.float32
    assert truth.sum() < -512 * 4.5
    error = (half - truth).double()
    assert error.square().mean().sqrt() < 0.03
    assert error.sum().abs() < 1.2
