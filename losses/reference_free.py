"""Losses of preference pairs that need no reference model: log-probs are means over the tokens of a response."""

import torch
import torch.nn.functional as F

from halos import rules
from trainers import PairedPreferenceTrainer


class SimPOTrainer(PairedPreferenceTrainer):
    needs = ("average_log_prob",)
    rules = {"beta": rules.number(above=0), "gamma": rules.number(least=0)}

    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """SimPO, Eq. 6 of https://arxiv.org/abs/2405.14734, on log-probs per token."""
        chosen_rewards = self.config.loss.beta * policy_chosen_logps
        rejected_rewards = self.config.loss.beta * policy_rejected_logps
        losses = -F.logsigmoid(chosen_rewards - rejected_rewards - self.config.loss.gamma)
        return losses, chosen_rewards.detach(), rejected_rewards.detach()


class ORPOTrainer(PairedPreferenceTrainer):
    needs = ("average_log_prob",)
    rules = {"lambda_coef": rules.number(least=0)}

    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """ORPO, Eq. 6 and 7 of https://arxiv.org/abs/2403.07691: the likelihood of the chosen response, and the odds
        ratio of the two responses, all on log-probs per token."""
        margins = log_odds(policy_chosen_logps) - log_odds(policy_rejected_logps)
        losses = -policy_chosen_logps - self.config.loss.lambda_coef * F.logsigmoid(margins)
        return losses, policy_chosen_logps.detach(), policy_rejected_logps.detach()


def log_odds(logps: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of log p. A probability of 1 counts as 1 - 1e-6, since its odds are infinite."""
    logps = logps.clamp(max=-1e-6)
    return logps - torch.log(-torch.expm1(logps))
