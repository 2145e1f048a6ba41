"""The losses: one short class each.

To add a loss, subclass `UnpairedPreferenceTrainer` or `PairedPreferenceTrainer`, define `loss`, and name the class in a
file of `config/loss/`. `loss` sees the whole global batch, in float32. A loss of tokens, lengths, scores or unrelated
responses defines `batch_loss` instead. The loop is in `halos/trainer.py` and the batch in `halos/engine.py`: packing,
sharding and checkpoints cannot change what a loss means.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from halos import advice, rules
from halos.engine import Batch, Outcome, Statistic, joined
from halos.errors import UserError
from halos.trainer import BasicTrainer, wins
from utils import discounted_sums


class UnpairedPreferenceTrainer(BasicTrainer):
    """For losses on single responses that are desirable (chosen) or undesirable (rejected)."""

    data_format = "unpaired"


class PairedPreferenceTrainer(BasicTrainer):
    """For losses on preference pairs: entry i of the chosen vectors and of the rejected ones are one pair."""

    data_format = "paired"

    def accuracy(self, chosen_rewards, rejected_rewards):
        """Share of pairs whose chosen response has the higher reward; ties are half."""
        if len(chosen_rewards) != len(rejected_rewards):
            raise UserError(
                f"{len(chosen_rewards)} chosen and {len(rejected_rewards)} rejected responses are not pairs; override "
                f"accuracy() in {type(self).__name__}"
            )
        return wins(chosen_rewards, rejected_rewards)


class SFTTrainer(BasicTrainer):
    """Supervised finetuning: imitate one response per prompt."""

    data_format = "sft"

    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """Negative log-likelihood, summed over the tokens of each response."""
        rewards = policy_chosen_logps.detach()
        return -policy_chosen_logps, rewards, rewards.new_empty(0)


class DPOTrainer(PairedPreferenceTrainer):
    needs = ("use_reference_model",)
    rules = {"beta": rules.number(above=0)}

    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """DPO, Eq. 7 of https://arxiv.org/abs/2305.18290."""
        chosen_rewards = self.config.loss.beta * (policy_chosen_logps - reference_chosen_logps)
        rejected_rewards = self.config.loss.beta * (policy_rejected_logps - reference_rejected_logps)
        losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
        return losses, chosen_rewards.detach(), rejected_rewards.detach()


class CDPOTrainer(PairedPreferenceTrainer):
    needs = ("use_reference_model",)
    rules = {"beta": rules.number(above=0), "epsilon": rules.number(least=0, most=0.5)}

    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """Conservative DPO: DPO for labels that are flipped with probability epsilon.

        Eq. 3 of https://ericmitchell.ai/cdpo.pdf.
        """
        chosen_rewards = self.config.loss.beta * (policy_chosen_logps - reference_chosen_logps)
        rejected_rewards = self.config.loss.beta * (policy_rejected_logps - reference_rejected_logps)
        margins = chosen_rewards - rejected_rewards
        epsilon = self.config.loss.epsilon
        losses = -(1 - epsilon) * F.logsigmoid(margins) - epsilon * F.logsigmoid(-margins)
        return losses, chosen_rewards.detach(), rejected_rewards.detach()


class SLiCTrainer(PairedPreferenceTrainer):
    rules = {"beta": rules.number(least=0), "lambda_coef": rules.number(least=0)}

    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """SLiC-HF: a hinge on the log-probs of the pair, and the likelihood of the chosen response as regulariser.

        Eq. 1 and 2 of https://arxiv.org/abs/2305.10425, with beta for its delta and lambda_coef for its lambda.
        """
        hinge = torch.clamp(self.config.loss.beta - policy_chosen_logps + policy_rejected_logps, min=0)
        losses = hinge - self.config.loss.lambda_coef * policy_chosen_logps
        return losses, policy_chosen_logps.detach(), policy_rejected_logps.detach()


class WeightedTrainer(UnpairedPreferenceTrainer):
    """For losses with a reference model, and with a weight for each kind of response."""

    needs = ("use_reference_model",)
    rules = {
        "beta": rules.number(above=0),
        "desirable_weight": rules.number(least=0),
        "undesirable_weight": rules.number(least=0),
    }

    def advice(self):
        """Say how many responses of each kind there are, and which weights the KTO paper recommends for that."""
        weights = self.config.loss.desirable_weight, self.config.loss.undesirable_weight
        return [*super().advice(), advice.balance(*self.train_loader.class_counts(), *weights)]


class KTOTrainer(WeightedTrainer):
    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """KTO (https://arxiv.org/abs/2402.01306), with the KL of the other half of the batch as reference point.

        For desirable y:    L = desirable_weight * (1 - sigmoid(beta * (log-ratio(y) - KL_rejected)))
        For undesirable y:  L = undesirable_weight * (1 - sigmoid(beta * (KL_chosen - log-ratio(y))))
        where KL is the mean log-ratio of that half, at least 0, and 0 if that half is empty. Gradients flow through it.
        The weights are lambda_D and lambda_U of Eq. 8.
        """
        beta = self.config.loss.beta
        chosen_logratios = policy_chosen_logps - reference_chosen_logps
        rejected_logratios = policy_rejected_logps - reference_rejected_logps
        # The mean of an empty half is NaN, its sum is 0.
        chosen_KL = (chosen_logratios.sum() / max(1, len(chosen_logratios))).clamp(min=0)
        rejected_KL = (rejected_logratios.sum() / max(1, len(rejected_logratios))).clamp(min=0)
        chosen_losses = 1 - torch.sigmoid(beta * (chosen_logratios - rejected_KL))
        rejected_losses = 1 - torch.sigmoid(beta * (chosen_KL - rejected_logratios))
        losses = torch.cat(
            (self.config.loss.desirable_weight * chosen_losses, self.config.loss.undesirable_weight * rejected_losses)
        )
        return losses, (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach()

    def advice(self):
        lines = super().advice()
        if self.config.model.batch_size == 1:
            lines.append(
                "warning: model.batch_size=1: the other half of each batch, whose KL is KTO's reference point, "
                "is empty, so the KL is always 0; use a larger batch"
            )
        return lines

    def batch_loss(self, batch):
        """Log the mean log-ratio of each half, before it is clamped, and the share of halves that are clamped to 0."""
        outcome = super().batch_loss(batch)
        halves = {"chosen": outcome.chosen_rewards, "rejected": outcome.rejected_rewards}
        kls = {f"kl/{name}": rewards.mean()[None] for name, rewards in halves.items() if len(rewards)}
        kls = {name: kl / self.config.loss.beta for name, kl in kls.items()}
        clamped = torch.cat(list(kls.values())) < 0
        return replace(outcome, metrics={**kls, "clamped/kl": clamped.float()})


#### PPO


@dataclass(frozen=True)
class Episode:
    """Advantages and returns of a batch, the same for all PPO epochs on it. Both: (n_tokens,)."""

    advantages: torch.Tensor  # of mean 0 and variance 1
    returns: torch.Tensor


class PPOTrainer(UnpairedPreferenceTrainer):
    """Offline, off-policy PPO (https://arxiv.org/abs/1707.06347) on the responses of the data instead of samples.

    The last token of a desirable response has the reward +1, that of an undesirable one -1, and the old policy of the
    ratio is the reference model. A batch is trained on `ppo_epochs` times, with an update each. As rewards the log has
    the log-ratio of policy and reference, summed over a response.
    """

    needs = ("use_reference_model", "use_value_head")
    rules = {
        "ppo_epochs": rules.whole(least=1),
        "cliprange": rules.number(above=0, most=1),
        "lam": rules.number(least=0, most=1),
        "gamma": rules.number(least=0, most=1),
        "critic_coef": rules.number(least=0),
        "KL_coef": rules.number(least=0),
        "kl_estimator": rules.choice("k3", "k1"),
    }
    uses_entropy = True
    departures = {"extreme": "the ratio is exp(log-ratio), which float32 holds up to 88 nats for one token"}

    def train_step(self, microbatches):
        """One update per PPO epoch, all over the same advantages and returns. The accumulated microbatches are one
        batch, since advantages are normalised over all of its tokens."""
        examples = joined(microbatches)
        reference_logps, episode = None, None  # the same in all epochs
        for _ in range(self.config.loss.ppo_epochs):
            forward, batch = self.forward(examples, reference_logps)
            reference_logps, episode = batch.reference_logps, episode or self.episode(batch)
            outcome = self.backward(self.clipped_loss(batch, episode), forward, batch)
            self.update([outcome], examples)

    def batch_loss(self, batch):
        return self.clipped_loss(batch, self.episode(batch))

    def total_updates(self):
        return super().total_updates() * self.config.loss.ppo_epochs

    def gradient_limits(self):
        """The critic's gradient has a limit of its own."""
        v_head = self.policy.v_head, self.config.model.v_head_max_grad_norm
        return super().gradient_limits() | {"v_head_grad_norm": v_head}

    @torch.no_grad()
    def episode(self, batch: Batch) -> Episode:
        """Advantages and returns of a batch, from the values of the policy before its first update."""
        lengths, values = batch.lengths[:, None], batch.policy.values
        longest = max(n for example in batch.examples for n in example.n_targets)  # not of `lengths`: no wait for a GPU
        token = torch.arange(longest, device=values.device)
        mask, is_last = token < lengths, token == lengths - 1
        rewards = is_last * torch.where(batch.chosen, 1.0, -1.0)[:, None]
        values = values.new_zeros(mask.shape).masked_scatter(mask, values)
        at = mask.flatten().nonzero_static(size=len(batch.policy.values))[:, 0]  # entries of `mask`, row after row
        advantages, returns = (x.flatten()[at] for x in self.advantages_and_returns(values, rewards))
        advantages = (advantages - advantages.mean()) * torch.rsqrt(advantages.var(correction=0) + 1e-8)
        return Episode(advantages, returns)

    def advantages_and_returns(
        self, values: torch.Tensor, rewards: torch.Tensor
    ) -> tuple[torch.FloatTensor, torch.FloatTensor]:
        """Advantages by GAE (Eq. 16 of https://arxiv.org/abs/1506.02438), and discounted rewards from each token on.

        All: (n_responses, longest response), 0 behind the end of a response, so that nothing comes after it.
        """
        gamma, lam = self.config.loss.gamma, self.config.loss.lam
        deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
        return discounted_sums(deltas, gamma * lam), discounted_sums(rewards, gamma)

    def clipped_loss(self, batch: Batch, episode: Episode) -> Outcome:
        """PPO's clipped objective (Eq. 7 of https://arxiv.org/abs/1707.06347) with a critic and a KL penalty.

        Losses and most metrics: (n_tokens,).
        """
        settings = self.config.loss
        logps, values, entropy = batch.policy[:3]
        logratios = logps - batch.reference_logps
        ratios = logratios.exp()
        unclipped = -episode.advantages * ratios
        clipped = -episode.advantages * ratios.clamp(settings.cliprange, 1 / settings.cliprange)
        policy_losses = torch.maximum(unclipped, clipped)
        critic_losses = 0.5 * (values - episode.returns) ** 2
        # Both estimate the KL divergence of the policy from a reference that wrote the data; k1 can be negative.
        kl = torch.expm1(logratios) - logratios if settings.kl_estimator == "k3" else -logratios
        losses = policy_losses + settings.critic_coef * critic_losses + settings.KL_coef * kl
        rewards = self.split(batch, logratios.detach())
        metrics = {
            "loss/total": losses,
            "loss/policy": policy_losses,
            "loss/critic": critic_losses,
            "loss/entropy": entropy,
            "loss/policykl": kl,
            "loss/seqratio": Statistic(mean_ratio, rewards),
            "clipfrac/policy": (clipped > unclipped).float(),
            "returns/mean": episode.returns,
            "returns/var": Statistic(variance, (episode.returns,)),
            "val/mean": values,
            "val/var": Statistic(variance, (values,)),
            "val/explained_variance": Statistic(explained_variance, (values, episode.returns)),
        }
        return Outcome(losses, *rewards, *self.split(batch, logps), metrics=metrics)


def mean_ratio(*logratios: torch.Tensor) -> torch.Tensor:
    return torch.cat(logratios).double().clamp(max=700).exp().mean()  # a float64 holds e^700, and no e^710


def variance(x: torch.Tensor) -> torch.Tensor:
    return x.var(correction=0)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
    """Share of the returns' variance that the values explain; NaN if the returns are all equal."""
    explained = 1 - variance(returns - values) / variance(returns)
    return torch.where(variance(returns) > 0, explained, float("nan"))
