"""The loss card: every file of config/loss/ passes it, and it finds planted mistakes.

A new loss is tested by it without a test of its own. Each mistake below is a small class that the check of its name, or
another that is named, has to catch.
"""

import os
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

import dataloaders
import trainers
from halos import components
from halos.engine import Outcome
from halos.errors import UserError
from halos.loss_card import card, picture, sweep, terminal
from halos.loss_card.card import Status
from halos.loss_card.subject import Subject
from halos.tokens import Role
from helpers import CONFIG_DIR
from scripts import loss_card as command
from small_runs import losses
from trainers import DPOTrainer, KTOTrainer, PairedPreferenceTrainer, UnpairedPreferenceTrainer


def subject(name: str) -> Subject:
    """The loss of a file of config/loss/."""
    settings = OmegaConf.load(os.path.join(CONFIG_DIR, "loss", f"{name}.yaml"))
    classes = components.find(trainers, settings.trainer), components.find(dataloaders, settings.dataloader)
    return Subject(name, settings, *classes)


def planted(trainer: type, with_reference: bool = True) -> Subject:
    """A loss with a mistake, with beta 0.1."""
    loaders = {"paired": dataloaders.PairedPreferenceDataLoader, "unpaired": dataloaders.UnpairedPreferenceDataLoader}
    settings = {
        "use_reference_model": with_reference,
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
    }
    loader = getattr(trainer, "loader", loaders[trainer.data_format])
    return Subject("planted", OmegaConf.create(settings), trainer, loader)


def failed(loss: Subject) -> dict[str, card.Finding]:
    return {one.check: one for one in card.card(loss) if one.status is Status.FAILED}


#### EVERY LOSS


@pytest.mark.parametrize("name", losses())
def test_every_loss_passes_its_card(name):
    """No check fails, but for departures that the trainer declares; and what is declared is not what passes."""
    found = card.card(subject(name))
    assert not [one for one in found if one.status is Status.FAILED]
    declared = {one.check for one in found if one.status is Status.DECLARED}
    assert declared == set(subject(name).trainer.departures)


def test_the_checks_say_what_they_found():
    """DPO at beta 0.1: ln 2 at the start, a gradient of -beta/2 = -0.05, a reward of 0.1 per nat."""
    found = {one.check: one for one in card.card(subject("dpo"))}
    assert found["start"].value == "loss 0.6931 where policy equals reference"
    assert found["signs"].value.startswith("chosen -0.05, rejected +0.05 at the start")
    assert found["rewards"].value == "chosen +0.1 per nat, rejected +0.1 per nat"
    assert found["empty_half"].status is Status.INAPPLICABLE


def test_the_gap_of_bfloat16_grows_with_beta():
    """Log-probs of -600 nats are rounded to multiples of 4: at beta 1 that is worse than at beta 0.1."""
    gaps = []
    for beta in (0.1, 1.0):
        loss = subject("dpo")
        loss.settings.beta = beta
        found = {one.check: one.value for one in card.card(loss)}
        gaps.append(float(re.search(r"gap ([\d.]+)%", found["bfloat16"])[1]))
    assert 0 < gaps[0] < gaps[1]


#### PLANTED MISTAKES


class FlippedSign(DPOTrainer):
    def loss(self, *logps):
        losses, *rewards = super().loss(*logps)
        return -losses, *rewards


class UndetachedReward(DPOTrainer):
    def loss(self, pc, pr, rc, rr):
        losses, _, rejected_rewards = super().loss(pc, pr, rc, rr)
        return losses, 0.1 * (pc - rc), rejected_rewards


class SumForMean(KTOTrainer):
    """The KL of a half is a sum, so it grows with the batch."""

    def loss(self, pc, pr, rc, rr):
        chosen, rejected = pc - rc, pr - rr
        kl = torch.cat((chosen, rejected)).sum().clamp(min=0)
        losses = torch.cat((1 - torch.sigmoid(0.1 * (chosen - kl)), 1 - torch.sigmoid(0.1 * (kl - rejected))))
        return losses, 0.1 * chosen.detach(), 0.1 * rejected.detach()


class SummedLoss(DPOTrainer):
    """The batch's losses are one number, their sum."""

    def loss(self, *logps):
        losses, *rewards = super().loss(*logps)
        return losses.sum()[None], *rewards


class ZeroByZero(DPOTrainer):
    """IPO with a margin that is divided by its absolute value: 0 / 0 at the start."""

    def loss(self, pc, pr, rc, rr):
        h = (pc - rc) - (pr - rr)
        return (h - 5 * h / h.abs()) ** 2, 0.1 * (pc - rc).detach(), 0.1 * (pr - rr).detach()


class ExchangedHalf(KTOTrainer):
    """The undesirable half is written as the desirable one."""

    def loss(self, pc, pr, rc, rr):
        chosen, rejected = pc - rc, pr - rr
        losses = torch.cat((1 - torch.sigmoid(0.1 * chosen), 1 - torch.sigmoid(0.1 * rejected)))
        return losses, 0.1 * chosen.detach(), 0.1 * rejected.detach()


class ReferenceWithGradient(UnpairedPreferenceTrainer):
    """The old policy of a ratio is the policy itself, and .detach() is missing: nothing is trained."""

    def batch_loss(self, batch):
        old = batch.policy.logps
        ratios = self.split(batch, (batch.policy.logps - old).exp())
        rewards = (part.detach() for part in self.split(batch, batch.policy.logps - batch.reference_logps))
        return Outcome(torch.cat((-ratios[0], ratios[1])), *rewards, *self.split(batch, old))


class NaiveLogSigmoid(DPOTrainer):
    """log of a sigmoid that is 0 at -1e4."""

    def loss(self, pc, pr, rc, rr):
        _, *rewards = super().loss(pc, pr, rc, rr)
        return -torch.log(torch.sigmoid(0.1 * ((pc - rc) - (pr - rr)))), *rewards


class ChangesPolicyInPlace(DPOTrainer):
    def loss(self, pc, pr, rc, rr):
        return super().loss(pc.sub_(rc), pr.sub_(rr), torch.zeros_like(rc), torch.zeros_like(rr))


class ChangesReferenceInPlace(DPOTrainer):
    def loss(self, pc, pr, rc, rr):
        losses, *rewards = super().loss(pc, pr, rc, rr)
        rc.zero_()
        return losses, *rewards


class ChangesBatchInPlace(PairedPreferenceTrainer):
    def batch_loss(self, batch):
        batch.reference_logps.clamp_(min=-2.0)
        chosen, rejected = self.split(batch, 0.1 * (batch.policy.logps - batch.reference_logps))
        logps = self.split(batch, batch.policy.logps)
        return Outcome(-F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach(), *logps)


class MeanOfEmptyHalf(KTOTrainer):
    def loss(self, pc, pr, rc, rr):
        chosen, rejected = pc - rc, pr - rr
        losses = torch.cat(
            (
                1 - torch.sigmoid(0.1 * (chosen - rejected.mean().clamp(min=0))),
                1 - torch.sigmoid(0.1 * (chosen.mean().clamp(min=0) - rejected)),
            )
        )
        return losses, 0.1 * chosen.detach(), 0.1 * rejected.detach()


class StatisticOfOne(DPOTrainer):
    """Margins are divided by their standard deviation, which a batch of one pair does not have."""

    def loss(self, pc, pr, rc, rr):
        h = 0.1 * ((pc - rc) - (pr - rr))
        return -F.logsigmoid(h / (1e-3 + h.std())), 0.1 * (pc - rc).detach(), 0.1 * (pr - rr).detach()


class ForgottenReference(DPOTrainer):
    def loss(self, pc, pr, rc, rr):
        return super().loss(pc, pr, rc, torch.zeros_like(rr))


class UnusedReference(DPOTrainer):
    """SLiC's hinge, whose YAML still asks for a reference model."""

    def loss(self, pc, pr, rc, rr):
        return torch.clamp(10 - pc + pr, min=0), pc.detach(), pr.detach()


class StoppedGradient(DPOTrainer):
    """A pair is weighted by the policy's own confidence, and .detach() is there without a reason."""

    def loss(self, *logps):
        losses, chosen, rejected = super().loss(*logps)
        return losses * losses.detach(), chosen, rejected


class RoundedToFloat32(DPOTrainer):
    def loss(self, *logps):
        return super().loss(*(part.half().float() for part in logps))


class FlippedReward(DPOTrainer):
    def loss(self, *logps):
        losses, chosen, rejected = super().loss(*logps)
        return losses, -chosen, -rejected


class RewardOfRole(DPOTrainer):
    """Chosen rewards have a bonus."""

    def loss(self, *logps):
        losses, chosen, rejected = super().loss(*logps)
        return losses, chosen + 1, rejected


class RunningMeanInLoss(DPOTrainer):
    """A running mean is updated in the loss, which an evaluation calls as well."""

    def loss(self, *logps):
        losses, chosen, rejected = super().loss(*logps)
        self.state.own["mean"] = 0.9 * self.state.own.get("mean", 0.0) + 0.1 * chosen.mean().item()
        return losses, chosen, rejected


class FirstRowIsSpecial(DPOTrainer):
    def loss(self, *logps):
        losses, chosen, rejected = super().loss(*logps)
        return losses * torch.tensor([2.0] + [1.0] * (len(losses) - 1)), chosen, rejected


class OneRole(DPOTrainer):
    """The rejected log-probs are detached."""

    def loss(self, pc, pr, rc, rr):
        return super().loss(pc, pr.detach(), rc, rr)


class MissingScore(PairedPreferenceTrainer):
    def batch_loss(self, batch):
        chosen, rejected = self.split(batch, 0.1 * (batch.policy.logps - batch.reference_logps))
        logps = self.split(batch, batch.policy.logps)
        return Outcome(-F.logsigmoid(chosen - rejected) * batch.margins, chosen.detach(), rejected.detach(), *logps)


class OddsOfCertainty(PairedPreferenceTrainer):
    """Log-odds, log(p / (1 - p)), whose 1 - p is 0 if the policy is certain."""

    def loss(self, pc, pr, rc, rr):
        odds = [part - torch.log1p(-part.exp()) for part in (pc, pr)]
        return -F.logsigmoid(odds[0] - odds[1]), pc.detach(), pr.detach()


class UndefinedMetric(DPOTrainer):
    def batch_loss(self, batch):
        outcome = super().batch_loss(batch)
        return Outcome(**{**vars(outcome), "metrics": {"h/std": outcome.losses[:1].detach().log10() * torch.nan}})


class MismatchedRows(dataloaders.UnpairedPreferenceDataLoader):
    def flatten(self, rng):
        rows = super().flatten(rng)
        return [row.with_unrelated(other) for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]


class UndetachedKL(UnpairedPreferenceTrainer):
    """KTO whose KL of unrelated responses has a gradient, which no forward pass would take."""

    loader = MismatchedRows

    def batch_loss(self, batch):
        logratios = batch.sum_by_response(batch.policy.logps - batch.reference_logps)
        chosen, rejected, unrelated = (batch.of_role(logratios, role) for role in Role)
        kl = unrelated.mean()
        losses = torch.cat((1 - torch.sigmoid(0.1 * (chosen - kl)), 1 - torch.sigmoid(0.1 * (kl - rejected))))
        logps = self.split(batch, batch.policy.logps)
        return Outcome(losses, 0.1 * chosen.detach(), 0.1 * rejected.detach(), *logps)


MISTAKES = {
    FlippedSign: {"signs", "scale"},
    UndetachedReward: {"detached"},
    SumForMean: {"duplicates"},
    SummedLoss: {"duplicates", "shapes"},
    ZeroByZero: {"start"},
    ExchangedHalf: {"signs"},
    ReferenceWithGradient: {"signs"},
    NaiveLogSigmoid: {"extreme"},
    ChangesPolicyInPlace: {"pure"},
    ChangesReferenceInPlace: {"pure"},
    ChangesBatchInPlace: {"pure"},
    MeanOfEmptyHalf: {"empty_half"},
    StatisticOfOne: {"one_example"},
    ForgottenReference: {"shift"},
    UnusedReference: {"shift"},
    StoppedGradient: {"gradcheck"},
    RoundedToFloat32: {"gradcheck"},
    FlippedReward: {"rewards"},
    RewardOfRole: {"swap"},
    RunningMeanInLoss: {"pure"},
    FirstRowIsSpecial: {"order"},
    OneRole: {"signs"},
    MissingScore: {"no_scores"},
    OddsOfCertainty: {"certain"},
    UndefinedMetric: {"metrics"},
    UndetachedKL: {"reach"},
}


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda cls: cls.__name__)
def test_a_planted_mistake_is_caught(mistake):
    """The checks that have to catch it do, and each says what is probably wrong."""
    found = failed(planted(mistake))
    assert MISTAKES[mistake] <= set(found), {name: one.value for name, one in found.items()}
    assert all(found[name].value and found[name].why for name in MISTAKES[mistake])


#### DEPARTURES


class Declared(FlippedSign):
    departures = {"signs": "a joke of the first of April", "scale": "the same"}


class Misspelt(DPOTrainer):
    departures = {"sings": "no check has this name"}


def test_a_declared_departure_is_shown_and_no_failure():
    loss = planted(Declared)
    found = card.card(loss)
    assert not [one for one in found if one.status is Status.FAILED]
    text = terminal.text("joke", loss, found, colors=False)
    assert "declared  signs        chosen +0.05" in text and "Declared says: a joke of the first of April" in text
    assert text.endswith("17 passed, 2 declared, 1 not applicable")


def test_a_departure_from_an_unknown_check_is_refused():
    with pytest.raises(UserError, match="Misspelt.departures has 'sings', which is no check; did you mean 'signs'?"):
        card.card(planted(Misspelt))


def test_what_is_wrong_stands_under_the_check():
    loss = planted(FlippedSign)
    lines = terminal.text("flipped", loss, card.card(loss), colors=False).splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("  FAIL      signs"))
    assert "raising the log-prob of a chosen response raises the loss: a sign is flipped" in lines[row + 1]
    assert lines[:3] == [
        "flipped",
        "  FlippedSign, PairedPreferenceDataLoader, use_reference_model=true beta=0.1 desirable_weight=1.0",
        "  undesirable_weight=1.0",
    ]


#### CURVES


def test_the_curve_of_kto_is_its_value_function():
    """One desirable response alone has a KL of 0: 1 - sigmoid(reward), with the weight beta sigmoid'(reward)."""
    chosen, rejected = sweep.sweep(subject("kto"))
    sigmoid = 1 / (1 + np.exp(-chosen.rewards))
    np.testing.assert_allclose(chosen.losses, 1 - sigmoid, atol=1e-5)
    np.testing.assert_allclose(chosen.weights, 0.1 * sigmoid * (1 - sigmoid), atol=1e-6)
    np.testing.assert_allclose(rejected.losses, 1 / (1 + np.exp(-rejected.rewards)), atol=1e-5)
    assert chosen.rewards[[0, -1]] == pytest.approx([-5, 5], abs=1e-4)


def test_the_curve_of_a_pair_moves_one_response():
    """DPO: softplus(-reward) for the chosen response, whose rejected one stays at 0, and softplus(reward) for it."""
    for curve, sign in zip(sweep.sweep(subject("dpo")), (-1, 1), strict=True):
        np.testing.assert_allclose(curve.losses, np.log1p(np.exp(sign * curve.rewards)), atol=1e-5)


def test_a_response_whose_loss_needs_others_gets_them():
    """PPO's advantages have the mean 0: for one response alone there would be no gradient."""
    for curve in sweep.sweep(subject("ppo")):
        assert curve.at_start(curve.weights) > 0.1


def test_units_of_the_start():
    """In units of the start, every loss is 0 with the slope 1, and every weight is 1."""
    for curve in picture.in_units_of_the_start(sweep.sweep(subject("dpo"))):
        assert curve.at_start(curve.losses) == 0 and curve.at_start(curve.weights) == pytest.approx(1)
        near = np.abs(curve.rewards) < 0.2
        assert abs(np.polyfit(curve.rewards[near], curve.losses[near], 1)[0]) == pytest.approx(1, rel=0.02)


def test_pictures_of_few_and_of_many(tmp_path):
    """A picture of one loss, of a few, and of more than can be told apart in one panel."""
    curves = sweep.sweep(subject("sft"))
    for n in (1, 2, picture.FEW + 1):
        picture.draw(str(tmp_path / f"{n}.png"), {f"loss_{i}": curves for i in range(n)})
        assert (tmp_path / f"{n}.png").stat().st_size > 10_000


#### THE COMMAND


def test_words_become_one_job_per_loss():
    words = command.one_job_per_loss
    assert words(["loss=dpo", "lr=1"]) == ["loss=dpo", "lr=1"]
    assert words(["loss=[dpo,kto]", "lr=1"]) == ["-m", "loss=dpo,kto", "lr=1"]
    assert words(["-m", "loss=[dpo,kto]"]) == ["-m", "loss=dpo,kto"]
    assert words(["loss=[dpo,kto]", "loss.beta=0.3"]) == ["-m", "loss=dpo,kto", "loss.beta=choice(0.3)"]
    assert words(["loss=[dpo]"]) == ["loss=dpo"]
    assert words(["loss=all"]) == ["-m", f"loss={','.join(losses())}"]


def test_exit_code_1_if_a_check_fails(tmp_path, monkeypatch, capsys):
    """The picture is there all the same, and an earlier one has another name."""
    monkeypatch.chdir(tmp_path)
    found = card.card(planted(FlippedSign))
    cards = {"mine": (found, "mine", sweep.sweep(subject("sft")))}
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            command.finish(cards, "")
        assert stop.value.code == 1
    assert sorted(os.listdir("loss_cards")) == ["mine.png", "mine.png.bak-1"]
    assert "the earlier loss_cards/mine.png is now loss_cards/mine.png.bak-1" in capsys.readouterr().out


def test_the_command(tmp_path, monkeypatch, capsys):
    """Two losses with a value of their own: two cards, a line for each, one picture."""
    words = ["loss=[dpo,kto]", "loss.beta=0.3", f"output={tmp_path}/both.png", f"cache_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["loss_card.py", *words])
    command.main()
    printed = capsys.readouterr().out
    assert "signs        chosen -0.15, rejected +0.15 at the start" in printed
    assert re.search(r"^kto loss.beta=0.3  20 passed", printed, re.M) and os.path.exists(tmp_path / "both.png")


def test_mistakes_of_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["loss_card.py", "loss=dpo", "loss.beta=-1", f"cache_dir={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: loss.beta=-1 must be a number above 0\n"
