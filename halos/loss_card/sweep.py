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
    """Loss and gradient weight of one response, of a pair or alone, as its reward changes.

    rewards: (n,) as the loss reports them, minus that at the start
    losses: (n,) the sum over the batch
    weights: (n,) absolute value of the gradient in the response's log-prob, per nat
    slope: by how much the reward rises per nat, at the start
    """

    role: Role
    rewards: np.ndarray
    losses: np.ndarray
    weights: np.ndarray
    slope: float

    def at_start(self, values: np.ndarray) -> float:
        return float(values[np.abs(self.rewards).argmin()])


def sweep(loss: Subject) -> list[Curve]:
    """One curve for each role that the loss trains."""
    start = loss.batch(loss.rows(EVEN), torch.zeros(1), base=BASE[loss.with_reference])
    roles = [role for role in (Role.CHOSEN, Role.REJECTED) if any(role in one.roles for one in start.examples)]
    return [curve(loss, _smallest(loss, start, role), role) for role in roles]


def _smallest(loss: Subject, start: Batch, role: Role) -> Batch:
    """An example with this role alone; or the whole batch, if the loss does not see that one response moves.

    So PPO's advantages have mean 0 over a batch, and BCO's shift is the mean reward of a batch.
    """
    alone = taken(start, [next(i for i, one in enumerate(start.examples) if role in one.roles)])
    (outcome, gradients), (other, _) = (loss.response_gradients(_raised(loss, alone, role, n)) for n in (0.0, 1.0))
    change = (other.losses.sum() - outcome.losses.sum()).abs()
    return alone if min(gradients.abs().max(), change) > UNMOVED else start


def _index(batch: Batch, role: Role) -> int:
    """The number of the first response with this role."""
    return int((batch.chosen if role is Role.CHOSEN else batch.rejected).nonzero()[0])


def _raised(loss: Subject, batch: Batch, role: Role, nats: float) -> Batch:
    """The batch with the log-prob of the first response with this role raised."""
    amounts = torch.zeros(len(batch.lengths))
    amounts[_index(batch, role)] = nats
    return loss.moved(batch, amounts)


def curve(loss: Subject, start: Batch, role: Role) -> Curve:
    """Move the log-prob of the first response with this role."""
    index = _index(start, role)
    before = rewards_of(start, loss.outcome(start))[index].item()
    slope = abs(reward_slope(loss)) or 1.0
    points = []
    for nats in _range(loss, slope, len(start.examples[0].responses[0])):
        batch = _raised(loss, start, role, nats)
        outcome, gradients = loss.response_gradients(batch)
        reward = rewards_of(batch, outcome)[index].item() - before
        reward = nats * slope if np.isnan(reward) else reward
        points.append((reward, outcome.losses.sum().item(), abs(gradients[index].item())))
    rewards, losses, weights = np.array(points).T
    return Curve(role, rewards, losses, weights, slope)


def _range(loss: Subject, slope: float, length: int) -> np.ndarray:
    """By how many nats a response is moved: REACH of the reward on both sides, but only to log-probs that there are."""
    low, high = -REACH / slope, REACH / slope
    if loss.driver == "logps":
        base = BASE[loss.with_reference]
        low, high = max(low, length * (LOWEST - base)), min(high, length * (CERTAIN - base))
    return np.concatenate((np.linspace(low, 0, POINTS // 2, endpoint=False), np.linspace(0, high, POINTS // 2 + 1)))
