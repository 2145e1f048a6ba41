"""The checks at the limits: small and one-sided batches; extreme, certain and rounded log-probs; no scores."""

import math
from dataclasses import replace

import torch

from halos.engine import Batch
from halos.errors import UserError
from halos.loss_card.batches import per_token, taken, with_column
from halos.loss_card.checks import Inapplicable, finite, require, same
from halos.loss_card.subject import Subject
from halos.tokens import Role

TRAINED = (Role.CHOSEN, Role.REJECTED)
EXTREME = 1e4  # nats
LONG = (200, 200)  # tokens of the responses whose log-probs are rounded
AT_EXTREMES = [(1, 1), (1, -1), (-1, 1), (-1, -1)]  # signs of the log-ratios of chosen and rejected


def one_example(loss: Subject) -> str:
    """A batch of a single example gives a finite loss and gradient."""
    batch = loss.random()
    first = {one.roles: i for i, one in reversed(list(enumerate(batch.examples)))}
    remedy = "probably a statistic of the batch that one entry does not have, such as a standard deviation"
    for roles, position in first.items():
        single = taken(batch, [position])
        finite(*loss.response_gradients(single), f"for a batch of one example ({', '.join(roles)})", remedy)
    return f"finite for {' and for '.join('+'.join(roles) for roles in first)} alone"


def empty_half(loss: Subject) -> str:
    """A batch of desirable responses alone, or of undesirable ones alone, gives a finite loss and gradient."""
    batch = loss.random()
    found = {role: [i for i, one in enumerate(batch.examples) if role in one.roles] for role in TRAINED}
    if set(found[Role.CHOSEN]) & set(found[Role.REJECTED]) or not all(found.values()):
        raise Inapplicable("a batch always holds both" if found[Role.REJECTED] else "no response is rejected")
    remedy = "the mean of an empty half is NaN: use sum() / max(1, len(...))"
    for role, positions in found.items():
        finite(*loss.response_gradients(taken(batch, positions)), f"with {role} responses alone", remedy)
    return "finite with chosen alone and with rejected alone"


def extreme(loss: Subject) -> str:
    """Log-ratios of 10,000 nats in any direction give a finite loss and gradient."""
    remedy = "exp overflows, or log meets 0: use F.logsigmoid, torch.logaddexp, log1p or expm1, or clamp the log-ratio"
    for chosen, rejected in AT_EXTREMES:
        batch = loss.of_roles(chosen * EXTREME, rejected * EXTREME)
        where = f"at log-ratios of {chosen * EXTREME:+.0e} (chosen) and {rejected * EXTREME:+.0e} (rejected)"
        finite(*loss.response_gradients(batch), where, remedy)
    finite(*loss.response_gradients(loss.random(scale=EXTREME)), "at random log-ratios of 1e4", remedy)
    return "finite at log-ratios of 1e4 nats"


def certain(loss: Subject) -> str:
    """A response with the log-prob 0 under the policy, of which it is certain, gives a finite loss and gradient."""
    remedy = "the logarithm of 1 - p is taken where p is 1: clamp the log-prob to at most -1e-6"
    for role in TRAINED:
        batch = loss.start()
        is_sure = (batch.chosen if role is Role.CHOSEN else batch.rejected).repeat_interleave(batch.lengths)
        batch = with_column(batch, "logps", batch.policy.logps.masked_fill(is_sure, 0.0))
        finite(*loss.response_gradients(batch), f"where {role} responses have the probability 1", remedy)
    return "finite where the policy is certain"


def metrics(loss: Subject) -> str:
    """Every metric of the loss is finite over two batches, in training and under its other name in evaluation."""
    outcomes = [loss.outcome(loss.random(seed)) for seed in (0, 1)]
    for mode in ("train", "eval"):
        values = loss.instance.summarize(outcomes, mode)
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        require(not bad, f"{', '.join(bad)} not finite", "a metric divides by 0 or is a mean of nothing; guard it")
    names = [name.replace("/", "_eval/", 1) for name in outcomes[0].metrics]
    lost = [name for name in names if name not in values]
    require(not lost, f"{', '.join(lost)} not logged", "a metric is an empty vector or an undefined statistic")
    return f"{len(names)} of its own, all finite"


def no_scores(loss: Subject) -> str:
    """On data without scores the loss is finite, or says in one line that it needs them."""
    remedy = "a score that is missing is NaN: give such responses a weight of 1, or raise UserError"
    try:
        plain = loss.random(with_scores=False)
        finite(*loss.response_gradients(plain), "on data without scores", remedy)
    except UserError as refusal:
        return f"refused: {refusal}"
    uses = "" if same(loss.outcome(loss.random()).losses, loss.outcome(plain).losses) else ", not as with them"
    return f"finite without scores{uses}"


def bfloat16(loss: Subject) -> str:
    """How far the loss is off if the log-probs of responses are rounded to bfloat16: reported, not judged.

    Responses of 200 tokens have about -600 nats, where bfloat16 has steps of 4 nats: this is why they are float32.
    """
    examples = loss.rows(LONG)
    generator = torch.Generator().manual_seed(0)
    logratios = 5 * torch.randn(sum(len(one.roles) for one in examples), generator=generator)
    batch = loss.batch(examples, logratios, noise=0.2)
    exact, rounded = loss.outcome(batch), loss.outcome(_rounded(batch, loss.driver))
    gap = (rounded.losses.mean() - exact.losses.mean()).abs() / exact.losses.mean().abs()
    require(gap.isfinite(), f"relative gap {gap:.1g}", "the loss is not finite on responses of 200 tokens")
    return f"relative gap {gap:.1%} for responses of 200 tokens"


def _rounded(batch: Batch, driver: str) -> Batch:
    """The batch with the sum of each response rounded to bfloat16; the difference is spread over its tokens."""

    def rounded(name: str, column: torch.Tensor) -> torch.Tensor:
        if name != "logps":
            return column.bfloat16().float()
        sums = batch.sum_by_response(column)
        return column + per_token(batch.lengths, name, sums.bfloat16().float() - sums)

    reference = None if batch.reference_logps is None else rounded("logps", batch.reference_logps)
    moved = with_column(batch, driver, rounded(driver, getattr(batch.policy, driver)))
    return replace(moved, reference_logps=reference)
