"""Losses of preference pairs in which tokens count differently."""

import numpy as np
import torch

from halos import rules
from halos.engine import Batch, Outcome
from halos.packing import moved
from trainers import DPOTrainer


class LDDPOTrainer(DPOTrainer):
    rules = {"alpha": rules.number(least=0, most=1)}

    def batch_loss(self, batch):
        """LD-DPO (https://arxiv.org/abs/2409.06411): DPO on log-probs in which a token of the longer response counts
        alpha, if it comes after as many tokens as the shorter one has. Policy and reference alike."""
        weights = self.weights(batch)
        policy, reference = (self.split(batch, weights * x) for x in (batch.policy.logps, batch.reference_logps))
        losses, *rewards = self.loss(*policy, *reference)
        return Outcome(losses, *rewards, *self.split(batch, batch.policy.logps))

    def weights(self, batch: Batch) -> torch.Tensor:
        """(n_tokens,) 1 within the length that the responses of a pair share, and alpha beyond it."""
        alpha, lengths = self.config.loss.alpha, [example.n_targets for example in batch.examples]
        weights = [np.where(np.arange(n) < min(pair), 1, alpha) for pair in lengths for n in pair]
        return moved(torch.from_numpy(np.concatenate(weights).astype(np.float32)), batch.policy.logps.device)
