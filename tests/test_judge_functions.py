"""Python functions as judges: which names are theirs, what they may return, and what is said of mistakes."""

import asyncio
import json

import pytest

from comparing import working_in
from halos.errors import UserError
from halos.judge.functions import FunctionJudge, is_python, python_object
from halos.judge.judges import Stop, Unanswerable
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
    for name, said in mistakes.items():
        with pytest.raises(UserError) as error:
            python_object(name, "--judge")
        assert said in str(error.value)
    with pytest.raises(UserError, match="--judge_kind score"):
        FunctionJudge("mine:length", scores=False)
