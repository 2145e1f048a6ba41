"""A loss that can be asked: its outcome and its gradient on a batch, without a model."""

from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from halos.engine import Batch, Outcome
from halos.loader import DataLoader
from halos.loss_card import batches
from halos.models import PerToken
from halos.tokens import Role, TokenizedExample
from halos.trainer import BasicTrainer

HEADS = ("use_value_head", "use_reward_head")  # keys of a YAML with which the policy has values
EVEN, RAGGED = (6, 6), (2, 9)  # shortest and longest response of a batch, in tokens


def bare(trainer: type[BasicTrainer], settings: dict | DictConfig) -> BasicTrainer:
    """A trainer that has its hyperparameters and an empty state: all that a loss may use.

    settings: the loss's YAML
    """
    instance = trainer.__new__(trainer)
    instance.config = OmegaConf.create({"loss": settings})
    instance.state = SimpleNamespace(own={})  # type: ignore[assignment]
    return instance


@dataclass(frozen=True)
class Subject:
    """A loss with its settings, and how it answers.

    settings: its YAML
    """

    name: str
    settings: DictConfig
    trainer: type[BasicTrainer]
    loader: type[DataLoader]

    @cached_property
    def instance(self) -> BasicTrainer:
        return bare(self.trainer, self.settings)

    @property
    def with_reference(self) -> bool:
        return bool(self.settings.get("use_reference_model"))

    @cached_property
    def driver(self) -> str:
        """The column of the policy that the loss learns from: the log-probs if it uses them, or else another one."""
        _, gradients = self.gradients(self._batch(self.rows(RAGGED), torch.zeros(1), "logps", noise=0.5))
        return next((name for name, gradient in gradients.items() if gradient.any()), "logps")

    #### ITS BATCHES

    def rows(self, lengths: tuple[int, int], with_scores: bool = True) -> list[TokenizedExample]:
        """Rows of the loss's own loader, with responses of so many tokens."""
        own = {key: self.settings[key] for key in self.loader.loss_keys}
        loader: Any = self.loader
        return batches.rows(loader, *lengths, with_scores, **own)

    def batch(self, examples: list[TokenizedExample], logratios: torch.Tensor, **settings) -> Batch:
        """A batch with these log-ratios (n_responses,); settings: those of `batches.batch_of`."""
        return self._batch(examples, logratios, self.driver, **settings)

    def _batch(self, examples: list[TokenizedExample], logratios: torch.Tensor, driver: str, **settings) -> Batch:
        has_head = any(self.settings.get(key) for key in HEADS)
        absent = {"values": not has_head, "entropy": not self.trainer.uses_entropy}
        columns = [name for name in PerToken._fields if not absent.get(name)]
        return batches.batch_of(
            examples, logratios, with_reference=self.with_reference, columns=columns, driver=driver, **settings
        )

    def start(self, lengths: tuple[int, int] = EVEN) -> Batch:
        """A batch of a run's first step: policy equals reference."""
        return self.of_roles(0, 0, lengths)

    def of_roles(self, chosen: float, rejected: float, lengths: tuple[int, int] = EVEN) -> Batch:
        """A batch in which all chosen responses have one log-ratio, and all rejected ones another."""
        examples = self.rows(lengths)
        value = {Role.CHOSEN: chosen, Role.REJECTED: rejected, Role.UNRELATED: 0.0}
        return self.batch(examples, torch.tensor([float(value[role]) for one in examples for role in one.roles]))

    def random(self, seed: int = 0, scale: float = 5.0, with_scores: bool = True) -> Batch:
        """A batch of random log-ratios, with this standard deviation in nats."""
        examples = self.rows(RAGGED, with_scores)
        generator = torch.Generator().manual_seed(seed)
        logratios = scale * torch.randn(sum(len(one.roles) for one in examples), generator=generator)
        return self.batch(examples, logratios, noise=0.2, seed=seed)

    #### ITS ANSWERS

    def outcome(self, batch: Batch) -> Outcome:
        return self.instance.batch_loss(batch)

    def gradients(self, batch: Batch) -> tuple[Outcome, dict[str, torch.Tensor]]:
        """The outcome, and the gradient of the summed losses in each column of the policy: (n_tokens,) each."""
        columns = {
            name: column.detach().clone().requires_grad_(name != "entropy")  # which `Forward` gives no gradient
            for name, column in batch.policy._asdict().items()
            if column is not None
        }
        outcome = self.outcome(replace(batch, policy=batch.policy._replace(**columns)))
        outcome.losses.sum().backward()
        return outcome, {
            name: torch.zeros_like(column) if column.grad is None else column.grad for name, column in columns.items()
        }

    def response_gradients(self, batch: Batch) -> tuple[Outcome, torch.Tensor]:
        """The outcome, and the gradient of the summed losses in the log-prob of each response: (n_responses,)."""
        outcome, gradients = self.gradients(batch)
        return outcome, batches.per_response(batch, self.driver, gradients[self.driver])

    def moved(self, batch: Batch, amounts: torch.Tensor) -> Batch:
        """The batch with the log-prob of each response raised by its amount: (n_responses,) nats."""
        rise = batches.per_token(batch.lengths, self.driver, amounts)
        return batches.with_column(batch, self.driver, getattr(batch.policy, self.driver) + rise)
