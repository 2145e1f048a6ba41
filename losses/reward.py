"""The reward model: a score of a whole conversation, learned from pairs (docs/reward_model.md)."""

import torch
import torch.nn.functional as F

from halos import rules
from halos.engine import Outcome
from halos.tokens import Role
from trainers import PairedPreferenceTrainer


class RewardTrainer(PairedPreferenceTrainer):
    """A Bradley-Terry reward model. Its rewards are the scores at the last tokens of the responses."""

    needs = ("use_reward_head",)
    rules = {"margin": rules.number(least=0), "centering": rules.number(least=0)}

    def batch_loss(self, batch):
        """The loss of https://arxiv.org/abs/2009.01325, section 3.4, with the margin of Eq. 2 of
        https://arxiv.org/abs/2307.09288 and the centering of https://arxiv.org/abs/2312.09244.

        L = -log sigmoid(r(chosen) - r(rejected) - margin * d) + centering * (r(chosen) + r(rejected))^2

        d is by how much the data scores the chosen response higher; 0 for a pair without scores.
        """
        scores = batch.at_last_token(batch.policy.values)
        chosen, rejected = (batch.of_role(scores, role) for role in (Role.CHOSEN, Role.REJECTED))
        margins = self.config.loss.margin * batch.margins.nan_to_num(0)
        losses = -F.logsigmoid(chosen - rejected - margins)
        losses = losses + self.config.loss.centering * (chosen + rejected) ** 2
        none = torch.empty(0, device=losses.device)  # a reward model has no log-probs
        return Outcome(losses, chosen.detach(), rejected.detach(), none, none)

    def gradient_limits(self):
        """The language model and its head are one model, whose gradient has one limit."""
        return {"grad_norm": (self.policy, self.config.model.max_grad_norm)}
