"""Loss and gradient of one response against its reward, all others as at the start of a run."""

from dataclasses import dataclass

import numpy as np
import torch

from halos.engine import Batch
from halos.loss_card.batches import CERTAIN, taken
from halos.loss_card.checks import reward_slope, rewards_of
from halos.loss_card.subject import EVEN, Subject
from halos.tokens import Role

REACH = 5.0  # of the rewards, on each side of the start
POINTS = 81
LOWEST = -20.0  # nats per token, below which no response that a model has written is
BASE = {True: -10.0, False: -1.0}  # nats per token at the start, with and without a reference
UNMOVED = 1e-6  # a gradient that is 0 but for rounding


@dataclass(frozen=True)
class Curve:
    """What happens to one response of a pair, or to one response alone, as its reward changes. All: (n,).

    rewards: as the loss reports them, minus that at the start
    losses: the sum over the batch
    weights: absolute value of the gradient in the response's log-prob, per nat
    """

    role: Role
    rewards: np.ndarray
    losses: np.ndarray
    weights: np.ndarray

    def at_start(self, values: np.ndarray) -> float:
        return float(values[np.abs(self.rewards).argmin()])


def sweep(loss: Subject) -> list[Curve]:
    """One curve for each role that the loss trains."""
    start = loss.batch(loss.rows(EVEN), torch.zeros(1), base=BASE[loss.with_reference])
    roles = [role for role in (Role.CHOSEN, Role.REJECTED) if any(role in one.roles for one in start.examples)]
    return [curve(loss, _smallest(loss, start, role), role) for role in roles]


def _smallest(loss: Subject, start: Batch, role: Role) -> Batch:
    """An example with this role alone; or with one of the other role, if the loss tells apart what is in its batch.

    So PPO's advantages, whose mean over a batch is 0, are 0 for one response alone.
    """
    first = {one.roles: i for i, one in reversed(list(enumerate(start.examples)))}
    own = [i for roles, i in first.items() if role in roles][:1]
    alone = taken(start, own)
    _, gradients = loss.response_gradients(alone)
    return (
        alone if (gradients.abs() > UNMOVED).any() else taken(start, own + [i for i in first.values() if i not in own])
    )


def curve(loss: Subject, start: Batch, role: Role) -> Curve:
    """Move the log-prob of the first response with this role."""
    index = int((start.chosen if role is Role.CHOSEN else start.rejected).nonzero()[0])
    before = rewards_of(start, loss.outcome(start))[index].item()
    slope = abs(reward_slope(loss)) or 1.0
    rows = []
    for nats in np.linspace(-REACH / slope, REACH / slope, POINTS):
        amounts = torch.zeros(len(start.lengths))
        amounts[index] = nats
        batch = loss.moved(start, amounts)
        if loss.driver == "logps" and not LOWEST <= _extreme_logp(batch, nats) <= CERTAIN:
            continue
        outcome, gradients = loss.response_gradients(batch)
        reward = rewards_of(batch, outcome)[index].item() - before
        reward = nats * slope if np.isnan(reward) else reward
        rows.append((reward, outcome.losses.sum().item(), abs(gradients[index].item())))
    return Curve(role, *np.array(rows).T)


def _extreme_logp(batch: Batch, nats: float) -> float:
    """The log-prob of a token that has moved the farthest."""
    return (batch.policy.logps.max() if nats > 0 else batch.policy.logps.min()).item()
