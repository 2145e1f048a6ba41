"""Python functions as judges: which names are theirs, what they may return, and what is said of mistakes."""

import asyncio
import json

import pytest

from comparing import compare, journal, kept, last_line, results, working_in, write_samples
from halos.errors import UserError
from halos.judge.functions import FunctionJudge, is_python, python_object
from halos.judge.judges import Reply, Stop, Unanswerable
from halos.judge.samples import Pair

PAIR = Pair(1, "Why?", "Because.", "I do not know.")
MODULE = """
import math

def first(prompt, first, second): return 1
async def second(prompt, first, second): return 2
def tie(prompt, first, second): return 0
def maybe(prompt, first, second): return True
def three(prompt, first, second): return 3
def broken(prompt, first, second): raise KeyError("light")
def length(prompt, response): return len(response)
def nan(prompt, response): return math.nan
def word(prompt, response): return "good"

class Judge:
    def __call__(self, prompt, first, second): return 2

instance = Judge()
number = 7
"""


@pytest.fixture
def module(tmp_path):
    """A module `mine` in the working directory."""
    (tmp_path / "mine.py").write_text(MODULE)
    with working_in(tmp_path):
        yield


def verdict_of(name: str, scores: bool = False, order: int = 0) -> float | None:
    judge = FunctionJudge(f"mine:{name}", scores)
    return judge.verdict(asyncio.run(judge.ask(judge.request(PAIR, order))))


def test_names():
    assert is_python("halos.demo:check") and is_python("json:loads") and is_python("no.such:thing")
    assert not any(map(is_python, ("gpt-4o", "llama3:8b", "ft:gpt-4o:org::id", "llama3:latest")))


def test_winners_and_scores(module):
    """1, 2 and 0 are the slots and a tie, of functions, coroutines and objects; the higher score wins."""
    assert [verdict_of(name) for name in ("first", "second", "tie", "instance")] == [1.0, 0.0, 0.5, 0.0]
    assert [verdict_of("length", scores=True, order=order) for order in (0, 1)] == [0.0, 1.0]
    judge = FunctionJudge("mine:length", scores=True)
    assert json.loads(asyncio.run(judge.ask(judge.request(PAIR, 0))).text) == [8.0, 14.0]


def test_what_is_neither_winner_nor_score_stops_the_run(module):
    """True is a mistake and not a 1. NaN and an exception concern one unit only."""
    for name, scores in (("maybe", False), ("three", False), ("word", True)):
        with pytest.raises(Stop) as stop:
            verdict_of(name, scores)
        assert stop.value.code == 2 and f"--judge mine:{name} returned" in str(stop.value)
    for name, scores, reason in (("broken", False, "KeyError: 'light'"), ("nan", True, "NaN")):
        with pytest.raises(Unanswerable, match=reason) as error:
            verdict_of(name, scores)
        assert not error.value.final


def test_names_that_lead_nowhere(module, tmp_path):
    (tmp_path / "bad.py").write_text("1 / 0")
    mistakes = {
        "nowhere.to:go": "no module 'nowhere'",
        "mine:frist": "no 'frist'",
        "mine:number": "not a function",
        "bad:f": "importing it failed (ZeroDivisionError",
    }
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    mistakes["leaves:f"] = "importing it failed (SystemExit: 0"
    for name, said in mistakes.items():
        with pytest.raises(UserError) as error:
            python_object(name, "--judge")
        assert said in str(error.value)
    with pytest.raises(UserError, match="--judge_kind score"):
        FunctionJudge("mine:length", scores=False)


RAISED = {
    "SystemExit(0)": "SystemExit: 0",
    "SystemExit": "SystemExit",
    "KeyboardInterrupt": "KeyboardInterrupt",
    "asyncio.CancelledError": "CancelledError",
    "GeneratorExit": "GeneratorExit",
    "Odd('way')": "Odd: way",
    "Mute()": "Mute",
}


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_whatever_a_function_raises_is_a_failed_verdict(tmp_path, raised, kind):
    """Before, a judge that called sys.exit(), or raised CancelledError, ended the command with exit code 0."""
    write_samples(tmp_path, 12)
    (tmp_path / "mine.py").write_text(
        "import asyncio\n\nclass Odd(BaseException):\n    pass\n\n"
        "class Mute(Exception):\n    def __str__(self):\n        return 1\n\n"
        f"{kind} leaves(prompt, first, second):\n    if 'Human: 3 ' in prompt:\n        raise {raised}\n    return 1\n"
    )
    done = compare(tmp_path, "--judge", "mine:leaves")
    assert done.returncode == 4 and "2 of 24 verdicts failed" in last_line(done), done.stderr
    assert f"the last: {RAISED[raised]}" in last_line(done)
    assert len(kept(journal(tmp_path), "verdict")) == 22
    assert compare(tmp_path, "--judge", "mine:leaves", "--max_fail", "0.1").returncode == 0
    assert results(tmp_path)[0]["failed_units"] == 2


@pytest.mark.parametrize("score", ["float('nan')", "10 ** 400", "object()", "Loud()", "b'x'", "None"])
def test_what_is_no_score_is_never_a_verdict(tmp_path, score):
    write_samples(tmp_path, 4)
    (tmp_path / "mine.py").write_text(
        "class Loud:\n    def __repr__(self):\n        return 1 / 0\n\n"
        f"def score(prompt, response):\n    return {score}\n"
    )
    done = compare(tmp_path, "--judge", "mine:score", "--judge_kind", "score")
    assert done.returncode in (2, 4) and last_line(done).startswith("error: "), done.stderr
    assert not kept(journal(tmp_path), "verdict") and not (tmp_path / "result.jsonl").exists()


def test_a_function_that_cancels_its_own_task(tmp_path):
    """Before, every verdict was missing, and the exit code was 0."""
    write_samples(tmp_path, 4)
    (tmp_path / "mine.py").write_text(
        "import asyncio\n\nasync def judge(prompt, first, second):\n    asyncio.current_task().cancel()\n"
        "    await asyncio.sleep(0)\n    return 1\n"
    )
    done = compare(tmp_path, "--judge", "mine:judge")
    assert done.returncode == 4 and "cancelled the task" in last_line(done)


@pytest.mark.parametrize("text", ["-1", "3", "", "1.0", "[1, 2]", "one", "[" * 2000])
def test_a_reply_that_no_function_gave_is_no_verdict(module, text):
    """Such a one may be in a damaged journal. Before, "-1" was read as the second slot's win."""
    assert FunctionJudge("mine:first", scores=False).verdict(Reply(text)) is None
    numbers = FunctionJudge("mine:length", scores=True).verdict(Reply(text))
    assert numbers == (0.0 if text == "[1, 2]" else None)
