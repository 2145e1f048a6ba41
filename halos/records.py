"""Rows of an evaluation, one per test response, in RUN/evaluations/step-N.parquet.

The logged loss is the mean of the rows' losses, weighted with their weights.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import accumulate, chain
from typing import Any, Self

import torch

from halos.engine import Batch, Outcome
from halos.errors import UserError, first_line
from halos.files import finished
from halos.run_dir import EVALUATIONS
from halos.tokens import Role

NAN = float("nan")


@dataclass(frozen=True)
class Records:
    """One entry per test response, in the order of the evaluation; NaN where there is no such number.

    row: number of the test example; the two responses of a pair have the same one
    reward: as the loss reports it
    logps, reference_logps: summed over the response's tokens, in nats; a reward model has none
    loss: of its pair, of the response, or the mean over its tokens, whatever the loss is a mean of
    weight: share of the response in the logged loss; over all rows the weights add up to 1
    """

    id: list[str]  # dataset/example/generation
    dataset: list[str]
    role: list[str]
    row: torch.Tensor
    n_tokens: torch.Tensor
    reward: torch.Tensor
    logps: torch.Tensor
    reference_logps: torch.Tensor
    loss: torch.Tensor
    weight: torch.Tensor

    def __len__(self) -> int:
        return len(self.id)

    def is_role(self, role: Role) -> torch.Tensor:
        """(n_responses,) bool"""
        return torch.tensor([one == role for one in self.role], dtype=torch.bool)

    @property
    def margin(self) -> torch.Tensor:
        """(n_responses,) reward of the chosen response of a pair minus that of the rejected one, for both of them."""
        of_row = {role: torch.full((int(self.row.max()) + 1,), NAN, dtype=torch.float64) for role in Role}
        for role, rewards in of_row.items():
            rewards[self.row[self.is_role(role)]] = self.reward[self.is_role(role)]
        margins = of_row[Role.CHOSEN] - of_row[Role.REJECTED]
        return torch.where(self.is_role(Role.UNRELATED), NAN, margins[self.row])

    def mean_loss(self) -> float:
        """Return the loss as it is logged, over these rows."""
        return float((self.loss * self.weight).nansum() / self.weight.sum())

    def only(self, kept: torch.Tensor) -> Self:
        """Return the rows where `kept`, (n_responses,) bool, is True."""
        at = kept.nonzero()[:, 0].tolist()
        columns: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        picked: dict[str, Any] = {
            name: x[at] if isinstance(x, torch.Tensor) else [x[i] for i in at] for name, x in columns.items()
        }
        return type(self)(**picked)

    def by_dataset(self, accuracy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return loss and rewards of each dataset, as `loss/eval/shp`; nothing if there is only one."""
        names = list(dict.fromkeys(self.dataset))
        parts = {name: self.only(torch.tensor([one == name for one in self.dataset])) for name in names}
        values: dict[str, float] = {}
        for name, part in parts.items() if len(parts) > 1 else ():
            own = {"loss/eval": part.mean_loss(), **part._rewards(accuracy)}
            values |= {f"{metric}/{name}": own[metric] for metric in own}
        return values

    def _rewards(self, accuracy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> dict[str, float]:
        sides = {role: self.reward[self.is_role(role)] for role in (Role.CHOSEN, Role.REJECTED)}
        sides = {role: rewards for role, rewards in sides.items() if len(rewards) and not rewards.isnan().any()}
        values = {f"rewards_eval/{role}": float(rewards.mean()) for role, rewards in sides.items()}
        if len(sides) == 2:
            values["rewards_eval/accuracies"] = float(accuracy(*sides.values()))
            values["rewards_eval/margins"] = values["rewards_eval/chosen"] - values["rewards_eval/rejected"]
        return values

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """Return the rows of several batches, on the CPU. The weights become shares of the whole."""
        columns: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            is_tensor = isinstance(values[0], torch.Tensor)
            columns[field.name] = torch.cat(values).double().cpu() if is_tensor else list(chain.from_iterable(values))
        columns |= {name: columns[name].long() for name in ("row", "n_tokens")}
        starts = torch.tensor([0, *accumulate(int(part.row.max()) + 1 for part in parts)][:-1])
        columns["row"] += starts.repeat_interleave(torch.tensor([len(part) for part in parts]))
        columns["weight"] /= columns["weight"].sum()
        return cls(**columns)

    def write(self, path: str) -> None:
        """Write the rows and their margins. The file is there whole or not at all."""
        import pyarrow
        from pyarrow import parquet

        os.makedirs(os.path.dirname(path), exist_ok=True)
        columns = {field.name: getattr(self, field.name) for field in fields(self)} | {"margin": self.margin}
        arrays = {
            name: pyarrow.array(values.numpy() if isinstance(values, torch.Tensor) else values, from_pandas=True)
            for name, values in columns.items()
        }
        # Opened here, because the error of pyarrow's own file does not say plainly why it cannot be written.
        with finished(path) as unfinished, open(unfinished, "wb") as file:
            parquet.write_table(pyarrow.table(arrays), file)

    @classmethod
    def read(cls, path: str) -> Self:
        """Read what `write` has written. Raises UserError for a file that is something else."""
        import pyarrow
        from pyarrow import parquet

        if not os.path.isfile(path):
            raise UserError(f"{path} does not exist; give an evaluation of a run, as in RUN/evaluations/step-0.parquet")
        try:
            table = parquet.read_table(path, partitioning=None).to_pydict()
            columns = {field.name: table[field.name] for field in fields(cls)}
            numbers = {name: [NAN if x is None else x for x in columns[name]] for name in list(columns)[5:]}
            whole = {name: torch.tensor(columns[name]) for name in ("row", "n_tokens")}
            return cls(**columns | whole | {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()})
        except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            reason = first_line(error)[:120]
            raise UserError(f"{path} is not an evaluation that a run wrote ({reason}); give another one") from None


#### ONE BATCH


def of_batch(batch: Batch, outcome: Outcome) -> Records:
    """Return the records of a batch, on its device: nothing waits for a GPU. `weight` counts losses here."""
    outcome = outcome.detach()
    loss, weight = _shares(batch, outcome.losses)
    names = (example.ids or ("",) * len(example.responses) for example in batch.examples)
    return Records(
        id=[name for own in names for name in own],
        dataset=batch.datasets,
        role=[str(role) for example in batch.examples for role in example.roles],
        row=torch.tensor([i for i, example in enumerate(batch.examples) for _ in example.responses]),
        n_tokens=batch.lengths,
        reward=_by_response(batch, outcome.chosen_rewards, outcome.rejected_rewards),
        logps=_sums(batch, batch.policy.logps.detach()),
        reference_logps=_sums(batch, batch.reference_logps),
        loss=loss,
        weight=weight,
    )


def _sums(batch: Batch, logps: torch.Tensor | None) -> torch.Tensor:
    """(n_tokens,) -> (n_responses,): sums over each response; NaN without a reference, or of a reward model."""
    if logps is None or not len(logps):
        return torch.full_like(batch.lengths, NAN, dtype=torch.float64)
    return batch.sum_by_response(logps.double())


def _where(batch: Batch, role: Role) -> torch.Tensor:
    """(n_of_this_role,) the numbers of its responses."""
    return batch.of_role(torch.arange(len(batch.lengths), device=batch.policy.logps.device), role)


def _by_response(batch: Batch, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """(n_chosen,), (n_rejected,) -> (n_responses,); NaN where the loss gives none."""
    values = torch.full_like(batch.lengths, NAN, dtype=torch.float64)
    for role, own in ((Role.CHOSEN, chosen), (Role.REJECTED, rejected)):
        where = _where(batch, role)
        if len(own) == len(where):
            values.index_copy_(0, where, own.double())
    return values


def _shares(batch: Batch, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_responses,) each: the loss of a response, and how many of the batch's losses are its own.

    Told by their number, the losses are of responses (the chosen ones first), of pairs, or of tokens. Of any other
    number, they belong to all responses alike.
    """
    losses = losses.double()
    chosen, rejected = _where(batch, Role.CHOSEN), _where(batch, Role.REJECTED)
    trained, n = torch.cat((chosen, rejected)), len(losses)
    if n == len(batch.policy.logps) and n != len(trained):
        return batch.sum_by_response(losses) / batch.lengths, batch.lengths.double()
    if n == len(trained):
        own = losses
    elif n == len(chosen) == len(rejected):
        own = torch.cat((losses, losses))
    else:
        own = losses.mean().expand(len(trained))
    loss = torch.full_like(batch.lengths, NAN, dtype=torch.float64).index_copy(0, trained, own)
    return loss, torch.zeros_like(loss).index_fill(0, trained, n / max(1, len(trained)))


#### THE FILES OF A RUN


def path_of(run_dir: str, step: int) -> str:
    return os.path.join(run_dir, EVALUATIONS, f"step-{step}.parquet")


def steps(run_dir: str) -> Iterator[int]:
    """Yield the updates after which the run was evaluated, in their order."""
    directory = os.path.join(run_dir, EVALUATIONS)
    names = os.listdir(directory) if os.path.isdir(directory) else []
    yield from sorted(int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)\.parquet", name)))


def remove_after(run_dir: str, step: int) -> None:
    """Remove what was written of evaluations after this many updates: a resumed run makes them again."""
    directory = os.path.join(run_dir, EVALUATIONS)
    for name in os.listdir(directory) if os.path.isdir(directory) else []:
        found = re.fullmatch(r"(?:step|ches)-(\d+)\.(?:parquet|json)", name)
        if found and int(found[1]) > step:
            os.remove(os.path.join(directory, name))
