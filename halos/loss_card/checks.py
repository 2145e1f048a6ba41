"""The checks of values and gradients. Each takes a `Subject`, and returns what it has found in a few words.

A check that fails raises `Wrong`, with what was found, what is probably wrong, and the remedy. One that has nothing to
look at raises `Inapplicable`. The name of a check is that of its function. Checks at the limits are in limits.py.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from halos.engine import Batch, Outcome
from halos.loss_card.batches import mapped, per_token, swapped, taken, with_column
from halos.loss_card.subject import RAGGED, Subject
from halos.tokens import Role
from halos.trainer import BasicTrainer

Check = Callable[[Subject], str]
SEEDS = range(4)  # of the random batches that gradients are averaged over


class Wrong(Exception):
    """A check that the loss fails.

    value: what was found
    remedy: what is probably wrong, and what to do
    """

    def __init__(self, value: str, remedy: str):
        super().__init__(value)
        self.value = value
        self.remedy = remedy


class Inapplicable(Exception):
    """A check that has nothing to look at; the text says why."""


def require(condition, value: str, remedy: str) -> None:
    if not condition:
        raise Wrong(value, remedy)


def finite(outcome: Outcome, gradient: torch.Tensor, where: str, remedy: str) -> None:
    """Require finite losses, rewards and gradients."""
    parts = {"the loss": outcome.losses, "a reward": torch.cat((outcome.chosen_rewards, outcome.rejected_rewards))}
    for what, values in (parts | {"the gradient": gradient}).items():
        bad = values.detach()[~values.isfinite()]
        require(not len(bad), f"{what} is {bad[0].item() if len(bad) else 0:g} {where}", remedy)


def same(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Return whether two tensors agree, relative to the largest entry."""
    if one.shape != other.shape or not one.numel():
        return one.shape == other.shape
    largest = torch.maximum(one.abs().max(), other.abs().max()).clamp(min=1e-6)
    return bool(((one - other).abs() <= tolerance * largest).all())


def rewards_of(batch: Batch, outcome: Outcome) -> torch.Tensor:
    """(n_responses,) the reward of each response, NaN where the loss reports none."""
    rewards = torch.full((len(batch.lengths),), torch.nan)
    for role, values in ((batch.chosen, outcome.chosen_rewards), (batch.rejected, outcome.rejected_rewards)):
        if len(values):
            rewards[role] = values.detach().float()
    return rewards


#### FORM


def shapes(loss: Subject) -> str:
    """One loss per pair, response or token; one reward and log-prob per response; all of them float32 vectors."""
    batch = loss.random()
    outcome = loss.outcome(batch)
    n_chosen, n_rejected = int(batch.chosen.sum()), int(batch.rejected.sum())
    n_tokens = int(batch.lengths[~batch.unrelated].sum())
    kinds = {n_tokens: "token", n_chosen + n_rejected: "response"}
    kinds |= {n_chosen: "pair"} if loss.trainer.data_format == "paired" else {}
    shape = tuple(outcome.losses.shape)
    found = f"losses of the shape {shape} for {n_chosen} chosen and {n_rejected} rejected responses"
    remedy = "the loss is averaged or summed by itself; return a vector, one loss per pair, response or token"
    require(len(shape) == 1 and shape[0] in kinds, found, remedy)
    for side, n in (("chosen", n_chosen), ("rejected", n_rejected)):
        rewards, logps = getattr(outcome, f"{side}_rewards"), getattr(outcome, f"{side}_logps")
        counts = f"{len(rewards)} rewards and {len(logps)} log-probs for {n} {side} responses"
        fits = len(rewards) in (0, n) if side == "rejected" else len(rewards) == n
        fits = fits and (len(logps) == n or loss.driver != "logps")
        require(fits, counts, "return one of each per response, in their order")
    dtypes = {values.dtype for values in (outcome.losses, outcome.chosen_rewards, outcome.rejected_rewards)}
    remedy = "the arguments are float32; leave the conversion out"
    require(dtypes == {torch.float32}, f"dtypes {', '.join(map(str, dtypes))}", remedy)
    return f"one loss per {kinds[shape[0]]}"


def detached(loss: Subject) -> str:
    """Rewards are reported without gradient."""
    outcome, _ = loss.gradients(loss.random())
    for side in ("chosen", "rejected"):
        remedy = f"return {side}_rewards.detach(): a reward is logged, and keeps the graph of its batch alive otherwise"
        require(not getattr(outcome, f"{side}_rewards").requires_grad, f"{side} rewards have a gradient", remedy)
    return "rewards have no gradient"


def pure(loss: Subject) -> str:
    """The same batch gives the same outcome twice, and is not changed, nor is what the trainer keeps."""
    batch = loss.random()
    before, own = mapped(batch, torch.clone), dict(loss.instance.state.own)
    first, second = loss.outcome(batch), loss.outcome(batch)
    remedy = "something is drawn at random, or kept from call to call; keep a running value in update(), state.own"
    require(torch.equal(first.losses, second.losses), "two calls give two losses", remedy)
    require(dict(loss.instance.state.own) == own, "state.own changes", "change state.own in update(), not in the loss")
    remedy = "an argument is changed in place (as by sub_, clamp_ or +=); write a new tensor"
    require(_equal(before, batch), "the batch is changed", remedy)
    if loss.trainer.loss is not BasicTrainer.loss:
        require(_keeps_vectors(loss, batch), "the four vectors are changed", remedy)
    return "same outcome twice, arguments unchanged"


def _equal(one: Batch, other: Batch) -> bool:
    pairs = [*zip(one.policy, other.policy, strict=True), (one.reference_logps, other.reference_logps)]
    return all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None)


def _keeps_vectors(loss: Subject, batch: Batch) -> bool:
    policy = loss.instance.split(batch, batch.policy.logps)
    reference = (None, None) if batch.reference_logps is None else loss.instance.split(batch, batch.reference_logps)
    vectors = [*policy, *reference]
    before = [None if vector is None else vector.clone() for vector in vectors]
    loss.instance.loss(*vectors)
    return all(a is None or torch.equal(a, b) for a, b in zip(before, vectors, strict=True))


#### VALUES AND GRADIENTS


def start(loss: Subject) -> str:
    """At a run's first step, where policy equals reference, the loss and its gradient are finite."""
    remedy = "probably 0/0, or a logarithm or a root of 0: add a small number inside, or write the formula without it"
    for batch in (loss.start(), loss.start(RAGGED)):
        outcome, gradients = loss.response_gradients(batch)
        finite(outcome, gradients, "where policy equals reference", remedy)
    outcome, _ = loss.gradients(loss.start())
    return f"loss {outcome.losses.mean():.4f} where policy equals reference"


def signs(loss: Subject) -> str:
    """Raising the log-prob of a chosen response lowers the mean loss, and raising that of a rejected one raises it.

    At the start for each response; over random batches for the mean of each role, since a single pair may rightly pull
    the other way: the target of IPO can be overshot, and a label of cDPO be wrong.
    """
    found = {"at the start": [loss.start()], "over random batches": [loss.random(seed) for seed in SEEDS]}
    return "; ".join(f"{_signs(loss, batches, where)} {where}" for where, batches in found.items())


def _signs(loss: Subject, batches: list[Batch], where: str) -> str:
    gradients = [loss.response_gradients(batch)[1] for batch in batches]
    means = []
    for role in (Role.CHOSEN, Role.REJECTED):
        own = torch.cat([batch.of_role(one, role) for batch, one in zip(batches, gradients, strict=True)])
        if len(own):
            means.append(_sign(role, own if len(batches) == 1 else own.mean()[None], where))
    return ", ".join(means)


def _sign(role: Role, gradients: torch.Tensor, where: str) -> str:
    """Require that all gradients have the sign of a role, and return their mean."""
    sign, does = (-1, "raises") if role is Role.CHOSEN else (1, "lowers")
    text = f"{role} {gradients.mean():+.2g}"
    remedy = f"the log-prob of a {role} response has no effect there: is it detached, or does it cancel?"
    require((gradients != 0).any(), f"{text} {where}", remedy)
    remedy = f"raising the log-prob of a {role} response {does} the loss: a sign is flipped, or two roles are exchanged"
    require((sign * gradients > 0).all(), f"{text} {where}", remedy)
    return text


def gradcheck(loss: Subject) -> str:
    """In float64, the gradient in the log-probs of trained responses agrees with finite differences."""
    batch = taken(loss.random(), range(4))
    column = getattr(batch.policy, loss.driver).double()
    batch = replace(batch, reference_logps=None if batch.reference_logps is None else batch.reference_logps.double())
    trained = (~batch.unrelated).repeat_interleave(batch.lengths).nonzero()[:, 0]

    def mean_loss(own: torch.Tensor) -> torch.Tensor:
        moved = with_column(batch, loss.driver, column.index_copy(0, trained, own))
        return loss.outcome(moved).losses.mean()

    own = column[trained].requires_grad_()
    agrees = torch.autograd.gradcheck(mean_loss, (own,), fast_mode=True, raise_exception=False)
    remedy = (
        "a quantity is detached, rounded to float32, or taken with .item() or .data: use it with its gradient, or "
        "declare the departure if the method stops that gradient"
    )
    require(agrees, "the gradient is not that of the loss", remedy)
    return "agrees with finite differences in float64"


def reach(loss: Subject) -> str:
    """Most trained responses have a gradient in a random batch, and unrelated ones have none."""
    batch = loss.random()
    _, gradients = loss.gradients(batch)
    moves = batch.sum_by_response(gradients[loss.driver].abs()) > 0
    trained = moves[~batch.unrelated].float().mean().item()
    remedy = "the loss is flat for the others: a clamp is active everywhere, or one role is detached"
    require(trained > 0.5, f"{trained:.0%} of the trained responses have a gradient", remedy)
    remedy = "they are scored without a graph, and the gradient would be lost: detach what is computed from them"
    require(not moves[batch.unrelated].any(), "unrelated responses have a gradient", remedy)
    return f"{trained:.0%} of the trained responses have a gradient"


def rewards(loss: Subject) -> str:
    """Raising the log-prob of a response raises its own reward, and leaves the rewards of the other role alone."""
    batch = loss.random()
    before = rewards_of(batch, loss.outcome(batch))
    texts = []
    for role, mask in ((Role.CHOSEN, batch.chosen), (Role.REJECTED, batch.rejected)):
        if before[mask].isnan().all():
            continue
        moved = loss.moved(batch, 0.5 * mask)
        change = (rewards_of(moved, loss.outcome(moved)) - before) / 0.5
        text = f"{role} {change[mask].mean():+.3g} per nat"
        remedy = (
            f"a sign of the {role} rewards is flipped, or they are not those of the policy: accuracies would mislead"
        )
        require((change[mask] >= 0).all() and (change[mask] > 0).any(), text, remedy)
        others = change[~mask].nan_to_num().abs()
        remedy = f"the rewards of the other role depend on the {role} responses; report each response's own"
        require((others <= 1e-3 * change[mask].max()).all(), f"{text}, the other role too", remedy)
        texts.append(text)
    if not texts:
        raise Inapplicable("the loss reports no rewards")
    return ", ".join(texts)


#### CHANGES THAT SHOULD NOT MATTER, OR MATTER IN A KNOWN WAY


def shift(loss: Subject) -> str:
    """Lowering all chosen responses by 3 nats and all rejected ones by 1, under policy and reference alike, leaves the
    gradient; under the reference alone it changes the loss.

    The gradient and not the loss, since a likelihood term (as in RPO) rightly has another value for another likelihood.
    """
    if not loss.with_reference:
        raise Inapplicable("no reference model")
    batch = loss.random()
    reference = batch.reference_logps
    assert reference is not None
    fall = per_token(batch.lengths, "logps", -3.0 * batch.chosen - 1.0 * batch.rejected)
    both = with_column(replace(batch, reference_logps=reference + fall), "logps", batch.policy.logps + fall)
    (outcome, gradients), (_, shifted) = loss.gradients(batch), loss.gradients(both)
    remedy = "a log-prob of the policy is used without its reference: subtract the reference for chosen and rejected"
    alike = same(gradients[loss.driver], shifted[loss.driver], 1e-3)
    require(alike, "the gradient changes if policy and reference shift together", remedy)
    alone = loss.outcome(replace(batch, reference_logps=reference + fall))
    remedy = "the loss does not use the reference; use it, or set use_reference_model: false and save its forward pass"
    require(not same(outcome.losses, alone.losses), "another reference gives the same loss", remedy)
    return "policy and reference shifted together: same gradient"


def scale(loss: Subject) -> str:
    """A policy that prefers what is rejected costs more than its mirror image, at two scales.

    Reports the growth of the loss: 1 times is a loss that saturates, 2 times a linear one, 4 times a square.
    """
    step = 1.0 / max(reward_slope(loss), 1e-3)
    level = loss.outcome(loss.start()).losses.mean()
    growth = []
    for size in (2 * step, 4 * step):
        right, wrong = (loss.outcome(loss.of_roles(s, -s)).losses.mean() for s in (size, -size))
        remedy = "the loss prefers the rejected response: a sign is flipped, or two roles are exchanged"
        require(wrong >= right - 1e-6 * abs(right), f"{wrong:.3g} at -{size:.3g} nats, {right:.3g} at +", remedy)
        growth.append((wrong - level).item())
    if not growth[0]:
        return "chosen and rejected cost the same"
    return f"twice as wrong ({2 * step:.3g} to {4 * step:.3g} nats) costs {growth[1] / growth[0]:.2f} times"


def reward_slope(loss: Subject) -> float:
    """By how much the chosen reward rises per nat, at the start; 1 if no reward is reported."""
    low, high = (loss.outcome(loss.of_roles(s, 0)).chosen_rewards for s in (-1.0, 0.0))
    return (high - low).mean().item() if len(low) else 1.0


def swap(loss: Subject) -> str:
    """With chosen and rejected exchanged, each response keeps its reward, and the accuracy is mirrored."""
    batch = loss.random()
    mirrored = swapped(batch)
    outcome, other = loss.outcome(batch), loss.outcome(mirrored)
    if not len(outcome.chosen_rewards) or not len(outcome.rejected_rewards):
        raise Inapplicable("no rejected rewards")
    kept = same(rewards_of(batch, outcome).nan_to_num(), rewards_of(mirrored, other).nan_to_num())
    remedy = "a reward depends on the response's role: use one formula for both, so that margins compare like with like"
    require(kept, "rewards change with the role", remedy)
    before, after = (float(loss.instance.accuracy(o.chosen_rewards, o.rejected_rewards)) for o in (outcome, other))
    remedy = "accuracy() treats chosen and rejected differently"
    require(abs(before + after - 1) < 1e-5, f"accuracy {before:.2f}, mirrored {after:.2f}", remedy)
    return f"accuracy {before:.2f}, mirrored {after:.2f}"


def order(loss: Subject) -> str:
    """The examples in another order give the same mean loss, and each response its own reward."""
    batch = loss.random()
    positions = torch.randperm(len(batch.examples), generator=torch.Generator().manual_seed(1)).tolist()
    permuted = taken(batch, positions)
    outcome, other = loss.outcome(batch), loss.outcome(permuted)
    remedy = "rows are matched that do not belong together, or the first row is special"
    require(same(outcome.losses.mean(), other.losses.mean()), "the mean loss depends on the order", remedy)
    sizes = [len(one.roles) for one in batch.examples]
    parts = rewards_of(batch, outcome).split(sizes)
    expected = torch.cat([parts[i] for i in positions]).nan_to_num()
    require(same(expected, rewards_of(permuted, other).nan_to_num()), "rewards depend on the order", remedy)
    return "another order: same mean loss, rewards in that order"


def duplicates(loss: Subject) -> str:
    """Every example twice gives the same mean loss, and each copy the same gradient of its losses."""
    for batch in map(loss.random, SEEDS):  # a clamp can hide a sum in one of them
        double = taken(batch, [*range(len(batch.examples))] * 2)
        (outcome, gradients), (other, copies) = loss.gradients(batch), loss.gradients(double)
        once, twice = outcome.losses.mean().item(), other.losses.mean().item()
        remedy = "a sum stands where a mean belongs: divide by the number of responses, or return a vector of losses"
        alike = abs(once - twice) <= 1e-4 * max(abs(once), 1e-3)
        require(alike, f"mean loss {once:.4g} once, {twice:.4g} twice", remedy)
        gradient = gradients[loss.driver]
        alike = same(torch.cat((gradient, gradient)), copies[loss.driver], 1e-3)
        require(alike, "a copy has another gradient than the example alone", remedy)
    return f"mean loss {once:.4f} once and twice"
