"""The ways to train that are compared: this project's trainers, and the plain way.

A way is made from `Settings` and all batches that it will see. `numbers` computes a batch without an update, `train`
makes a step for each batch. All policies start from the same weights plus the same noise (`perturb`), and the reference
is the weights without it. So losses are far from those of equal models, and a wrong one shows.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.throughput.work import Batch, config_of, mismatched
from benchmarks.workload import llama
from halos import distributed, logps_store, packing_check, sharding
from halos.engine import Forward, Outcome
from halos.models import PolicyModel
from halos.packing import pad
from halos.reference_cache import ReferenceCache
from halos.tokens import Role
from losses.unpaired import MismatchedKTOTrainer

NOISE = 0.1  # of the policy's weights at the start, relative to each tensor's own spread
Numbers = dict[str, float]  # loss, and mean log-probs and rewards of chosen and rejected responses


@dataclass(frozen=True)
class Settings:
    """The model, the loss and the device that a way is made for.

    model: a directory in Hugging Face's layout; None: a Llama with 35M random weights
    dtype: of matrix products; weights, gradients and the optimizer's state are float32
    folder: for temporary files
    """

    loss: str
    model: str | None
    device: torch.device
    dtype: torch.dtype
    folder: str


def load_lm(settings: Settings) -> PreTrainedModel:
    """Load the weights in float32 on the device."""
    if settings.model is None:
        return llama().lm.to(settings.device)
    return AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).to(settings.device)


@torch.no_grad()
def perturb(lm: PreTrainedModel) -> None:
    """Add noise to the weights: the same for the same architecture."""
    generator = torch.Generator().manual_seed(0)
    for parameter in lm.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        weights = distributed.local(parameter)
        weights += NOISE * weights.std(correction=0) * noise.to(weights.device)


def numbers_of(losses, chosen_logps, rejected_logps, chosen_rewards, rejected_rewards) -> Numbers:
    values = {
        "loss": losses,
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
    }
    return {name: value.detach().float().mean().item() for name, value in values.items()}


#### THIS PROJECT


class Batches:
    """The batches as a trainer sees a loader: all that `train_step` asks for."""

    def __init__(self, batches: list[Batch]):
        self.batches, self.total_examples = batches, sum(map(len, batches))

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": 0, "position": 0, "examples_seen": 0}


def recording(trainer_class: type) -> type:
    """Return the trainer class with one addition: it keeps the outcome of each batch."""

    class Recording(trainer_class):
        outcomes: list[Outcome]

        def forward_backward(self, examples):
            outcome = super().forward_backward(examples)
            self.outcomes.append(outcome)
            return outcome

    return Recording


class Ours:
    """A trainer of this project, through its own `train_step`.

    is_cached: reference log-probs are computed once, before training; else in every step
    """

    def __init__(self, settings: Settings, batches: list[Batch], *, is_cached: bool, trainer_class: type):
        config = config_of(settings.loss, settings.folder)
        self.policy = self._policy(settings)
        reference = None if is_cached else self._reference(settings, self.policy.packs)
        loader = Batches(batches)
        arguments: tuple[Any, ...] = (self.policy, reference, None, config, loader, loader, settings.folder)
        self.trainer = recording(trainer_class)(*arguments)
        if is_cached:
            tokens = config.model.max_tokens_per_forward
            self.trainer.reference_cache = filled_cache(self.policy, batches, tokens, settings.folder)
        perturb(self.policy.lm)

    def _policy(self, settings: Settings) -> PolicyModel:
        policy = PolicyModel(load_lm(settings))
        float32 = packing_check.in_float32(policy)
        sharding.prepare_policy(policy, settings.dtype, activation_checkpointing=False)
        policy.use_packing(packing_check.choose(policy, "auto", settings.dtype, float32)[0])
        return policy

    def _reference(self, settings: Settings, packs: bool) -> PolicyModel:
        reference = PolicyModel(packing_check.cast_weights(load_lm(settings), settings.dtype)).requires_grad_(False)
        reference.use_packing(packs)
        return reference.eval()

    @torch.no_grad()
    def numbers(self, batch: Batch) -> Numbers:
        _, seen = self.trainer.forward(batch)
        sharding.reshard(self.policy)
        return outcome_numbers(self.trainer.batch_loss(seen))

    def train(self, batches: list[Batch], after_step: Callable[[], None]) -> list[float]:
        """Make a step for each batch. Returns the losses."""
        self.trainer.outcomes = []
        self.policy.train()
        for batch in batches:
            self.trainer.train_step([batch])
            after_step()
        return [outcome.losses.mean().item() for outcome in self.trainer.outcomes]


def outcome_numbers(outcome: Outcome) -> Numbers:
    logps, rewards = (outcome.chosen_logps, outcome.rejected_logps), (outcome.chosen_rewards, outcome.rejected_rewards)
    return numbers_of(outcome.losses, *logps, *rewards)


@torch.no_grad()
def filled_cache(policy: PolicyModel, batches: list[Batch], max_tokens: int, folder: str) -> ReferenceCache:
    """Compute the reference log-probs of all batches with the policy, which is still the reference model."""
    directory = os.path.join(folder, "logps")
    policy.eval()
    for batch in batches:
        leaf = Forward(policy, batch, max_tokens).tokens.logps.cpu().numpy()
        lengths = [n for example in batch for n in example.n_targets]
        names = b"".join(address for example in batch for address in logps_store.addresses(example))
        logps_store.add_segment(directory, names, np.split(leaf, np.cumsum(lengths)[:-1]))
    sharding.reshard(policy)
    return ReferenceCache(logps_store.LogpsStore(directory, logps_store.segments(directory)))


class OursMismatched(Ours):
    """The same for KTO with the KL of unrelated responses."""

    def __init__(self, settings: Settings, batches: list[Batch], *, is_cached: bool):
        batches = [mismatched(batch) for batch in batches]
        super().__init__(settings, batches, is_cached=is_cached, trainer_class=MismatchedKTOTrainer)

    def numbers(self, batch: Batch) -> Numbers:
        return super().numbers(mismatched(batch))

    def train(self, batches: list[Batch], after_step: Callable[[], None]) -> list[float]:
        return super().train([mismatched(batch) for batch in batches], after_step)


#### THE PLAIN WAY


class Plain:
    """Padded batches, log-softmax of the logits of all positions, and a forward pass of the reference in each step."""

    def __init__(self, settings: Settings, batches: list[Batch], *, trainer_class: type):
        self.settings = settings
        self.config = config_of(settings.loss, settings.folder)
        self.loss = trainer_class.loss
        self.policy, self.reference = load_lm(settings).train(), load_lm(settings).eval().requires_grad_(False)
        perturb(self.policy)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=self.config.lr, weight_decay=0.0)

    def logps(self, lm: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """(n_responses,) log-probs of the responses, chosen and rejected as they come."""
        inputs = pad(batch, pad_token_id=0).to(self.settings.device)
        mask = torch.zeros_like(inputs.input_ids, dtype=torch.bool)
        mask.view(-1)[inputs.target_positions + 1] = True
        with torch.autocast(self.settings.device.type, self.settings.dtype, self.settings.dtype != torch.float32):
            logits = lm(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False).logits
        logps = logits[:, :-1].float().log_softmax(-1).gather(2, inputs.input_ids[:, 1:, None])[:, :, 0]
        return (logps * mask[:, 1:]).sum(-1)

    def parts(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Return (losses, chosen log-probs, rejected log-probs, chosen rewards, rejected rewards)."""
        roles = [role for one in batch for role in one.roles]
        chosen, rejected = (
            torch.tensor([role is wanted for role in roles], device=self.settings.device)
            for wanted in (Role.CHOSEN, Role.REJECTED)
        )
        policy = self.logps(self.policy, batch)
        with torch.no_grad():
            reference = self.logps(self.reference, batch)
        logps = policy[chosen], policy[rejected]
        losses, *rewards = self.loss(self, *logps, reference[chosen], reference[rejected])
        return losses, *logps, *rewards

    @torch.no_grad()
    def numbers(self, batch: Batch) -> Numbers:
        return numbers_of(*self.parts(batch))

    def train(self, batches: list[Batch], after_step: Callable[[], None]) -> list[float]:
        seen = []
        for batch in batches:
            losses, *_ = self.parts(batch)
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.model.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            seen.append(losses.detach().mean())
            after_step()
        return [loss.item() for loss in seen]
