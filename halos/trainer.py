"""The training loop: forward and backward passes, updates, evaluation and logging.

`BasicTrainer` is what every loss in `trainers.py` inherits. A loss defines `loss` (four vectors) or `batch_loss` (a
`Batch`); `train` is the loop, and its steps (`train_step`, `update`, `evaluate`, `save`, `should_stop`) are methods to
override. What one batch goes through is in `halos/engine.py`; clipping, optimizer and schedule are in
`halos/updates.py`, checkpoints and states in `halos/saving.py`.
"""

import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from itertools import islice
from typing import Any, NoReturn

import torch
from omegaconf import DictConfig

from halos import best, ches, displacement, distributed, loggers, metrics, mishaps, records, sharding, states, stopping
from halos.engine import Batch, Forward, Outcome, Planned, joined, planned
from halos.errors import UserError
from halos.loader import DataLoader
from halos.models import PolicyModel
from halos.packing import moved
from halos.prefetch import ahead
from halos.records import Records
from halos.reference_cache import ReferenceCache
from halos.rules import Rule
from halos.run_dir import EVALUATIONS
from halos.saving import Saving
from halos.scalars import Stopwatch
from halos.tokens import Role, TokenizedExample
from halos.train_state import TrainState
from halos.updates import Updates


class BasicTrainer(Updates, Saving):
    """Training and evaluation with a loss that a subclass defines."""

    data_format: str | None = None  # the DataLoader.data_format that the loss needs; None: any
    needs: tuple[str, ...] = ()  # keys of the loss's YAML that cannot be false
    rules: Mapping[str, Rule] = {}  # keys of the loss's YAML -> the values they can have
    uses_entropy = False  # whether `Batch.policy` has the entropy of each token's distribution
    uses_reference_kl = False  # whether it has the divergence from the reference model's, which then runs in every step
    departures: Mapping[str, str] = {}  # checks of the loss card (docs/loss_card.md) that do not hold -> why

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
        self.records: Records | None = None  # of the last evaluation
        self.reference_cache: ReferenceCache | None = None  # then `reference_model` is None
        self.log: metrics.MetricsLog | metrics.NoLog = metrics.NoLog()
        self.metrics_bytes: int | None = None  # of metrics.jsonl, that a resumed run keeps
        self.step_started = time.monotonic()
        self.stopwatch = Stopwatch(distributed.default_device())
        self.checks = mishaps.Checks()  # of the batches since the last update
        self.divisor = 0  # what the gradients since the last update are divided by; 0: there are none
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
        return batch.of_role(values, Role.CHOSEN), batch.of_role(values, Role.REJECTED)

    def accuracy(self, chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
        """Share of (chosen, rejected) combinations in which chosen has the higher reward; ties are half."""
        return wins(chosen_rewards[:, None], rejected_rewards[None, :])

    #### ONE BATCH

    def forward(
        self, examples: list[TokenizedExample], reference_logps: torch.Tensor | None = None
    ) -> tuple[Forward, Batch]:
        """Run the policy on a global batch, and the reference model unless its log-probs are given."""
        examples, most = self.planned(examples), self.config.model.max_tokens_per_forward
        reference = self.reference_model if self.uses_reference_kl else None
        with self.stopwatch("forward"):
            forward = Forward(self.policy, examples, most, self.uses_entropy, reference)
        if reference is not None:
            reference_logps = forward.reference_logps
        elif reference_logps is None:
            with self.stopwatch("reference_on_disk" if self.reference_cache else "reference"):
                reference_logps = self.reference_logps(examples)
        batch, humanline = Batch(examples, forward.tokens, reference_logps), self.config.humanline
        if humanline.enabled:
            batch = batch.clamped(humanline.log_epsilon_P, humanline.log_epsilon_R)
        return forward, batch

    @torch.no_grad()
    def reference_logps(self, examples: list[TokenizedExample]) -> torch.Tensor | None:
        """(n_tokens,) log-probs under the reference model, in nats; None if the loss has none."""
        if self.reference_cache is not None:
            return moved(self.reference_cache.logps(examples), self.policy.device)
        if self.reference_model is None:
            return None
        return Forward(self.reference_model, examples, self.config.model.max_tokens_per_forward).tokens.logps

    def forward_backward(self, examples: list[TokenizedExample]) -> Outcome:
        """The outcome of a batch, without gradient; its gradient is added to that of the policy's parameters."""
        forward, batch = self.forward(examples)
        return self.backward(self.batch_loss(batch), forward, batch)

    def backward(self, outcome: Outcome, forward: Forward, batch: Batch) -> Outcome:
        """Send the gradient of the summed losses into the policy, divided by `divisor`; `update` does the rest."""
        if outcome.losses.ndim != 1:
            raise UserError(
                f"the loss of {type(self).__name__} has the shape {tuple(outcome.losses.shape)}; return a vector, one "
                "loss per pair, response or token, so that microbatches of different sizes weigh as they should"
            )
        self.checks.finite(outcome.losses, "the loss", batch.examples)
        # Gradients become those of a mean here, where they are small, and not as those of all weights.
        self.divisor = self.divisor or len(outcome.losses)
        with self.stopwatch("backward"):
            (outcome.losses.sum() / self.divisor).backward()
            if misuse := forward.misuse():
                self.checks.add(*misuse)
            forward.backward()
        return outcome.with_metrics(batch.metrics).detach()

    def planned(self, examples: list[TokenizedExample]) -> Planned:
        """The batch with this rank's forward passes over it."""
        return planned(examples, self.config.model.max_tokens_per_forward, self.policy.device)

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
        self.state_written = time.monotonic()
        starts = state.examples == 0
        if starts and self.config.do_first_eval:
            self.log_evaluation()
            self.save_if_best()
        self.step_started = time.monotonic()
        # A state can be from before the evaluation that followed its step: a resumed run begins with that.
        if starts or self.after_step():
            with closing(self.steps()) as steps:
                for microbatches in self.stopwatch.waiting("data", steps):
                    self.guarded_step(microbatches)
                    if not self.after_step():
                        break
        if state.evaluated_at < state.examples:
            self.log_evaluation()
            self.save()
        if state.saved_at < state.examples:
            self.save_state()
        self.log.settle()

    def steps(self) -> Generator[list[list[TokenizedExample]]]:
        """The microbatches of each training step. Those of the next one are prepared meanwhile, in a thread."""
        loader, state = self.train_loader, self.state
        if self.config.keep_checkpoints:
            _ = loader.fingerprint  # which a state will name: not to be computed while the thread uses the loader
        n = self.config.model.gradient_accumulation_steps
        try:
            with closing(ahead(self.positioned_batches(), self.policy.device)) as batches:
                while group := list(islice(batches, n)):
                    state.position = group[-1][1]
                    yield [microbatch for microbatch, _ in group]
        finally:
            loader.load_state_dict(state.position)

    def positioned_batches(self) -> Iterator[tuple[Planned, dict[str, int]]]:
        """Batches of the training data, and the loader's position after each."""
        for examples in self.train_loader:
            yield self.planned(examples).lay_out(self.policy), self.train_loader.state_dict()

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
        self.step_started = time.monotonic()  # the next step's speed is without what was saved
        if is_over := best.patience_is_over(self.state.best, self.config.best):
            self.log.say(best.line(self.state.best, self.config.best))
        return not distributed.any_rank(is_over or self.should_stop())

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
            with mishaps.explained_out_of_memory(self.config, joined(microbatches), "model.batch_size"):
                self.train_step(microbatches)
        except mishaps.NotFinite as problem:
            self.skip(problem)
        else:
            self.state.skipped_in_a_row = 0

    def skip(self, problem: mishaps.NotFinite) -> None:
        """Leave the weights as they are and go on, or end the run if `on_nonfinite` says so or this happens often."""
        state = self.state
        state.optimizer.zero_grad(set_to_none=True)
        self.divisor = 0
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
        self.update(outcomes, joined(microbatches))

    def update(self, outcomes: list[Outcome], examples: list[TokenizedExample]) -> None:
        """Clip, step, schedule, zero, log. Raises before the weights change if the gradient is not finite.

        outcomes: those whose gradients have been accumulated
        examples: what they were computed from
        """
        state = self.state
        lr = float(state.optimizer.param_groups[0]["lr"])  # torchao keeps a tensor, which the scheduler changes
        with self.stopwatch("optimizer"):
            norms = self.clip_gradients(sum(len(outcome.losses) for outcome in outcomes), examples)
            state.optimizer.step()
            state.scheduler.step()
            state.optimizer.zero_grad(set_to_none=True)
        state.updates += 1
        self.log_step(outcomes, examples, {**norms, "lr": lr})

    def should_stop(self) -> bool:
        """Asked after every training step, on every rank: training ends if the answer is True on any of them.

        The run is then evaluated and saved as at its normal end. `self.state` says where it stands: its `eval_metrics`
        are those of the last evaluation, which may have followed this step. Look at the state and leave it as it is: a
        resumed run asks again about the step that it goes on from.
        """
        return False

    #### EVALUATION

    def eval_is_due(self) -> bool:
        """Return whether a multiple of eval_every has been passed since the last evaluation."""
        every = self.config.eval_every
        return self.state.examples // every > self.state.evaluated_at // every

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The closed-form metrics over the test examples. `records` then has what they are of each response."""
        self.eval_loader.restart()
        started = time.monotonic()
        outcomes, parts = [], []
        coming = ahead(map(self.planned, self.eval_loader), self.policy.device)
        with sharding.evaluating(self.policy):
            for examples in metrics.progress(coming, "evaluating", len(self.eval_loader)):
                with mishaps.explained_out_of_memory(self.config, examples, "model.eval_batch_size"):
                    _, batch = self.forward(examples)
                    outcomes.append(self.batch_loss(batch).with_metrics(batch.metrics))
                    parts.append(records.of_batch(batch, outcomes[-1]))
        seconds = time.monotonic() - started
        self.records = Records.concatenate(parts)
        values = self.summarize(outcomes, "eval") | self.records.by_dataset(self.accuracy)
        return values | {"examples_per_second": self.eval_loader.examples_seen / seconds}

    def log_evaluation(self) -> None:
        """Evaluate, and write and show what was found: metrics, records, the best evaluation so far, displacement."""
        state, self.records = self.state, None
        state.eval_metrics, state.evaluated_at = self.evaluate(), state.examples
        if not math.isfinite(state.eval_metrics["loss/eval"]):
            self.give_up(mishaps.NotFinite("the loss on the test examples", []))
        warning = self.keep_records()
        state.best = best.after(state.best, self.config.best, state.updates, state.eval_metrics)
        self.log.evaluation(state.updates, state.examples, state.eval_metrics)
        if warning:
            self.log.say(warning)
        self.stopwatch.lap()

    def keep_records(self) -> str:
        """Write evaluations/step-N.parquet. Returns a warning if the log-probs of chosen responses are displaced."""
        if self.records is None:  # an evaluate() of one's own
            return ""
        found = distributed.from_main(distributed.on_main(displacement.since_first, self.run_dir, self.records))
        if distributed.is_main():
            self.records.write(records.path_of(self.run_dir, self.state.updates))
        if found is None:
            return ""
        change, of_chosen = found
        self.state.eval_metrics |= {"displacement/found": float(change.is_found)}
        return f"{change.line()}; {self.pairs_alike(of_chosen)}" if change.is_found else ""

    def pairs_alike(self, changes: dict[str, float]) -> str:
        """Score the test pairs by CHES, once in a run. Returns where the worst are, on rank 0.

        changes: id -> how the log-prob of a chosen response has changed, in nats
        """
        if known := distributed.from_main(ches.found_in(self.run_dir)):
            return f"pairs: {known}"
        path = os.path.join(self.run_dir, EVALUATIONS, f"ches-{self.state.updates}.json")
        return ches.line(path) if self.score_pairs(path, changes) else "the test data have no pairs to score by CHES"

    def score_pairs(self, path: str, changes: dict[str, float]) -> bool:
        """Write the test pairs of the highest CHES scores. Returns False if there are no pairs."""
        max_tokens = self.config.model.max_tokens_per_forward
        return ches.score(path, self.policy, self.eval_loader, changes, max_tokens, self.tokenizer)

    #### METRICS

    def summarize(self, outcomes: list[Outcome], mode: str) -> dict[str, float]:
        """Metrics over all examples of all outcomes.

        mode: train or eval
        """
        return Outcome.concatenate(outcomes).summary(self.accuracy, mode).read()

    def log_step(self, outcomes: list[Outcome], examples: list[TokenizedExample], update: dict[str, float]) -> None:
        state, now = self.state, time.monotonic()
        seconds, self.step_started = now - self.step_started, now
        n_tokens = sum(example.n_tokens for example in examples)
        known = {
            **update,
            "examples_per_second": len(examples) / seconds,
            "counters/examples": state.examples,
            "counters/updates": state.updates,
        }
        known |= {"counters/skipped": state.skipped} if state.skipped else {}
        sent = Outcome.concatenate(outcomes).summary(self.accuracy, "train").send()
        lap = self.stopwatch.lap()
        self.log.training_step(
            state.updates, state.examples, lambda: {**sent.read(), **known, **lap.read()}, n_tokens / seconds
        )

    def open_log(self) -> metrics.MetricsLog | metrics.NoLog:
        if not distributed.is_main():
            return metrics.NoLog()
        resumed_after = None if self.metrics_bytes is None else self.state.updates
        interval, total = self.config.minimum_log_interval_secs, self.train_loader.total_examples
        return metrics.MetricsLog(
            self.run_dir,
            total,
            interval,
            loggers.open_all(self.config, self.run_dir, resumed_after),
            late=self.policy.device.type == "cuda",
            examples=self.state.examples,
            n_bytes=self.metrics_bytes,
        )


def wins(rewards: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Share of the entries in which a reward is larger than the other; equal ones count as half. A scalar."""
    return ((rewards > others).float() + 0.5 * (rewards == others).float()).mean()
