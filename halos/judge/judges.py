"""Judges: what every judge has in common, and what can come of a call to one."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from halos.errors import UserError
from halos.judge.samples import Pair


@dataclass(frozen=True)
class Reply:
    """What a judge answered.

    text: as it came; of an answer that is no chat completion, its whole body
    usage: (input tokens, output tokens) that were billed, or None where the server does not say
    p_first: in logprob mode, the probability of "1" over that of "1" and "2"
    broken: it is no chat completion, as from a proxy; nobody has judged
    """

    text: str
    usage: tuple[int, int] | None = None
    latency: float = 0.0
    id: str | None = None
    finish: str | None = None
    p_first: float | None = None
    broken: bool = False


class Unavailable(Exception):
    """An answer that may come at another time: a rate limit, a busy or broken server, a timeout.

    retry_after: seconds that the server asks to wait, or None
    rate_limited: it was a 429
    billed: the server may have worked on the request, and charge for it
    """

    def __init__(self, reason: str, retry_after: float | None = None, rate_limited: bool = False, billed: bool = False):
        super().__init__(reason)
        self.retry_after, self.rate_limited, self.billed = retry_after, rate_limited, billed


class Unanswerable(Exception):
    """This request will never be answered. final: asking again is useless, whatever else changes."""

    def __init__(self, reason: str, final: bool):
        super().__init__(reason)
        self.final = final


class Stop(UserError):
    """Nothing more is to be asked. code: the exit code (2 input or credentials, 3 quota or cost limit, ...)."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code = code


@dataclass
class JudgeScores:
    """What one judge said of every pair.

    scores: (n_pairs, 2) float64, the candidate's score: 1 won, 0.5 tied, 0 lost, in logprob mode between; column 0 with
    the candidate shown first, column 1 with the baseline first; NaN where there is no verdict.
    asked: (n_pairs, 2) bool, what was to be judged; asked and NaN has failed, or is missing.
    has_positions: False for a judge that scores responses one by one (only column 0 is asked).
    """

    name: str
    scores: np.ndarray
    asked: np.ndarray
    has_positions: bool = True


class Judge(ABC):
    """Somebody who judges. See the top of this file; ChatJudge and FunctionJudge are the two kinds."""

    name: str
    has_positions = True
    price: tuple[float, float] | None = None  # US dollars per million input and output tokens
    expected_tokens = 0  # of an answer; 0 where nothing is paid

    @property
    def max_tokens(self) -> int:
        """Of an answer."""
        return self.expected_tokens

    @abstractmethod
    def request(self, pair: Pair, order: int) -> Any:
        """What is asked; order 0 shows the candidate first."""

    @abstractmethod
    def key(self, request: Any) -> str:
        """32 hex digits over all that decides what is answered."""

    def size(self, request: Any) -> int:
        """Bytes of the texts that are paid for."""
        return 0

    @abstractmethod
    async def ask(self, request: Any, unread: Reply | None = None) -> Reply:
        """One call. unread: the previous reply, in which no verdict was found.

        Raises Unavailable, Unanswerable, or Stop.
        """

    @abstractmethod
    def verdict(self, reply: Reply) -> float | None:
        """What the reply says of the first slot: 1 better, 0 worse, 0.5 a tie; None where it says nothing."""

    async def open(self) -> None:  # noqa: B027
        """Make ready, before the first call."""

    async def close(self) -> None:  # noqa: B027
        """Let go of what `open` took."""
