"""Losses of single responses (losses/unpaired.py): hand-computed values, BCO's running mean, and TRL on one batch."""

import math
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch

import dataloaders
from halos import metrics
from halos.engine import Batch
from halos.errors import UserError
from halos.examples import Example
from halos.mishaps import NotFinite
from halos.models import PerToken
from halos.tokens import Role
from helpers import example
from losses.unpaired import APOZeroUnpairedTrainer, BCOTrainer, MismatchedKTOTrainer
from small_runs import loader_for, make_trainer, tokenizer
from test_losses import bare, close, kto_of_logratios, loss_of, vector

# With beta = ln 3, sigmoid(beta * x) = 3^x / (1 + 3^x): 1/2 at 0, 3/4 at 1, 9/10 at 2.
WEIGHTED = {"beta": math.log(3), "desirable_weight": 2.0, "undesirable_weight": 3.0}


def batch_of_logratios(*ratios: float, chosen: tuple[bool | None, ...]) -> Batch:
    """A batch of responses of one token each, with these log-ratios. chosen: one per response; None: unrelated"""
    policy = (vector(*ratios) - 7).requires_grad_()
    examples = [example([5], [6], chosen=(flag,)) for flag in chosen]
    return Batch(examples, PerToken(policy, None, None), torch.full_like(policy, -7))


#### KTO WITH MISMATCHED PAIRS


def test_mismatched_kto_by_hand():
    """Unrelated log-ratios 3 and -1 have the mean 1 = KL. With beta ln 3:

    chosen 2:     2 * (1 - sigmoid(beta * (2 - 1))) = 2 * 1/4     chosen 1:   2 * 1/2
    rejected 2:   3 * (1 - sigmoid(beta * (1 - 2))) = 3 * 3/4
    Gradients are -beta w s' and +beta w s' with s' = 3/16, 1/4, 3/16, and 0 for what the KL is made of.
    """
    batch = batch_of_logratios(2, 3, 1, 2, -1, chosen=(True, None, True, False, None))
    outcome = bare(MismatchedKTOTrainer, **WEIGHTED).batch_loss(batch)
    close(outcome.losses, (1 / 2, 1, 9 / 4))
    close(outcome.chosen_rewards, vector(2, 1) * math.log(3))
    close(outcome.rejected_rewards, vector(2) * math.log(3))
    outcome.losses.sum().backward()
    close(batch.policy.logps.grad, math.log(3) * vector(-2 * 3 / 16, 0, -2 / 4, 3 * 3 / 16, 0))
    values = bare(MismatchedKTOTrainer, **WEIGHTED).summarize([outcome], "train")
    assert (values["kl/unrelated"], values["clamped/kl"]) == (1, 0)


@pytest.mark.parametrize("unrelated", [(-2.0, 1.0), ()], ids=["negative", "none"])
def test_mismatched_kto_with_a_kl_of_0(unrelated):
    """A mean log-ratio of -1/2 is clamped to 0, and without unrelated responses the KL is 0: chosen 1 costs 2 * 1/4."""
    batch = batch_of_logratios(1, *unrelated, chosen=(True, *[None] * len(unrelated)))
    outcome = bare(MismatchedKTOTrainer, **WEIGHTED).batch_loss(batch)
    close(outcome.losses, (1 / 2,))
    assert outcome.metrics["clamped/kl"].item() == bool(unrelated)


def test_unrelated_responses_are_those_of_the_row_before_with_another_prompt():
    """Every row has one; over an epoch each response is unrelated once, unless rows of one prompt follow each other."""
    loader = loader_for("kto_mismatched", 20, batch_size=8)
    rows = list(loader.order(0))
    assert all(row.roles[1:] == (Role.UNRELATED,) and row.responses[1][0] != row.example for row in rows)
    before = [rows[i - 1].responses[0] for i in range(len(rows))]
    followed = [i for i, row in enumerate(rows) if before[i][0] != row.example]
    assert len(followed) > 30 and all(rows[i].responses[1] == before[i] for i in followed)
    assert Counter(row.roles[0] for row in rows) == {Role.CHOSEN: 20, Role.REJECTED: 20}


def test_rows_of_one_prompt_are_passed_over(tmp_path):
    """Five judged responses to the prompts a, a, a, b: each takes one of the other prompt."""
    judged = [(i, True) for i in range(3)]
    examples = [Example("a", list("xyz"), feedback=judged), Example("b", ["u"], feedback=[(0, False)])]
    settings = {"batch_size": 2, "max_length": 64, "max_prompt_length": 32, "cache_dir": str(tmp_path)}
    loader = dataloaders.MismatchedDataLoader(examples, tokenizer(), **settings)
    assert {(row.example, row.responses[1][0]) for row in loader.order(0)} == {(0, 1), (1, 0)}
    with pytest.raises(UserError, match="pairs responses with other prompts, and the data have one"):
        dataloaders.MismatchedDataLoader(examples[:1], tokenizer(), **settings)


#### APO-ZERO


def test_unpaired_apo_zero_by_hand():
    """With beta ln 3: chosen 1 costs 2 * (1 - 3/4), chosen 0 2 * 1/2; rejected 2 costs 3 * 9/10.

    Gradients: -beta * 2 * 3/16 and -beta * 2 * 1/4; +beta * 3 * 9/100.
    """
    results = kto_of_logratios((1, 0), (2,), loss_of(APOZeroUnpairedTrainer, **WEIGHTED))
    losses, chosen_rewards, rejected_rewards, chosen_grad, rejected_grad = results
    close(losses, (1 / 2, 1, 27 / 10))
    close(chosen_rewards, vector(1, 0) * math.log(3))
    close(rejected_rewards, vector(2) * math.log(3))
    close(chosen_grad, -math.log(3) * vector(3 / 8, 1 / 2))
    close(rejected_grad, math.log(3) * vector(27 / 100))


def test_unpaired_apo_zero_is_mismatched_kto_with_a_kl_of_0():
    ratios, chosen = torch.randn(6).tolist(), (True, False, True, True, False, False)
    kto = bare(MismatchedKTOTrainer, **WEIGHTED).batch_loss(batch_of_logratios(*ratios, chosen=chosen))
    apo = bare(APOZeroUnpairedTrainer, **WEIGHTED).batch_loss(batch_of_logratios(*ratios, chosen=chosen))
    close(apo.losses, kto.losses)


#### BCO


def bco(**own) -> BCOTrainer:
    """A trainer with beta ln 3, whose training so far has left `own`."""
    trainer = bare(BCOTrainer, beta=math.log(3))
    trainer.state = SimpleNamespace(own=own)
    return trainer


def test_bco_by_hand():
    """Without a past the shift is the mean reward of the batch: log-ratios 2, 0 and 1 have the mean 1.

    chosen 2: -ln sigmoid(ln 3) = ln 4/3; chosen 0: -ln sigmoid(-ln 3) = ln 4; rejected 1: ln 2.
    The shift has no gradient: -beta (1 - 3/4), -beta (1 - 1/4), +beta / 2.
    """
    results = kto_of_logratios((2, 0), (1,), bco().loss)
    losses, chosen_rewards, rejected_rewards, chosen_grad, rejected_grad = results
    close(losses, vector(4 / 3, 4, 2).log())
    close(chosen_rewards, vector(2, 0) * math.log(3))
    close(rejected_rewards, vector(1) * math.log(3))
    close(chosen_grad, -math.log(3) * vector(1 / 4, 3 / 4))
    close(rejected_grad, math.log(3) * vector(1 / 2))


def test_bco_shifts_by_the_mean_of_all_rewards():
    """Three rewards of mean 2 ln 3 before, and the rewards 0 and 4 ln 3 of this batch: the mean stays 2 ln 3.

    With rewards of 6 ln 3 and 1 ln 3 it is (6 + 7) / 5 ln 3. In evaluation the batch does not count.
    """
    trainer, unit = bco(rewards=(3, 2 * math.log(3))), math.log(3)
    close(trainer.delta(vector(0), vector(4 * unit)), torch.tensor(2 * unit))
    close(trainer.delta(vector(6 * unit), vector(unit)), torch.tensor(13 / 5 * unit))
    with torch.no_grad():
        close(trainer.delta(vector(6 * unit), vector(unit)), torch.tensor(2 * unit))
        close(bare(BCOTrainer, beta=1.0).delta(vector(6), vector(1)), torch.tensor(3.5))  # evaluation without training


def test_bco_keeps_its_mean_over_updates(tmp_path, monkeypatch):
    """After each update, the mean is that of all rewards so far. Evaluation and a skipped step leave it as it is."""
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)
    trainer = make_trainer(tmp_path, "bco", "lr=1", "loss.beta=1", "model.gradient_accumulation_steps=2")
    trainer.log, rewards = metrics.NoLog(), torch.empty(0)
    for batches in (trainer.train_loader.batches[:2], trainer.train_loader.batches[2:]):
        outcomes = [trainer.forward_backward(batch) for batch in batches]
        rewards = torch.cat([rewards, *(part for o in outcomes for part in (o.chosen_rewards, o.rejected_rewards))])
        trainer.update(outcomes, sum(batches, []))
        n, mean = trainer.state.own["rewards"]
        assert n == len(rewards) and mean == pytest.approx(rewards.double().mean().item(), rel=1e-6)
    assert n == 24 and abs(mean) > 0.01
    assert trainer.evaluate()["shift_eval/delta"] == pytest.approx(mean)
    trainer.checks.finite(torch.tensor(math.nan), "the loss", [])
    with pytest.raises(NotFinite):
        trainer.update(outcomes, batches[0])
    assert trainer.state.own["rewards"] == (n, mean)


#### TRL


def loss_of_trl(loss_type: str, ratios: torch.Tensor, unrelated: torch.Tensor, labels: list[bool]) -> torch.Tensor:
    """The mean loss of TRL's KTOTrainer on responses of one token with these log-ratios, instead of models."""
    KTOTrainer = pytest.importorskip("trl").KTOTrainer
    n, unit = len(labels), torch.ones(len(labels), 2, dtype=torch.long)

    def model(input_ids, **inputs):
        logps = (unrelated if input_ids.any() else ratios)[:, None]
        return SimpleNamespace(log_probs=logps, entropy=torch.zeros(n, 1), mean_logits=torch.zeros(n, 1))

    model.training = True
    batch = {"input_ids": 0 * unit, "attention_mask": unit, "completion_mask": unit, "label": torch.tensor(labels)}
    batch |= {f"KL_{name}": unit for name in ("input_ids", "attention_mask", "completion_mask")}
    batch |= {"ref_logps": torch.zeros(n), "ref_KL_logps": torch.zeros(n)}
    trainer = KTOTrainer.__new__(KTOTrainer)
    trainer.__dict__ |= WEIGHTED | {"loss_type": loss_type, "calculate_KL": loss_type == "kto", "model": model}
    trainer.__dict__ |= {"precompute_ref_logps": True, "aux_loss_enabled": False, "_total_train_tokens": 0}
    trainer.__dict__ |= {"_metrics": {"train": defaultdict(list)}, "_tp_size": 1}
    trainer.accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    return trainer._compute_loss(model, batch, return_outputs=False)


@pytest.mark.parametrize(
    ("loss_type", "trainer"), [("kto", MismatchedKTOTrainer), ("apo_zero_unpaired", APOZeroUnpairedTrainer)]
)
@pytest.mark.parametrize("shift", [-1.0, 1.0], ids=["clamped KL", "KL"])
def test_trl_has_the_same_losses(loss_type, trainer, shift):
    """Mean loss and gradients agree with TRL's to 1e-6, on six responses and the unrelated ones beside them."""
    generator = torch.Generator().manual_seed(0)
    ratios, unrelated = torch.randn(6, generator=generator), torch.randn(6, generator=generator) + shift
    labels = [True, False, False, True, True, True]
    ours = batch_of_logratios(*ratios.tolist(), *unrelated.tolist(), chosen=(*labels, *[None] * 6))
    mean = bare(trainer, **WEIGHTED).batch_loss(ours).losses.mean()
    mean.backward()
    theirs = loss_of_trl(loss_type, ratios.requires_grad_(), unrelated, labels)
    theirs.backward()
    close(mean, theirs, rtol=1e-6, atol=1e-6)
    close(ours.policy.logps.grad[:6], ratios.grad, rtol=1e-6, atol=1e-6)
