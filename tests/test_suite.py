"""The suite: its statistics on simulated scores, its plan of equal budgets, how it resumes, and what it prints."""

import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from scipy.special import stdtrit

import compare
import dataloaders
import eval as sampling
import train
import trainers
from halos import demo
from halos.config import validate
from halos.errors import Stopped, UserError
from halos.loading import load_tokenizer
from halos.suite import commands, findings, measures, plan, report, runner, settings, stages
from halos.suite.contrasts import estimate, no_difference_share, standard_error
from helpers import CONFIG_DIR, ONE_BLOCK, PROJECT

OWN = {"model": "tiny", "seeds": "5", "losses": "", "sizes": "", "aa": "", "settings": "", "out": ""}
FORMATS = {"sft": "sft", "dpo": "paired", "kto": "unpaired", "slic": "paired", "ppo": "unpaired", "ipo": "paired"}


def suite_of(*words: str, **own: str) -> settings.Suite:
    return settings.load(OWN | own, list(words))


#### STATISTICS


def simulated(rng, n_seeds: int, n_prompts: int, mean=0.0, seeds=0.03, prompts=0.3, rest=0.4) -> np.ndarray:
    """Draw scores with effects of seeds and of prompts. The last three arguments are standard deviations."""
    effects = seeds * rng.standard_normal((n_seeds, 1)) + prompts * rng.standard_normal((1, n_prompts))
    return mean + effects + rest * rng.standard_normal((n_seeds, n_prompts))


def test_the_standard_error_at_hand_computed_values():
    """Seeds have the means 1/2 and 1, prompts 1 and 1/2, the mean is 3/4, and the rest of each score is 1/4 or -1/4.

    So all three mean squares are 1/4: the variance is 1/4 / 4, and prompts explain no more than the rest does.
    """
    error, df = standard_error(np.array([[1.0, 0.0], [1.0, 1.0]]))
    assert (error, df) == (0.25, 1.0)
    found = estimate(np.array([[1.0, 0.0], [1.0, 1.0]]), n_comparisons=5)
    assert found.high - found.mean == pytest.approx(0.25 * stdtrit(1, 0.995))
    assert found.smallest == pytest.approx(0.25 * (stdtrit(1, 0.995) + stdtrit(1, 0.8)))
    assert found.p == 1.0  # 5 times 0.2


def test_one_seed_has_an_interval_over_prompts_and_a_missing_score_drops_its_prompt():
    scores = np.array([[1.0, 0.0, np.nan, 1.0, 0.0]])
    assert standard_error(scores[:, [0, 1, 3, 4]]) == (pytest.approx(np.sqrt(1 / 3 / 4)), 3)
    assert estimate(scores).mean == 0.5


@pytest.mark.parametrize("seeds, prompts, most", [(0.0, 0.0, 1.0), (0.03, 0.3, 1.0), (0.2, 0.1, 0.977), (0.0, 0.5, 1)])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds, prompts, most):
    """At 5 seeds: 95 % of 600 intervals, give or take three standard errors (2.7 %); more where seeds hardly matter."""
    rng = np.random.default_rng(0)
    found = [estimate(simulated(rng, 5, 60, 0.1, seeds, prompts)) for _ in range(600)]
    assert 0.923 <= np.mean([one.low <= 0.1 <= one.high for one in found]) <= most


def test_seeds_that_agree_by_chance_do_not_make_a_narrow_interval():
    """Five seeds with the same mean over 400 prompts, each half right, and each prompt right in half of the seeds.

    The scores vary as coins do, so the standard error is at least that of 2,000 coins: 0.5 / 2000^0.5.
    """
    coins = (np.add.outer(np.arange(5), np.arange(400)) % 2).astype(float)
    assert np.ptp(coins.mean(axis=1)) == 0
    assert standard_error(coins)[0] == pytest.approx(0.5 / 2000**0.5, rel=0.2)


def test_intervals_of_several_comparisons_hold_together():
    """Ten true differences of 0: in at most 5 % of 200 suites is any of them found, give or take 4.6 %."""
    rng = np.random.default_rng(1)
    wrong = [any(estimate(simulated(rng, 5, 60), 10).differs for _ in range(10)) for _ in range(200)]
    assert np.mean(wrong) <= 0.096


def test_the_smallest_difference_is_found_four_times_in_five():
    """With many seeds, so that the standard error is well known: 80 % of 400, give or take 6 %."""
    rng = np.random.default_rng(2)
    smallest = np.median([estimate(simulated(rng, 20, 60)).smallest for _ in range(50)])
    found = [estimate(simulated(rng, 20, 60, mean=smallest)).differs for _ in range(400)]
    assert 0.72 <= np.mean(found) <= 0.88


def test_one_row_under_two_names_does_not_differ():
    """Binary scores whose seeds and prompts differ; and as a control, two rows that do differ, as if they were one."""
    rng = np.random.default_rng(3)
    right = rng.random((10, 1)) * 0.04 + rng.random((1, 400)) * 0.9 > rng.random((10, 400))
    assert no_difference_share(right.astype(float)) >= 0.95
    right[:5] |= rng.random((5, 400)) > 0.5
    assert no_difference_share(right.astype(float)) < 1.0


#### THE PLAN


def test_rows_of_named_losses():
    assert settings.rows_of(["dpo", "kto"]) == ("sft", "dpo", "kto", "sft+dpo", "sft+kto")
    assert settings.rows_of(["sft+ipo"]) == ("sft", "sft+ipo")
    assert suite_of().rows == ("sft", "ppo", "dpo", "kto", "slic", "sft+ppo", "sft+dpo", "sft+kto", "sft+slic")


def test_a_loss_without_a_line_in_the_settings_is_tried_as_often():
    assert suite_of(losses="[kto,mine]").tries_of("sft+mine")["lr"] == ["1e-4", "2e-4", "4e-4"]


def test_what_is_compared():
    asked = findings.questions(settings.rows_of(["dpo", "kto"]))
    assert list(asked.values()) == [
        [("sft+dpo", "dpo"), ("sft+kto", "kto")],
        [("sft+dpo", "sft"), ("sft+kto", "sft")],
        [("sft+dpo", "sft+kto")],
        [("dpo", "kto")],
        [("sft+dpo - dpo", "sft+kto - kto")],
    ]
    scores = {"sft": 0, "dpo": 1, "kto": 2, "sft+dpo": 5, "sft+kto": 4}
    gain = findings.difference({row: np.array(score) for row, score in scores.items()}, "sft+dpo - dpo")
    assert gain == 4


def words_of(suite, run) -> dict[str, str]:
    """The key=value words of a run's training, the last one of each key."""
    return dict(word.split("=", 1) for word in plan.train_words(suite, run, FORMATS))


def test_every_loss_has_as_many_responses_per_update():
    suite = suite_of()
    runs = {run.row: words_of(suite, run) for run in plan.final_runs(suite, "1550k", range(3, 4), fixed(suite))}
    assert {row: words["model.batch_size"] for row, words in runs.items()} == {
        row: "32" if settings.loss_of(row) in ("dpo", "slic") else "64" for row in suite.rows
    }
    assert {words["seed"] for words in runs.values()} == {"3"}
    assert runs["sft+dpo"]["model.load_from"] == "1550k_sft_seed3/LATEST/policy.pt"
    assert runs["dpo"]["model.load_from"] == runs["sft"]["model.load_from"] == "1550k_base_seed0/LATEST/policy.pt"


def fixed(suite) -> dict[str, tuple[str, ...]]:
    return plan.first_settings(suite)


def test_pairs_and_single_responses_are_the_same_data_in_as_many_updates(tmp_path, monkeypatch):
    """One epoch of the paired and of the unpaired loader has the same responses to the same prompts."""
    monkeypatch.setattr(demo, "N_PROMPTS", {"train": 60, "test": 10})
    suite = suite_of("dataset.demo.keep.n_prompts=40", out=str(tmp_path))
    seen, updates, orders = [], [], []
    for run in plan.final_runs(suite, "1550k", range(1, 2), fixed(suite)):
        if run.row in ("dpo", "kto"):
            with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
                config = compose("config", plan.train_words(suite, run, FORMATS))
            loader = dataloaders.make_loader(config, load_tokenizer(config), "train")
            rows = [(bytes(one.prompt), bytes(text)) for batch in loader for one in batch for text in one.responses]
            chosen = [
                bytes(text)
                for row in loader.order(0)
                for text, role in zip(loader.whole(row)[1], loader.tokenized(row).roles, strict=True)
                if role == "chosen"
            ]
            seen.append(Counter(rows))
            updates.append(len(loader))
            orders.append(chosen)
    assert seen[0] == seen[1] and seen[0].total() > 80
    assert updates[0] == updates[1] and orders[0] == orders[1]


def test_the_best_learning_rate_is_tried_with_the_other_values():
    suite = suite_of()
    asked = []

    def score(run):
        asked.append(run.words)
        return {("lr=1e-4",): 0.5, ("lr=4e-4",): 0.6}.get(run.words, 0.55)

    best = plan.tries(suite, "1550k", "dpo", None, score)
    assert asked == [("lr=1e-4",), ("lr=4e-4",), ("lr=4e-4", "loss.beta=0.3")] and best.words == ("lr=4e-4",)


@pytest.mark.parametrize(
    "own, message",
    [
        ({"losses": "[dpo", "aa": "kto"}, "aa=kto is not a row"),
        ({"sizes": "[tyni]"}, "sizes=[tyni] is neither in the settings nor in config/model; did you mean 'tiny'?"),
        ({"settings": "tinny"}, "settings=tinny: there is no such file; did you mean 'tiny'?"),
        ({"seeds": "0"}, "seeds=0 is not a whole number of at least 1"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(own, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[").replace("?", r"\?")):
        suite_of(**own)


@pytest.mark.parametrize(
    "word, message", [("lrr=1", "lrr=1: there is no key lrr"), ("n_epochs=-1", "n_epochs=-1 must be")]
)
def test_a_word_that_training_would_refuse_is_refused_at_the_start(word, message):
    with pytest.raises(UserError, match=message):
        stages.check(suite_of(word, losses="[dpo]"), runner.Programs(*[None] * 3, trainers, dataloaders, FORMATS))


def test_scores_of_other_settings_are_not_taken(tmp_path):
    """The settings that are tried may change between two commands, and a run is known by its number."""
    suite = stub(tmp_path)
    old, new = (plan.Run("one", "sft", 0, (f"lr={lr}",), attempt=1) for lr in (1e-3, 2e-3))
    os.makedirs(os.path.dirname(plan.file_of(suite, old, "scores.json")))
    plan.write_json(plan.file_of(suite, old, "scores.json"), {"words": old.words, "right": [1.0]})
    worker = runner.Runner(suite, SimpleNamespace(), total=1)
    assert worker.finish(old)["right"] == [1.0]
    with pytest.raises(UserError, match="is of a run with lr=0.001, not with lr=0.002; give another out=DIR"):
        worker.finish(new)


def test_unequal_tuning_and_unknown_keys_are_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    text = open(os.path.join(settings.FOLDER, "tiny.yaml")).read()
    path.write_text(text.replace("loss.KL_coef=0.02", "loss.KL_coef=0.02, loss.KL_coef=0.3"))
    with pytest.raises(UserError, match=r"tries: not equally many settings for each row \(sft: 3, ppo: 4"):
        suite_of(settings=str(path))
    path.write_text(text.replace("n_pairs", "pairs"))
    with pytest.raises(UserError, match="these keys are missing or unknown: n_pairs, pairs"):
        suite_of(settings=str(path))


#### RESUMING


STUB = {
    "losses": ["sft+dpo"],
    "sizes": {"one": ONE_BLOCK},
    "base": None,
    "words": ["datasets=[demo]", "n_examples=16", "do_first_eval=false"],
    "sft": [],
    "responses_per_update": 16,
    "tries": {"other": {"lr": [1e-3], "then": []}},
    "n_samples": 6,
    "n_tuning_samples": 2,
    "n_pairs": 8,
    "truth": "halos.demo:check",
    "judge": ["--judge", "halos.demo:check", "--judge_kind", "score"],
}


def stub(tmp_path, **own: str) -> settings.Suite:
    path = tmp_path / "stub.yaml"
    path.write_text(json.dumps(STUB))
    return suite_of(settings=str(path), out=str(tmp_path / "suite"), **{"seeds": "1", **own})


def test_a_suite_of_two_runs_from_its_start_to_its_table(tmp_path, monkeypatch):
    """It is stopped before its last comparison, goes on from there, and then has nothing left to do."""
    monkeypatch.setattr(demo, "N_PROMPTS", {"train": 60, "test": 20})
    suite = stub(tmp_path)
    whole = runner.Programs(train.main, sampling.main, compare.main, trainers, dataloaders, FORMATS)
    stopped = runner.Programs(train.main, sampling.main, lambda: sys.exit(130), trainers, dataloaders, FORMATS)
    with pytest.raises(Stopped, match="run the same command again"):
        stages.whole(suite, stopped)
    sampled = tmp_path / "suite" / "one_sft_seed1" / "samples.json"
    first = sampled.stat().st_mtime_ns
    stages.whole(suite, whole)
    assert sampled.stat().st_mtime_ns == first
    made = (tmp_path / "suite" / "commands.txt").read_text().splitlines()
    assert [line.split()[1] for line in made].count("eval.py") == 2
    nothing = runner.Programs(None, None, None, trainers, dataloaders, FORMATS)
    stages.whole(suite, nothing)  # without programs: all is done
    table = json.loads((tmp_path / "suite" / "table.json").read_text())
    budgets = table["budgets"]["one"]
    assert (budgets["sft"]["updates"], budgets["sft"]["examples"]) == (1, 16)
    assert (budgets["sft+dpo"]["updates"], budgets["sft+dpo"]["examples"]) == (2, 16)
    assert [one["question"] for one in table["comparisons"]] == ["is it better than SFT alone?"]
    assert "| SFT+DPO | " in (tmp_path / "suite" / "table.md").read_text()
    assert (tmp_path / "suite" / "suite.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(UserError, match="holds a suite with other n_pairs"):
        runner.prepare(stub_with(tmp_path, n_pairs=4))


def stub_with(tmp_path, **changed) -> settings.Suite:
    path = tmp_path / "other.yaml"
    path.write_text(json.dumps(STUB | changed))
    return suite_of(settings=str(path), seeds="1", out=str(tmp_path / "suite"))


def test_a_command_that_fails_is_named_with_its_log(tmp_path):
    suite = stub(tmp_path)
    runner.prepare(suite)
    worker = runner.Runner(suite, SimpleNamespace(), total=1)
    run = plan.Run("one", "sft", 1, ())
    with pytest.raises(UserError, match="one_sft_seed1 failed, with exit code 3; .*one_sft_seed1.log says why"):
        worker.call(run, sys.exit, 3)


#### REPORTS


def test_the_answers_of_a_table(tmp_path):
    """KTO is right in all of 40 prompts and DPO in every second one, with one exception per seed."""
    suite = suite_of(losses="[dpo,kto]", out=str(tmp_path), seeds="3")
    half = np.tile(np.arange(40) % 2, (3, 1)).astype(float)
    half[np.arange(3), np.arange(3)] = 1 - half[np.arange(3), np.arange(3)]
    by_row = {row: half for row in suite.rows} | {"kto": np.ones((3, 40))}
    lines = {(one.one, one.other): report.line_of(one) for one in findings.compared(suite, {"1550k": by_row})}
    assert lines["dpo", "kto"][1:3] == ["DPO - KTO", "-49.2"] and lines["dpo", "kto"][-1] == "KTO"
    assert lines["sft+dpo", "dpo"][2:] == ["0.0", "[0.0, 0.0]", "0.0", "no difference seen"]


def test_only_what_is_at_least_one_is_right():
    rows = [{"prompt": "\n\nHuman: Repeat: MIKA\n\nAssistant:", "policy": text} for text in (" MIKA", " MIKI", "")]
    assert measures.rights("halos.demo:check", rows) == [1.0, 0.0, 0.0]


def test_pairs_of_one_prompt_count_once():
    assert measures.means(np.array([1.0, 0.0, 0.0, 1.0]), [b"b", b"a", b"b", b"c"]) == [0.5, 0.0, 1.0]


#### --print


def printed(*words: str, **own: str) -> list[list[str]]:
    """The commands that --print shows, without its comments."""
    suite = suite_of(*words, **own)
    lines = commands.as_text(suite, [f"{key}={value}" for key, value in own.items()], FORMATS).splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("#")]


def test_the_printed_commands_are_those_of_real_models():
    lines = printed(model="llama13b", seeds="1", losses="[dpo]", out="/data/models")
    programs = [line[1] for line in lines]
    assert programs == ["scripts/suite.py", *["train.py"] * 3, *["eval.py", "compare.py"] * 3, "scripts/suite.py"]
    for words in [line[2:] for line in lines if line[1] == "train.py"]:
        with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
            config = compose("config", words)
        load_from, config.model.load_from = config.model.load_from, None  # there is no such run yet
        validate(config, trainers, dataloaders)
        assert config.model.name_or_path == "huggyllama/llama-13b" and config.datasets == ["shp", "hh", "oasst"]
    assert load_from == "llama13b_sft_seed1/LATEST/policy.pt"
    compare.parser().parse_args(lines[-2][2:])


def test_with_a_launcher_each_line_of_training_submits_all_seeds():
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=8"]
    lines = printed(*launcher, model="llama13b", seeds="3", losses="[sft+kto]", out="/data/models")
    sft, kto = (line[2:] for line in lines if line[1] == "train.py")
    assert sft[:3] == kto[:3] == ["-m", *launcher]
    assert "seed=1,2,3" in kto and "exp_name=llama13b_sft_kto_seed${seed}" in kto
    assert "model.load_from=llama13b_sft_seed${seed}/LATEST/policy.pt" in kto


@pytest.mark.slow
def test_a_sweep_through_submitit(tmp_path):
    """Jobs of a launcher of clusters, here in processes of this machine: two runs, and then the refusal of both.

    Each job starts two processes, as on a machine with two GPUs. These must find what to do, though the job's __main__
    is submitit's.
    """
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = [
        *ONE_BLOCK,
        f"cache_dir={tmp_path}",
        "n_examples=16",
        "nproc_per_node=2",
        "exp_name=run_${seed}",
        "seed=1,2",
    ]
    command = [sys.executable, "train.py", "-m", "hydra/launcher=submitit_local", *words]
    first, second = (subprocess.run(command, cwd=PROJECT, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert all((tmp_path / f"run_{seed}" / "LATEST" / "policy.pt").is_file() for seed in (1, 2))
    assert second.returncode == 2 and "error: job #0 failed" in second.stderr
