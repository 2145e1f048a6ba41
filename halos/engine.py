"""One global batch through a model: what goes into a loss (`Batch`), what comes out of it (`Outcome`), and the forward
and backward passes around it (`Forward`).

Every rank sees the whole batch and runs its share of it, in pieces of bounded size. The results are gathered, without
gradient, into vectors over all response tokens of the batch, which are the same on every rank: a loss of these vectors
is the loss of the global batch. Change this file to change how a batch is computed; losses are in `trainers.py`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch

from halos import distributed
from halos.errors import UserError
from halos.models import PerToken, PolicyModel
from halos.packing import Inputs, moved, schedule
from halos.reference_kl import Predictions
from halos.scalars import Scalars
from halos.tokens import Role, TokenizedExample

# Run by a rank that has nothing left to do in a forward pass that all ranks take part in.
DUMMY = TokenizedExample(np.zeros(1, np.int32), (np.zeros(1, np.int32),), (Role.CHOSEN,))


TRAINED = frozenset({Role.CHOSEN, Role.REJECTED})
UNTRAINED = frozenset({Role.UNRELATED})


@dataclass(frozen=True)
class Batch:
    """The global batch as a loss sees it.

    Vectors over tokens are (n_tokens,): the tokens of all responses, one response after the other, without the turns of
    other speakers between an assistant's. Vectors over
    responses are (n_responses,), in the same order: example after example.

    policy: log-probs of the tokens, and values, entropies and divergences from the reference model if the loss has a
        critic or wants them. In training all but entropies have gradients, except for those of unrelated responses. A
        reward model has no log-probs; its values are the scores of the conversation up to and including each token.
    reference_logps: (n_tokens,) log-probs under the reference model, in nats; None without one
    is_clamped: (n_tokens,) bool: tokens whose log-ratio was beyond the bounds of `clamped`; None without bounds
    """

    examples: list[TokenizedExample]
    policy: PerToken
    reference_logps: torch.Tensor | None
    is_clamped: torch.Tensor | None = None

    @cached_property
    def lengths(self) -> torch.Tensor:
        """(n_responses,) number of tokens of each response, without those of turns that are not trained on."""
        return self._moved([n for example in self.examples for n in example.n_targets])

    @cached_property
    def chosen(self) -> torch.Tensor:
        """(n_responses,) bool: responses that are chosen, or desirable."""
        return self._has_role(Role.CHOSEN)

    @cached_property
    def rejected(self) -> torch.Tensor:
        """(n_responses,) bool: responses that are rejected, or undesirable."""
        return self._has_role(Role.REJECTED)

    @cached_property
    def unrelated(self) -> torch.Tensor:
        """(n_responses,) bool: responses to other prompts, which are scored and not trained on."""
        return self._has_role(Role.UNRELATED)

    @cached_property
    def scores(self) -> torch.Tensor:
        """(n_responses,) float32 scores that the data gives the responses; NaN where it gives none."""
        nested = [example.scores or (float("nan"),) * len(example.responses) for example in self.examples]
        return self._moved([float(score) for scores in nested for score in scores])

    @cached_property
    def margins(self) -> torch.Tensor:
        """(n_pairs,) score of the chosen response minus that of the rejected one. Paired data only."""
        return self.of_role(self.scores, Role.CHOSEN) - self.of_role(self.scores, Role.REJECTED)

    @property
    def ids(self) -> list[str]:
        """One name per response, `dataset/example/generation`: the same in every epoch and batch."""
        return [name for example in self.examples for name in example.ids]

    @property
    def datasets(self) -> list[str]:
        """The name of the dataset that each response's prompt is from."""
        return [example.dataset for example in self.examples for _ in example.responses]

    def sum_by_response(self, per_token: torch.Tensor) -> torch.Tensor:
        """(n_tokens,) -> (n_responses,): the sum over each response's tokens."""
        return per_token.new_zeros(len(self.lengths)).index_add(0, self._response_of_token, per_token)

    def at_last_token(self, per_token: torch.Tensor) -> torch.Tensor:
        """(n_tokens,) -> (n_responses,): the entry of each response's last token that is trained on."""
        return per_token.index_select(0, self.lengths.cumsum(0) - 1)

    def clamped(self, least: float, most: float) -> "Batch":
        """Return the batch with the log-ratio of policy and reference clamped to [least, most] nats for each token.

        The policy's log-probs change for this. Beyond the bounds they have no gradient, within they are what they were.
        """
        assert self.reference_logps is not None, "log-ratios need a reference model"
        logps, bounds = self.policy.logps, (self.reference_logps + least, self.reference_logps + most)
        is_clamped = (logps < bounds[0]) | (logps > bounds[1])
        return replace(self, policy=self.policy._replace(logps=logps.clamp(*bounds)), is_clamped=is_clamped)

    @property
    def metrics(self) -> dict[str, torch.Tensor]:
        """Metrics that do not depend on the loss: the share of clamped tokens, if there are bounds."""
        return {} if self.is_clamped is None else {"clamped/tokens": self.is_clamped}

    def of_role(self, values: torch.Tensor, role: Role) -> torch.Tensor:
        """(n_responses,) -> (n_of_this_role,). Unlike a mask, this does not wait for a GPU."""
        return values.index_select(0, self._numbers[role])

    @cached_property
    def _numbers(self) -> dict[Role, torch.Tensor]:
        """Role -> (n,) numbers of the responses that have it."""
        roles = [role for example in self.examples for role in example.roles]
        return {role: self._moved([i for i, one in enumerate(roles) if one is role], torch.long) for role in Role}

    @cached_property
    def _response_of_token(self) -> torch.Tensor:
        """(n_tokens,) number of the response that each token belongs to."""
        lengths = [n for example in self.examples for n in example.n_targets]
        return moved(torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)), self.policy.logps.device)

    def _has_role(self, role: Role) -> torch.Tensor:
        return self._moved([one is role for example in self.examples for one in example.roles])

    def _moved(self, values: list, dtype: torch.dtype | None = None) -> torch.Tensor:
        return moved(torch.tensor(values, dtype=dtype), self.policy.logps.device)


@dataclass(frozen=True)
class Statistic:
    """A metric that is not the mean of a vector, such as a variance.

    function: (vectors) -> a scalar; NaN where it is undefined, and then it is not logged
    vectors: its arguments for one batch; those of several batches are concatenated before `function` sees them
    """

    function: Callable[..., torch.Tensor]
    vectors: tuple[torch.Tensor, ...]

    def value(self) -> torch.Tensor:
        return self.function(*self.vectors)


@dataclass(frozen=True)
class Outcome:
    """The loss of one batch. `losses.mean()` is optimised.

    losses: one loss per pair, per response (the chosen ones first) or per token
    chosen_rewards, rejected_rewards, chosen_logps, rejected_logps: (n_chosen,) or (n_rejected,), to be logged; empty if
        the loss has none
    metrics: more to be logged, `name: vector` or `name: Statistic`. Of a vector the mean is logged, over all batches of
        an update or of an evaluation. `kl/chosen` is logged as `kl/chosen` in training, as `kl_eval/chosen` in
        evaluation. A NaN among a vector's values is logged as NaN.
    """

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    metrics: dict[str, torch.Tensor | Statistic] = field(default_factory=dict)

    def with_metrics(self, metrics: Mapping[str, torch.Tensor | Statistic]) -> Self:
        return replace(self, metrics={**self.metrics, **metrics})

    def detach(self) -> Self:
        return self.concatenate([self])

    @classmethod
    def concatenate(cls, outcomes: list[Self]) -> Self:
        """One outcome of several batches, without gradient."""
        vectors = [f.name for f in fields(cls) if f.name != "metrics"]
        parts: dict[str, Any] = {name: _cat(getattr(outcome, name) for outcome in outcomes) for name in vectors}
        names = dict.fromkeys(name for outcome in outcomes for name in outcome.metrics)
        parts["metrics"] = {name: _join([o.metrics[name] for o in outcomes if name in o.metrics]) for name in names}
        return cls(**parts)

    def summary(self, accuracy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], mode: str) -> Scalars:
        """Metrics by their names in the log. What cannot be computed, such as a mean of nothing, is left out.

        accuracy: of chosen and rejected rewards
        mode: train or eval
        """
        values = Scalars()
        values.add(f"loss/{mode}", self.losses.mean())
        for side in ("chosen", "rejected"):
            for name in ("rewards", "logps"):
                if len(vector := getattr(self, f"{side}_{name}")):
                    values.add(f"{name}_{mode}/{side}", vector.mean())
        if len(self.chosen_rewards) and len(self.rejected_rewards):
            values.add(f"rewards_{mode}/accuracies", accuracy(self.chosen_rewards, self.rejected_rewards))
            values.add(f"rewards_{mode}/margins", self.chosen_rewards.mean() - self.rejected_rewards.mean())
        suffix = "" if mode == "train" else f"_{mode}"
        for name, metric in self.metrics.items():
            group, slash, rest = name.partition("/")
            name = f"{group}{suffix}{slash}{rest}"
            if isinstance(metric, Statistic):
                values.add(name, metric.value(), undefined_if_nan=True)
            elif len(metric):
                values.add(name, metric.float().mean())
        return values


def _cat(vectors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.as_tensor(vector).detach().reshape(-1) for vector in vectors])


def _join(parts: list[Any]) -> torch.Tensor | Statistic:
    """The same metric of several batches as one."""
    if not isinstance(parts[0], Statistic):
        return _cat(parts)
    return Statistic(parts[0].function, tuple(map(_cat, zip(*(part.vectors for part in parts), strict=True))))


@dataclass(frozen=True)
class Piece:
    """One forward pass of this rank."""

    examples: list[TokenizedExample]
    positions: torch.Tensor  # (n,) where its response tokens stand in the batch; empty for the dummy
    laid_out: dict[bool, Inputs] = field(default_factory=dict)  # packed and padded, as they were needed

    def inputs(self, model: PolicyModel) -> Inputs:
        """Return the model's inputs: the same for policy and reference, and for all passes over a batch."""
        if model.packs not in self.laid_out:
            self.laid_out[model.packs] = model.inputs(self.examples)
        return self.laid_out[model.packs]


class Planned(list[TokenizedExample]):
    """The examples of a global batch, and this rank's forward passes over them.

    trained: those over responses that are trained on, which have a backward pass
    untrained: those over unrelated responses
    """

    def __init__(self, examples: list[TokenizedExample], max_tokens: int, device: torch.device):
        super().__init__(examples)
        self.max_tokens = max_tokens
        self.trained = pieces(examples, TRAINED, max_tokens, device)
        self.untrained = pieces(examples, UNTRAINED, max_tokens, device)

    def lay_out(self, model: PolicyModel) -> Self:
        """Prepare the inputs of all forward passes."""
        for piece in self.trained + self.untrained:
            piece.inputs(model)
        return self


def planned(examples: list[TokenizedExample], max_tokens: int, device: torch.device) -> Planned:
    """Plan the forward passes over a batch, unless that is done."""
    if isinstance(examples, Planned) and examples.max_tokens == max_tokens:
        return examples
    return Planned(examples, max_tokens, device)


def joined(microbatches: list[list[TokenizedExample]]) -> list[TokenizedExample]:
    """Return all examples of some microbatches. Those of one are returned as they are, with their plan."""
    return microbatches[0] if len(microbatches) == 1 else [one for batch in microbatches for one in batch]


class Forward:
    """A global batch through a model, on all ranks together.

    `tokens` holds the log-probs of all response tokens of the batch (and what else is wanted), as views of an autograd
    leaf. After the backward pass of a loss on them, `backward()` sends the leaf's gradient into the model.

    If all of this rank's share fits one forward pass, its graph is kept. Otherwise the pieces run without gradient
    first, and again, one by one, with gradient in `backward`: memory is bounded by one piece, and the loss is still
    that of the whole batch. Unrelated responses run apart from the others, without a backward pass; under the reference
    model, too, so that it computes exactly what the policy does and log-ratios start at 0.

    max_tokens: limit of packed tokens in one forward pass; a longer example is a piece of its own
    reference: the reference model, if its divergence from `model` is wanted: it runs the same forward passes, right
        before the model, and gives `reference_logps`, too
    """

    def __init__(
        self,
        model: PolicyModel,
        examples: list[TokenizedExample],
        max_tokens: int,
        with_entropy: bool = False,
        reference: PolicyModel | None = None,
    ):
        self.model = model
        self.with_entropy = with_entropy
        self.reference = reference
        self.reference_head = reference.whole_head() if reference is not None else None
        trains = torch.is_grad_enabled()
        plan = planned(examples, max_tokens, model.device)
        self.pieces, without_graph = plan.trained, plan.untrained
        keeps_graph = trains and len(self.pieces) == 1
        with torch.set_grad_enabled(keeps_graph):
            outputs = [self._run(piece) for piece in self.pieces]
        self.graph = outputs[0] if keeps_graph else None
        with torch.no_grad():
            outputs += [self._run(piece) for piece in without_graph]
        where = [piece.positions for piece in self.pieces + without_graph]
        n_tokens = sum(n for example in examples for n in example.n_targets)
        self.leaf: torch.Tensor = distributed.gather_rows(outputs, where, n_tokens).requires_grad_(trains)

    def _run(self, piece: Piece) -> torch.Tensor:
        """(n, columns): what `PerToken` has of each response token of a piece, in its order, and after it the token's
        reference log-prob, if there is a reference model."""
        inputs = piece.inputs(self.model)
        reference_logps, predictions = self._run_reference(inputs)
        output = self.model(inputs, with_entropy=self.with_entropy, reference=predictions)._asdict()
        output["reference_logps"] = reference_logps
        columns = {name: column for name, column in output.items() if column is not None and len(column)}
        self.names = list(columns)
        return torch.stack(list(columns.values()), dim=1)[: len(piece.positions)]

    @torch.no_grad()
    def _run_reference(self, inputs: Inputs) -> tuple[torch.Tensor | None, Predictions | None]:
        """Return the log-probs and the predictions of the reference model; None without one."""
        if self.reference is None or self.reference_head is None:
            return None, None
        output = self.reference(inputs, with_states=True)
        if inputs.layout is None:
            return output.logps, Predictions(output.states)
        weight, bias = self.reference_head
        return output.logps, Predictions(output.states, weight.to(output.states.dtype), bias)

    @property
    def tokens(self) -> PerToken:
        columns = dict(zip(self.names, self.leaf.unbind(1), strict=True))
        logps = columns.get("logps", self.leaf.new_empty(0))
        return PerToken(logps, *(columns.get(name) for name in ("values", "entropy", "kl")))

    @property
    def reference_logps(self) -> torch.Tensor | None:
        """(n_tokens,) log-probs under the reference model, in nats; None without one."""
        return self.leaf.detach()[:, -1] if self.reference is not None else None

    def misuse(self) -> tuple[torch.Tensor, UserError] | None:
        """Return whether the loss has differentiated the entropy (a bool on the device), and the error if it has."""
        if not self.with_entropy or self.leaf.grad is None:
            return None
        return self.leaf.grad[:, self.names.index("entropy")].any(), UserError(
            "the loss differentiates batch.policy.entropy, which has no gradient: that term would train nothing; "
            "use batch.policy.entropy.detach(), or leave the term out"
        )

    def backward(self) -> None:
        """Send the gradient of `tokens` into the model's parameters."""
        # FSDP averages gradients over ranks, and each rank has those of its own tokens: hence the factor.
        assert self.leaf.grad is not None, "the loss must be differentiated first"
        upstream = self.leaf.grad * distributed.world_size()
        for piece in self.pieces:
            output = self.graph if self.graph is not None else self._run(piece)
            output.backward(upstream[piece.positions])


def pieces(
    examples: list[TokenizedExample], roles: frozenset[Role], max_tokens: int, device: torch.device
) -> list[Piece]:
    """Plan this rank's forward passes over the responses that have one of these roles.

    Every rank has equally many, since all ranks take part in each; an idle one runs DUMMY and keeps none of its tokens.
    """
    selected, positions = _select(examples, roles)
    runs = schedule(selected, distributed.world_size(), max_tokens)[distributed.rank()]
    nothing = np.empty(0, np.int64)
    return [
        Piece(
            [selected[i] for i in run] or [DUMMY],
            moved(torch.from_numpy(np.concatenate([nothing, *(positions[i] for i in run)])), device),
        )
        for run in runs
    ]


def _select(
    examples: list[TokenizedExample], roles: frozenset[Role]
) -> tuple[list[TokenizedExample], list[np.ndarray]]:
    """Examples reduced to the responses of these roles, and where the tokens of those stand in the batch."""
    selected, positions, start = [], [], 0
    for example in examples:
        kept = []
        for index, (n, role) in enumerate(zip(example.n_targets, example.roles, strict=True)):
            if role in roles:
                kept.append((index, np.arange(start, start + n)))
            start += n
        if kept:
            selected.append(example.only([index for index, _ in kept]))
            positions.append(np.concatenate([span for _, span in kept]))
    return selected, positions
