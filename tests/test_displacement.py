"""Likelihood displacement and CHES scores: by hand, against plain forward passes, and in a run."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from halos import ches, curves, displacement, metrics, records
from halos.records import Records
from helpers import random_examples, tiny_policy
from small_runs import batches_for, loader_for, make_trainer

N = 40


def evaluation(chosen: torch.Tensor, rejected: torch.Tensor) -> Records:
    """An evaluation of pairs with these log-probs."""
    n = len(chosen)
    unknown = torch.full((2 * n,), float("nan"), dtype=torch.float64)
    return Records(
        id=[f"d/{i}/{side}" for i in range(n) for side in (0, 1)],
        dataset=["d"] * 2 * n,
        role=["chosen", "rejected"] * n,
        row=torch.arange(n).repeat_interleave(2),
        n_tokens=torch.full((2 * n,), 5),
        reward=unknown,
        logps=torch.stack((chosen, rejected), 1).flatten().double(),
        reference_logps=unknown,
        loss=unknown,
        weight=unknown,
    )


def compared(chosen: torch.Tensor, rejected: torch.Tensor) -> displacement.Displacement:
    """Compare with an evaluation in which all log-probs, of widely different responses, were these changes less."""
    before = -100 * torch.rand(len(chosen), dtype=torch.float64)
    now = evaluation(before + chosen, before + rejected)
    found = displacement.compare(7, evaluation(before, before), now)
    assert found is not None
    return found


def test_a_fall_of_both_sides_by_hand():
    """Chosen responses change by -2 and -4 in turn, rejected ones by -10: the mean is -3, and the margin rises by 7.

    The standard deviation of N values of -3 +- 1 is sqrt(N / (N - 1)), so the standard error is 1 / sqrt(N - 1).
    """
    found = compared(torch.tensor([-2.0, -4.0]).repeat(N // 2), torch.full((N,), -10.0))
    assert found.is_found
    assert found.chosen.mean == pytest.approx(-3) and found.chosen.error == pytest.approx(1 / (N - 1) ** 0.5)
    assert found.line() == (
        "warning: likelihood displacement: since the evaluation at step 7 the log-prob of chosen responses fell by "
        "3.00 ± 0.16 nats (it fell for 100% of 40), and the margin rose by 7.00 only because rejected ones fell by "
        "10.00"
    )


def test_what_is_no_displacement():
    """Chosen responses that rise; a margin that falls; a fall within the noise; and one of less than 1 nat."""
    fall = torch.full((N,), -3.0)
    assert compared(fall, fall - 1).is_found
    assert not compared(-fall, fall).is_found
    assert not compared(fall, fall + 1).is_found
    assert not compared(fall + 2.1, fall).is_found
    noise = torch.tensor([30.0, -30.0]).repeat(N // 2)  # a standard error of 4.8
    assert not compared(fall + noise, fall - 50).is_found
    assert not compared(fall, fall - 1 + noise).is_found


def test_too_few_responses_say_nothing():
    few = torch.full((displacement.FEWEST - 1,), -3.0)
    assert displacement.compare(0, evaluation(few, few), evaluation(few - 3, few - 9)) is None


def test_evaluations_of_other_examples_are_compared_in_those_of_both():
    """A resumed run may have another n_eval_examples: responses are told by their ids."""
    before = torch.arange(N).double()
    first, now = evaluation(before, before), evaluation(before[5:] - 3, before[5:] - 9)
    now.id[:] = evaluation(before, before).id[10:]
    found = displacement.compare(0, first, now)
    assert (found.chosen.n, found.chosen.mean, found.rejected.mean) == (N - 5, -3, -9)


#### CHES


def test_ches_by_hand():
    """H of the chosen response is (1, 2) over 2 tokens, that of the rejected one (3, 1) over 1.

    CHES is 1 * 3 + 2 * 1 - (1 + 4) = 0. Normalised: (0.5, 1) and (3, 1), so 1.5 + 1 - (0.25 + 1) = 1.25. A pair of
    equal responses has 0 in both forms.
    """
    sums = torch.tensor([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0], [2.0, 2.0]])
    assert ches._scored(sums, torch.tensor([2.0, 1.0, 4.0, 4.0])).tolist() == [[0, 1.25], [0, 0]]


@pytest.mark.parametrize("packs", [True, False])
def test_ches_is_that_of_plain_forward_passes(packs):
    """Each response alone, with the hidden states that transformers returns: of the last token of the prompt, and of
    all tokens of the response but the last. In one forward pass and in many."""
    policy, pairs = tiny_policy("llama"), random_examples(6)
    expected = []
    for pair in pairs:
        sums = []
        for response in pair.responses:
            ids = torch.tensor([[*pair.prompt.tolist(), *response.tolist()]])
            with torch.no_grad():
                hidden = policy.lm.model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
            sums.append(hidden[len(pair.prompt) - 1 : -1].sum(0))
        n = [len(response) for response in pair.responses]
        (a, b), (x, y) = sums, (sums[0] / n[0], sums[1] / n[1])
        expected.append([float(a @ b - a @ a), float(x @ y - x @ x)])
    policy.use_packing(packs)
    for limit in (10_000, 30, 1):
        scored = torch.stack(ches.scores(policy, pairs, limit), 1)
        torch.testing.assert_close(scored, torch.tensor(expected), rtol=1e-4, atol=1e-3)


#### A RUN


def lift(path: str, chosen: float, rejected: float) -> None:
    """Change an evaluation's log-probs, so that later ones seem to have fallen."""
    rows = Records.read(path)
    rows.logps[rows.is_role("chosen")] += chosen
    rows.logps[rows.is_role("rejected")] += rejected
    rows.write(path)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_run_says_that_it_displaces(tmp_path, loss, monkeypatch):
    """The warning follows the evaluation, once with the pairs of the highest CHES; 1 and 0 are in the metrics.

    KTO has no pairs among its rows: they are those of the test data.
    """
    said = []
    loader = loader_for(loss, N, batch_size=16)
    trainer = make_trainer(tmp_path, loss)
    trainer.eval_loader = loader
    monkeypatch.setattr(metrics.NoLog, "say", lambda self, line: said.append(line))
    trainer.log_evaluation()
    assert "displacement/found" not in trainer.state.eval_metrics and not said
    trainer.state.updates = 4
    trainer.log_evaluation()
    assert trainer.state.eval_metrics["displacement/found"] == 0 and not said
    lift(records.path_of(trainer.run_dir, 0), 2.0, 5.0)
    trainer.state.updates = 8
    trainer.log_evaluation()
    assert trainer.state.eval_metrics["displacement/found"] == 1
    path = os.path.join(trainer.run_dir, "evaluations", "ches-8.json")
    with open(path) as file:
        content = json.load(file)
    scores = [pair["ches_normalised"] for pair in content["worst"]]
    assert content["pairs_scored"] == N and scores == sorted(scores, reverse=True)
    names = ", ".join(pair["chosen_id"] for pair in content["worst"][: ches.NAMED])
    assert "fell by 2.00 ± 0.00 nats (it fell for 100% of 40), and the margin rose by 3.00" in said[0]
    assert said[0].endswith(f"; pairs that are most alike to the model (CHES) are in {path}, such as {names}")
    monkeypatch.setattr(ches, "scores", None)
    trainer.state.updates = 12
    trainer.log_evaluation()
    assert said[1].endswith(f"; pairs: {path}") and said[1].split(";")[0] == said[0].split(";")[0]


def test_a_damaged_first_evaluation_does_not_end_the_run(tmp_path, capsys):
    trainer = make_trainer(tmp_path, "dpo", eval_batches=batches_for("dpo", 1))
    trainer.log_evaluation()
    with open(path := records.path_of(trainer.run_dir, 0), "wb"):
        pass
    trainer.state.updates = 1
    trainer.log_evaluation()
    assert f"warning: {path} is not an evaluation that a run wrote" in capsys.readouterr().out


def test_curves_mark_where_it_was_found():
    """From the first evaluation that found it to the last; nothing is marked in a run without."""
    spans = []
    axis = SimpleNamespace(axvspan=lambda first, last, **style: spans.append((first, last)))
    curves._mark_displacement(axis, [(16, 0.0), (32, 1.0), (48, 1.0)])
    curves._mark_displacement(axis, [(16, 0.0)])
    curves._mark_displacement(axis, [])
    assert spans == [(32, 48)]
    assert "displacement" not in curves.panels(["displacement/found", "loss/eval"])
