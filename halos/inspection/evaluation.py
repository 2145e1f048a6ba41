"""Summarise the rows of an evaluation (RUN/evaluations/step-N.parquet): per dataset, by length, the worst first.

python scripts/inspect_data.py evaluation=RUN/evaluations/step-100.parquet
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from halos.errors import UserError
from halos.loader import DataLoader
from halos.records import Records
from halos.tokens import Role


class DatasetRow(NamedTuple):
    """One dataset of an evaluation; None where the loss gives no such number."""

    name: str
    responses: int
    loss: float
    chosen: float | None  # mean reward
    rejected: float | None
    wins: float | None  # share of pairs whose margin is above 0
    tokens_chosen: float | None  # mean length
    tokens_rejected: float | None


class Response(NamedTuple):
    role: str
    reward: float
    logps: float
    change: float  # log-prob minus that under the reference model, in nats; NaN without one
    n_tokens: int
    text: str


@dataclass(frozen=True)
class Case:
    """A test example that went wrong: a pair of low margin, or a single response with a reward of the wrong kind."""

    id: str
    margin: float | None
    loss: float
    prompt: str
    responses: list[Response]


def datasets(rows: Records) -> Iterator[DatasetRow]:
    """Yield a row for each dataset; with several, one for all of them first."""
    names = list(dict.fromkeys(rows.dataset))
    if len(names) > 1:
        yield _dataset("all", rows)
    for name in names:
        yield _dataset(name, rows.only(torch.tensor([one == name for one in rows.dataset])))


def _dataset(name: str, rows: Records) -> DatasetRow:
    chosen, rejected = (rows.only(rows.is_role(role)) for role in (Role.CHOSEN, Role.REJECTED))
    margins = rows.margin[rows.is_role(Role.CHOSEN)]
    return DatasetRow(
        name,
        len(rows),
        rows.mean_loss(),
        _mean(chosen.reward),
        _mean(rejected.reward),
        _mean((margins > 0).double()) if _mean(margins) is not None else None,
        _mean(chosen.n_tokens.double()),
        _mean(rejected.n_tokens.double()),
    )


def _mean(values: torch.Tensor) -> float | None:
    return float(values.mean()) if len(values) and not values.isnan().any() else None


def length_correlation(rows: Records, role: Role) -> float | None:
    """Return the correlation of reward and length among the responses of a role; None if it is undefined."""
    own = rows.only(rows.is_role(role))
    value = torch.corrcoef(torch.stack((own.n_tokens.double(), own.reward)))[0, 1] if len(own) > 1 else torch.nan
    return float(value) if value == value else None


def worst(rows: Records, n: int) -> list[list[int]]:
    """Return the n worst test examples, each as the numbers of its responses.

    Pairs come by their margin. Without pairs, the worst are chosen responses of low reward and rejected ones of high.
    """
    sign = torch.where(rows.is_role(Role.REJECTED), -1.0, 1.0)
    badness = torch.where(rows.margin.isnan().all(), rows.reward * sign, rows.margin)
    of_row: dict[int, list[int]] = {}
    for i, row in enumerate(rows.row.tolist()):
        of_row.setdefault(row, []).append(i)
    known = [own for own in of_row.values() if not badness[own[0]].isnan()]
    return sorted(known, key=lambda own: float(badness[own[0]]))[:n]


def cases(rows: Records, n: int, texts: dict[str, tuple[str, str]]) -> list[Case]:
    """Return the n worst examples. texts: id -> prompt and response, where they are known"""
    margins = rows.margin
    found = []
    for own in worst(rows, n):
        first = own[0]
        known = [texts.get(rows.id[i], ("", "")) for i in own]
        margin = float(margins[first])
        responses = [_response(rows, i, text) for i, (_, text) in zip(own, known, strict=True)]
        found.append(
            Case(
                rows.id[first].rpartition("/")[0],
                margin if margin == margin else None,
                float(rows.loss[first]),
                known[0][0],
                responses,
            )
        )
    return found


def _response(rows: Records, i: int, text: str) -> Response:
    logps, reference = float(rows.logps[i]), float(rows.reference_logps[i])
    return Response(rows.role[i], float(rows.reward[i]), logps, logps - reference, int(rows.n_tokens[i]), text)


def texts_of(loader: DataLoader, ids: set[str]) -> dict[str, tuple[str, str]]:
    """Return the prompt and the response, as the model reads them without truncation, of the ids that a loader has."""
    found = {}
    decode = loader.encoder.tokenizer.decode
    for index, example in enumerate(loader.examples):
        for generation in range(len(example.generations)):
            if (name := f"{example.id}/{generation}") in ids:
                response = loader.response_ids[loader.first_response[index] + generation]
                whole = [token if token >= 0 else ~token for token in response.tolist()]  # context is stored as ~id
                found[name] = decode(loader.prompt_ids[index]), decode(whole)
    return found


def check_some(rows: Records, path: str) -> None:
    """Raise UserError for an evaluation without a response."""
    if not len(rows):
        raise UserError(f"{path} has no rows; give another evaluation")
