"""benchmarks/gpu.py: the table is whole, a row that fails does not stop the others, and time does not run over."""

import os
import re
import subprocess
import sys

import pytest

from benchmarks import gpu
from benchmarks.gpu import Result, Row
from helpers import PROJECT

MACHINE = {
    "device": "a device",
    "memory": 79.0,
    "torch": "2.13",
    "transformers": "5.23",
    "dtype": "bfloat16",
    "side": 8192,
    "rate": 8e14,
    "lacks": ["trl (pip install trl)"],
}
NUMBERS = {"tokens_per_second": 50000.0, "examples_per_second": 99.0, "peak_bytes": 3 * 2**30, "flops_per_second": 4e14}


def results_of(todo, outcome, memory=79.0, budget=520.0):
    """Run rows without processes. outcome: (row, limit) -> Result. Returns the results and the table after each row."""
    tables = []
    results = gpu.run_all(
        todo, outcome, lambda row, found: tables.append(gpu.table(todo, found, MACHINE)), memory, budget
    )
    return results, tables


def lines_of(table: str) -> dict[str, list[str]]:
    """The table's rows: name -> its other cells."""
    cells = [[cell.strip() for cell in line.split(" | ")] for line in table.splitlines() if line.startswith("| ")]
    return {one[0].removeprefix("| "): [cell.removesuffix("|").strip() for cell in one[1:]] for one in cells[1:]}


def python(code: str, **settings) -> Row:
    return Row("a row", ("-c", code), **settings)


def test_every_row_is_in_the_table_from_the_start():
    """The table is written after every row: those to come are not measured yet, and say with what command to."""
    todo = gpu.rows(small=False)
    names = [row.name for row in todo]
    assert len(set(names)) == len(names) >= 15
    results, tables = results_of(todo, lambda row, limit: Result(dict(NUMBERS)), memory=200)
    assert len(tables) == len(todo)
    for done, table in enumerate(tables, 1):
        rows = lines_of(table)
        assert list(rows) == names
        assert sum("not measured" in cells[-1] for cells in rows.values()) == len(todo) - done
    assert lines_of(tables[-1])[names[1]] == ["50,000", "99.0", "3.0", "0.50", "", ""]


def test_the_rows_that_were_asked_for():
    """Steps of both losses at both sizes, with and without recomputation and compilation, TRL's, and the tests."""
    names = [row.name for row in gpu.rows(small=False)]
    for words in (
        "tests marked", "DPO neox.*checkpointing off$", "DPO neox.*selective$", "DPO neox.*checkpointing on$",
        "KTO neox.*checkpointing off$", "KTO neox.*selective$", "KTO neox.*checkpointing on$", "DPO neox.*compile on",
        "KTO neox.*compile on", "DPO llama", "KTO llama", "TRL, DPO", "TRL, KTO",
    ):  # fmt: skip
        assert any(re.search(words, name) for name in names), words


def test_a_row_that_fails_leaves_the_others_alone():
    todo = [Row("one", ()), Row("two", ()), Row("three", ())]

    def outcome(row, limit):
        return Result(note="failed: CUDA | error", failed=True) if row.name == "two" else Result(dict(NUMBERS))

    results, tables = results_of(todo, outcome)
    rows = lines_of(tables[-1])
    assert [rows[name][-1] for name in ("one", "two", "three")] == ["", "failed: CUDA / error", ""]
    assert rows["three"][0] == "50,000" and rows["two"][0] == ""


def test_rows_without_room_or_time_are_skipped_and_say_so():
    todo = [Row("big", (), needs=130), Row("now", (), least=5, limit=80), Row("late", (), least=60)]
    limits = []
    results, _ = results_of(todo, lambda row, limit: limits.append(limit) or Result(dict(NUMBERS)), budget=30)
    assert results["big"].note == "skipped: needs 130 GiB, the device has 79"
    assert results["late"].note.startswith("skipped: 30 of 30 s were left") and "--only" in results["late"].note
    assert len(limits) == 1 and 29 < limits[0] <= 30  # no row may run past the end of the whole
    assert not any(result.failed for result in results.values())


def test_the_ratio_to_trl_is_that_of_equal_batches():
    todo = [Row("ours", (), peer="dpo"), Row("TRL, its best", (), peer="dpo"), Row("ours, larger batches", ())]
    speeds = {"TRL, its best": 20000.0}
    results, tables = results_of(todo, lambda row, _: Result({"tokens_per_second": speeds.get(row.name, 50000.0)}))
    assert [cells[4] for cells in lines_of(tables[0]).values()] == ["", "", ""]
    assert [cells[4] for cells in lines_of(tables[-1]).values()] == ["2.50", "", ""]


@pytest.mark.parametrize(
    "code, note",
    [
        ("import sys; sys.exit('no room')", "failed: no room"),
        ("import os; os.kill(os.getpid(), 11)", "failed: without a word (signal 11)"),
        ("import sys, json; json.dump({'error': 'OutOfMemoryError: 80 GiB'}, open(sys.argv[-1], 'w')); sys.exit(1)",
         "failed: OutOfMemoryError: 80 GiB"),
        ("import time; time.sleep(60)", "failed: stopped after 2 s"),
    ],
)  # fmt: skip
def test_a_process_that_fails_gives_its_last_line(capsys, code, note):
    result = gpu.run(python(code), 2)
    assert result.failed and result.note == note and not result.numbers


def test_what_is_missing_is_skipped_and_not_failed():
    code = "import sys, json; json.dump({'lacks': 'trl (pip install trl)'}, open(sys.argv[-1], 'w')); sys.exit(2)"
    result = gpu.run(python(code), 20)
    assert result.note == "skipped: trl (pip install trl)" and not result.failed


def test_the_tests_give_their_last_line():
    summary = "print('...'); print('= 12 passed, 1 skipped in 80 s =')"
    assert gpu.run(python(summary, writes_json=False), 20).note == "12 passed, 1 skipped in 80 s"
    failed = gpu.run(python(summary + "; raise SystemExit(1)", writes_json=False), 20)
    assert failed.failed and failed.note == "failed: 12 passed, 1 skipped in 80 s"


def test_a_row_that_is_stopped_leaves_no_process(tmp_path):
    """What the row has started is stopped with it."""
    late = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {late!r}])"
    assert gpu.run(python(code), 1).note == "failed: stopped after 1 s"
    subprocess.run([sys.executable, "-c", "import time; time.sleep(4)"])
    assert not (tmp_path / "late").exists()


def command(*words: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    words = ("bash", "benchmarks/gpu.sh", *words)
    return subprocess.run(words, cwd=PROJECT, env=variables, capture_output=True, text=True)


def test_without_a_gpu_there_is_one_line(tmp_path):
    """Exit code 2, one line that says what to do, and no table that would replace an earlier one."""
    done = command(OUT=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and not os.listdir(tmp_path)
    assert done.stderr.count("\n") == 1 and "no GPU" in done.stderr and "--small" in done.stderr


def test_an_unknown_row_is_refused():
    done = command("--only", "nothing of that name")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--plan" in done.stderr


def test_steps_of_both_losses_at_a_small_size(tmp_path):
    """Three rows from the command to the table: our step with the reference cached and live, and its numbers."""
    done = command("--small", "--only", "selective, bfloat16", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = lines_of((tmp_path / "GPU-part.md").read_text()).values()
    tokens, examples, peak, share, ratio, note = row
    assert float(tokens.replace(",", "")) > 100 and float(examples) > 1 and 0 < float(share) < 1 and float(peak) > 0
    assert ratio == "" and "failed" not in note


@pytest.mark.slow
def test_the_whole_command_at_a_small_size(tmp_path):
    done = command("--small", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = lines_of((tmp_path / "GPU-part.md").read_text())
    assert list(rows) == [row.name for row in gpu.rows(small=True)]
    for name, cells in rows.items():
        assert "not measured" not in cells[-1] and "failed" not in cells[-1]
        assert cells[0] or "skipped" in cells[-1], name


def test_the_table_in_the_repository_has_all_rows():
    """benchmarks/GPU.md: the present rows. A row that was not measured has the command that measures it."""
    with open(os.path.join(PROJECT, "benchmarks", "GPU.md")) as file:
        rows = lines_of(file.read())
    assert list(rows) == [row.name for row in gpu.rows(small=False)]
    assert all(any(cells) for cells in rows.values())
