"""Losses of single responses that are desirable (chosen) or undesirable (rejected)."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from halos import rules
from halos.engine import Outcome
from halos.tokens import Role
from trainers import UnpairedPreferenceTrainer, WeightedTrainer


class MismatchedKTOTrainer(WeightedTrainer):
    def batch_loss(self, batch):
        """KTO as published, Eq. 8 of https://arxiv.org/abs/2402.01306.

        For desirable y:    L = desirable_weight * (1 - sigmoid(beta * (log-ratio(y) - KL)))
        For undesirable y:  L = undesirable_weight * (1 - sigmoid(beta * (KL - log-ratio(y))))
        where KL is the mean log-ratio of responses to other prompts, at least 0, without gradient; 0 if there are none.
        """
        beta, logratios = self.config.loss.beta, batch.sum_by_response(batch.policy.logps - batch.reference_logps)
        chosen, rejected, unrelated = (batch.of_role(logratios, role) for role in Role)
        raw = unrelated.detach().sum() / max(1, len(unrelated))  # the mean of nothing is NaN
        kl = raw.clamp(min=0)
        chosen_losses = self.config.loss.desirable_weight * (1 - torch.sigmoid(beta * (chosen - kl)))
        rejected_losses = self.config.loss.undesirable_weight * (1 - torch.sigmoid(beta * (kl - rejected)))
        losses = torch.cat((chosen_losses, rejected_losses))
        metrics = {"kl/unrelated": unrelated, "clamped/kl": (raw < 0)[None]}
        logps = self.split(batch, batch.policy.logps)
        return Outcome(losses, beta * chosen.detach(), beta * rejected.detach(), *logps, metrics=metrics)


class APOZeroUnpairedTrainer(WeightedTrainer):
    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """APO-zero for single responses: desirable ones become likelier than under the reference, others less likely.

        The two terms of APO-zero (Eq. 7 of https://arxiv.org/abs/2408.06266), each for responses of its kind. It is KTO
        with a KL of 0.
        """
        chosen_rewards = self.config.loss.beta * (policy_chosen_logps - reference_chosen_logps)
        rejected_rewards = self.config.loss.beta * (policy_rejected_logps - reference_rejected_logps)
        chosen_losses = self.config.loss.desirable_weight * (1 - torch.sigmoid(chosen_rewards))
        rejected_losses = self.config.loss.undesirable_weight * torch.sigmoid(rejected_rewards)
        losses = torch.cat((chosen_losses, rejected_losses))
        return losses, chosen_rewards.detach(), rejected_rewards.detach()


class BCOTrainer(UnpairedPreferenceTrainer):
    """Binary classifier optimization. `state.own["rewards"]` has the number and the mean of all rewards of training."""

    needs = ("use_reference_model",)
    rules = {"beta": rules.number(above=0)}
    departures = {"gradcheck": "the shift delta is a mean of rewards without their gradient"}

    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """BCO (https://arxiv.org/abs/2404.04656): binary cross-entropy of rewards that are shifted by delta.

        For desirable y:    L = -log sigmoid(reward(y) - delta)
        For undesirable y:  L = -log sigmoid(delta - reward(y))
        """
        chosen_rewards = self.config.loss.beta * (policy_chosen_logps - reference_chosen_logps)
        rejected_rewards = self.config.loss.beta * (policy_rejected_logps - reference_rejected_logps)
        delta = self.delta(chosen_rewards.detach(), rejected_rewards.detach())
        losses = -torch.cat((F.logsigmoid(chosen_rewards - delta), F.logsigmoid(delta - rejected_rewards)))
        return losses, chosen_rewards.detach(), rejected_rewards.detach()

    def batch_loss(self, batch):
        outcome = super().batch_loss(batch)
        delta = self.delta(outcome.chosen_rewards, outcome.rejected_rewards)
        return replace(outcome, metrics={"shift/delta": delta[None]})

    def delta(self, chosen_rewards, rejected_rewards):
        """The shift: a scalar, the mean of the rewards of all training so far and of this batch.

        In evaluation it is that of training so far; before any training, and without a state, that of the batch.
        """
        n, mean = self.rewards_so_far()
        rewards = torch.cat((chosen_rewards, rejected_rewards)).double()
        if n and not torch.is_grad_enabled():
            return torch.as_tensor(mean, device=rewards.device).float()
        return ((n * mean + rewards.sum()) / (n + len(rewards))).float()

    def rewards_so_far(self) -> tuple[int, torch.Tensor | float]:
        """The number of rewards of all updates, and their mean, which stays on the device: no update waits for it."""
        return self.state.own.get("rewards", (0, 0.0)) if hasattr(self, "state") else (0, 0.0)

    def update(self, outcomes, examples):
        """Take the rewards of this update into the mean, unless the update is skipped."""
        n, mean = self.rewards_so_far()
        rewards = torch.cat([part for one in outcomes for part in (one.chosen_rewards, one.rejected_rewards)]).double()
        total = n + len(rewards)
        mean = mean + (rewards.sum() - len(rewards) * mean) / total
        super().update(outcomes, examples)
        self.state.own["rewards"] = total, mean
