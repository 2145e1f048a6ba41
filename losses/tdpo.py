"""Token-level DPO: pairs, and the KL divergence of policy and reference at each of their tokens."""

import torch.nn.functional as F

from halos import rules
from halos.engine import Outcome
from trainers import PairedPreferenceTrainer


class TDPOTrainer(PairedPreferenceTrainer):
    needs = ("use_reference_model",)
    rules = {"beta": rules.number(above=0), "alpha": rules.number(least=0), "detach_chosen_kl": rules.flag}
    uses_reference_kl = True

    def batch_loss(self, batch):
        """TDPO2 (https://arxiv.org/abs/2404.11999); TDPO1 with alpha 1 and without detach_chosen_kl.

        L = -log sigmoid(beta * (log-ratio margin - alpha * (KL_rejected - KL_chosen))), where KL sums
        KL(reference || policy) over the positions of a response. Rewards are beta * (log-ratio + KL).
        """
        beta, alpha = self.config.loss.beta, self.config.loss.alpha
        chosen, rejected = self.split(batch, batch.policy.logps - batch.reference_logps)
        chosen_kl, rejected_kl = self.split(batch, batch.policy.kl)
        rewards = [(beta * (ratio + kl)).detach() for ratio, kl in ((chosen, chosen_kl), (rejected, rejected_kl))]
        metrics = {"kl/chosen": chosen_kl, "kl/rejected": rejected_kl}
        chosen_kl = chosen_kl.detach() if self.config.loss.detach_chosen_kl else chosen_kl
        losses = -F.logsigmoid(beta * (chosen - rejected - alpha * (rejected_kl - chosen_kl)))
        return Outcome(losses, *rewards, *self.split(batch, batch.policy.logps), metrics=metrics)
