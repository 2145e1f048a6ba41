"""Everything that changes during training, except for the weights."""

from dataclasses import dataclass, field
from typing import Any

import torch

from halos.loader import DataLoader

# Of a TrainState.
PLAIN = ("updates", "evaluated_at", "saved_at", "skipped", "skipped_in_a_row", "eval_metrics", "best", "own")


@dataclass
class TrainState:
    """Everything that changes during training, except for the weights."""

    loader: DataLoader
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    updates: int = 0  # optimizer steps taken
    evaluated_at: int = 0  # `examples` at the last evaluation
    saved_at: int = 0  # `examples` at the last state that was saved
    skipped: int = 0  # training steps without an update, since a value was not finite
    skipped_in_a_row: int = 0
    eval_metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    best: dict[str, Any] = field(default_factory=dict)  # the best evaluation so far (halos/best.py)
    own: dict[str, Any] = field(default_factory=dict)  # what a trainer keeps between updates, such as a running mean
    position: dict[str, int] = field(default_factory=dict)  # after the last batch used; the loader itself is ahead

    def __post_init__(self):
        self.position = self.loader.state_dict()

    @property
    def examples(self) -> int:
        """Training examples that were used, on all ranks together."""
        return self.position["examples_seen"]

    def progress(self) -> dict[str, Any]:
        """Everything but the optimizer, whose tensors are as large as the weights and are saved beside them."""
        plain = {name: getattr(self, name) for name in PLAIN}
        return {"loader": self.position, "scheduler": self.scheduler.state_dict(), **plain}

    def load_progress(self, progress: dict[str, Any]) -> None:
        self.position = dict(progress["loader"])
        self.loader.load_state_dict(self.position)
        self.scheduler.load_state_dict(progress["scheduler"])
        for name in PLAIN:
            setattr(self, name, progress.get(name, getattr(self, name)))  # a state of an earlier version lacks some

    def state_dict(self) -> dict[str, Any]:
        return {**self.progress(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.load_progress(state)
