"""KL divergences from a reference model at each token, through the engine, and TDPO, which needs them."""

import math

import pytest
import torch

from halos import logps, metrics, reference_cache
from halos.engine import Batch, Forward
from halos.models import PerToken, PolicyModel
from halos.reference_kl import Predictions, fused, plain
from helpers import example, make_config, random_examples, tiny_lm
from losses.tdpo import TDPOTrainer
from small_runs import SMALL, loader_for, make_trainer, tokenizer
from test_losses import bare, close, vector

N, D, V = 37, 16, 211  # targets, hidden size, vocabulary


def case(with_bias: bool = False, dtype=torch.float32) -> tuple[Predictions, Predictions, torch.Tensor]:
    """Return predictions of a policy and of a reference near it, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    hidden, weight, bias = draw(N, D), draw(V, D) * (2 / math.sqrt(D)), draw(V)
    reference = hidden + 0.3 * draw(N, D), weight + 0.1 * draw(V, D), bias
    both = [Predictions(*(part.to(dtype) for part in parts)) for parts in ((hidden, weight, bias), reference)]
    both = both if with_bias else [one._replace(bias=None) for one in both]
    return both[0], both[1], draw(N)


def values_and_gradients(function, policy, reference, upstream, **options) -> list[torch.Tensor]:
    leaves = [part if part is None else part.clone().requires_grad_() for part in policy]
    values = function(Predictions(*leaves), reference, **options)
    values.backward(upstream)
    return [values.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("function", [plain, fused])
def test_by_hand(function):
    """The reference has odds 1 : 3, the policy 1 : 1: KL = 1/4 ln(1/2) + 3/4 ln(3/2). Equal ones have KL 0.

    Its gradient with respect to the policy's logits is p - q = (1/2 - 1/4, 1/2 - 3/4), here that of the weights.
    """
    states, weight = torch.ones(2, 1), torch.zeros(2, 1, requires_grad=True)
    reference = Predictions(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [math.log(3)]]))
    values = function(Predictions(states, weight), reference)
    close(values, (math.log(1 / 2) / 4 + 3 / 4 * math.log(3 / 2), 0))
    values.sum().backward()
    close(weight.grad[:, 0], (1 / 4, -1 / 4))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 1000])
def test_fused_is_plain(monkeypatch, rows_per_chunk, scale, softcap):
    """Fused and plain agree to 1e-5 in values and gradients, in one chunk or several, and with float64 in values.

    The gradient p - q is a difference of nearly equal numbers, so it has fewer digits than they have.
    """
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", {"cpu": 4 * rows_per_chunk * V})
    policy, reference, upstream = case(with_bias=True)
    options = {"softcap": softcap, "scale": scale}
    ours = values_and_gradients(fused, policy, reference, upstream, **options)
    for one, other in zip(ours, values_and_gradients(plain, policy, reference, upstream, **options), strict=True):
        assert relative(one, other) < 1e-5
    p, q = (torch.distributions.Categorical(logits=exact(one, **options)) for one in (policy, reference))
    assert relative(ours[0], torch.distributions.kl_divergence(q, p)) < 1e-5


def exact(one: Predictions, softcap: float | None, scale: float) -> torch.Tensor:
    logits = scale * (one.states.double() @ one.weight.double().T + one.bias.double())
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def test_bfloat16_sums_over_chunks_in_float32(monkeypatch):
    """From bfloat16 inputs, values and gradients are those of the same inputs in float32, rounded once."""
    policy, reference, upstream = case(dtype=torch.bfloat16)
    wide = [Predictions(one.states.float(), one.weight.float()) for one in (policy, reference)]
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", {"cpu": 4 * V})
    ours = values_and_gradients(fused, policy, reference, upstream)
    expected = values_and_gradients(plain, *wide, upstream)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == torch.bfloat16
    assert relative(ours[0], expected[0]) < 1e-6
    assert relative(ours[1], expected[1]) < 0.005 and relative(ours[2], expected[2]) < 0.005


#### THROUGH THE ENGINE


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("max_tokens", [1, 40, 1000])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_batch_has_the_divergences_of_the_definition(packs, max_tokens, model_type):
    """Values and gradients are those of both models' padded logits, in one forward pass or several.

    gemma2 caps its logits, and has tied embeddings. The log-probs of the reference come from the same forward passes.
    """
    examples = [*random_examples(3), example([5, 6], [7, 8], [9], chosen=(True, None))]
    policy, reference = (PolicyModel(tiny_lm(model_type, seed)) for seed in (0, 1))
    inputs = policy.inputs(examples)
    outputs = policy(inputs, reference=Predictions(reference(inputs, with_states=True).states.detach()))
    upstream = torch.linspace(-1, 2, len(outputs.kl))
    trained = torch.tensor([role != "unrelated" for one in examples for role in one.roles])
    trained = trained.repeat_interleave(torch.tensor([n for one in examples for n in one.n_targets]))
    (upstream * trained * outputs.kl).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    for model in (policy, reference):
        model.use_packing(packs)
    forward = Forward(policy, examples, max_tokens, reference=reference.requires_grad_(False))
    assert forward.tokens.kl.min() > 0 and forward.tokens.kl.mean() > 0.1
    close(forward.tokens.kl, outputs.kl, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        close(forward.reference_logps, Forward(reference, examples, max_tokens).tokens.logps, rtol=0, atol=0)
    (upstream * forward.tokens.kl).sum().backward()
    forward.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert relative(gradient, expected) < 1e-5 and expected.norm() > 0.1


#### TDPO


def tdpo_outcome(**hyper):
    """Chosen: log-ratios 2 and 0 with divergences 0.5 and 1.5; rejected: log-ratio -1 with divergence 1."""
    policy = (vector(2, 0, -1) - 7).requires_grad_()
    kl = vector(0.5, 1.5, 1, grad=True)
    batch = Batch([example([5], [6, 7], [8])], PerToken(policy, None, None, kl), torch.full((3,), -7.0))
    outcome = bare(TDPOTrainer, beta=0.5, **hyper).batch_loss(batch)
    outcome.losses.sum().backward()
    return outcome, policy.grad, kl.grad


def test_tdpo2_by_hand():
    """h = 0.5 (2 + 1 - 0.5 (1 - 2)) = 1.75: the loss is ln(1 + e^-1.75), and dL/dh = -1 / (1 + e^1.75) = -s.

    Gradients: -/+ 0.5 s of log-probs; + 0.25 s of the rejected divergence, and none of the chosen one. Rewards:
    0.5 (2 + 2) and 0.5 (-1 + 1).
    """
    outcome, of_logps, of_kl = tdpo_outcome(alpha=0.5, detach_chosen_kl=True)
    s = 1 / (1 + math.exp(1.75))
    close(outcome.losses, (math.log(1 + math.exp(-1.75)),))
    close(of_logps, (-s / 2, -s / 2, s / 2))
    close(of_kl, (0, 0, s / 4))
    close(torch.cat((outcome.chosen_rewards, outcome.rejected_rewards)), (2, 0))
    assert outcome.metrics["kl/chosen"].item() == 2 and outcome.metrics["kl/rejected"].item() == 1


def test_tdpo1_by_hand():
    """h = 0.5 (2 + 1 - (1 - 2)) = 2. The chosen divergence has the gradient -0.5 s: it grows."""
    outcome, of_logps, of_kl = tdpo_outcome(alpha=1.0, detach_chosen_kl=False)
    s = 1 / (1 + math.exp(2))
    close(outcome.losses, (math.log(1 + math.exp(-2)),))
    close(of_logps, (-s / 2, -s / 2, s / 2))
    close(of_kl, (-s / 2, -s / 2, s / 2))


def test_tdpo_with_alpha_0_is_dpo(tmp_path):
    """Losses and gradients of the model, after a step that takes it away from the reference."""
    gradients = []
    for loss, words in (("tdpo", ["loss.alpha=0"]), ("dpo", [])):
        trainer = make_trainer(tmp_path / loss, loss, "lr=0.1", *words)
        trainer.log = metrics.NoLog()
        first, second = trainer.train_loader.batches[:2]
        trainer.train_step([first])
        trainer.forward_backward(second)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.policy.parameters()]))
    assert relative(*gradients) < 1e-5 and gradients[0].norm() > 0.1


def test_tdpo_has_no_use_for_cached_log_probs(tmp_path, capsys):
    """The run says so in one line, and gets the reference model itself. At the start its divergence is 0."""
    config = make_config(tmp_path, *SMALL, "loss=tdpo", "cache_reference_logps=true")
    loader = loader_for("tdpo", 8, batch_size=8)
    policy, reference, cache = reference_cache.load(config, tokenizer(), [loader], needs_model=True)
    said = "reference log-probs: computed in every step, since tdpo needs the reference model"
    assert cache is None and capsys.readouterr().out.strip() == said
    trainer = TDPOTrainer(policy, reference, tokenizer(), config, None, loader, str(tmp_path))
    values = trainer.evaluate()
    assert values["kl_eval/chosen"] == values["kl_eval/rejected"] == 0
    assert values["loss/eval"] == pytest.approx(math.log(2))
