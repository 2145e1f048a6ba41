"""Losses that imitate responses."""

import torch

from halos import rules
from trainers import UnpairedPreferenceTrainer


class ConditionalSFTTrainer(UnpairedPreferenceTrainer):
    rules = {"chosen_control": rules.text, "rejected_control": rules.text}
    departures = {"signs": "undesirable responses are imitated as well, behind a control text of their own"}

    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """Negative log-likelihood of all responses, each given its prompt and the control text of its kind.

        Conditional training (https://arxiv.org/abs/2302.08582), for two kinds. The loader adds the texts. Rewards are
        the policy's log-probs.
        """
        losses = -torch.cat((policy_chosen_logps, policy_rejected_logps))
        return losses, policy_chosen_logps.detach(), policy_rejected_logps.detach()
