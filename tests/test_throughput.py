"""The comparison with other trainers: counts at hand-computed values, and that no way with another loss passes."""

import dataclasses
import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trainers
from benchmarks.throughput import __main__ as command
from benchmarks.throughput import block, machine, peer, report, ways, work
from halos.errors import UserError
from halos.models import PolicyModel
from halos.tokens import Role
from helpers import example

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed; pip install -e '.[bench]'"
)
VOCABULARY = 97

# Prompts of 4 and 2 tokens, responses of 3, 1, 2 and 2.
PAIRS = [example([1, 2, 3, 4], [5, 6, 7], [8]), example([1, 2], [3, 4], [5, 6])]


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Settings for a micro Llama with random weights."""

    def llama():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=VOCABULARY,
            initializer_range=0.2,
        )
        return PolicyModel(LlamaForCausalLM(config))

    monkeypatch.setattr(ways, "llama", llama)
    return lambda loss: ways.Settings(loss, None, torch.device("cpu"), torch.float32, str(tmp_path))


def batches_for(loss: str, n: int = 3) -> list[work.Batch]:
    batches = work.synthetic("hh", loss, n, 4, VOCABULARY)
    short = [[one._replace(prompt=one.prompt[:20]) for one in batch] for batch in batches]
    return [[one._replace(responses=tuple(r[:9] for r in one.responses)) for one in batch] for batch in short]


#### COUNTS


def test_sizes_of_pairs():
    """Packed: 4 + 2 + 0 and 2 + 1 + 1 inputs. Padded: 4 sequences as wide as the longest, of 7 tokens."""
    assert work.sizes_of(PAIRS) == work.Sizes(unique=10, targets=8, unrelated=0, real=7 + 5 + 4 + 4, padded=28)
    assert work.sizes_of(PAIRS).padding == pytest.approx(8 / 28)


def test_a_prompt_that_two_pairs_share_is_unique_once():
    both = [PAIRS[1], PAIRS[1]._replace(responses=(np.array([7, 8, 9], np.int32), np.array([6], np.int32)))]
    assert work.sizes_of(both).unique == 2 + 1 + 1 + 2 + 0


def test_floor_flops():
    """6 per weight for the step, 2 more for a live reference; unrelated responses take 2 and 2."""
    sizes = work.Sizes(unique=10, targets=8, unrelated=3, real=0, padded=1)
    step = 6 * (100 * 10 + 50 * 8) + 2 * (100 + 50) * 3
    assert work.floor_flops(sizes, body=100, head=50, is_live=False) == step
    assert work.floor_flops(sizes, body=100, head=50, is_live=True) == step + 2 * (100 * 10 + 50 * 8 + 150 * 3)


def test_halves_are_single_responses_of_both_kinds_in_turn():
    rows = work.halves(PAIRS)
    assert [row.roles for row in rows] == [(Role.CHOSEN,), (Role.REJECTED,)] * 2
    assert [row.responses[0].tolist() for row in rows] == [[5, 6, 7], [5, 6], [3, 4], [8]]


def test_mismatched_takes_the_response_of_the_row_before():
    rows = work.mismatched(work.halves(PAIRS))
    assert [row.roles[1] for row in rows] == [Role.UNRELATED] * 4
    assert [row.responses[1].tolist() for row in rows] == [[8], [5, 6, 7], [5, 6], [3, 4]]
    assert work.sizes_of(rows).unrelated == 8


def test_too_few_rows_are_an_error():
    with pytest.raises(UserError, match="2 rows of the wanted length, but 2 batches of 2"):
        work.batches_of(PAIRS, 2, 2)


#### DO ALL COMPUTE THE SAME


def numbers(**changed: float) -> dict[str, float]:
    return {"loss": 0.7, "logps/chosen": -300.0, "logps/rejected": -250.0} | {
        "rewards/chosen": 0.5,
        "rewards/rejected": -0.2,
        **{name.replace("_", "/"): value for name, value in changed.items()},
    }


def test_a_wrong_loss_is_an_error():
    assert report.check_numbers("dpo", {"ours_live": numbers(), "plain": numbers(loss=0.7005)}) < 1e-3
    with pytest.raises(UserError, match="loss is 0.7 for ours_live and 0.702 for plain"):
        report.check_numbers("dpo", {"ours_live": numbers(), "plain": numbers(loss=0.702)})
    with pytest.raises(UserError, match="loss is nan for plain"):
        report.check_numbers("dpo", {"ours_live": numbers(), "plain": numbers(loss=float("nan"))})


def test_kto_losses_are_compared_between_ways_with_the_same_kl():
    """Losses with another KL differ; their log-probs and rewards must not."""
    ours, trl = numbers(), numbers(loss=0.9)
    report.check_numbers("kto", {"ours_live": ours, "ours_mismatched_live": trl, "trl_live": trl})
    with pytest.raises(UserError, match="loss is"):
        report.check_numbers("kto", {"ours_mismatched_live": ours, "trl_live": trl})
    with pytest.raises(UserError, match="rewards/chosen is"):
        report.check_numbers("kto", {"ours_live": ours, "trl_live": trl | {"rewards/chosen": 0.51}})


@pytest.mark.parametrize("loss, trainer", [("dpo", trainers.DPOTrainer), ("kto", trainers.KTOTrainer)])
def test_ours_live_ours_cached_and_plain_agree(settings, loss, trainer):
    """Of a batch without an update, and in each of three steps with updates between them."""
    batches = batches_for(loss)
    made = {
        "ours_live": ways.Ours(settings(loss), batches, is_cached=False, trainer_class=trainer),
        "ours_cached": ways.Ours(settings(loss), batches, is_cached=True, trainer_class=trainer),
        "plain": ways.Plain(settings(loss), batches, trainer_class=trainer),
    }
    report.check_numbers(loss, {name: way.numbers(batches[0]) for name, way in made.items()})
    ticks = []
    losses = {name: way.train(batches, lambda: ticks.append(0)) for name, way in made.items()}
    assert len(ticks) == 9
    assert losses["ours_live"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["ours_cached"] == pytest.approx(losses["plain"], rel=1e-5)


def test_a_way_with_another_loss_does_not_pass(settings):
    """The start is far from equal models, so that twice the beta shows in the loss."""

    class Doubled(trainers.DPOTrainer):
        def loss(self, *logps):
            return super().loss(*(2 * one for one in logps))

    batches = batches_for("dpo", 1)
    right = ways.Plain(settings("dpo"), batches, trainer_class=trainers.DPOTrainer).numbers(batches[0])
    wrong = ways.Ours(settings("dpo"), batches, is_cached=False, trainer_class=Doubled).numbers(batches[0])
    with pytest.raises(UserError, match="the ways do not compute the same"):
        report.check_numbers("dpo", {"plain": right, "ours_live": wrong})


def test_mismatched_kto_is_the_papers_formula(settings):
    """The KL is the mean log-ratio of the unrelated responses after the rows' prompts."""
    [batch] = batches_for("kto", 1)
    way = ways.OursMismatched(settings("kto"), [batch], is_cached=False)
    plain = ways.Plain(settings("kto"), [batch], trainer_class=trainers.KTOTrainer)
    pairs = [one.only([1])._replace(roles=(Role.CHOSEN,)) for one in work.mismatched(batch)]
    with torch.no_grad():
        kl = (plain.logps(plain.policy, pairs) - plain.logps(plain.reference, pairs)).mean().clamp(min=0)
        logratios = plain.logps(plain.policy, batch) - plain.logps(plain.reference, batch)
    signs = torch.tensor([1.0 if one.roles == (Role.CHOSEN,) else -1.0 for one in batch])
    expected = (1 - torch.sigmoid(0.1 * signs * (logratios - kl))).mean().item()
    assert way.numbers(batch)["loss"] == pytest.approx(expected, rel=1e-5)


#### TRL


def test_rows_of_trl_are_the_same_ids():
    assert peer.pair_rows(PAIRS[:1]) == [{"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6, 7], "rejected_ids": [8]}]
    rows = peer.response_rows(work.halves(PAIRS)[:2])
    assert rows[0] == {
        "prompt_ids": [1, 2, 3, 4],
        "completion_ids": [5, 6, 7],
        "KL_completion_ids": [5, 6],
        "label": True,
    }


def test_missing_trl_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="trl is not installed; pip install"):
        peer.import_trl()


@needs_trl
@pytest.mark.parametrize("loss", ["dpo", "kto"])
@pytest.mark.parametrize("is_precomputed", [True, False])
def test_trl_agrees_with_ours(settings, loss, is_precomputed):
    batches = batches_for(loss)
    trl = peer.TRL(settings(loss), batches, is_precomputed=is_precomputed)
    if loss == "dpo":
        name, ours = "ours_live", ways.Ours(settings(loss), batches, is_cached=False, trainer_class=trainers.DPOTrainer)
    else:
        name, ours = "ours_mismatched_live", ways.OursMismatched(settings(loss), batches, is_cached=False)
    report.check_numbers(loss, {name: ours.numbers(batches[1]), "trl_live": trl.numbers(batches[1])})
    ticks = []
    assert trl.train(batches, lambda: ticks.append(0)) == pytest.approx(ours.train(batches, lambda: None), rel=1e-4)
    assert len(ticks) == 3


#### TABLES


def result(seconds: list[float], losses: list[float] | None = None) -> block.Result:
    return block.Result(
        numbers={},
        losses=losses or [0.7] * len(seconds),
        seconds=seconds,
        seconds_before=1.0,
        rates=[90.0, 110.0],
        other_load=0.0,
        peak_memory=2**31,
        body=4,
        head=2,
        versions={"torch": "2"},
    )


def test_table_has_rates_ratios_and_shares():
    """One batch of 2 pairs and 10 unique tokens, 1 and 2 s in two rounds; the other way takes 3 and 4 s.

    Its FLOPs are 6 (4 * 10 + 2 * 8) = 336, 3.36 s at a rate of 100 FLOP/s.
    """
    blocks = {"ours_cached": [result([1.0]), result([2.0])], "trl_live": [result([3.0]), result([4.0])]}
    assert report.shares("dpo", "ours_cached", [PAIRS], blocks["ours_cached"]) == pytest.approx([3.36, 1.68])
    row = report.table("dpo", [PAIRS], blocks).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["this project, cached", "1.50 (1.00 to 2.00)", "1.33", "7", "2.0", "252%", "2.50 (2.00 to 3.00)"]


def test_losses_of_the_steps_are_compared():
    right = {"ours_live": [result([1.0, 1.0], [0.7, 0.6])], "plain": [result([1.0, 1.0], [0.7, 0.6])]}
    assert report.check_losses("dpo", right) == 0
    wrong = right | {"plain": [result([1.0, 1.0], [0.7, 0.61])]}
    with pytest.raises(UserError, match="loss of step 2 is 0.6 for ours_live"):
        report.check_losses("dpo", wrong)


def test_a_section_replaces_the_one_with_its_title(tmp_path):
    path = str(tmp_path / "RESULTS.md")
    for title, text in (("one", "first"), ("two", "second"), ("one", "third")):
        report.write_section(path, title, text)
    text = (tmp_path / "RESULTS.md").read_text()
    assert text == f"{report.HEAD.strip()}\n\n## one\n\nthird\n\n## two\n\nsecond\n"


#### THE COMMAND


def test_a_busy_machine_is_refused(monkeypatch):
    monkeypatch.setattr(machine, "_seconds", iter([(0.0, 0.0, 0.0), (1.0, machine.os.cpu_count() / 2, 0.0)]).__next__)
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="other processes use 50% of this machine's cores.*--beside_other_work"):
        machine.wait_until_quiet(patience=-1.0)


def test_own_time_is_not_other_load(monkeypatch):
    cores = machine.os.cpu_count()
    monkeypatch.setattr(machine, "_seconds", iter([(0.0, 0.0, 0.0), (10.0, 7.0 * cores, 5.0 * cores)]).__next__)
    assert machine.OtherLoad()() == pytest.approx(0.2)


def test_every_second_round_goes_backwards(monkeypatch, tmp_path):
    args = command.parse(["--ways", "ours_cached", "plain", "--rounds", "3"])
    bench = command.Bench(args, "name", [PAIRS], str(tmp_path))
    order = []
    monkeypatch.setattr(bench, "run", lambda way, *rest: order.append(way) or SimpleNamespace(seconds=[1.0]))
    bench.measure()
    assert order == ["ours_cached", "plain", "plain", "ours_cached", "ours_cached", "plain"]


def test_a_block_beside_other_work_is_measured_again(monkeypatch, tmp_path):
    """A process that started after the block had begun took the cores from it, and its times counted."""
    bench = command.Bench(command.parse([]), "name", [PAIRS], str(tmp_path))
    loads = iter([0.5, 0.0, 0.5, 0.5, 0.5])

    def start(way, given, wanted):
        with open(wanted, "w") as file:
            json.dump(dataclasses.asdict(dataclasses.replace(result([1.0]), other_load=next(loads))), file)

    monkeypatch.setattr(bench, "start", start)
    assert bench.run("plain", "round-0", "float32").other_load == 0.0
    with pytest.raises(UserError, match="in 3 tries of a block"):
        bench.run("plain", "round-1", "float32")


def test_wrong_numbers_stop_before_timing(monkeypatch, tmp_path):
    args = command.parse(["--ways", "ours_cached", "plain", "--shapes", "hh", "--results", str(tmp_path / "R.md")])
    ran = []

    def run(self, way, name, dtype, checks=False):
        ran.append(name)
        return SimpleNamespace(numbers=numbers(loss=0.7 if way == "plain" else 0.8))

    monkeypatch.setattr(command.Bench, "run", run)
    with pytest.raises(UserError, match="the ways do not compute the same"):
        command.run(args, str(tmp_path))
    assert ran == ["check", "check"] and not (tmp_path / "R.md").exists()


@pytest.mark.parametrize("words", ["--model /nowhere --data .", "--model . --data hh=/nowhere", "--model ."])
def test_a_missing_path_is_named(words, capsys):
    with pytest.raises(SystemExit) as ended:
        command.parse(words.split())
    assert ended.value.code == 2 and capsys.readouterr().err.count("error:") == 1
