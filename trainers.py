"""The losses, and the loop around them.

To add a loss, subclass `UnpairedPreferenceTrainer` or `PairedPreferenceTrainer`, define `loss`, and name the class in a
file of `config/loss/`. `loss` sees the whole global batch, in float32, on every rank; packing, sharding, and
checkpoints are in `halos/` and cannot change what it means.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf

from dataloaders import DataLoader
from halos import checkpoint, distributed, metrics, sharding
from halos.errors import UserError
from halos.models import PolicyModel
from halos.packing import schedule
from halos.tokens import TokenizedExample
from utils import discounted_sums

DUMMY = TokenizedExample(np.zeros(1, np.int32), (np.zeros(1, np.int32),), (True,))  # for a forward without examples


@dataclass(frozen=True)
class Outcome:
    """What the loss said of one batch: vectors over the global batch."""

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor

    def detach(self) -> Self:
        return type(self)(*(getattr(self, field.name).detach() for field in fields(self)))

    @classmethod
    def concatenate(cls, outcomes: list[Self]) -> Self:
        return cls(*(torch.cat([getattr(outcome, field.name) for outcome in outcomes]) for field in fields(cls)))


class BasicTrainer:
    """The loop, evaluation, logging, and saving. A subclass defines `loss`."""

    data_format: str | None = None  # the DataLoader.data_format that the loss needs; None: any
    needs: tuple[str, ...] = ()  # keys of the loss's YAML that cannot be false

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

    def token_logps(self, model: PolicyModel, examples: list[TokenizedExample]) -> torch.Tensor:
        """(n_tokens,) float32 log-probs of the response tokens, response after response."""
        return model(model.inputs(examples)).logps

    def sequence_logps(self, token_logps: torch.Tensor, batch: list[TokenizedExample]) -> torch.Tensor:
        """(n_tokens,) -> (n_responses,): summed over tokens, or averaged if the loss's YAML says so."""
        lengths = torch.tensor([len(r) for example in batch for r in example.responses], device=token_logps.device)
        rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        sums = token_logps.new_zeros(len(lengths)).index_add(0, rows, token_logps)
        return sums / lengths if self.config.loss.get("average_log_prob", False) else sums

    def forwards(self, batch: list[TokenizedExample]) -> list[tuple[list[TokenizedExample], torch.Tensor]]:
        """This process's forwards over its share of a batch: the examples of each, and which of the batch's tokens
        are theirs.

        Every process has as many; one that has fewer examples runs a dummy instead, of whose tokens it keeps none.
        """
        limit = self.config.model.max_tokens_per_forward
        runs = schedule(batch, distributed.world_size(), limit)[distributed.rank()]
        lengths = torch.tensor([sum(map(len, example.responses)) for example in batch])
        tokens = torch.arange(int(lengths.sum()), device=self.policy.device).split(lengths.tolist())
        none = tokens[0][:0]
        return [([batch[i] for i in run] or [DUMMY], torch.cat([none, *(tokens[i] for i in run)])) for run in runs]

    @torch.no_grad()
    def frozen(self, forward: Callable, model: PolicyModel, batch: list[TokenizedExample]) -> torch.Tensor:
        """`forward(model, examples)` of the whole batch without gradient: its rows for all tokens of the batch.

        forward: (model, examples) -> a row per response token, such as `token_logps`
        """
        forwards = self.forwards(batch)
        return self.gather([forward(model, examples) for examples, _ in forwards], forwards, batch)

    def gather(self, parts: list[torch.Tensor], forwards: list, batch: list[TokenizedExample]) -> torch.Tensor:
        rows = [rows for _, rows in forwards]
        n_tokens = sum(len(response) for example in batch for response in example.responses)
        parts = [part[: len(own)] for part, own in zip(parts, rows, strict=True)]
        return distributed.gather_rows(parts, rows, n_tokens)

    def policy_leaf(
        self, forward: Callable, batch: list[TokenizedExample]
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], None]]:
        """What the policy says of a batch, all processes together, as an autograd leaf; and a function that sends the
        leaf's gradient into the model.

        One forward keeps its graph. Several run first without, then one by one again with it, so that memory is
        bounded by one forward, and a loss on the leaf is still that of the whole batch.

        forward: as in `frozen`
        """
        forwards = self.forwards(batch)
        kept = forward(self.policy, forwards[0][0]) if len(forwards) == 1 else None
        values = self.gather([kept], forwards, batch) if kept is not None else self.frozen(forward, self.policy, batch)

        def into_policy(upstream: torch.Tensor) -> None:
            # FSDP averages gradients over processes, each of which has those of its own tokens: hence the factor.
            upstream = upstream * distributed.world_size()
            for examples, rows in forwards:
                output = kept if kept is not None else forward(self.policy, examples)
                output[: len(rows)].backward(upstream[rows])

        return values.requires_grad_(), into_policy

    def outcome(self, token_logps: torch.Tensor, batch: list[TokenizedExample]) -> Outcome:
        """Split the batch's log-probs into chosen and rejected, and apply the loss."""
        chosen = self.chosen_rows(batch, token_logps.device)
        policy_logps, reference = self.sequence_logps(token_logps, batch), (None, None)
        if self.reference_model is not None:
            reference_logps = self.sequence_logps(self.frozen(self.token_logps, self.reference_model, batch), batch)
            reference = reference_logps[chosen], reference_logps[~chosen]
        logps = (policy_logps[chosen], policy_logps[~chosen])
        return Outcome(*self.loss(*logps, *reference), *logps)

    def chosen_rows(self, batch: list[TokenizedExample], device: torch.device) -> torch.Tensor:
        """(n_responses,) bool: which responses of the batch are chosen, or desirable."""
        return torch.tensor([flag for example in batch for flag in example.chosen], device=device)

    def forward_backward(self, batch: list[TokenizedExample]) -> Outcome:
        """The outcome of a batch, and its gradient added to the policy's."""
        leaf, into_policy = self.policy_leaf(self.token_logps, batch)
        return self.backward(self.outcome(leaf, batch), leaf, into_policy, batch)

    def backward(self, outcome: Outcome, leaf: torch.Tensor, into_policy: Callable, batch: list) -> Outcome:
        """Send the gradient of the summed losses through the leaf into the policy; `update` divides by their number."""
        self.check_finite(outcome.losses, "loss", batch)
        outcome.losses.sum().backward()
        into_policy(leaf.grad)
        return outcome.detach()

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
            self.flush()
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
        self.examples += len(batch)
        self.pending.append((batch, self.forward_backward(batch)))
        if len(self.pending) == self.config.model.gradient_accumulation_steps:
            self.update()

    def flush(self) -> None:
        """An update from what is left of an accumulation at the end of the data."""
        if self.pending:
            self.update()

    def update(self) -> None:
        """Clip (raising before the weights change if the gradient is not finite), step, schedule, zero, log."""
        batches, outcomes = zip(*self.pending, strict=True)
        n_losses = sum(len(outcome.losses) for outcome in outcomes)
        grads = [p.grad for p in self.policy.parameters() if p.grad is not None]
        torch._foreach_div_(grads, n_losses)  # the sum of losses becomes their mean
        norms = self.clip_gradients()
        for norm in norms.values():
            self.check_finite(norm, "gradient", [example for batch in batches for example in batch])
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        self.pending = []
        self.log_step(batches, outcomes, {name: norm.item() for name, norm in norms.items()} | {"lr": lr})

    def clip_gradients(self) -> dict[str, torch.Tensor]:
        """Scale gradients down to their largest allowed norm; the norms before, by the name they are logged under."""
        return {"grad_norm": self.clipped(self.policy.lm, self.config.model.max_grad_norm)}

    def clipped(self, module: torch.nn.Module, max_norm: float) -> torch.Tensor:
        return distributed.whole(torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm))

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
        progress = min(1.0, (update - warmup) / max(1, self.total_updates() - warmup))
        return {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[self.config.lr_scheduler]

    def total_updates(self) -> int:
        """Of the whole run."""
        return -(-len(self.train_loader) // self.config.model.gradient_accumulation_steps)

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
        if distributed.is_main():
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
                outcomes.append(self.evaluate_batch(batch))
        self.policy.train()
        sharding.reshard(self.policy)
        seconds = time.monotonic() - started
        return self.summarize(outcomes, "eval") | {"examples_per_second": self.eval_loader.examples_seen / seconds}

    def evaluate_batch(self, batch: list[TokenizedExample]) -> Outcome:
        return self.outcome(self.frozen(self.token_logps, self.policy, batch), batch)

    def log_evaluation(self) -> None:
        self.eval_metrics = self.evaluate()
        self.evaluated_at = self.examples
        self.log.evaluation(self.updates, self.examples, self.eval_metrics)
        self.step_started = time.monotonic()

    #### METRICS

    def summarize(self, outcomes: list[Outcome], mode: str) -> dict[str, float]:
        """Means over all examples of all outcomes, under the names that every loss shares."""
        whole = Outcome.concatenate(outcomes)
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

    def make_log(self, total_examples: int) -> metrics.MetricsLog | metrics.NoLog:
        if not distributed.is_main():
            return metrics.NoLog()
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
            v_head=self.policy.v_head,
        )
        if distributed.is_main():
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


#### PPO


@dataclass(frozen=True)
class Episode:
    """What all PPO epochs on a batch share, frozen. Vectors over tokens hold response after response."""

    batch: list[TokenizedExample]
    reference_logps: torch.Tensor  # (n_tokens,) of the old policy, which is the reference model
    advantages: torch.Tensor  # (n_tokens,) of mean 0 and variance 1
    returns: torch.Tensor  # (n_tokens,)


@dataclass(frozen=True)
class PPOOutcome(Outcome):
    """`losses` and everything here: (n_tokens,)."""

    policy_losses: torch.Tensor
    critic_losses: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    clipped: torch.Tensor  # 1 where the clipped loss counts
    values: torch.Tensor
    returns: torch.Tensor


class PPOTrainer(UnpairedPreferenceTrainer):
    """Offline, off-policy PPO (https://arxiv.org/abs/1707.06347): what the data holds stands in for samples.

    The last token of a desirable response has the reward +1, that of an undesirable one -1, and the old policy of the
    ratio is the reference model. The loss is one of tokens, with a critic, so it replaces `train_step` and not `loss`.
    As rewards it reports the log-ratio of policy and reference, summed over a response.
    """

    needs = ("use_reference_model", "use_value_head")

    def train_step(self, batch):
        """Wait for the whole accumulation: advantages are normalised over all of its tokens."""
        self.examples += len(batch)
        self.pending.append((batch, None))
        if len(self.pending) == self.config.model.gradient_accumulation_steps:
            self.flush()

    def flush(self):
        """The PPO epochs on all pending batches as one: an update each, over the same advantages and returns."""
        batch = [example for pending, _ in self.pending for example in pending]
        episode = None
        for _ in range(self.config.loss.ppo_epochs if batch else 0):
            leaf, into_policy = self.policy_leaf(self.token_outputs, batch)
            episode = episode or self.episode(batch, values=leaf.detach()[:, 1])
            outcome = self.backward(self.token_loss(leaf, episode), leaf, into_policy, batch)
            self.pending = [(batch, outcome)]
            self.update()

    def evaluate_batch(self, batch):
        tokens = self.frozen(self.token_outputs, self.policy, batch)
        return self.token_loss(tokens, self.episode(batch, values=tokens[:, 1]))

    def total_updates(self):
        return super().total_updates() * self.config.loss.ppo_epochs

    def clip_gradients(self):
        """The critic's gradient has a limit of its own."""
        v_head_norm = self.clipped(self.policy.v_head, self.config.model.v_head_max_grad_norm)
        return super().clip_gradients() | {"v_head_grad_norm": v_head_norm}

    def token_outputs(self, model: PolicyModel, examples: list[TokenizedExample]) -> torch.Tensor:
        """(n_tokens, 3): log-prob, value, and entropy (which has no gradient) of each response token."""
        return torch.stack(model(model.inputs(examples), with_entropy=True), dim=1)

    def episode(self, batch: list[TokenizedExample], values: torch.Tensor) -> Episode:
        """values: (n_tokens,), of the policy before the first update"""
        reference_logps = self.frozen(self.token_logps, self.reference_model, batch)
        chosen = self.chosen_rows(batch, values.device)
        lengths = torch.tensor([len(response) for example in batch for response in example.responses])
        lengths = lengths.to(values.device)[:, None]
        token = torch.arange(int(lengths.max()), device=values.device)
        mask, is_last = token < lengths, token == lengths - 1
        rewards = is_last * torch.where(chosen, 1.0, -1.0)[:, None]
        values = values.new_zeros(mask.shape).masked_scatter(mask, values)
        advantages, returns = self.advantages_and_returns(values, rewards)
        advantages = advantages[mask]
        advantages = (advantages - advantages.mean()) * torch.rsqrt(advantages.var(correction=0) + 1e-8)
        return Episode(batch, reference_logps, advantages, returns[mask])

    def advantages_and_returns(
        self, values: torch.Tensor, rewards: torch.Tensor
    ) -> tuple[torch.FloatTensor, torch.FloatTensor]:
        """Advantages by GAE (Eq. 16 of https://arxiv.org/abs/1506.02438), and discounted rewards from each token on.

        All: (n_responses, longest response), 0 behind the end of a response, so that nothing comes after it.
        """
        gamma, lam = self.config.loss.gamma, self.config.loss.lam
        deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
        return discounted_sums(deltas, gamma * lam), discounted_sums(rewards, gamma)

    def token_loss(self, tokens: torch.Tensor, episode: Episode) -> PPOOutcome:
        """PPO's clipped objective (Eq. 7 of https://arxiv.org/abs/1707.06347) with a critic and a KL penalty.

        tokens: (n_tokens, 3) float32, as `token_outputs` gives them
        """
        settings = self.config.loss
        logps, values, entropy = tokens.unbind(1)
        logratios = logps - episode.reference_logps
        ratios = logratios.exp()
        unclipped = -episode.advantages * ratios
        clipped = -episode.advantages * ratios.clamp(settings.cliprange, 1 / settings.cliprange)
        policy_losses = torch.maximum(unclipped, clipped)
        critic_losses = 0.5 * (values - episode.returns) ** 2
        # Both estimate the KL divergence of the policy from a reference that wrote the data; k1 can be negative.
        kl = torch.expm1(logratios) - logratios if settings.kl_estimator == "k3" else -logratios
        losses = policy_losses + settings.critic_coef * critic_losses + settings.KL_coef * kl
        chosen = self.chosen_rows(episode.batch, logps.device)
        rewards, sequence_logps = (self.sequence_logps(part, episode.batch) for part in (logratios, logps))
        return PPOOutcome(
            losses=losses,
            chosen_rewards=rewards[chosen],
            rejected_rewards=rewards[~chosen],
            chosen_logps=sequence_logps[chosen],
            rejected_logps=sequence_logps[~chosen],
            policy_losses=policy_losses,
            critic_losses=critic_losses,
            kl=kl,
            entropy=entropy,
            clipped=(clipped > unclipped).float(),
            values=values,
            returns=episode.returns,
        )

    def summarize(self, outcomes, mode):
        """What every loss reports, and what PPO does: in training under the original's names, such as loss/policy."""
        whole = PPOOutcome.concatenate(outcomes)
        logratios = torch.cat((whole.chosen_rewards, whole.rejected_rewards))
        returns_var = whole.returns.var(correction=0)
        metrics = {
            "loss/total": whole.losses.mean(),
            "loss/policy": whole.policy_losses.mean(),
            "loss/critic": whole.critic_losses.mean(),
            "loss/entropy": whole.entropy.mean(),
            "loss/policykl": whole.kl.mean(),
            "loss/seqratio": logratios.double().clamp(max=700).exp().mean(),  # a float64 holds e^700, and no e^710
            "clipfrac/policy": whole.clipped.mean(),
            "returns/mean": whole.returns.mean(),
            "returns/var": returns_var,
            "val/mean": whole.values.mean(),
            "val/var": whole.values.var(correction=0),
        }
        if returns_var > 0:
            metrics["val/explained_variance"] = 1 - (whole.returns - whole.values).var(correction=0) / returns_var
        suffix = "" if mode == "train" else f"_{mode}"
        named = {name.replace("/", f"{suffix}/"): value.item() for name, value in metrics.items()}
        return super().summarize(outcomes, mode) | named
