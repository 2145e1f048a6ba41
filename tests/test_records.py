"""The rows of an evaluation: what they say of each response, and that they combine to what is logged."""

import json
import os

import pytest
import torch

from halos import curves, metrics, records, run_dir
from halos.engine import Batch, Outcome
from halos.errors import UserError
from halos.models import PerToken
from halos.records import Records
from helpers import example
from small_runs import batches_for, losses, make_trainer

NAN = float("nan")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)


def evaluated(folder, loss: str, batches, *words: str):
    """Return a trainer whose policy has left the reference, after one logged evaluation, and the rows of its file."""
    trainer = make_trainer(folder, loss, *words, eval_batches=batches)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.mul_(1.2)
    trainer.log_evaluation()
    return trainer, Records.read(records.path_of(trainer.run_dir, 0))


@pytest.mark.parametrize("loss", losses())
def test_rows_combine_to_what_is_logged(tmp_path, loss):
    """Loss and rewards of an evaluation are means over the rows, to 1e-6, with batches of 8 and 5 examples.

    A new loss in config/loss is tested, too: whether it has one loss per pair, per response or per token.
    """
    batches = [*batches_for(loss, 1, seed=3), *batches_for(loss, 1, 5, seed=4)]
    trainer, rows = evaluated(tmp_path, loss, batches)
    logged = trainer.state.eval_metrics
    assert rows.mean_loss() == pytest.approx(logged["loss/eval"], rel=1e-6, abs=1e-6)
    assert float(rows.weight.sum()) == pytest.approx(1)
    for side in ("chosen", "rejected"):
        own = rows.reward[rows.is_role(side)]
        assert f"rewards_eval/{side}" not in logged or logged[f"rewards_eval/{side}"] == pytest.approx(
            float(own.mean()), rel=1e-5, abs=1e-6
        )
    examples = sum(batches, [])
    assert rows.id == [name for one in examples for name in one.ids]
    assert rows.n_tokens.tolist() == [n for one in examples for n in one.n_targets]
    with torch.no_grad():
        _, batch = trainer.forward(examples)
    if len(batch.policy.logps):
        expected = batch.sum_by_response(batch.policy.logps)
        torch.testing.assert_close(rows.logps.float(), expected, rtol=1e-5, atol=1e-4)
    else:  # a reward model
        assert rows.logps.isnan().all()
    if batch.reference_logps is None:
        assert rows.reference_logps.isnan().all()
    else:
        expected = batch.sum_by_response(batch.reference_logps)
        torch.testing.assert_close(rows.reference_logps.float(), expected, rtol=1e-5, atol=1e-4)


def batch_of(*examples) -> Batch:
    logps = -torch.arange(1.0, sum(n for one in examples for n in one.n_targets) + 1)
    return Batch(list(examples), PerToken(logps, None, None), None)


# Two pairs; their responses have 1, 2, 1 and 3 tokens, whose log-probs are -1, ..., -7.
PAIRS = batch_of(example([1], [2], [3, 4]), example([1], [5], [6, 7, 8]))


def rows_of(batch: Batch, losses: list[float], chosen=(1.0, 2.0), rejected=(0.0, 5.0)) -> Records:
    vectors = (torch.tensor(vector) for vector in (losses, chosen, rejected, chosen, rejected))
    return Records.concatenate([records.of_batch(batch, Outcome(*vectors))])


def test_the_share_of_a_response_by_hand():
    """The number of losses tells what they are of. With 2 pairs, 4 responses and 7 tokens:

    2 are of pairs, 4 of responses (chosen ones first), 7 of tokens, and 1 of the batch.
    """
    pairs = rows_of(PAIRS, [10.0, 20.0])
    assert pairs.loss.tolist() == [10, 10, 20, 20] and pairs.weight.tolist() == [0.25] * 4
    responses = rows_of(PAIRS, [1.0, 2.0, 3.0, 4.0])
    assert responses.loss.tolist() == [1, 3, 2, 4] and responses.weight.tolist() == [0.25] * 4
    tokens = rows_of(PAIRS, [1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert tokens.loss.tolist() == [1, 3, 5, 7] and (7 * tokens.weight).tolist() == pytest.approx([1, 2, 1, 3])
    assert tokens.mean_loss() == pytest.approx(33 / 7)
    assert rows_of(PAIRS, [3.0]).loss.tolist() == [3] * 4
    assert pairs.logps.tolist() == [-1, -5, -4, -18] and pairs.n_tokens.tolist() == [1, 2, 1, 3]
    assert pairs.reward.tolist() == [1, 0, 2, 5] and pairs.margin.tolist() == [1, 1, -3, -3]
    assert pairs.row.tolist() == [0, 0, 1, 1]


def test_batches_weigh_by_their_losses():
    """A batch of one pair beside one of two: the six rows have a third of the loss, two by two."""
    one, two = (records.of_batch(batch, Outcome(*[torch.ones(n)] * 5)) for batch, n in ((SINGLE, 1), (PAIRS, 2)))
    rows = Records.concatenate([one, two])
    assert rows.weight.tolist() == pytest.approx([1 / 6] * 6) and rows.row.tolist() == [0, 0, 1, 1, 2, 2]


SINGLE = batch_of(example([1], [2], [3, 4]))


def test_unrelated_responses_have_no_part_in_the_loss(tmp_path):
    """They have log-probs, and neither loss, reward nor margin: null in the file."""
    batch = batch_of(example([1], [2], [3, 4], chosen=(True, None)))
    rows = rows_of(batch, [2.0], (1.0,), ())
    rows.write(str(tmp_path / "rows.parquet"))
    back = Records.read(str(tmp_path / "rows.parquet"))
    assert back.role == ["chosen", "unrelated"] and back.logps.tolist() == [-1, -5]
    assert back.loss[0] == 2 and back.loss.isnan().tolist() == [False, True] and back.weight.tolist() == [1, 0]
    assert back.mean_loss() == 2 and back.margin.isnan().all() and back.reference_logps.isnan().all()
    from pyarrow import parquet

    table = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert table[1]["loss"] is None and table[1]["reward"] is None and table[0]["margin"] is None


def test_what_is_no_evaluation_is_refused(tmp_path):
    for name, content in {"text": b"no parquet", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="is not an evaluation that a run wrote"):
            Records.read(str(tmp_path / name))
    with pytest.raises(UserError, match="nope.parquet does not exist; give an evaluation of a run"):
        Records.read(str(tmp_path / "nope.parquet"))


#### DATASETS


def test_metrics_of_each_dataset_by_hand(tmp_path):
    """Pair 1 is of shp: loss 10, rewards 1 and 0. Pair 2 is of hh: loss 20, rewards 2 and 5, so its margin is -3."""
    first, second = PAIRS.examples
    batch = batch_of(first._replace(dataset="shp"), second._replace(dataset="org/hh"))
    trainer = make_trainer(tmp_path, "dpo")
    assert rows_of(batch, [10.0, 20.0]).by_dataset(trainer.accuracy) == {
        "loss/eval/shp": 10, "rewards_eval/chosen/shp": 1, "rewards_eval/rejected/shp": 0,
        "rewards_eval/accuracies/shp": 1, "rewards_eval/margins/shp": 1,
        "loss/eval/org/hh": 20, "rewards_eval/chosen/org/hh": 2, "rewards_eval/rejected/org/hh": 5,
        "rewards_eval/accuracies/org/hh": 0, "rewards_eval/margins/org/hh": -3,
    }  # fmt: skip
    assert rows_of(PAIRS, [10.0, 20.0]).by_dataset(trainer.accuracy) == {}  # both of one


def test_a_run_of_two_datasets_logs_and_draws_both(tmp_path, capsys):
    """The metrics of a dataset are in metrics.jsonl and in the panels, and not in the line of the terminal."""
    (batch,) = batches_for("kto", 1)
    named = [one._replace(dataset="shp" if i < 4 else "hh") for i, one in enumerate(batch)]
    trainer = make_trainer(tmp_path, "kto", eval_batches=[named])
    trainer.log = trainer.open_log()
    trainer.log_evaluation()
    with open(os.path.join(trainer.run_dir, "metrics.jsonl")) as file:
        (row,) = map(json.loads, file)
    mean = (row["loss/eval/shp"] + row["loss/eval/hh"]) / 2
    assert mean == pytest.approx(row["loss/eval"], rel=1e-6)
    assert "loss/eval 0.5" in (said := capsys.readouterr().out) and "shp" not in said
    drawn = curves.panels(curves.Series([row]).curves)
    assert drawn["loss per dataset"] == ["loss/eval/hh", "loss/eval/shp"]
    assert drawn["loss"] == ["loss/eval"]


#### THE FILES OF A RUN


def test_a_resumed_run_removes_later_evaluations(tmp_path):
    """Evaluations after the state are made again; what else is in the folder, and what a kill left, is told apart."""
    folder = tmp_path / run_dir.EVALUATIONS
    folder.mkdir()
    for name in ("step-2.parquet", "step-10.parquet", "ches-10.json", "ches-2.json", "step-10.parquet.mine"):
        (folder / name).touch()
    (folder / ".step-4.parquet.unfinished").touch()
    run_dir.recover(str(tmp_path))
    records.remove_after(str(tmp_path), 2)
    assert sorted(os.listdir(folder)) == ["ches-2.json", "step-10.parquet.mine", "step-2.parquet"]
    assert list(records.steps(str(tmp_path))) == [2]


def test_an_evaluation_of_ones_own_writes_no_rows(tmp_path):
    trainer = make_trainer(tmp_path, "sft")
    trainer.evaluate = lambda: {"loss/eval": 1.0}
    trainer.log_evaluation()
    assert not os.path.exists(os.path.join(trainer.run_dir, run_dir.EVALUATIONS))
