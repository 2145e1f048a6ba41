"""Comparisons from Python: settings and their mistakes, and `compare` in a running event loop, as in a notebook."""

import asyncio
import dataclasses
import json
import os
import re
import signal
import threading
import time

import pytest

import compare as program
from comparing import journal, kept, numbers, results, rows_of, working_in, write_samples
from halos import demo
from halos.errors import UserError
from halos.judge import Settings, Stop, compare
from helpers import PROJECT
from judge_server import serve

LONGER = "def longer(prompt, first, second):\n    return 1 if len(first) > len(second) else 2\n"


def in_a_notebook(cell):
    """Call a function where an event loop is running in this thread, with the signal handlers that a kernel has."""

    async def run():
        return cell()

    loop = asyncio.new_event_loop()  # asyncio.run would handle Ctrl-C itself
    try:
        return loop.run_until_complete(run())
    finally:
        loop.close()


@pytest.fixture
def directory(tmp_path):
    """The working directory, with 40 rows of samples and a module with a judge."""
    write_samples(tmp_path, 40)
    (tmp_path / "mine.py").write_text(LONGER)
    with working_in(tmp_path):
        yield tmp_path


def mine(**fields) -> Settings:
    return Settings("samples.json", baseline_key="chosen", judge=("mine:longer",), **fields)


#### COMPARISONS


def test_the_lines_of_the_documentation(tmp_path, capsys):
    """As docs/judging.md has them: the first is right and the other response of each pair is wrong."""
    with open(os.path.join(PROJECT, "docs", "judging.md"), encoding="utf-8") as file:
        (lines,) = re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL)
    rows = []
    for item in demo.generate("test")[:20]:
        scores = [demo.check(item["prompt"], response) for response in item["responses"]]
        best, worst = (item["responses"][scores.index(bound(scores))] for bound in (max, min))
        rows.append({"prompt": item["prompt"], "policy": best, "chosen": worst, "reference": ""})
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "kto_tiny.json").write_text(json.dumps(rows))
    names: dict = {}
    with working_in(tmp_path):
        in_a_notebook(lambda: exec(lines, names))
    assert names["summary"]["win_rate"] == 1.0 and names["summary"]["n_judged"] == 20
    assert results(tmp_path)[0]["win_rate"] == 1.0
    assert "win rate" in capsys.readouterr().out


def test_a_notebook_and_a_script_get_the_same_numbers(directory):
    """With a running loop and without one; the summary is what the line in the results file says."""
    inside = in_a_notebook(lambda: compare(mine(cache="inside")))
    outside = compare(mine(cache="outside"))
    assert numbers(inside) == numbers(outside) == numbers(results(directory, "results.jsonl")[0])
    assert len(kept(journal(directory, "inside"), "verdict")) == 80


def test_a_server_from_a_notebook_and_from_another_thread(directory):
    """Another thread has no loop of its own, and may set no signal handler."""
    with serve(delay=0.0, verdict="longer") as server:
        chat = Settings("samples.json", baseline_key="chosen", judge=("m",), base_url=server.url, cache="chat")
        summary = in_a_notebook(lambda: compare(chat))
        assert server.stats()["requests"] == 80
        found = []
        thread = threading.Thread(target=lambda: found.append(compare(dataclasses.replace(chat, cache="thread"))))
        thread.start()
        thread.join()
        assert server.stats()["requests"] == 160
    wins = sum(len(row["policy"]) > len(row["chosen"]) for row in rows_of(40))
    assert summary["wins"] == found[0]["wins"] == wins


def test_errors_come_out_of_the_thread(directory):
    (directory / "bad.py").write_text("def f(prompt, first, second):\n    return 7\n")
    with pytest.raises(Stop, match="returned 7") as stop:
        in_a_notebook(lambda: compare(Settings("samples.json", baseline_key="chosen", judge=("bad:f",))))
    assert stop.value.code == 2


def test_stopping_a_cell_lets_calls_end_and_the_next_run_goes_on(directory):
    """What a notebook's stop button does is Ctrl-C in the main thread."""
    with serve(delay=0.1) as server:
        chat = Settings("samples.json", baseline_key="chosen", judge=("m",), base_url=server.url, concurrency=4)

        def press_stop() -> None:
            while server.stats()["requests"] < 12:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=press_stop).start()
        with pytest.raises(Stop, match="interrupted") as stop:
            in_a_notebook(lambda: compare(chat))
        assert stop.value.code == 130 and not (directory / "results.jsonl").exists()
        before = len(kept(journal(directory), "verdict"))
        assert 8 <= before < 80
        server.reset(delay=0.0)
        assert in_a_notebook(lambda: compare(chat))["calls"]["possibly_billed"] == 0
        assert server.stats()["requests"] == 80 - before  # nothing twice


def test_signal_handlers_are_those_from_before(directory):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    compare(mine())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_function_that_was_edited_between_two_cells_judges_anew(directory):
    """Its keys are those of the new text, so that its verdicts must be, too."""
    first = compare(mine())
    (directory / "mine.py").write_text(LONGER.replace(">", "<"))
    os.utime(directory / "mine.py", (0, 0))  # Python's own cache of modules looks at times and sizes
    second = compare(mine())
    assert (second["wins"], second["losses"]) == (first["losses"], first["wins"])
    assert len(kept(journal(directory), "verdict")) == 160


def test_dry_run_returns_nothing_and_the_page_shows_the_call(directory, capsys):
    assert compare(mine(dry_run=True)) == {} and "80 to ask for" in capsys.readouterr().out
    assert set(os.listdir(directory)) - {"__pycache__"} == {"mine.py", "samples.json"}
    compare(mine(report="page.html"))
    call = "compare(Settings(file='samples.json', baseline_key='chosen', judge=('mine:longer',), report='page.html'))"
    assert call.replace("'", "&#x27;") in (directory / "page.html").read_text()


#### SETTINGS


def test_defaults_and_what_follows_from_them():
    settings = Settings("samples/a.json")
    assert (settings.baseline, settings.journal_directory) == ("reference", "judgments")
    assert settings.changed() == {"file": "samples/a.json"}
    two = Settings("a.json", file2="b.json", candidate_key="mine", results_file="out/r.jsonl")
    assert (two.baseline, two.journal_directory) == ("mine", "out/judgments")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"judge": "mine:longer"}, "judge=('mine:longer',)"),
        ({"judge": ()}, "not a tuple of names"),
        ({"judge": ("a", "b", "a")}, "--judge a is given twice"),
        ({"judge": ("a", "b", "c"), "price": ((1, 2), (3, 4))}, "2 times for 3 judges"),
        ({"price": (0.75, 4.5)}, "price=((0.75, 4.5),)"),
        ({"mode": "jason"}, "did you mean 'json'"),
        ({"judge_kind": "rank"}, "pairwise, score"),
        ({"order": "all"}, "both, one"),
        ({"concurrency": 0}, "--concurrency 0 is not between 1 and 4096"),
        ({"concurrency": 2.5}, "--concurrency 2.5 is not a whole number"),
        ({"max_comp": -1}, "--max_comp"),
        ({"seed": None}, "--seed"),
        ({"rpm": "60"}, "--rpm '60' is not a number"),
        ({"timeout": True}, "--timeout"),
        ({"sleep_time": -0.1}, "--sleep_time"),
        ({"max_fail": float("nan")}, "--max_fail"),
        ({"max_cost": 0.0}, "--max_cost"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_line(fields, said):
    with pytest.raises(UserError) as error:
        Settings("samples.json", **fields)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_flags_and_fields_are_the_same():
    """And the default of a field is the one that the flag's help shows in brackets at its end."""
    flags = {action.dest: action for action in program.parser()._actions if action.dest != "help"}
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    assert set(flags) == set(fields)
    assert all(f"--{name}" in flags[name].option_strings for name in fields)
    for name in ("candidate_key", "history_key", "judge_kind", "mode", "order", "results_file"):
        assert flags[name].help.endswith(f"({fields[name].default})")
    for name in ("seed", "concurrency", "sleep_time", "timeout", "max_fail"):
        assert flags[name].help.endswith(f"({fields[name].default:g})")


def test_paths_are_texts(tmp_path):
    with pytest.raises(UserError, match="results_file="):
        Settings("samples.json", results_file=tmp_path / "r.jsonl")
    assert Settings("samples.json", sleep_time=0, max_fail=0, seed=-1, max_comp=None).sleep_time == 0
