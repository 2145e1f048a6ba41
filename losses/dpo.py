"""DPO's relatives: losses of preference pairs that compare the policy with a reference model.

Most are functions of the two log-ratios of a pair, log(policy / reference) of the chosen and of the rejected response,
in nats: they define `of_logratios`. Those that also use lengths or scores define `of_margins`. `batch` in these
docstrings is the microbatch of all ranks together: with gradient accumulation, AOT sorts each microbatch by itself.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from halos import rules
from halos.engine import Outcome
from halos.tokens import Role
from trainers import DPOTrainer, PairedPreferenceTrainer


class LogRatioTrainer(PairedPreferenceTrainer):
    """For losses of the two log-ratios of a pair. The logged rewards are beta times the log-ratios."""

    needs = ("use_reference_model",)
    rules = {"beta": rules.number(above=0)}

    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        chosen = policy_chosen_logps - reference_chosen_logps
        rejected = policy_rejected_logps - reference_rejected_logps
        beta = self.config.loss.beta
        return self.of_logratios(chosen, rejected), (beta * chosen).detach(), (beta * rejected).detach()

    def of_logratios(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """Return one loss per pair. All: (n_pairs,) float32."""
        raise TypeError(f"{type(self).__name__} has no loss: define of_logratios() in it")


#### FUNCTIONS OF THE MARGIN


class IPOTrainer(LogRatioTrainer):
    def of_logratios(self, chosen, rejected):
        """IPO, Eq. 17 of https://arxiv.org/abs/2310.12036, with beta for its tau."""
        return (chosen - rejected - 1 / (2 * self.config.loss.beta)) ** 2


class HingeDPOTrainer(LogRatioTrainer):
    def of_logratios(self, chosen, rejected):
        """The hinge-norm loss of RSO (https://arxiv.org/abs/2309.06657), with beta for its gamma: SLiC's hinge on
        log-ratios instead of log-probs."""
        return F.relu(1 - self.config.loss.beta * (chosen - rejected))


class RobustDPOTrainer(LogRatioTrainer):
    rules = {"epsilon": rules.number(least=0, most=0.49)}

    def of_logratios(self, chosen, rejected):
        """Robust DPO (https://arxiv.org/abs/2403.00409): an unbiased estimate of DPO's loss under the true labels, if
        each label is flipped with probability epsilon. It is negative for large margins, and has no lower bound."""
        margins = self.config.loss.beta * (chosen - rejected)
        epsilon = self.config.loss.epsilon
        return ((epsilon - 1) * F.logsigmoid(margins) + epsilon * F.logsigmoid(-margins)) / (1 - 2 * epsilon)


class DPOPositiveTrainer(LogRatioTrainer):
    rules = {"lambda_coef": rules.number(least=0)}

    def of_logratios(self, chosen, rejected):
        """DPO-Positive, Eq. 3 of https://arxiv.org/abs/2402.13228: DPO with a penalty on a chosen response that gets
        less likely than it is under the reference model."""
        penalty = self.config.loss.lambda_coef * F.relu(-chosen)
        return -F.logsigmoid(self.config.loss.beta * (chosen - rejected - penalty))


#### FUNCTIONS OF BOTH LOG-RATIOS


class APOZeroTrainer(LogRatioTrainer):
    def of_logratios(self, chosen, rejected):
        """APO-zero, Eq. 7 of https://arxiv.org/abs/2408.06266, plus 1, which makes it positive: the chosen response
        gets more likely and the rejected one less. For chosen responses that are better than the model's own."""
        beta = self.config.loss.beta
        return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


class APODownTrainer(LogRatioTrainer):
    departures = {"signs": "where policy equals reference, its two terms cancel for the chosen response"}

    def of_logratios(self, chosen, rejected):
        """APO-down, Eq. 8 of https://arxiv.org/abs/2408.06266, plus 1, which makes it positive: both responses get less
        likely, the rejected one more so. For chosen responses that are worse than the model's own."""
        beta = self.config.loss.beta
        return 1 + torch.sigmoid(beta * chosen) - torch.sigmoid(beta * (chosen - rejected))


class NCATrainer(LogRatioTrainer):
    def of_logratios(self, chosen, rejected):
        """NCA (https://arxiv.org/abs/2402.05369) for preference pairs: K = 2 responses, of which one is preferred."""
        chosen, rejected = self.config.loss.beta * chosen, self.config.loss.beta * rejected
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


class SPPOTrainer(LogRatioTrainer):
    def of_logratios(self, chosen, rejected):
        """SPPO, Eq. 4.7 of https://arxiv.org/abs/2405.00675, with 1 / beta for its eta, and a probability of winning of
        1 for the chosen response and 0 for the rejected one. So the log-ratios have the targets +-1 / (2 beta)."""
        target = 1 / (2 * self.config.loss.beta)
        return (chosen - target) ** 2 + (rejected + target) ** 2


class CalDPOTrainer(SPPOTrainer):
    def of_logratios(self, chosen, rejected):
        """Cal-DPO, Eq. 10 of https://arxiv.org/abs/2412.14516: DPO's loss with a beta of 1, and squares that calibrate
        the log-ratios. These are SPPO's."""
        return -F.logsigmoid(chosen - rejected) + super().of_logratios(chosen, rejected)


#### DPO ON OTHER VECTORS


class FDPOTrainer(DPOTrainer):
    """DPO's reward is beta times the logarithm of u = policy / reference. Here it is beta times f'(u)."""

    rules = {
        "divergence": rules.choice("reverse_kl", "forward_kl", "jensen_shannon", "alpha"),
        "alpha": rules.number(above=0, most=1),
    }

    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """f-DPO, Theorem 1 and Table 1 of https://arxiv.org/abs/2309.16240."""
        chosen = self.derivative(policy_chosen_logps - reference_chosen_logps)
        rejected = self.derivative(policy_rejected_logps - reference_rejected_logps)
        return super().loss(chosen, rejected, 0.0, 0.0)

    def derivative(self, logratios: torch.Tensor) -> torch.Tensor:
        """Return f'(u) for log u, up to a constant, so that it is 0 for u = 1. Both: (n_pairs,).

        reverse_kl: log u; forward_kl: 1 - 1 / u; jensen_shannon: log(2u / (1 + u)); alpha: (1 - u^-alpha) / alpha
        """
        divergence = self.config.loss.divergence
        if divergence == "reverse_kl":
            return logratios
        if divergence == "jensen_shannon":
            return math.log(2) + F.logsigmoid(logratios)
        alpha = 1.0 if divergence == "forward_kl" else self.config.loss.alpha
        # Squares of e^40 are finite in a gradient's norm; those of e^80 are not.
        return -torch.expm1((-alpha * logratios).clamp(max=40)) / alpha


class AOTTrainer(DPOTrainer):
    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """AOT for pairs (https://arxiv.org/abs/2406.05882): the margins of the policy, as a distribution over the
        batch, are to exceed those of the reference model. So quantiles are compared, and not pairs."""
        policy = (policy_chosen_logps - policy_rejected_logps).sort().values
        reference = (reference_chosen_logps - reference_rejected_logps).sort().values
        _, *rewards = super().loss(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
        )
        return -F.logsigmoid(self.config.loss.beta * (policy - reference)), *rewards


class UnpairedAOTTrainer(LogRatioTrainer):
    def of_logratios(self, chosen, rejected):
        """AOT for unpaired responses (https://arxiv.org/abs/2406.05882): the log-ratios of the chosen responses, as a
        distribution over the batch, are to exceed those of the rejected ones."""
        return -F.logsigmoid(self.config.loss.beta * (chosen.sort().values - rejected.sort().values))


class RPOTrainer(DPOTrainer):
    rules = {"alpha": rules.number(least=0)}

    def batch_loss(self, batch):
        """RPO, Eq. 1 of https://arxiv.org/abs/2404.19733: DPO, and the negative log-likelihood per token of the chosen
        response. Here alpha is the weight of the likelihood; the paper's is that of DPO, and 1 as well."""
        outcome = super().batch_loss(batch)
        logps = batch.sum_by_response(batch.policy.logps) / batch.lengths
        nll = -batch.of_role(logps, Role.CHOSEN)
        return replace(outcome, losses=outcome.losses + self.config.loss.alpha * nll, metrics={"nll/chosen": nll})


#### MARGINS, AND WHAT THE DATA KNOW OF A PAIR


class MarginTrainer(PairedPreferenceTrainer):
    """For losses of the margin between the two rewards of a pair (as in DPO), and of its lengths or scores."""

    needs = ("use_reference_model",)
    rules = {"beta": rules.number(above=0)}

    def batch_loss(self, batch):
        rewards = self.split(batch, self.config.loss.beta * (batch.policy.logps - batch.reference_logps))
        chosen, rejected = rewards
        losses = self.of_margins(chosen - rejected, batch)
        return Outcome(losses, chosen.detach(), rejected.detach(), *self.split(batch, batch.policy.logps))

    def of_margins(self, margins: torch.Tensor, batch) -> torch.Tensor:
        """Return one loss per pair. margins: (n_pairs,), beta times the difference of the log-ratios."""
        raise TypeError(f"{type(self).__name__} has no loss: define of_margins() in it")


class RDPOTrainer(MarginTrainer):
    rules = {"alpha": rules.number(least=0)}

    def of_margins(self, margins, batch):
        """R-DPO, Eq. 9 of https://arxiv.org/abs/2403.19159. The sign is plus: a chosen response that is longer has to
        win by less, so that length is not learned as a merit."""
        longer = batch.of_role(batch.lengths, Role.CHOSEN) - batch.of_role(batch.lengths, Role.REJECTED)
        return -F.logsigmoid(margins + self.config.loss.alpha * longer)


class MarginDPOTrainer(MarginTrainer):
    rules = {"scale": rules.number(above=0)}

    def of_margins(self, margins, batch):
        """DPO in which a pair weighs as much as its scores differ (reward difference optimization,
        https://arxiv.org/abs/2408.09385). A pair whose scores contradict its label weighs nothing."""
        weights = (batch.margins / self.config.loss.scale).clamp(min=0)
        return -weights * F.logsigmoid(margins)


class ScoreDPOTrainer(MarginTrainer):
    rules = {"temperature": rules.number(above=0)}

    def of_margins(self, margins, batch):
        """InfoNCA (https://arxiv.org/abs/2402.05369) for two responses: each is as right as the softmax of the scores
        says. These labels make equal scores pull the two rewards together."""
        labels = torch.sigmoid(batch.margins / self.config.loss.temperature)
        return -labels * F.logsigmoid(margins) - (1 - labels) * F.logsigmoid(-margins)
