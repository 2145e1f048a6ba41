"""Save what a trainer has: LATEST, step-N/, BEST/, the states to resume from, and the weights of a failed run.

The files of a checkpoint are in `halos/checkpoint.py`, those of a state in `halos/states.py`.
"""

import os
import time
from typing import NoReturn

from omegaconf import DictConfig

from halos import best, checkpoint, distributed, metrics, mishaps, records, states
from halos.errors import UserError
from halos.files import make_room
from halos.models import PolicyModel
from halos.states import StateWriter
from halos.train_state import TrainState


class Saving:
    """The part of a trainer that writes checkpoints and states. `BasicTrainer` says when."""

    policy: PolicyModel
    tokenizer: object
    config: DictConfig
    state: TrainState
    states: StateWriter
    state_written: float  # when, by time.monotonic()
    metrics_bytes: int | None  # of metrics.jsonl, that a resumed run keeps
    run_dir: str
    log: metrics.MetricsLog | metrics.NoLog

    def save(self) -> None:
        """Write LATEST, step-N and BEST beside it if configured, and the curves."""
        names = ["LATEST"]
        if self.config.intermediate_checkpoints and self.state.updates:
            names.append(f"step-{self.state.updates}")
        if self.is_best():
            names.append(best.BEST)
        self.write_checkpoint([os.path.join(self.run_dir, name) for name in names])
        self.log.draw_curves(self.config.exp_name)

    def is_best(self) -> bool:
        """Return whether the last evaluation is the best so far, of a run that keeps its best weights."""
        return self.state.best.get("updates") == self.state.updates

    def save_if_best(self) -> None:
        """Write BEST alone: at the start of a run, where there is nothing else to save."""
        if self.is_best():
            self.write_checkpoint([os.path.join(self.run_dir, best.BEST)])

    def write_checkpoint(self, directories: list[str]) -> None:
        checkpoint.save(
            directories,
            self.policy.lm,
            self.tokenizer,
            self.config,
            step=self.state.updates,
            metrics=self.state.eval_metrics,
            export_dtype=self.policy.export_dtype,
            v_head=self.policy.v_head,
        )

    def state_is_due(self) -> bool:
        """Return whether a multiple of save_every has been passed since the last state."""
        every = self.config.save_every or self.config.eval_every
        return self.state.examples // every > self.state.saved_at // every

    def minutes_are_over(self) -> bool:
        """Return whether this rank's clock says that a state is due."""
        minutes = self.config.save_every_minutes
        return minutes is not None and time.monotonic() - self.state_written > 60 * minutes

    def save_state(self) -> None:
        """Write what a resumed run starts from, in the background."""
        self.state.saved_at = self.state.examples
        kept = {"metrics_bytes": self.log.flush(), "data": self.state.loader.fingerprint}
        self.states.write(self.policy, self.state.optimizer, {**self.state.progress(), **kept})
        self.state_written = time.monotonic()

    def load_state(self, path: str) -> None:
        """Go on from a state that `save_state` wrote, on any number of ranks. `train` does the rest."""
        progress = states.load(path, self.policy, self.state.optimizer)
        if progress["data"] != self.state.loader.fingerprint:
            raise UserError(
                f"resume=true, but the training data have other texts or other rows than those of {path}; restore "
                "them, or train on these under another exp_name"
            )
        self.metrics_bytes = progress["metrics_bytes"]
        self.state.load_progress(progress)
        if distributed.is_main():
            records.remove_after(self.run_dir, self.state.updates)

    def give_up(self, problem: mishaps.NotFinite) -> NoReturn:
        """End the run. The last good checkpoint stays; the present weights and the examples go to `not_finite/`."""
        directory = os.path.join(self.run_dir, "not_finite")
        self.log.settle()
        if distributed.is_main():
            make_room(directory)
        self.write_checkpoint([directory])
        if distributed.is_main():
            mishaps.write_examples(os.path.join(directory, "examples.json"), problem.examples, self.tokenizer)
        examples = f" and the {len(problem.examples)} examples" if problem.examples else ""
        remedy = ", look at the examples, or skip such steps with on_nonfinite=skip" if problem.examples else ""
        raise UserError(
            f"{problem.what} is not finite after {self.state.updates} updates; LATEST stays what it was, and the "
            f"weights now{examples} are in {directory}; lower lr{remedy}"
        )
