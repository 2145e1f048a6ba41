"""Likelihood displacement: chosen responses become less likely while margins rise (https://arxiv.org/abs/2410.08847).

Found by comparing an evaluation with the first one of the run, response by response.
"""

from dataclasses import dataclass
from typing import Self

import torch

from halos import records
from halos.errors import UserError
from halos.records import Records
from halos.tokens import Role

# A fall is named if it is larger than both: this many standard errors, since every evaluation asks again, ...
ERRORS = 3.0
# ... and this many nats per response: on average, a chosen response is then less likely by a factor of e.
LEAST = 1.0
FEWEST = 30  # responses of each side below which the standard error says little


@dataclass(frozen=True)
class Change:
    """The mean change of log-probs since the first evaluation, in nats per response, with its standard error."""

    n: int
    mean: float
    error: float
    fell: float  # share of responses whose log-prob fell

    @classmethod
    def of(cls, changes: torch.Tensor) -> Self:
        n = len(changes)
        return cls(n, float(changes.mean()), float(changes.std()) / n**0.5, float((changes < 0).double().mean()))


@dataclass(frozen=True)
class Displacement:
    """The change of log-probs of the test responses since the first evaluation.

    since: updates before that evaluation
    """

    since: int
    chosen: Change
    rejected: Change

    @property
    def is_found(self) -> bool:
        """True if the chosen responses have fallen and the margin has risen, both by more than noise."""
        margin = self.chosen.mean - self.rejected.mean
        error = (self.chosen.error**2 + self.rejected.error**2) ** 0.5
        return self.chosen.mean < -max(LEAST, ERRORS * self.chosen.error) and margin > ERRORS * error

    def line(self) -> str:
        chosen, rejected = self.chosen, self.rejected
        return (
            f"warning: likelihood displacement: since the evaluation at step {self.since} the log-prob of chosen "
            f"responses fell by {-chosen.mean:.2f} ± {chosen.error:.2f} nats (it fell for {chosen.fell:.0%} of "
            f"{chosen.n}), and the margin rose by {chosen.mean - rejected.mean:.2f} only because rejected ones fell "
            f"by {-rejected.mean:.2f}"
        )


def compare(since: int, first: Records, now: Records) -> Displacement | None:
    """Compare an evaluation with the first one, after `since` updates; None if too few responses are in both."""
    sides = [changes(first, now, role) for role in (Role.CHOSEN, Role.REJECTED)]
    if min(map(len, sides)) < FEWEST:
        return None
    chosen, rejected = (torch.tensor(list(side.values()), dtype=torch.float64) for side in sides)
    return Displacement(since, Change.of(chosen), Change.of(rejected))


def since_first(run_dir: str, now: Records) -> tuple[Displacement, dict[str, float]] | None:
    """Compare an evaluation with the first one that the run directory has.

    Returns this and the change of each chosen response; None if there is none to compare with.
    """
    since = next(records.steps(run_dir), None)
    if since is None:
        return None
    try:
        first = Records.read(records.path_of(run_dir, since))
    except UserError as error:
        print(f"warning: {error}; without it, likelihood displacement is not looked for", flush=True)
        return None
    found = compare(since, first, now)
    return None if found is None else (found, changes(first, now, Role.CHOSEN))


def changes(first: Records, now: Records, role: Role) -> dict[str, float]:
    """Return the change of each response's log-prob, in nats, by its id. A response of several pairs counts once."""
    before, after = (
        {name: logps for name, own, logps in zip(one.id, one.role, one.logps.tolist(), strict=True) if own == role}
        for one in (first, now)
    )
    return {name: after[name] - before[name] for name in before.keys() & after.keys()}


def against_reference(rows: Records) -> dict[str, float]:
    """Return by how many nats each chosen response is likelier than under the reference; NaN without one."""
    chosen = rows.only(rows.is_role(Role.CHOSEN))
    return dict(zip(chosen.id, (chosen.logps - chosen.reference_logps).tolist(), strict=True))
