"""Python functions as judges, and the names pkg.module:attribute by which users give functions and classes.

Change FunctionJudge to let functions return something else than 1, 2, 0 or a score.
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import math
import operator
import os
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from halos import secrets
from halos.errors import UserError
from halos.judge.judges import Judge, Reply, Stop, Unanswerable
from halos.judge.samples import Pair, digest, slots


class FunctionJudge(Judge):
    """A Python function: f(prompt, first, second) -> 1, 2 or 0 (a tie), or f(prompt, response) -> a score.

    The function may be async. Keys depend on the text of its module, so that another version of it judges anew.
    scores: whether it scores single responses; the one with the higher score wins
    """

    def __init__(self, name: str, scores: bool):
        self.name, self.scores = name, scores
        self.has_positions = not scores
        self.function = python_object(name, "--judge")
        n_arguments = 2 if scores else 3
        try:
            inspect.signature(self.function).bind(*[""] * n_arguments)
        except (Exception, SystemExit) as error:
            form = "f(prompt, response)" if scores else "f(prompt, first, second)"
            remedy = "leave out --judge_kind score" if scores else "one that scores responses takes --judge_kind score"
            raise UserError(f"--judge {name} cannot be called as {form}: {said(error)}; {remedy}") from error
        self.version = _version_of(self.function)

    def request(self, pair: Pair, order: int) -> tuple[str, str, str]:
        """Make (prompt, first response, second response)."""
        return pair.prompt, *slots(pair, order)

    def key(self, request: tuple[str, str, str]) -> str:
        return digest(self.name, "score" if self.scores else "pairwise", self.version, *request).hex()

    def verdict(self, reply: Reply) -> float | None:
        if not self.scores:
            return WINNERS.get(reply.text)
        return verdict_of_scores(reply.text)

    async def ask(self, request: tuple[str, str, str], unread: Reply | None = None) -> Reply:
        """Call the function. The text of the reply is its winner, or both scores as a JSON list."""
        await asyncio.sleep(0)  # a function that never waits would keep the progress bar and Ctrl-C waiting
        prompt, first, second = request
        started = time.perf_counter()
        if self.scores:
            text = json.dumps([await self._score(prompt, response) for response in (first, second)])
        else:
            text = str(await self._winner(prompt, first, second))
        return Reply(text, latency=time.perf_counter() - started)

    async def _winner(self, *texts: str) -> int:
        value = await self._call(*texts)
        try:
            winner = -1 if isinstance(value, bool) else operator.index(value)
        except Exception:
            winner = -1
        if winner not in (0, 1, 2):
            raise Stop(2, f"--judge {self.name} returned {shown(value)}; it must return 1, 2, or 0 for a tie")
        return winner

    async def _score(self, *texts: str) -> float:
        value = await self._call(*texts)
        try:
            score = float(value)
        except Exception as error:
            raise Stop(2, f"--judge {self.name} returned {shown(value)}; a score is a number") from error
        if math.isnan(score):
            raise Unanswerable("the score is NaN", final=False)
        return score

    async def _call(self, *texts: str) -> Any:
        try:
            value = self.function(*texts)
            return await value if inspect.isawaitable(value) else value
        except BaseException as error:  # the user's own code may raise anything, also SystemExit; it is counted
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # a second Ctrl-C
            raise Unanswerable(said(error), final=False) from error


WINNERS = {"0": 0.5, "1": 1.0, "2": 0.0}  # the text of a reply -> the score of the first slot


def verdict_of_scores(text: str) -> float | None:
    """Read the score of the first slot from a JSON list of two numbers; None if one of them is missing or NaN."""
    first, second = _two_numbers(text)
    is_unclear = math.isnan(first) or math.isnan(second)
    return None if is_unclear else 0.5 * (1 + (first > second) - (first < second))


def _two_numbers(text: str) -> tuple[float, float]:
    """Read the two scores of a reply; (NaN, 0) if it holds something else, as one of a journal may."""
    try:
        first, second = map(float, json.loads(text))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return math.nan, 0.0
    return first, second


def said(error: BaseException) -> str:
    """The kind of an exception and its message, in one line without secrets. A user's exception may fail to speak."""
    try:
        return secrets.redact(" ".join(f"{type(error).__name__}: {error}".split()))
    except Exception:
        return type(error).__name__


def shown(value: Any) -> str:
    """The beginning of a value, in one line without secrets, whatever the value is."""
    try:
        return " ".join(secrets.redact(repr(value)).split())[:40]
    except Exception:
        return f"an object of {type(value).__name__}"


def _version_of(function: Callable) -> str:
    """Hash the text of the function's module; empty if it has none."""
    try:
        path = inspect.getsourcefile(function)
    except TypeError:  # an instance of a class with __call__
        path = inspect.getsourcefile(type(function))
    return _digest_of_file(path)


def _digest_of_file(path: str | None) -> str:
    if path is None or not os.path.isfile(path):
        return ""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return digest(file.read()).hex()


#### NAMES OF PYTHON OBJECTS


def is_python(name: str) -> bool:
    """Tell pkg.module:function from a model's name, such as llama3:8b or ft:gpt-4o:org::id."""
    module, colon, attribute = name.partition(":")
    if not colon or not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        return False
    return "." in module or _is_module(module)


def _is_module(name: str) -> bool:
    _see_working_directory()
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # the name of what has no spec, as __main__
        return False
    return found is not None and found.origin is not None


def _see_working_directory() -> None:
    """Let imports find modules in the working directory, those made a moment ago included."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()


def python_object(name: str, flag: str) -> Any:
    """Import the callable that pkg.module:attribute names; modules in the working directory are found as well.

    flag: of the name, for the message of the UserError if there is no such callable
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(_imported(module), attribute)
    except ModuleNotFoundError as error:
        raise UserError(f"{flag} {name}: there is no module {error.name!r}; check the name") from error
    except AttributeError as error:
        raise UserError(f"{flag} {name}: {module} has no {attribute!r}; check the name") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's module raises while it is imported, also SystemExit
        raise UserError(f"{flag} {name}: importing it failed ({said(error)})") from error
    if not callable(found):
        raise UserError(f"{flag} {name} is not a function; give pkg.module:function")
    return found


def _imported(name: str) -> ModuleType:
    """Import a module; reload it if its file has changed since the last time, as between two cells of a notebook.

    Otherwise the keys would be those of the new text, and the verdicts those of the old function.
    """
    _see_working_directory()
    module = importlib.import_module(name)
    text = _digest_of_file(getattr(module, "__file__", None))
    if _texts.setdefault(name, text) != text:
        _texts[name] = text
        module = importlib.reload(module)
    return module


_texts: dict[str, str] = {}  # module name -> digest of its file when it was last imported here
