"""Log-probs of targets: the plain function against the definition, and the fused function against the plain one."""

import functools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode  # private, as the next: see halos/measuring.py
from torch.utils._pytree import tree_leaves

from halos import logps

N, D, V = 37, 16, 211  # targets, hidden size, vocabulary


@pytest.fixture
def chunk(monkeypatch):
    """Set the largest number of logits in a chunk."""

    def chunk(elements: int) -> None:
        monkeypatch.setattr(logps, "CHUNK_ELEMENTS", {"cpu": elements})

    return chunk


def case(n: int = N, d: int = D, v: int = V, with_bias: bool = False, dtype=torch.float32, seed: int = 0):
    """Return (hidden, weight, targets, bias, upstream gradient); the logits have a standard deviation of 2."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    hidden, weight = draw(n, d), draw(v, d) * (2 / math.sqrt(d))
    targets = torch.randint(v, (n,), generator=generator)
    return hidden, weight, targets, draw(v) if with_bias else None, torch.randn(n, generator=generator)


def values_and_gradients(function, hidden, weight, targets, bias, upstream, **options) -> list[torch.Tensor]:
    """Return [values, gradient of hidden, gradient of weight, gradient of bias if there is one]."""
    leaves = [part.clone().requires_grad_() for part in (hidden, weight, bias) if part is not None]
    values = function(*leaves[:2], targets, *leaves[2:], **options)
    values.backward(upstream.to(values.dtype))
    return [values.detach(), *(leaf.grad for leaf in leaves)]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def exact(hidden, weight, targets, bias=None, softcap=None, scale=1.0) -> torch.Tensor:
    """Compute the definition in float64: z_t - ln sum exp z."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = scale * logits
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return logits[range(len(targets)), targets] - logits.exp().sum(-1).log()


@pytest.mark.parametrize("function", [logps.plain, logps.fused])
def test_by_hand(function):
    """The hidden state (1, 1) with weights (0, 0), (ln 2, 0), (0, ln 5) has the logits 0, ln 2, ln 5: odds 1 : 2 : 5.

    So the targets 0, 1, 2 have the log-probs ln 1/8, ln 2/8, ln 5/8. A bias of ln 3 on the first gives 3 : 2 : 5.
    """
    hidden = torch.ones(3, 2)
    weight = torch.tensor([[0, 0], [math.log(2), 0], [0, math.log(5)]])
    targets = torch.tensor([0, 1, 2])
    torch.testing.assert_close(function(hidden, weight, targets), torch.tensor([1 / 8, 2 / 8, 5 / 8]).log())
    biased = function(hidden, weight, targets, torch.tensor([math.log(3), 0, 0]))
    torch.testing.assert_close(biased, torch.tensor([3 / 10, 2 / 10, 5 / 10]).log())


@pytest.mark.parametrize("function", [logps.plain, logps.fused])
def test_softcap_by_hand(function):
    """Logits 0 and ln 3, capped at 2, become 0 and 2 tanh(ln 3 / 2) = 2 (3 - 1) / (3 + 1) = 1.

    So the log-probs are 0 - ln(1 + e) and 1 - ln(1 + e).
    """
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3)]])
    expected = torch.tensor([0.0, 1.0]) - math.log(1 + math.e)
    torch.testing.assert_close(function(hidden, weight, torch.tensor([0, 1]), softcap=2.0), expected)


@pytest.mark.parametrize("function", [logps.plain, logps.fused])
def test_scale_by_hand(function):
    """Logits 0 and ln 9, times 1/2, are 0 and ln 3: odds 1 : 3. So the log-probs are ln 1/4 and ln 3/4.

    The scale comes before the soft cap: capped at 2, ln 3 becomes 1, as in the test above.
    """
    hidden, weight, targets = torch.ones(2, 1), torch.tensor([[0.0], [math.log(9)]]), torch.tensor([0, 1])
    torch.testing.assert_close(function(hidden, weight, targets, scale=0.5), torch.tensor([1 / 4, 3 / 4]).log())
    expected = torch.tensor([0.0, 1.0]) - math.log(1 + math.e)
    torch.testing.assert_close(function(hidden, weight, targets, softcap=2.0, scale=0.5), expected)


@pytest.mark.parametrize("function", [logps.plain, logps.fused])
def test_entropy_by_hand(function):
    """Odds 1 : 2 : 5 have the entropy sum p ln(1 / p) = (ln 8 + 2 ln 4 + 5 ln(8 / 5)) / 8.

    Equal odds of three have the entropy ln 3. If one logit is 1000 and the others 0, the entropy is 0.
    """
    weight = torch.tensor([[0.0, 0, 0], [math.log(2), 0, 0], [math.log(5), 0, 1000]])
    entropy = torch.empty(3)
    values = function(torch.eye(3), weight, torch.tensor([0, 1, 2]), entropy=entropy)
    expected = (math.log(8) + 2 * math.log(4) + 5 * math.log(8 / 5)) / 8
    torch.testing.assert_close(entropy, torch.tensor([expected, math.log(3), 0.0]))
    torch.testing.assert_close(values, torch.tensor([math.log(1 / 8), math.log(1 / 3), 0.0]))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 1000])
def test_entropy_in_chunks(chunk, rows_per_chunk, softcap):
    """Entropies do not depend on the chunks, and computing them does not change values and gradients.

    They agree with the definition in float64 to 1e-6, from bfloat16 inputs to 2 %.
    """
    chunk(rows_per_chunk * V)
    hidden, weight, targets, bias, upstream = case(with_bias=True)
    plain, fused, half = (torch.empty(N) for _ in range(3))
    logps.plain(hidden, weight, targets, bias, softcap, plain)
    with_entropy = functools.partial(logps.fused, entropy=fused)
    results = values_and_gradients(with_entropy, hidden, weight, targets, bias, upstream, softcap=softcap)
    without = values_and_gradients(logps.fused, hidden, weight, targets, bias, upstream, softcap=softcap)
    assert all(torch.equal(one, other) for one, other in zip(results, without, strict=True))
    logits = hidden.double() @ weight.double().T + bias.double()
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    exact = torch.distributions.Categorical(logits=logits).entropy()
    assert relative(plain, exact) < 1e-6 and relative(fused, exact) < 1e-6
    logps.fused(hidden.bfloat16(), weight.bfloat16(), targets, bias.bfloat16(), softcap, half)
    assert relative(half, exact) < 0.02


@pytest.mark.parametrize("function", [logps.plain, logps.fused])
def test_extreme_logits_stay_finite(function):
    """Logits 0 and 1000 have the log-probs -1000 and 0.

    The gradient of the logits is onehot - softmax: (1, -1) for the first target, (0, 0) for the second. The gradient of
    the hidden state is that times the weights (0, 1000): -1000 and 0.
    """
    hidden, weight = torch.ones(2, 1, requires_grad=True), torch.tensor([[0.0], [1000.0]])
    values = function(hidden, weight, torch.tensor([0, 1]))
    torch.testing.assert_close(values, torch.tensor([-1000.0, 0.0]))
    values.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[-1000.0], [0.0]]))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 36, 1000])
def test_fused_is_plain(chunk, rows_per_chunk, with_bias, scale, softcap):
    """Fused and plain agree to 1e-6 in values and gradients, whether the 37 targets come in 37, 8, 2 or 1 chunks."""
    chunk(rows_per_chunk * V + V // 2)
    inputs = case(with_bias=with_bias)
    plain = values_and_gradients(logps.plain, *inputs, softcap=softcap, scale=scale)
    fused = values_and_gradients(logps.fused, *inputs, softcap=softcap, scale=scale)
    assert len(plain) == len(fused) == 3 + with_bias
    for one, other in zip(fused, plain, strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape
        assert relative(one, other) < 1e-6
    assert relative(plain[0], exact(*inputs[:4], softcap, scale)) < 1e-6


def test_one_row_and_none():
    """A single target works, and so do no targets: log-probs of shape (0,), and gradients of 0."""
    one = case(n=1)
    for fused, plain in zip(
        values_and_gradients(logps.fused, *one), values_and_gradients(logps.plain, *one), strict=True
    ):
        assert relative(fused, plain) < 1e-6
    values, hidden_grad, weight_grad = values_and_gradients(logps.fused, *case(n=0))
    assert values.shape == (0,) and hidden_grad.shape == (0, D)
    assert not weight_grad.any()


def test_chunks_cover_each_row_once(chunk):
    """Chunks cover each target once.

    1000 elements hold the 211 logits of at most 4 targets, so 37 targets need 10 chunks: 9 of 4, and 1 of 1.
    """
    chunk(1000)
    hidden, weight, *_ = case()
    slices = logps.chunks(hidden, weight)
    assert [row for rows in slices for row in range(N)[rows]] == list(range(N))
    assert [rows.stop - rows.start for rows in slices] == [4] * 9 + [1]
    chunk(V - 1)  # less than one target: one at a time
    assert len(logps.chunks(hidden, weight)) == N


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["hidden", "weight"])
def test_only_the_gradients_that_are_wanted(wanted):
    """With a frozen head, or a frozen body, the gradient of the other is unchanged."""
    hidden, weight, targets, _, upstream = case()
    plain = values_and_gradients(logps.plain, hidden, weight, targets, None, upstream)
    hidden, weight = hidden.clone().requires_grad_(wanted[0]), weight.clone().requires_grad_(wanted[1])
    logps.fused(hidden, weight, targets).backward(upstream)
    for tensor, expected in ((hidden, plain[1]), (weight, plain[2])):
        assert (tensor.grad is not None) == tensor.requires_grad
        assert tensor.grad is None or relative(tensor.grad, expected) < 1e-6


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bfloat16_inputs_against_the_truth(chunk, softcap):
    """Log-probs of bfloat16 inputs are compared with the same inputs in float64, and gradients too.

    bfloat16 has 8 bits of mantissa, so a logit z is off by at most 2^-9 |z|, capped or not. The target's logit and the
    log-sum-exp are each off by at most 2^-9 max|z|, so a log-prob is off by at most 2^-8 max|z|; float32 steps add
    nothing. The sum of N errors of random sign is at most sqrt(N) times that, far below N times.

    Gradients are rounded a few times at 2^-9, so they agree to 1 % of their norm. The 512 chunks are summed in float32
    and add nothing; a bfloat16 sum would be off by 2^-9 sqrt(512) = 4 %.
    """
    n = 512
    chunk(V)
    hidden, weight, targets, bias, upstream = case(n, with_bias=True, dtype=torch.bfloat16)
    truth = values_and_gradients(
        exact, hidden.double(), weight.double(), targets, bias.double(), upstream, softcap=softcap
    )
    fused = values_and_gradients(logps.fused, hidden, weight, targets, bias, upstream, softcap=softcap)
    assert fused[0].dtype == torch.float32
    assert {part.dtype for part in fused[1:]} == {torch.bfloat16}
    bound = 2**-8 * (hidden.double() @ weight.double().T + bias.double()).abs().max()
    assert (fused[0] - truth[0]).abs().max() < bound
    assert (fused[0] - truth[0]).sum().abs() < bound * math.sqrt(n)
    for one, other in zip(fused[1:], truth[1:], strict=True):
        assert relative(one, other) < 0.01


def test_bfloat16_sum_over_a_long_response():
    """For 512 tokens of about -8 nats, the summed log-prob (about -4000) is off by less than 0.005 nat.

    Logits of size 2, rounded to bfloat16, would be off by 2^-9 of that, 0.003, and sqrt(512) such errors are 0.07 nat;
    the plain function may be off by 0.25. A bfloat16 sum would move in steps of 16 nats.
    """
    hidden, weight, targets, *_ = case(n=512, d=32, v=1000, dtype=torch.bfloat16)
    truth = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, targets[:, None]).sum()
    assert truth < -3500
    assert abs(logps.fused(hidden, weight, targets).sum().double() - truth) < 0.005
    assert abs(logps.plain(hidden, weight, targets).sum().double() - truth) < 0.25


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *made, 0)
        return out


def test_tokens_times_vocabulary_never_exists(chunk):
    """No tensor has targets x vocabulary = 128 x 512 = 65,536 elements, also with entropies.

    With chunks of 8 targets, the largest tensors are 8 x 512 = 4096 logits and the 512 x 8 weights. The plain function
    makes the large tensor, which shows that the recorder would see it.
    """
    inputs = case(n=128, d=8, v=512, with_bias=True)
    chunk(8 * 512)
    with Largest() as fused:
        values_and_gradients(functools.partial(logps.fused, entropy=torch.empty(128)), *inputs, softcap=5.0)
    with Largest() as plain:
        values_and_gradients(logps.plain, *inputs, softcap=5.0)
    assert plain.numel == 128 * 512
    assert fused.numel == 8 * 512


def test_two_chunks_are_never_alive_at_once(chunk, monkeypatch):
    """Each chunk's logits are freed before the next one's are made, forward and backward."""
    import weakref

    alive, made = weakref.WeakSet(), []
    logits_of = logps.logits_of

    def recorded(*args):
        made.append(len(alive))
        logits = logits_of(*args)
        alive.add(logits)
        return logits

    monkeypatch.setattr(logps, "logits_of", recorded)
    chunk(5 * V)
    values_and_gradients(logps.fused, *case())
    assert len(made) == 15  # 8 chunks, forward and backward; the last one's logits are kept from one to the other
    assert made[:8] == [0] * 8
    assert max(made) <= 1
