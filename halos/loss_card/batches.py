"""Global batches without a model: rows of a loss's own loader, and log-probs that give each response its log-ratio.

The rows come from the loader, so a batch has the roles that the loss is trained on: pairs, single responses, unrelated
ones. `batch_of` fills in what a model would say of their tokens; the other functions change a batch.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from halos.engine import Batch
from halos.examples import Example
from halos.loader import DataLoader
from halos.models import PerToken
from halos.project_dir import PROJECT
from halos.tokens import Role, TokenizedExample

PAIRS = 12  # that a loader is given; it can leave some of their responses out
ROWS = 8  # of a batch
VOCAB = 97
CERTAIN = -1e-4  # the log-prob of a token without a reference is at most this: the logarithm of a probability

#### ROWS


def loader_over(loader: type[DataLoader], pairs: list[TokenizedExample], tokenizer, **settings) -> DataLoader:
    """The loader over pairs of given tokens, chosen first, instead of texts. Its examples are drawn/0, drawn/1, ..."""
    known: dict[str, Any] = {"pairs": [(0, 1)], "sft_index": 0, "dataset_name": "drawn"}
    examples = [
        Example(str(i), ["0", "1"], list(pair.scores), id=f"drawn/{i}", **known) for i, pair in enumerate(pairs)
    ]
    settings = {"max_length": 1000, "max_prompt_length": 500, "cache_dir": "", "seed": 0} | settings
    return type(loader.__name__, (_OfTokens, loader), {"drawn": pairs})(examples, tokenizer, **settings)


class _OfTokens:
    """A mixin for a DataLoader whose token ids are given instead of encoded."""

    drawn: list[TokenizedExample]

    def _tokenize(self, *args):
        self.prompt_ids = _Ids(one.prompt for one in self.drawn)
        self.response_ids = _Ids(response for one in self.drawn for response in one.responses)
        self.first_response = np.arange(0, 2 * len(self.drawn), 2)


class _Ids(list):
    """A TokenStore in memory."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self])

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate(self)


@cache
def rows(loader: Any, shortest: int, longest: int, with_scores: bool, **settings) -> list[TokenizedExample]:
    """ROWS rows of a loader over random pairs, with responses of so many tokens, and different scores or none.

    loader: a subclass of DataLoader
    settings: its arguments
    """
    rng = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray:
        return rng.integers(0, VOCAB, n).astype(np.int32)

    pairs = []
    for _ in range(PAIRS):
        responses = tuple(ids(n) for n in rng.integers(shortest, longest + 1, 2))
        scores = rng.uniform(0.5, 1.0), rng.uniform(0.0, 0.5)
        pairs.append(TokenizedExample(ids(5), responses, (Role.CHOSEN, Role.REJECTED), scores if with_scores else ()))
    return next(iter(loader_over(loader, pairs, _tokenizer(), batch_size=ROWS, **settings)))


@cache
def _tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(os.path.join(PROJECT, "assets", "tiny_tokenizer"))


#### BATCHES


def batch_of(
    examples: list[TokenizedExample],
    logratios: torch.Tensor,
    *,
    with_reference: bool,
    columns: Sequence[str],
    driver: str = "logps",
    base: float = -3.0,
    noise: float = 0.0,
    seed: int = 0,
) -> Batch:
    """A batch in which each response has a given log-ratio of policy and reference, spread evenly over its tokens.

    No log-prob is above 0: where the ratio is positive, the reference's is lowered. Without a reference the ratio is
    that to the base, and ends where the response is certain.

    logratios: (n_responses,) in nats
    columns: the fields of `PerToken` that the policy has
    driver: the column that the ratios are put into, if it is not the log-probs
    base: log-prob of a token in nats
    noise: standard deviation of what is added to the ratio of a token; with it, the other columns are random, too
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([n for example in examples for n in example.n_targets])
    n_tokens = int(lengths.sum())

    def drawn() -> torch.Tensor:
        return noise * torch.randn(n_tokens, generator=generator)

    bases = base - drawn().abs()
    ratios = per_token(lengths, driver, logratios.expand(len(lengths))) + drawn()
    others: dict[str, Any] = {name: drawn() if name == "values" else drawn().abs() for name in columns}
    if driver != "logps":
        others[driver], ratios = ratios, drawn()
    logps = bases + ratios.clamp(max=0) if with_reference else (bases + ratios).clamp(max=CERTAIN)
    reference = bases - ratios.clamp(min=0) if with_reference else None
    found: dict[str, Any] = {name: others.get(name) for name in PerToken._fields} | {"logps": logps}
    return Batch(examples, PerToken(**found), reference)


def mapped(batch: Batch, function) -> Batch:
    """The batch with a function applied to each of its per-token vectors."""
    policy: Any = (None if column is None else function(column) for column in batch.policy)
    named = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in ("examples", "policy")}
    more: Any = {name: function(value) for name, value in named.items() if value is not None}
    return replace(batch, policy=PerToken(*policy), **more)


def with_column(batch: Batch, name: str, column: torch.Tensor) -> Batch:
    return replace(batch, policy=batch.policy._replace(**{name: column}))


def taken(batch: Batch, positions: Iterable[int]) -> Batch:
    """The examples at these positions, in this order, with their tokens. A position may come twice."""
    sizes, positions = [sum(example.n_targets) for example in batch.examples], list(positions)
    part = mapped(batch, lambda vector: torch.cat([vector.split(sizes)[i] for i in positions]))
    return replace(part, examples=[batch.examples[i] for i in positions])


def swapped(batch: Batch) -> Batch:
    """The batch with chosen and rejected exchanged, and with them their scores; the tokens stay where they are."""
    other = {Role.CHOSEN: Role.REJECTED, Role.REJECTED: Role.CHOSEN}
    examples = []
    for one in batch.examples:
        trained = [i for i, role in enumerate(one.roles) if role in other]
        source = dict(zip(trained, reversed(trained), strict=True))
        scores = tuple(one.scores[source.get(i, i)] for i in range(len(one.scores)))
        examples.append(one._replace(roles=tuple(other.get(role, role) for role in one.roles), scores=scores))
    return replace(batch, examples=examples)


def per_token(lengths: torch.Tensor, column: str, of_response: torch.Tensor) -> torch.Tensor:
    """(n_responses,) -> (n_tokens,): an amount of a response, spread evenly over its tokens.

    Only a log-prob is a sum over tokens. In another column, such as that of scores, each token has the whole amount.
    """
    amount = of_response / lengths if column == "logps" else of_response
    return amount.repeat_interleave(lengths)


def per_response(batch: Batch, column: str, gradient: torch.Tensor) -> torch.Tensor:
    """(n_tokens,) -> (n_responses,): the gradient in an amount that `per_token` has spread."""
    sums = batch.sum_by_response(gradient)
    return sums / batch.lengths if column == "logps" else sums
