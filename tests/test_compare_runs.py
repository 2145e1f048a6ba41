"""scripts/compare_runs.py on records that are written by hand; nothing is trained."""

import importlib.util
import json
import math
import os
import shutil

import pytest
import torch
import yaml
from safetensors.torch import save_file

from helpers import PROJECT

SPEC = importlib.util.spec_from_file_location("compare_runs", os.path.join(PROJECT, "scripts", "compare_runs.py"))
compare_runs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare_runs)

CASE = "processes_2/dpo-packed"
WEIGHTS = {"head.weight": torch.tensor([[0.1, -2.0], [0.0, math.nan]]), "norm.weight": torch.ones(2)}
ROWS = [
    {"step": 0, "examples": 0, "mode": "eval", "loss/eval": math.log(2), "examples_per_second": 10.0},
    {"step": 1, "examples": 8, "mode": "train", "loss/train": 0.1, "grad_norm": math.nan, "examples_per_second": 9.0},
]


def write_record(folder, rows=ROWS, weights=WEIGHTS, config=None, case=CASE) -> str:
    """Write a record of one case: metrics.jsonl, config.yaml, and a checkpoint with its export."""
    run_dir = folder / case
    latest = run_dir / "LATEST"
    latest.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"cache_dir": str(folder), "loss": {"beta": 0.1}} | (config or {})
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    torch.save({"step_idx": 1, "state": weights, "metrics": {"loss/eval": 0.5}}, latest / "policy.pt")
    (run_dir / "states" / "step-1").mkdir(parents=True)
    torch.save({"updates": 1, "scheduler": {}}, run_dir / "states" / "step-1" / "progress.pt")  # no checkpoint
    save_file(weights, latest / "model.safetensors")
    return str(folder)


def changed_row(index: int, **changes) -> list[dict]:
    """Return ROWS with some values of one row replaced; None removes a key. A double underscore stands for a slash."""
    rows = [dict(row) for row in ROWS]
    rows[index] |= {key.replace("__", "/"): value for key, value in changes.items()}
    rows[index] = {key: value for key, value in rows[index].items() if value is not None}
    return rows


@pytest.fixture
def compare(tmp_path, capsys):
    """Compare a record with a changed one: compare(*flags, **changes) -> (exit code, output)."""

    def compare(*flags, **changes):
        before, after = write_record(tmp_path / "before"), write_record(tmp_path / "after", **changes)
        code = compare_runs.main(["compare", before, after, *flags])
        return code, capsys.readouterr().out

    return compare


def test_equal_records_are_identical_whenever_and_wherever_they_were_made(compare):
    """Times and cache_dir may differ, and NaN equals NaN.

    14 values: 5 and 6 in the two rows, loss.beta, and step and loss of policy.pt. 4 tensors: 2 in each of two files.
    """
    code, output = compare(rows=changed_row(1, examples_per_second=1.0))
    assert code == 0
    assert "2 rows, 14 values, 4 tensors in 1 cases: identical" in output, output
    assert "DIFFERS" not in output and "new" not in output


def test_the_last_bit_of_a_metric_is_found(compare):
    code, output = compare(rows=changed_row(1, loss__train=math.nextafter(0.1, 1)))
    assert code == 1
    assert "metrics.jsonl, step 1 (train), loss/train: 0.1 before, 0.10000000000000002 after" in output


@pytest.mark.parametrize("zero, other", [(0.0, -0.0), (0, 0.0)])
def test_values_are_compared_as_they_are_written(zero, other):
    assert not compare_runs.same(zero, other) and compare_runs.same(zero, zero)


def test_a_missing_key_a_missing_row_and_a_row_too_many_are_found(tmp_path, capsys):
    before = write_record(tmp_path / "before")
    for name, rows, expected in (
        ("key", changed_row(1, loss__train=None), "step 1 (train), loss/train: 0.1 before, 'missing' after"),
        ("row", ROWS[:1], "metrics.jsonl: 2 rows before, 1 after"),
        ("more", [*ROWS, ROWS[1]], "metrics.jsonl: 2 rows before, 3 after"),
    ):
        assert compare_runs.main(["compare", before, write_record(tmp_path / name, rows=rows)]) == 1
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    "value, expected",
    [
        (torch.tensor([1.0, 1.0 + 2**-23]), "1 of 2 entries differ, by 1.19e-07 at most"),
        (torch.ones(2, dtype=torch.bfloat16), "torch.float32 [2] before, torch.bfloat16 [2] after"),
        (torch.ones(1, 2), "torch.float32 [2] before, torch.float32 [1, 2] after"),
    ],
)
def test_one_tensor_that_differs_is_found_in_both_of_its_files(compare, value, expected):
    code, output = compare(weights=WEIGHTS | {"norm.weight": value})
    assert code == 1
    for file in ("policy.pt", "model.safetensors"):
        assert f"DIFFERS  {CASE}: LATEST/{file}, norm.weight: {expected}" in output


def test_the_sign_of_a_zero_weight_is_found(compare):
    code, output = compare(weights=WEIGHTS | {"head.weight": torch.tensor([[0.1, -2.0], [-0.0, math.nan]])})
    assert code == 1 and "head.weight: 1 of 4 entries differ" in output


def test_a_missing_tensor_and_a_changed_setting_are_found(compare):
    weights = {"head.weight": WEIGHTS["head.weight"]}
    code, output = compare(weights=weights, config={"loss": {"beta": 0.2}})
    assert code == 1
    assert "LATEST/policy.pt, norm.weight: missing in AFTER" in output
    assert "config.yaml, loss.beta: 0.1 before, 0.2 after" in output


def test_new_keys_and_files_are_listed_and_accepted(tmp_path, capsys):
    before = write_record(tmp_path / "before")
    after = write_record(tmp_path / "after", rows=changed_row(1, KL__chosen=0.5), config={"patience": 3})
    (tmp_path / "after" / CASE / "state.json").write_text("{}")
    assert compare_runs.main(["compare", before, after]) == 0
    output = capsys.readouterr().out
    for thing in ("key KL/chosen", "key patience", "file state.json"):
        assert f"new      {thing} (1 cases)" in output


def test_missing_files_and_cases_are_found_and_new_cases_accepted(tmp_path, capsys):
    before, after = write_record(tmp_path / "before"), write_record(tmp_path / "after")
    write_record(tmp_path / "before", case="processes_3/dpo-packed")
    write_record(tmp_path / "after", case="processes_2/ipo-packed")
    os.remove(tmp_path / "after" / CASE / "LATEST" / "policy.pt")
    assert compare_runs.main(["compare", before, after]) == 1
    output = capsys.readouterr().out
    assert f"DIFFERS  {CASE}: LATEST/policy.pt: missing in AFTER" in output
    assert "DIFFERS  processes_3/dpo-packed: missing in AFTER" in output
    assert "processes_2/ipo-packed" in output and "3 cases: 2 cases differ" in output


def test_allowed_keys_are_reported_with_their_largest_difference(compare):
    code, output = compare("--allow", "loss/*", "--allow", "none", rows=changed_row(1, loss__train=0.35))
    assert code == 0
    assert "allowed  loss/train differs in 1 cases, by 0.25 at most" in output


def test_nothing_to_compare_is_not_identical(tmp_path):
    with pytest.raises(SystemExit, match="holds no record"):
        compare_runs.main(["compare", str(tmp_path), str(tmp_path)])


def test_the_matrix_has_every_loss_and_what_a_chosen_case_starts_from(tmp_path):
    names = set(compare_runs.matrix(PROJECT))
    losses = {name.removesuffix(".yaml") for name in os.listdir(os.path.join(PROJECT, "config", "loss"))}
    assert names >= {f"{loss}-{kind}" for loss in losses for kind in compare_runs.GENERIC}
    assert names >= set(compare_runs.SPECIAL)
    assert list(compare_runs.matrix(PROJECT, "ppo-l*")) == ["ppo-packed", "ppo-loaded"]
    shutil.copytree(os.path.join(PROJECT, "config"), tmp_path / "config")
    os.remove(tmp_path / "config" / "loss" / "ppo.yaml")
    assert not [name for name in compare_runs.matrix(str(tmp_path)) if name.startswith("ppo")]
