"""The losses, and the loop around them.

To add a loss, subclass `UnpairedPreferenceTrainer` or `PairedPreferenceTrainer`, define `loss`, and name the class in a
file of `config/loss/`. `loss` sees the whole global batch, in float32, on every rank; packing, sharding, and
checkpoints are in `halos/` and cannot change what it means.
"""

import json
import math
import os
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf

from dataloaders import DataLoader
from halos import checkpoint, distributed, metrics, sharding
from halos.errors import UserError
from halos.models import PolicyModel
from halos.packing import split_by_tokens
from halos.tokens import TokenizedExample


class Outcome(NamedTuple):
    """What the loss said of one batch: vectors over the global batch, detached."""

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor


class BasicTrainer:
    """The loop, evaluation, logging, and saving. A subclass defines `loss`."""

    data_format: str | None = None  # the DataLoader.data_format that the loss needs; None: any

    def __init__(
        self,
        policy: PolicyModel,
        reference_model: PolicyModel | None,
        tokenizer,
        config: DictConfig,
        train_loader: DataLoader | None,
        eval_loader: DataLoader,
        run_dir: str,
    ):
        self.policy = policy
        self.reference_model = reference_model
        self.tokenizer = tokenizer
        self.config = config
        self.train_loader = train_loader
        self.eval_loader = eval_loader
        self.run_dir = run_dir
        self.updates = 0
        self.examples = 0
        self.eval_metrics: dict[str, float] = {}

    #### THE LOSS

    def loss(
        self,
        policy_chosen_logps: torch.FloatTensor,
        policy_rejected_logps: torch.FloatTensor,
        reference_chosen_logps: torch.FloatTensor | None,
        reference_rejected_logps: torch.FloatTensor | None,
    ) -> tuple[torch.FloatTensor, torch.FloatTensor, torch.FloatTensor]:
        """(losses, chosen_rewards, rejected_rewards) of the global batch; `losses.mean()` is optimised.

        All arguments: float32, (n_chosen,) or (n_rejected,); either may be empty. The reference's are None when
        `use_reference_model: false`. Uses these and `self.config.loss`, nothing else.
        """
        raise TypeError(f"{type(self).__name__} has no loss: define loss() in it")

    def accuracy(self, chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
        """Share of (chosen, rejected) combinations in which the chosen response has the higher reward."""
        return (chosen_rewards[:, None] > rejected_rewards[None, :]).float().mean()

    #### FORWARD AND BACKWARD

    def sequence_logps(self, model: PolicyModel, examples: list[TokenizedExample]) -> torch.Tensor:
        """(n_responses,) float32 log-probs: summed over tokens, or averaged if the loss's YAML says so."""
        inputs = model.inputs(examples)
        logps = inputs.sum_by_row(model(inputs))
        return logps / inputs.tokens_by_row() if self.config.loss.get("average_log_prob", False) else logps

    @torch.no_grad()
    def frozen_logps(self, model: PolicyModel | None, batch: list[TokenizedExample]) -> torch.Tensor | None:
        """`sequence_logps` of a whole batch without gradient, forward by forward; None without a model."""
        if model is None:
            return None
        return torch.cat([self.sequence_logps(model, [batch[i] for i in run]) for run in self.forwards(batch)])

    def forwards(self, batch: list[TokenizedExample]) -> list[list[int]]:
        """The batch in runs that fit one forward."""
        return split_by_tokens(batch, self.config.model.max_tokens_per_forward)

    def outcome(self, policy_logps: torch.Tensor, batch: list[TokenizedExample]) -> Outcome:
        """Split the batch's log-probs into chosen and rejected, and apply the loss."""
        chosen = torch.tensor([flag for example in batch for flag in example.chosen], device=policy_logps.device)
        reference_logps = self.frozen_logps(self.reference_model, batch)
        reference = (None, None) if reference_logps is None else (reference_logps[chosen], reference_logps[~chosen])
        logps = (policy_logps[chosen], policy_logps[~chosen])
        return Outcome(*self.loss(*logps, *reference), *(part.detach() for part in logps))

    def forward_backward(self, batch: list[TokenizedExample]) -> Outcome:
        """Add the gradient of the summed losses of a batch; `update` divides by their number.

        The loss is computed on the vector of all log-probs as an autograd leaf, whose gradient is then sent through
        the model. One forward keeps its graph. Several run first without, then one by one again with it, so that
        memory is bounded by one forward, and the loss is still that of the whole batch.
        """
        runs = self.forwards(batch)
        kept = self.sequence_logps(self.policy, batch) if len(runs) == 1 else None
        values = kept.detach() if kept is not None else self.frozen_logps(self.policy, batch)
        leaf = values.requires_grad_()
        outcome = self.outcome(leaf, batch)
        self.check_finite(outcome.losses, "loss", batch)
        outcome.losses.sum().backward()
        if kept is not None:
            kept.backward(leaf.grad)
            return Outcome(*(part.detach() for part in outcome))
        upstream = iter(leaf.grad.split([sum(len(batch[i].responses) for i in run) for run in runs]))
        for run in runs:
            self.sequence_logps(self.policy, [batch[i] for i in run]).backward(next(upstream))
        return Outcome(*(part.detach() for part in outcome))

    #### TRAINING

    def train(self) -> None:
        """Train to the end of the loader, evaluating and saving as configured."""
        self.start_training()
        try:
            if self.config.do_first_eval:
                self.log_evaluation()
            for batch in self.train_loader:
                self.train_step(batch)
                if self.eval_is_due():
                    self.log_evaluation()
                    self.save()
            if self.pending:
                self.update()
            if self.evaluated_at < self.examples:
                self.log_evaluation()
                self.save()
        finally:
            self.log.close()

    def start_training(self) -> None:
        self.optimizer = self.make_optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.lr_factor)
        self.log = self.make_log(self.train_loader.total_examples)
        self.policy.train()
        self.pending: list[tuple[list[TokenizedExample], Outcome]] = []
        self.step_started = time.monotonic()
        self.evaluated_at = 0

    def train_step(self, batch: list[TokenizedExample]) -> None:
        """Forward and backward of a microbatch, and an update when the accumulation is complete."""
        self.pending.append((batch, self.forward_backward(batch)))
        if len(self.pending) == self.config.model.gradient_accumulation_steps:
            self.update()

    def update(self) -> None:
        """Clip (raising before the weights change if the gradient is not finite), step, schedule, zero, log."""
        batches, outcomes = zip(*self.pending, strict=True)
        n_losses = sum(len(outcome.losses) for outcome in outcomes)
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        torch._foreach_div_([p.grad for p in parameters], n_losses)  # the sum of losses becomes their mean
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.model.max_grad_norm)
        grad_norm = distributed.whole(grad_norm)
        self.check_finite(grad_norm, "gradient", [example for batch in batches for example in batch])
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        self.examples += sum(map(len, batches))
        self.pending = []
        self.log_step(batches, outcomes, {"grad_norm": grad_norm.item(), "lr": lr})

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The configured class of torch.optim; weight decay spares vectors (norms and biases)."""
        kwargs = OmegaConf.to_container(self.config.optimizer_kwargs)
        matrices = [p for p in self.policy.parameters() if p.requires_grad and p.ndim > 1]
        vectors = [p for p in self.policy.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return getattr(torch.optim, self.config.optimizer)(groups, lr=self.config.lr, **kwargs)

    def lr_factor(self, update: int) -> float:
        """Of the peak learning rate: linear warm-up, then constant, or cosine or linear down to 0."""
        warmup = self.config.warmup_steps
        if update < warmup:
            return (update + 1) / (warmup + 1)
        total = -(-len(self.train_loader) // self.config.model.gradient_accumulation_steps)
        progress = min(1.0, (update - warmup) / max(1, total - warmup))
        return {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[self.config.lr_scheduler]

    def check_finite(self, values: torch.Tensor, what: str, batch: list[TokenizedExample]) -> None:
        """Stop before a value that is not finite reaches the weights: save what there is, say which examples."""
        if torch.isfinite(values).all():
            return
        path = os.path.join(self.run_dir, "not_finite.json")
        texts = [
            {
                "prompt": self.tokenizer.decode(example.prompt),
                "responses": [self.tokenizer.decode(response) for response in example.responses],
            }
            for example in batch
        ]
        with open(path, "w") as file:
            json.dump(texts, file, indent=1)
        self.save()
        raise UserError(
            f"the {what} is not finite after {self.updates} updates; no weight has been changed by it, the weights "
            f"before are in LATEST, and the {len(batch)} examples of this update in {path}; lower lr or look at them"
        )

    #### EVALUATION

    def eval_is_due(self) -> bool:
        """Whether a multiple of eval_every has been passed since the last time, and an update is complete."""
        every = self.config.eval_every
        return not self.pending and self.examples // every > self.evaluated_at // every

    def evaluate(self) -> dict[str, float]:
        """The closed-form metrics over the test examples."""
        self.policy.eval()
        self.eval_loader.restart()
        started = time.monotonic()
        outcomes = []
        with torch.no_grad():
            for batch in metrics.progress(self.eval_loader, "evaluating"):
                outcomes.append(self.outcome(self.frozen_logps(self.policy, batch), batch))
        self.policy.train()
        sharding.reshard(self.policy)
        seconds = time.monotonic() - started
        return self.summarize(outcomes, "eval") | {"examples_per_second": self.eval_loader.examples_seen / seconds}

    def log_evaluation(self) -> None:
        self.eval_metrics = self.evaluate()
        self.evaluated_at = self.examples
        self.log.evaluation(self.updates, self.examples, self.eval_metrics)
        self.step_started = time.monotonic()

    #### METRICS

    def summarize(self, outcomes: list[Outcome], mode: str) -> dict[str, float]:
        """Means over all examples of all outcomes, under the names that every loss shares."""
        whole = Outcome(*(torch.cat(parts) for parts in zip(*outcomes, strict=True)))
        values = {f"loss/{mode}": whole.losses.mean()}
        for side in ("chosen", "rejected"):
            rewards, logps = getattr(whole, f"{side}_rewards"), getattr(whole, f"{side}_logps")
            if len(logps):
                values[f"rewards_{mode}/{side}"] = rewards.mean()
                values[f"logps_{mode}/{side}"] = logps.mean()
        if len(whole.chosen_logps) and len(whole.rejected_logps):
            values[f"rewards_{mode}/accuracies"] = self.accuracy(whole.chosen_rewards, whole.rejected_rewards)
            values[f"rewards_{mode}/margins"] = whole.chosen_rewards.mean() - whole.rejected_rewards.mean()
        return {name: value.item() for name, value in values.items()}

    def log_step(self, batches: list, outcomes: list[Outcome], update: dict[str, float]) -> None:
        now = time.monotonic()
        seconds, self.step_started = now - self.step_started, now
        n_tokens = sum(example.n_tokens for batch in batches for example in batch)
        values = {
            **self.summarize(outcomes, "train"),
            **update,
            "examples_per_second": sum(map(len, batches)) / seconds,
            "counters/examples": self.examples,
            "counters/updates": self.updates,
        }
        self.log.training_step(self.updates, self.examples, values, n_tokens / seconds)

    def make_log(self, total_examples: int) -> metrics.MetricsLog:
        settings = OmegaConf.to_container(self.config, resolve=True)
        sink = metrics.open_wandb(self.config.wandb, self.run_dir, self.config.exp_name, settings)
        return metrics.MetricsLog(self.run_dir, total_examples, self.config.minimum_log_interval_secs, sink)

    #### SAVING

    def save(self) -> None:
        """LATEST, step-N beside it if configured, and the curves."""
        names = ["LATEST"]
        if self.config.intermediate_checkpoints and self.updates:
            names.append(f"step-{self.updates}")
        checkpoint.save(
            [os.path.join(self.run_dir, name) for name in names],
            self.policy.lm,
            self.tokenizer,
            self.config,
            step=self.updates,
            metrics=self.eval_metrics,
            export_dtype=self.policy.export_dtype,
        )
        metrics.draw_curves(self.run_dir, self.config.exp_name)


class SFTTrainer(BasicTrainer):
    """Supervised finetuning: imitate one response per prompt."""

    data_format = "sft"

    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """Negative log-likelihood, summed over the tokens of each response."""
        rewards = policy_chosen_logps.detach()
        return -policy_chosen_logps, rewards, rewards.new_empty(0)


class UnpairedPreferenceTrainer(BasicTrainer):
    """For losses on single responses that are desirable (chosen) or undesirable (rejected)."""

    data_format = "unpaired"


class PairedPreferenceTrainer(BasicTrainer):
    """For losses on preference pairs: entry i of the chosen vectors and of the rejected ones are one pair."""

    data_format = "paired"

    def accuracy(self, chosen_rewards, rejected_rewards):
        """Share of pairs whose chosen response has the higher reward."""
        return (chosen_rewards > rejected_rewards).float().mean()


class DPOTrainer(PairedPreferenceTrainer):
    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """DPO, Eq. 7 of https://arxiv.org/abs/2305.18290."""
        chosen_rewards = self.config.loss.beta * (policy_chosen_logps - reference_chosen_logps)
        rejected_rewards = self.config.loss.beta * (policy_rejected_logps - reference_rejected_logps)
        losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
        return losses, chosen_rewards.detach(), rejected_rewards.detach()


class CDPOTrainer(PairedPreferenceTrainer):
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
    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """SLiC-HF: a hinge on the log-probs of the pair, and the likelihood of the chosen response as regulariser.

        Eq. 1 and 2 of https://arxiv.org/abs/2305.10425, with beta for its delta and lambda_coef for its lambda.
        """
        hinge = torch.clamp(self.config.loss.beta - policy_chosen_logps + policy_rejected_logps, min=0)
        losses = hinge - self.config.loss.lambda_coef * policy_chosen_logps
        return losses, policy_chosen_logps.detach(), policy_rejected_logps.detach()


class KTOTrainer(UnpairedPreferenceTrainer):
    def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        """KTO (https://arxiv.org/abs/2402.01306), with the KL of the other half of the batch as reference point.

        For desirable y:    L = 1 - sigmoid(beta * (log-ratio(y) - KL_rejected))
        For undesirable y:  L = 1 - sigmoid(beta * (KL_chosen - log-ratio(y)))
        where KL is the mean log-ratio of that half, at least 0, and 0 if that half is empty. Gradients flow through it.
        """
        beta = self.config.loss.beta
        chosen_logratios = policy_chosen_logps - reference_chosen_logps
        rejected_logratios = policy_rejected_logps - reference_rejected_logps
        # The mean of an empty half is NaN, its sum is 0.
        chosen_KL = (chosen_logratios.sum() / max(1, len(chosen_logratios))).clamp(min=0)
        rejected_KL = (rejected_logratios.sum() / max(1, len(rejected_logratios))).clamp(min=0)
        chosen_losses = 1 - torch.sigmoid(beta * (chosen_logratios - rejected_KL))
        rejected_losses = 1 - torch.sigmoid(beta * (chosen_KL - rejected_logratios))
        losses = torch.cat((chosen_losses, rejected_losses))
        return losses, (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach()
