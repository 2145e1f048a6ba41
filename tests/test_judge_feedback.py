"""--export_feedback: which verdicts become preference pairs, and that train.py's reader takes them."""

import json

import numpy as np
import pytest

from comparing import at, compare, last_line, rows_of, write_samples
from dataloaders import get_local
from halos.datafiles import read_rows
from halos.judge.feedback import export_feedback
from halos.judge.samples import Pair
from judge_server import Settings, serve

NAN = float("nan")
MESSAGES = [{"role": "user", "content": "Hi"}]


def pair(n: int, candidate: str = "good", baseline: str = "bad", prompt: object = None) -> Pair:
    return Pair(n, f"shown {n}", candidate, baseline, source=(prompt or f"prompt {n}", candidate, baseline))


def exported(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_better_response_is_chosen_and_undecided_pairs_are_left_out(tmp_path, capsys):
    """Scores above 0.5 choose the candidate, below 0.5 the baseline. 0.5, within rounding, and NaN give no pair."""
    path = tmp_path / "feedback.jsonl"
    pairs = [pair(0), pair(1), pair(2), pair(3), pair(4), pair(5, " "), pair(6, "x", "x"), pair(7, prompt=MESSAGES)]
    export_feedback(str(path), pairs, np.array([1, 0.25, 0.5, 0.1 + 0.2 + 0.2, NAN, 1, 1, 0.75]))
    assert exported(path) == [
        {"prompt": "prompt 0", "chosen": "good", "rejected": "bad"},
        {"prompt": "prompt 1", "chosen": "bad", "rejected": "good"},
        {"prompt": MESSAGES, "chosen": "good", "rejected": "bad"},
    ]
    said = capsys.readouterr().out
    assert "3 preference pairs written" in said and "1 without all verdicts" in said and "2 tied" in said
    assert "1 with an empty response" in said and "1 with equal responses" in said
    datasets = [get_local(str(path), split) for split in ("train", "test")]
    read = [text for dataset in datasets for example in dataset.examples.values() for text in example.generations]
    assert set(read) == {"good", "bad"}


def test_an_earlier_file_is_renamed_and_none_is_written_without_a_pair(tmp_path, capsys):
    path = tmp_path / "feedback.jsonl"
    path.write_text("earlier\n")
    export_feedback(str(path), [pair(0)], np.array([0.5]))
    assert path.read_text() == "earlier\n" and "no pair has a better response" in capsys.readouterr().out
    export_feedback(str(path), [pair(0)], np.array([1.0]))
    assert (tmp_path / "feedback.jsonl.bak-1").read_text() == "earlier\n" and len(exported(path)) == 1


def test_rows_come_back_as_the_file_has_them(tmp_path):
    """A prompt or a response that is a list of messages is written as that list, and not as the text of the judge."""
    said = [{"role": "assistant", "content": "Hello."}]
    rows = [{"prompt": MESSAGES, "policy": said, "chosen": "Go away."}, {"prompt": "p", "policy": "a", "chosen": "b"}]
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    (tmp_path / "first.py").write_text("def wins(prompt, first, second):\n    return 1\n")
    words = ["--judge", "first:wins", "--export_feedback", str(tmp_path / "f.jsonl")]
    assert compare(tmp_path, *words, "--order", "one", "--seed", "1").returncode == 0
    (row,) = [row for row in exported(tmp_path / "f.jsonl") if row["prompt"] != "p"]
    assert row["prompt"] == MESSAGES and said in (row["chosen"], row["rejected"])


@pytest.fixture(scope="module")
def running():
    with serve() as server:
        yield server


@pytest.fixture
def start(running):
    """start(**settings): the server of this file with these settings, without delay."""

    def set_up(**settings):
        running.reset(**vars(Settings(**{"delay": 0.0, **settings})))
        return running

    return set_up


def test_verdicts_of_a_comparison(tmp_path, start):
    """A judge that prefers the longer response. What it refuses to judge is not in the dataset."""
    write_samples(tmp_path, 30)
    server = start(verdict="longer", filtered="Human: 7 ")
    words = at(server, "--export_feedback", str(tmp_path / "feedback.jsonl"), "--max_fail", "0.1")
    done = compare(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "29 preference pairs written" in done.stdout and "1 without all verdicts" in done.stdout
    rows = exported(tmp_path / "feedback.jsonl")
    samples = [row for number, row in enumerate(rows_of(30)) if number != 7]
    for row, sample in zip(rows, samples, strict=True):
        assert row["prompt"] == sample["prompt"] and len(row["chosen"]) > len(row["rejected"])
        assert {row["chosen"], row["rejected"]} == {sample["policy"], sample["chosen"]}


def test_orders_that_disagree_are_no_feedback(tmp_path, start):
    """A judge that always names the first slot has no opinion."""
    write_samples(tmp_path, 10)
    server = start(verdict="first")
    done = compare(tmp_path, *at(server, "--export_feedback", str(tmp_path / "feedback.jsonl")))
    assert done.returncode == 0 and "10 tied" in done.stdout, done.stderr
    assert not (tmp_path / "feedback.jsonl").exists()


def test_what_is_missing_after_a_stopped_run_is_left_out(tmp_path, start):
    """With --stats_only after a stop, the pairs that are complete so far are exported."""
    write_samples(tmp_path, 10)
    server = start(verdict="longer", error="insufficient_quota", error_after=8)
    words = at(server, "--export_feedback", str(tmp_path / "feedback.jsonl"), "--concurrency", "1")
    assert compare(tmp_path, *words).returncode == 3
    assert not (tmp_path / "feedback.jsonl").exists()
    assert compare(tmp_path, *words, "--stats_only").returncode == 0
    assert len(list(read_rows(str(tmp_path / "feedback.jsonl")))) == 4


def test_a_path_that_cannot_be_training_data_is_refused_first(tmp_path, start):
    write_samples(tmp_path, 2)
    done = compare(tmp_path, *at(start(), "--export_feedback", "feedback.csv"))
    assert done.returncode == 2 and "does not end in .jsonl" in last_line(done)
