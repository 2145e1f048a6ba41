"""The training loop: forward and backward passes, updates, evaluation, logging and saving.

`BasicTrainer` is what every loss in `trainers.py` inherits. A loss defines `loss` (four vectors) or `batch_loss` (a
`Batch`); `train` is the loop, and its steps (`train_step`, `update`, `evaluate`, `save`, `should_stop`) are methods to
override. What one batch goes through is in `halos/engine.py`.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NoReturn

import torch
from omegaconf import DictConfig, OmegaConf

from halos import advice, checkpoint, distributed, loading, metrics, mishaps, optimizers, sharding, states, stopping
from halos.engine import Batch, Forward, Outcome
from halos.errors import UserError
from halos.files import make_room
from halos.loader import DataLoader
from halos.models import PolicyModel
from halos.reference_cache import ReferenceCache
from halos.rules import Rule
from halos.tokens import TokenizedExample
from halos.train_state import TrainState


class BasicTrainer:
    """Training and evaluation with a loss that a subclass defines."""

    data_format: str | None = None  # the DataLoader.data_format that the loss needs; None: any
    needs: tuple[str, ...] = ()  # keys of the loss's YAML that cannot be false
    rules: Mapping[str, Rule] = {}  # keys of the loss's YAML -> the values they can have
    uses_entropy = False  # whether `Batch.policy` has the entropy of each token's distribution

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
        self.train_loader: Any = train_loader  # None: evaluation only
        self.eval_loader = eval_loader
        self.run_dir = run_dir
        self.reference_cache: ReferenceCache | None = None  # then `reference_model` is None
        self.log: metrics.MetricsLog | metrics.NoLog = metrics.NoLog()
        self.metrics_bytes: int | None = None  # of metrics.jsonl, that a resumed run keeps
        self.step_started = time.monotonic()
        if train_loader is not None:
            optimizer = self.make_optimizer()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
            self.state = TrainState(train_loader, optimizer, scheduler)

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
        raise TypeError(f"{type(self).__name__} has no loss: define loss() or batch_loss() in it")

    def batch_loss(self, batch: Batch) -> Outcome:
        """The outcome of the global batch. Override this and not `loss` for a loss of tokens, lengths, scores or
        unrelated responses, or to log more. Uses the batch and `self.config.loss`, nothing else."""
        logps = self.split(batch, batch.policy.logps)
        reference = (None, None) if batch.reference_logps is None else self.split(batch, batch.reference_logps)
        loss: Callable[..., tuple] = self.loss
        losses, chosen_rewards, rejected_rewards = loss(*logps, *reference)
        return Outcome(losses, chosen_rewards, rejected_rewards, *logps)

    def split(self, batch: Batch, per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n_tokens,) -> (n_chosen,), (n_rejected,): the sum over each response's tokens, or their mean if the loss's
        YAML says `average_log_prob: true`."""
        values = batch.sum_by_response(per_token)
        values = values / batch.lengths if self.config.loss.get("average_log_prob", False) else values
        return values[batch.chosen], values[batch.rejected]

    def accuracy(self, chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
        """Share of (chosen, rejected) combinations in which chosen has the higher reward; ties are half."""
        return wins(chosen_rewards[:, None], rejected_rewards[None, :])

    #### ONE BATCH

    def forward(
        self, examples: list[TokenizedExample], reference_logps: torch.Tensor | None = None
    ) -> tuple[Forward, Batch]:
        """Run the policy on a global batch, and the reference model unless its log-probs are given."""
        forward = Forward(self.policy, examples, self.config.model.max_tokens_per_forward, self.uses_entropy)
        if reference_logps is None:
            reference_logps = self.reference_logps(examples)
        return forward, Batch(examples, forward.tokens, reference_logps)

    @torch.no_grad()
    def reference_logps(self, examples: list[TokenizedExample]) -> torch.Tensor | None:
        """(n_tokens,) log-probs under the reference model, in nats; None if the loss has none."""
        if self.reference_cache is not None:
            return self.reference_cache.logps(examples).to(self.policy.device)
        if self.reference_model is None:
            return None
        return Forward(self.reference_model, examples, self.config.model.max_tokens_per_forward).tokens.logps

    def forward_backward(self, examples: list[TokenizedExample]) -> Outcome:
        """The outcome of a batch, without gradient; its gradient is added to that of the policy's parameters."""
        forward, batch = self.forward(examples)
        return self.backward(self.batch_loss(batch), forward, examples)

    def backward(self, outcome: Outcome, forward: Forward, examples: list[TokenizedExample]) -> Outcome:
        """Send the gradient of the summed losses into the policy; `update` divides by their number."""
        if outcome.losses.ndim != 1:
            raise UserError(
                f"the loss of {type(self).__name__} has the shape {tuple(outcome.losses.shape)}; return a vector, one "
                "loss per pair, response or token, so that microbatches of different sizes weigh as they should"
            )
        mishaps.check_finite(outcome.losses, "the loss", examples)
        outcome.losses.sum().backward()
        forward.backward()
        return outcome.detach()

    #### TRAINING

    def train(self) -> None:
        """Train to the end of the data, or until `should_stop`; evaluate and save as configured, and at the end.

        Raises Stopped if a signal asks for it: after the step, and with its state saved.
        """
        self.policy.train()
        self.log = self.open_log()
        self.states = states.StateWriter(self.run_dir, self.config.keep_checkpoints)
        try:
            with stopping.StopRequest() as self.stop_request:
                self.train_loop()
            self.states.wait()
        finally:
            self.states.close()
            self.log.close()

    def train_loop(self) -> None:
        state = self.state
        self.step_started = self.state_written = time.monotonic()
        starts = state.examples == 0
        if starts and self.config.do_first_eval:
            self.log_evaluation()
        # A state can be from before the evaluation that followed its step: a resumed run begins with that.
        if starts or self.after_step():
            for microbatches in _groups(self.train_loader, self.config.model.gradient_accumulation_steps):
                self.guarded_step(microbatches)
                if not self.after_step():
                    break
        if state.evaluated_at < state.examples:
            self.log_evaluation()
            self.save()
        if state.saved_at < state.examples:
            self.save_state()

    def after_step(self) -> bool:
        """Evaluate and save what is due, and stop if a signal asked for it. Returns whether training goes on."""
        signal, is_time = distributed.largest(self.stop_request.signal, self.minutes_are_over())
        if signal:
            self.stop(signal)
        if self.eval_is_due():
            self.log_evaluation()
            self.save()
        if is_time or self.state_is_due():
            self.save_state()
        return not distributed.any_rank(self.should_stop())

    def stop(self, signal: int) -> NoReturn:
        """Save the state, and end the run as a signal asks for it."""
        if self.state.saved_at < self.state.examples:
            self.save_state()
        self.states.wait()
        kept = "are saved; resume=true goes on from there"
        if not self.config.keep_checkpoints:
            kept = "are not saved, since keep_checkpoints=0"
        raise stopping.stopped_by(signal, f"stopped after {self.state.updates} updates, which {kept}")

    def guarded_step(self, microbatches: list[list[TokenizedExample]]) -> None:
        """A training step, or the end of the run, or none if the loss or the gradient is not finite."""
        try:
            with mishaps.explained_out_of_memory(self.config, sum(microbatches, []), "model.batch_size"):
                self.train_step(microbatches)
        except mishaps.NotFinite as problem:
            self.skip(problem)
        else:
            self.state.skipped_in_a_row = 0

    def skip(self, problem: mishaps.NotFinite) -> None:
        """Leave the weights as they are and go on, or end the run if `on_nonfinite` says so or this happens often."""
        state = self.state
        state.optimizer.zero_grad(set_to_none=True)
        sharding.reshard(self.policy)
        state.skipped += 1
        state.skipped_in_a_row += 1
        if self.config.on_nonfinite == "stop" or state.skipped_in_a_row > mishaps.MOST_SKIPPED:
            self.give_up(problem)
        self.log.say(
            f"warning: {problem.what} is not finite: this step is skipped; steps skipped so far: {state.skipped}"
        )

    def train_step(self, microbatches: list[list[TokenizedExample]]) -> None:
        """Accumulate the gradients of the microbatches, and update once."""
        outcomes = [self.forward_backward(examples) for examples in microbatches]
        self.update(outcomes, sum(microbatches, []))

    def update(self, outcomes: list[Outcome], examples: list[TokenizedExample]) -> None:
        """Clip, step, schedule, zero, log. Raises before the weights change if the gradient is not finite.

        outcomes: those whose gradients have been accumulated
        examples: what they were computed from
        """
        state = self.state
        self.average_gradients(sum(len(outcome.losses) for outcome in outcomes))
        norms = self.clip_gradients()
        for norm in norms.values():
            mishaps.check_finite(norm, "the gradient", examples)
        lr = float(state.optimizer.param_groups[0]["lr"])  # torchao keeps a tensor, which the scheduler changes
        state.optimizer.step()
        state.scheduler.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.updates += 1
        self.log_step(outcomes, examples, {name: norm.item() for name, norm in norms.items()} | {"lr": lr})

    def should_stop(self) -> bool:
        """Asked after every training step, on every rank: training ends if the answer is True on any of them.

        The run is then evaluated and saved as at its normal end. `self.state` says where it stands: its `eval_metrics`
        are those of the last evaluation, which may have followed this step. Look at the state and leave it as it is: a
        resumed run asks again about the step that it goes on from.
        """
        return False

    @torch.no_grad()
    def average_gradients(self, n_losses: int) -> None:
        """Divide by the number of losses: the gradient of their sum becomes that of their mean."""
        for parameter in self.policy.parameters():
            if parameter.grad is not None:
                distributed.local(parameter.grad).div_(n_losses)

    def clip_gradients(self) -> dict[str, torch.Tensor]:
        """Scale gradients down to their largest allowed norm. Returns the norms before, by their name in the log."""
        return {"grad_norm": self.clipped(self.policy.lm, self.config.model.max_grad_norm)}

    def clipped(self, module: torch.nn.Module, max_norm: float) -> torch.Tensor:
        return distributed.whole(torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm))

    def make_optimizer(self) -> torch.optim.Optimizer:
        kwargs: Any = OmegaConf.to_container(self.config.optimizer_kwargs)
        return optimizers.make(self.policy, self.config.optimizer, self.config.lr, kwargs)

    def lr_factor(self, update: int) -> float:
        """Factor of the peak learning rate: linear warm-up, then constant, or cosine or linear down to 0."""
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
        """Updates in this run."""
        return -(-len(self.train_loader) // self.config.model.gradient_accumulation_steps)

    def advice(self) -> list[str]:
        """Return what is worth knowing before the first update, one line each. A loss may add lines of its own."""
        updates, lr = self.total_updates(), self.config.lr
        lines = advice.warmup(updates, self.config.warmup_steps, lr)
        if self.policy.export_dtype != self.policy.lm.dtype and self.config.optimizer != "SGD":
            matrices = (distributed.local(p.detach()) for p in self.policy.lm.parameters() if p.ndim > 1)
            lines += advice.export_rounding(self.policy.export_dtype, matrices, lr, updates)
        return lines + advice.slow_dtypes(loading.compute_dtypes(self.config, self.policy.device), self.policy.device)

    def give_up(self, problem: mishaps.NotFinite) -> NoReturn:
        """End the run. The last good checkpoint stays; the present weights and the examples go to `not_finite/`."""
        directory = os.path.join(self.run_dir, "not_finite")
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

    #### EVALUATION

    def eval_is_due(self) -> bool:
        """Return whether a multiple of eval_every has been passed since the last evaluation."""
        every = self.config.eval_every
        return self.state.examples // every > self.state.evaluated_at // every

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The closed-form metrics over the test examples."""
        self.policy.eval()
        self.eval_loader.restart()
        started = time.monotonic()
        outcomes = []
        for examples in metrics.progress(self.eval_loader, "evaluating"):
            with mishaps.explained_out_of_memory(self.config, examples, "model.eval_batch_size"):
                _, batch = self.forward(examples)
                outcomes.append(self.batch_loss(batch))
        self.policy.train()
        sharding.reshard(self.policy)
        seconds = time.monotonic() - started
        return self.summarize(outcomes, "eval") | {"examples_per_second": self.eval_loader.examples_seen / seconds}

    def log_evaluation(self) -> None:
        state = self.state
        state.eval_metrics, state.evaluated_at = self.evaluate(), state.examples
        if not math.isfinite(state.eval_metrics["loss/eval"]):
            self.give_up(mishaps.NotFinite("the loss on the test examples", []))
        self.log.evaluation(state.updates, state.examples, state.eval_metrics)
        self.step_started = time.monotonic()

    #### METRICS

    def summarize(self, outcomes: list[Outcome], mode: str) -> dict[str, float]:
        """Metrics over all examples of all outcomes.

        mode: train or eval
        """
        return Outcome.concatenate(outcomes).summary(self.accuracy, mode)

    def log_step(self, outcomes: list[Outcome], examples: list[TokenizedExample], update: dict[str, float]) -> None:
        state, now = self.state, time.monotonic()
        seconds, self.step_started = now - self.step_started, now
        n_tokens = sum(example.n_tokens for example in examples)
        values = {
            **self.summarize(outcomes, "train"),
            **update,
            "examples_per_second": len(examples) / seconds,
            "counters/examples": state.examples,
            "counters/updates": state.updates,
        }
        values |= {"counters/skipped": state.skipped} if state.skipped else {}
        self.log.training_step(state.updates, state.examples, values, n_tokens / seconds)

    def open_log(self) -> metrics.MetricsLog | metrics.NoLog:
        if not distributed.is_main():
            return metrics.NoLog()
        settings: Any = OmegaConf.to_container(self.config, resolve=True)
        sink = metrics.open_wandb(self.config.wandb, self.run_dir, self.config.exp_name, settings)
        interval, total = self.config.minimum_log_interval_secs, self.train_loader.total_examples
        return metrics.MetricsLog(self.run_dir, total, interval, sink, self.state.examples, self.metrics_bytes)

    #### SAVING

    def save(self) -> None:
        """Write LATEST, step-N beside it if configured, and the curves."""
        names = ["LATEST"]
        if self.config.intermediate_checkpoints and self.state.updates:
            names.append(f"step-{self.state.updates}")
        self.write_checkpoint([os.path.join(self.run_dir, name) for name in names])
        self.log.draw_curves(self.config.exp_name)

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


def wins(rewards: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Share of the entries in which a reward is larger than the other; equal ones count as half. A scalar."""
    return ((rewards > others).float() + 0.5 * (rewards == others).float()).mean()


def _groups(batches: Iterable[list[TokenizedExample]], n: int) -> Iterator[list[list[TokenizedExample]]]:
    """n batches at a time; the last group has what is left."""
    iterator = iter(batches)
    while group := list(islice(iterator, n)):
        yield group
