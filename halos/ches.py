"""CHES scores: which pairs are so alike to the model that learning to prefer one response makes both less likely.

Centered hidden embedding similarity, Definition 2 of https://arxiv.org/abs/2410.08847. With H the sum of the hidden
states that predict the tokens of a response, as the head reads them,

    CHES = <H_chosen, H_rejected> - |H_chosen|^2

The paper compares pairs by the length-normalised form, in which each H is divided by the length of its response.
The paper computes scores with the model before training; here it is the policy when the displacement is found.
"""

import json
import os
from glob import glob
from typing import NamedTuple

import numpy as np
import torch

from halos import distributed
from halos.engine import DUMMY
from halos.epoch import Row
from halos.files import finished
from halos.loader import DataLoader
from halos.models import PolicyModel
from halos.packing import schedule
from halos.run_dir import EVALUATIONS
from halos.sharding import evaluating
from halos.tokens import TokenizedExample

MOST = 512  # pairs that are scored
LISTED, NAMED = 20, 3  # pairs that the file has, and that the warning names


class Scores(NamedTuple):
    """(n_pairs,) float32 each."""

    ches: torch.Tensor
    normalised: torch.Tensor  # in which length plays no part


def pairs_of(loader: DataLoader, ids: set[str]) -> list[TokenizedExample]:
    """Return pairs of the loader whose chosen response is among these ids, MOST at most, whatever rows the loss has."""
    rows = (
        Row.of(index, chosen=better, rejected=worse)
        for index, example in enumerate(loader.examples)
        for better, worse in example.pairs
        if f"{example.id}/{better}" in ids
    )
    pairs: list[TokenizedExample] = []
    for row in rows:
        if len(pairs) < MOST and not loader.is_one_response(row):
            pairs.append(loader.tokenized(row))
    return pairs


def score(
    path: str, policy: PolicyModel, loader: DataLoader, changes: dict[str, float], max_tokens: int, tokenizer
) -> bool:
    """Score the pairs of these chosen responses, and write the worst. Returns False if there are none.

    All ranks must call this. Rank 0 writes.

    changes: id -> how the log-prob of a chosen response has changed, in nats; NaN where this is unknown
    """
    pairs = pairs_of(loader, set(changes))
    if pairs:
        with evaluating(policy):
            scored = scores(policy, pairs, max_tokens)
        if distributed.is_main():
            write(path, pairs, scored, changes, tokenizer)
    return bool(pairs)


@torch.no_grad()
def scores(policy: PolicyModel, pairs: list[TokenizedExample], max_tokens: int) -> Scores:
    """Score pairs, on all ranks together: one forward pass per pack of at most `max_tokens` tokens.

    pairs: chosen response first
    """
    runs = schedule(pairs, distributed.world_size(), max_tokens)[distributed.rank()]
    outputs, where = [], []
    for run in runs:
        sums, lengths = _hidden_sums(policy, [pairs[i] for i in run] or [DUMMY])
        outputs.append(_scored(sums[: 2 * len(run)], lengths[: 2 * len(run)]))
        where.append(torch.tensor(run, dtype=torch.long, device=policy.device))
    return Scores(*distributed.gather_rows(outputs, where, len(pairs)).unbind(1))


def _hidden_sums(policy: PolicyModel, examples: list[TokenizedExample]) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_responses, d) sums of the hidden states that predict a response, and (n_responses,) how many these are."""
    inputs = policy.inputs(examples)
    with policy.keeping_hidden() as kept:
        policy(inputs)
    hidden = kept[0].index_select(0, inputs.target_positions).float()
    sums = hidden.new_zeros(inputs.n_rows, hidden.shape[1]).index_add(0, inputs.rows, hidden)
    return sums, inputs.sum_by_row(torch.ones_like(inputs.targets, dtype=torch.float32))


def _scored(sums: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(2 n_pairs, d), (2 n_pairs,) -> (n_pairs, 2): CHES and its length-normalised form."""
    both = []
    for states in (sums, sums / lengths[:, None].clamp(min=1)):
        chosen, rejected = states[0::2], states[1::2]
        both.append((chosen * rejected).sum(1) - (chosen * chosen).sum(1))
    return torch.stack(both, dim=1)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return Spearman's rho; None where it is undefined: equal values, or unknown ones."""
    from scipy.stats import spearmanr

    if np.isnan(other).any() or len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(spearmanr(one, other).statistic)


def write(path: str, pairs: list[TokenizedExample], scored: Scores, changes: dict[str, float], tokenizer) -> None:
    """Write the pairs with the highest normalised scores, with texts."""
    ches, normalised = (values.cpu().numpy() for values in scored)
    moved = np.array([changes[pair.ids[0]] for pair in pairs])
    worst = np.argsort(-normalised, kind="stable")[:LISTED].tolist()
    rows = [
        {
            "chosen_id": pairs[i].ids[0],
            "rejected_id": pairs[i].ids[1],
            "ches": float(ches[i]),
            "ches_normalised": float(normalised[i]),
            "chosen_logps_change": None if np.isnan(moved[i]) else float(moved[i]),
            "prompt": tokenizer.decode(pairs[i].prompt),
            "chosen": tokenizer.decode(pairs[i].responses[0]),
            "rejected": tokenizer.decode(pairs[i].responses[1]),
        }
        for i in worst
    ]
    content = {
        "pairs_scored": len(pairs),
        "rank_correlation_of_ches_and_change": rank_correlation(ches, moved),
        "rank_correlation_of_ches_normalised_and_change": rank_correlation(normalised, moved),
        "worst": rows,
    }
    with finished(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)


def found_in(directory: str) -> str | None:
    """Return the path of the file that `write` has written for the run in this directory."""
    return next(iter(sorted(glob(os.path.join(directory, EVALUATIONS, "ches-*.json")))), None)


def line(path: str) -> str:
    """Return where the worst pairs are listed, and which these are; nothing on ranks but 0."""
    if not distributed.is_main():
        return ""
    with open(path, encoding="utf-8") as file:
        worst = [pair["chosen_id"] for pair in json.load(file)["worst"]]
    named = f", such as {', '.join(worst[:NAMED])}" if worst else ""
    return f"pairs that are most alike to the model (CHES) are in {path}{named}"
