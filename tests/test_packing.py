"""Packing: the literal layouts, and that a packed forward is the padded one, on every architecture that is promised.

`pad` is the plain way: its layouts are held to literals here, and its forward is the model's own.
"""

import logging
from collections import Counter

import pytest
import torch

from halos import models, packing, sharding
from halos.errors import UserError
from halos.models import PolicyModel
from halos.packing import Layout, balanced_shares, pack, pad, schedule, split_by_tokens
from halos.packing_check import cast_weights, choose, in_float32, probe_logps
from helpers import ARCHITECTURES, VOCAB, example, random_examples, tiny_lm, tiny_policy

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)

#### LAYOUTS


def shown(inputs) -> dict:
    """Inputs as lists."""
    values = {
        name: getattr(inputs, name) for name in ("input_ids", "position_ids", "targets", "target_positions", "rows")
    }
    return {name: value.tolist() for name, value in values.items()} | {"n_rows": inputs.n_rows}


PAIR = example([1, 2, 3], [4, 5, 9], [6, 9])
SINGLE = example([7, 8], [5, 9])


def test_pack_a_pair_and_a_single_response():
    """[1 2 3 | 4 5 | 6] and [7 8 | 5]: the last token of a response, 9, is a target and no input.

    The pair's second response goes on at position 3, where its prompt ends, and sees tokens 0 to 3 before itself. The
    first token of each response is predicted at its prompt's last token, index 2 for both of the pair.
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
    """Three rows of 6: [1 2 3 4 5 9], [1 2 3 6 9 .], [7 8 5 9 . .]; row i starts at 6 i in the flattened batch."""
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
    """They are no input at all: only the prompt is run, and its last token predicts all of them."""
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
    """[1 2 | 3 | 5 6] and [4]: examples 0 and 2 share their prompt; targets stay in the order of the batch."""
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
    """The prompt once, each response but for its last token; equal prompts in different examples save more."""
    for one in random_examples(20, (1, 2, 3)):
        assert one.n_tokens == pack([one]).input_ids.numel()


def test_layout_for_a_variable_length_kernel():
    """Segments of 5, 1, 3 queries; the second has its prompt's 3 keys before its own: 5, 4, 3 keys."""
    layout = pack([PAIR, SINGLE]).layout
    assert layout.cu_seq_q.tolist() == [0, 5, 6, 9] and layout.cu_seq_q.dtype == torch.int32
    assert layout.cu_seq_k.tolist() == [0, 5, 9, 12] and layout.cu_seq_k.dtype == torch.int32
    assert layout.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]


def test_sums_by_row():
    """Rows 0 0 0 1 1 2 2 of 1 to 7: 6, 9, 13."""
    assert pack([PAIR, SINGLE]).sum_by_row(torch.arange(1.0, 8.0)).tolist() == [6, 9, 13]


@pytest.mark.parametrize(
    ("max_tokens", "runs"),
    [
        (100, [[0, 1, 2, 3, 4]]),
        (12, [[0, 1, 2], [3], [4]]),  # 4 + 4 + 4; 20 alone is more than fits; 4
        (11, [[0, 1], [2], [3], [4]]),
        (24, [[0, 1, 2], [3, 4]]),
        (1, [[0], [1], [2], [3], [4]]),
    ],
)
def test_split_by_tokens(max_tokens, runs):
    """Examples of 4, 4, 4, 20, 4 tokens."""
    examples = [example(list(range(n)), [9]) for n in (4, 4, 4, 20, 4)]
    assert [one.n_tokens for one in examples] == [4, 4, 4, 20, 4]
    assert split_by_tokens(examples, max_tokens) == runs


def test_balanced_shares():
    """Tokens 2, 9, 4, 6, 3 for two: 9, 6, 4, 3, 2, always to the lighter one: 9 + 3 = 12 and 6 + 4 + 2 = 12. Shares are
    in the order of the batch, and one share of all is the batch as it is."""
    examples = [example(list(range(n)), [9]) for n in (2, 9, 4, 6, 3)]
    assert balanced_shares(examples, 2) == [[1, 4], [0, 2, 3]]
    assert balanced_shares(examples, 1) == [[0, 1, 2, 3, 4]]
    assert balanced_shares(examples[:1], 3) == [[0], [], []]


def test_shares_are_balanced_on_ragged_lengths():
    """64 examples of 3 to 26 tokens for 2 to 8 processes: the largest share is within 3 % of the mean."""
    examples = random_examples(64)
    for n in (2, 3, 8):
        tokens = [sum(examples[i].n_tokens for i in share) for share in balanced_shares(examples, n)]
        assert max(tokens) <= 1.03 * sum(tokens) / n


def test_a_schedule_has_as_many_forwards_everywhere():
    """Every example once; a process with fewer runs has empty ones at its end; a forward keeps to its limit."""
    examples = [example(list(range(n)), [9]) for n in (20, 3, 3, 3, 3, 3, 3)]
    for n in (1, 2, 3, 5, 9):
        per_process = schedule(examples, n, max_tokens=6)
        assert len(per_process) == n and len({len(runs) for runs in per_process}) == 1
        every = [i for runs in per_process for run in runs for i in run]
        assert sorted(every) == list(range(7))
        for runs in per_process:
            assert runs == sorted(runs, key=lambda run: not run)  # the empty ones last
            assert all(sum(examples[i].n_tokens for i in run) <= 6 or run == [0] for run in runs)
    # Two processes: one has the long example, 20 tokens in one forward; the other six of 3 tokens, two by two.
    assert schedule(examples, 2, max_tokens=6) == [[[0], [], []], [[1, 2], [3, 4], [5, 6]]]


def test_split_by_tokens_of_nothing():
    assert split_by_tokens([], 100) == []


#### ATTENTION AGAINST A DENSE MASK


@pytest.mark.parametrize("sliding_window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("groups", [1, 2])
def test_packed_attention_is_attention_under_a_dense_mask(sliding_window, softcap, groups):
    """Token i sees j if both belong to one prompt-and-response, j is not later, and is within the window.

    The mask is written down from the definition, by looking at every pair of tokens.
    """
    inputs = pack([PAIR, SINGLE, example([1, 2, 3], [5, 5, 5, 9])])
    owners = [{0, 1, 3}] * 3 + [{0}] * 2 + [{1}] + [{3}] * 3 + [{2}] * 3  # the rows that a token is part of
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
    """Per-token log-probs in the order of the batch, and the gradient of every parameter for a random upstream."""
    policy.zero_grad(set_to_none=True)
    logps = policy(policy.inputs(examples)).logps
    generator = torch.Generator().manual_seed(0)
    logps.backward(torch.randn(len(logps), generator=generator) if upstream is None else upstream)
    gradients = {name: parameter.grad for name, parameter in policy.lm.named_parameters()}
    assert None not in gradients.values()
    return logps.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def assert_same(one, other, tolerance: float = 1e-5) -> None:
    """Values and every parameter's gradient: norm of the difference over the norm.

    Some gradients are 0 in exact arithmetic (a key's bias shifts all scores alike), and rounding noise here: a
    parameter's norm counts as at least a hundredth of the norm of all.
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
    """float32, 1e-5, values and gradients; the model's own attention on one side, ours on the other."""
    policy = tiny_policy(name)
    padded = values_and_gradients(policy, EXAMPLES)
    assert padded[0].std() > 0.3  # a model that says the same of every token would agree with anything
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
        assert runs["inside"] == 2 * 2  # both layers, once forward and once again in the backward


@every_architecture
def test_responses_do_not_see_each_other(name):
    """Changing one response of a pack leaves every other log-prob as it was, bit by bit."""
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
    """A prompt laid out once for its responses, against each response in a pack of its own."""
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
    """A permuted batch has the permuted sums, and the same gradient of their weighted sum."""
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
    """`model.logps: plain | fused` on a packed forward."""
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
    """A model that drops the keyword must not fall back to attention over everything in silence."""
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="does not hand the layout of a pack down"):
        packing.packed_attention(torch.nn.Identity(), q, q, q, None)


def test_attention_sinks_are_refused():
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="attention sinks"):
        packing.packed_attention(torch.nn.Identity(), q, q, q, None, layout=Layout([(0, 3, 0, 0)]), s_aux=q)


#### IS PACKING EXACT FOR THIS MODEL?

# Models that a pack is not read by correctly: what they are built from, and why not.
UNPACKABLE = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # ALiBi, an attention of its own
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},  # recurrent
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    "granite": {**ARCHITECTURES["llama"], "logits_scaling": 4.0},  # scales its logits after the head
}


@pytest.fixture(autouse=True)
def quiet():
    """transformers' warnings that these models do not switch their attention; we say so ourselves."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def check(policy, packing, dtype):
    """The check as a run makes it: in float32, then as prepared to compute in `dtype`."""
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
    """And the padded forward of that model then is its own: log-softmax of its logits, response by response."""
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
    """Not even a model: None would raise if it was looked at."""
    for setting in (False, "false"):
        assert choose(None, setting, torch.float32, None) == (False, "model.packing=false")


def test_a_model_that_raises_is_not_packed():
    """Its error is the reason."""
    policy = tiny_policy("llama")
    forward = policy.lm.base_model.forward

    def broken(*args, layout=None, **kwargs):
        if layout is not None:
            raise NotImplementedError("no such\nkeyword")
        return forward(*args, **kwargs)

    policy.lm.base_model.forward = broken
    assert check(policy, "auto", torch.float32) == (False, "NotImplementedError: no such keyword")


def test_the_check_leaves_no_trace():
    """Weights bit by bit, their dtype, training mode, and the attention: also where weights are stored in bfloat16."""
    for stored in (torch.float32, torch.bfloat16):
        policy = PolicyModel(cast_weights(tiny_lm("llama"), stored)).train()
        before = {name: tensor.clone() for name, tensor in policy.lm.state_dict().items()}
        attention = policy.lm.config._attn_implementation
        assert choose(policy, "auto", stored, in_float32(policy))[0]
        assert policy.training and not policy.packs and policy.lm.config._attn_implementation == attention
        for name, tensor in policy.lm.state_dict().items():
            assert tensor.dtype == stored and torch.equal(tensor, before[name])


def test_the_float32_rule_is_1e_5_of_the_largest_logprob():
    """A packed value that is off by 0.9e-5 of the largest passes, one by 1.1e-5 does not."""
    policy = tiny_policy("llama").eval()
    oracle, packed = in_float32(policy)
    largest = oracle.abs().max()
    assert (packed - oracle).abs().max() < 2e-6 * largest
    for share, agrees in ((0.9e-5, True), (1.1e-5, False)):
        off = oracle.clone()
        off[3] += share * largest
        assert choose(policy, "auto", torch.float32, (oracle, off))[0] == agrees


def test_the_bfloat16_rule_is_twice_the_error_of_padded_bfloat16():
    """The oracle is set so that padded bfloat16 is off by e everywhere; packed, off by about e, passes; an oracle that
    is nearer to padded than to packed by more than the factor does not."""
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
    """Bloom's attention never sees a layout. With small weights that costs less than bfloat16 does, and float32 still
    shows it: 8e-4 nat where 5e-5 are allowed. What is wrong in exact arithmetic is wrong in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        policy = PolicyModel(tiny_lm("bloom", **UNPACKABLE["bloom"], initializer_range=0.02))
        assert not check(policy, "auto", dtype)[0]


def test_bfloat16_close_to_float32_over_a_long_response():
    """512 random tokens after one prompt, computed in bfloat16 throughout, at ln 97 = 4.6 nats a token: each is off by
    about 0.013 nat, and errors of random sign sum to sqrt(512) times that, 0.3 nat, where a systematic one would sum to
    512 times, 7 nats. Four times 0.3 is allowed."""
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
