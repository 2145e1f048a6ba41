"""All checks of a loss, and the departures that it declares.

A trainer class can declare that it leaves the rule of a check on purpose, and why:

    departures = {"signs": "APO-down lowers chosen responses as well, if less than rejected ones"}
"""

from dataclasses import dataclass
from enum import StrEnum

from halos.errors import UserError, did_you_mean, first_line
from halos.loss_card import checks, limits
from halos.loss_card.checks import Check, Inapplicable, Wrong
from halos.loss_card.subject import Subject

CHECKS: tuple[Check, ...] = (
    checks.shapes,
    checks.start,
    checks.signs,
    checks.gradcheck,
    checks.reach,
    checks.detached,
    checks.rewards,
    checks.pure,
    checks.shift,
    checks.scale,
    checks.swap,
    checks.order,
    checks.duplicates,
    limits.one_example,
    limits.empty_half,
    limits.extreme,
    limits.certain,
    limits.metrics,
    limits.no_scores,
    limits.bfloat16,
)


class Status(StrEnum):
    PASSED = "pass"
    FAILED = "FAIL"
    DECLARED = "declared"  # fails, and the trainer says why that is right
    INAPPLICABLE = "-"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    value: what was found
    why: of a failure, what is probably wrong and the remedy; of a departure, the trainer's reason
    """

    check: str
    status: Status
    value: str
    why: str = ""


def card(loss: Subject) -> list[Finding]:
    """Run all checks. Raises UserError if the trainer declares a departure from a check that does not exist."""
    names = [check.__name__ for check in CHECKS]
    for name in loss.trainer.departures:
        if name not in names:
            where = f"{loss.trainer.__name__}.departures"
            raise UserError(f"{where} has {name!r}, which is no check; {did_you_mean(name, names)}")
    return [finding(check, loss) for check in CHECKS]


def finding(check: Check, loss: Subject) -> Finding:
    name = check.__name__
    try:
        return Finding(name, Status.PASSED, check(loss))
    except Inapplicable as why_not:
        return Finding(name, Status.INAPPLICABLE, str(why_not))
    except Wrong as wrong:
        value, why = wrong.value, wrong.remedy
    except Exception as error:  # of the loss: it is what the card reports
        value = f"{type(error).__name__}: {first_line(error)}"
        why = f"the loss fails on the batch of this check ({(check.__doc__ or '').partition('.')[0].lower()})"
    reason = loss.trainer.departures.get(name)
    return Finding(name, Status.DECLARED, value, reason) if reason else Finding(name, Status.FAILED, value, why)
