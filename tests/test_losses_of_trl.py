"""The losses of pairs against TRL's own code on the same log-probs: value, and gradient of every token.

TRL's methods run on stand-ins for their trainers, with a model that returns given log-probs.
"""

import importlib.util
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from halos.engine import Batch
from halos.models import PerToken
from helpers import example, random_examples
from test_losses import LOSSES, bare, trainer_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed; pip install -e '.[bench]'"
)
N, CHOSEN_LENGTH = 8, 5

# Pairs whose chosen responses have 5 tokens each, so that TRL's mean over all chosen tokens is ours over responses.
PAIRS = [example([1], [2] * CHOSEN_LENGTH, list(one.responses[0])) for one in random_examples(N, (1,))]
LENGTHS = [n for one in PAIRS for n in one.n_targets]


def drawn(seed: int) -> torch.Tensor:
    """Log-probs of all tokens of the pairs, (n_tokens,) float32."""
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(sum(LENGTHS), generator=generator)


def ours(name: str, **hyper) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of the batch, and its gradient, (n_tokens,)."""
    policy = drawn(0).requires_grad_()
    reference = drawn(1) if LOSSES[name]["use_reference_model"] else None
    batch = Batch(PAIRS, PerToken(policy, None, None), reference)
    loss = bare(trainer_of(name), **LOSSES[name] | hyper).batch_loss(batch).losses.mean()
    loss.backward()
    return loss.detach(), policy.grad


#### TRL'S SIDE


def padded(logps: torch.Tensor) -> torch.Tensor:
    """(n_tokens,) -> (2 n_pairs, longest): the chosen responses, then the rejected ones, 0 behind each end."""
    rows = torch.nn.utils.rnn.pad_sequence(logps.split(LENGTHS), batch_first=True)
    return torch.cat([rows[::2], rows[1::2]])


class Model(torch.nn.Module):
    """A model of TRL's that returns given log-probs of the responses' tokens, and zeros as its other outputs."""

    is_gradient_checkpointing = False

    def __init__(self, logps: torch.Tensor):
        super().__init__()
        self.logps = padded(logps)

    def forward(self, **kwargs):
        zeros = torch.zeros_like(self.logps)
        return SimpleNamespace(log_probs=self.logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def accelerator():
    same = {name: lambda tensor: tensor for name in ("gather", "gather_for_metrics")}
    return SimpleNamespace(device=torch.device("cpu"), **same)


def dpo_of_trl(policy: torch.Tensor, loss_types=("sigmoid",), **settings) -> torch.Tensor:
    from trl import DPOTrainer

    mask = torch.nn.functional.pad(padded(torch.ones(sum(LENGTHS), dtype=torch.long)), (1, 0))  # one token of prompt
    model = Model(policy)
    trainer = SimpleNamespace(
        model=model,
        ref_model=Model(drawn(1)),
        accelerator=accelerator(),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        loss_types=list(loss_types),
        loss_weights=[1.0] * len(loss_types),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **{"ld_alpha": None, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5} | settings,
        **dict.fromkeys(("aux_loss_enabled", "precompute_ref_logps", "use_weighting"), False),
    )
    inputs = {"completion_mask": mask, "input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask)}
    return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


def means(policy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs per token of the chosen and of the rejected responses."""
    sums, lengths = padded(policy).sum(1), torch.tensor(LENGTHS[::2] + LENGTHS[1::2])
    return (sums / lengths).chunk(2)


def simpo_of_trl(policy: torch.Tensor, **settings) -> torch.Tensor:
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(accelerator=accelerator(), alpha=0.0, loss_type="simpo", label_smoothing=0.0, **settings)
    return CPOTrainer.cpo_loss(trainer, *means(policy))[0].mean()


def orpo_of_trl(policy: torch.Tensor, **settings) -> torch.Tensor:
    """Its likelihood is TRL's without the prompts."""
    from trl.experimental.orpo import ORPOTrainer

    losses, *_ = ORPOTrainer.odds_ratio_loss(SimpleNamespace(accelerator=accelerator(), **settings), *means(policy))
    return -means(policy)[0].mean() - losses.mean()


# Our loss and hyperparameters, TRL's function, and its settings.
SAME = {
    "dpo": ("dpo", {}, dpo_of_trl, {"beta": 0.1}),
    "ipo": ("ipo", {"average_log_prob": True}, dpo_of_trl, {"loss_types": ("ipo",), "beta": 0.1}),
    "hinge": ("hinge", {}, dpo_of_trl, {"loss_types": ("hinge",), "beta": 0.05}),
    "robust": ("robust_dpo", {}, dpo_of_trl, {"loss_types": ("robust",), "beta": 0.1, "label_smoothing": 0.1}),
    "apo_zero": ("apo_zero", {}, dpo_of_trl, {"loss_types": ("apo_zero",), "beta": 0.1}),
    "apo_down": ("apo_down", {}, dpo_of_trl, {"loss_types": ("apo_down",), "beta": 0.1}),
    "nca": ("nca", {}, dpo_of_trl, {"loss_types": ("nca_pair",), "beta": 0.01}),
    "sppo": ("sppo", {}, dpo_of_trl, {"loss_types": ("sppo_hard",), "beta": 0.001}),
    "aot": ("aot", {}, dpo_of_trl, {"loss_types": ("aot",), "beta": 0.1, "label_smoothing": 0.0}),
    "aot_unpaired": (
        "aot_unpaired",
        {},
        dpo_of_trl,
        {"loss_types": ("aot_unpaired",), "beta": 0.1, "label_smoothing": 0.0},
    ),
    "rpo": ("rpo", {}, dpo_of_trl, {"loss_types": ("sigmoid", "sft"), "beta": 0.1}),
    "ld_dpo": ("ld_dpo", {}, dpo_of_trl, {"ld_alpha": 0.5, "beta": 0.1}),
    "forward_kl": ("fdpo", {"divergence": "forward_kl"}, dpo_of_trl, {"f_divergence_type": "forward_kl", "beta": 0.1}),
    "jensen_shannon": ("fdpo", {}, dpo_of_trl, {"f_divergence_type": "js_divergence", "beta": 0.1}),
    "alpha": (
        "fdpo",
        {"divergence": "alpha", "alpha": 0.3},
        dpo_of_trl,
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7, "beta": 0.1},
    ),
    "simpo": ("simpo", {}, simpo_of_trl, {"beta": 2.0, "simpo_gamma": 1.0}),
    "orpo": ("orpo", {}, orpo_of_trl, {"beta": 0.1}),
}


@pytest.mark.parametrize("case", SAME)
def test_our_loss_is_that_of_trl(case):
    """Values agree to 1e-6, and gradients to 1e-6 of their largest entry."""
    name, hyper, theirs, settings = SAME[case]
    loss, gradient = ours(name, **hyper)
    policy = drawn(0).requires_grad_()
    expected = theirs(policy, **settings)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
    assert (gradient - policy.grad).abs().max() <= 1e-6 * policy.grad.abs().max()
