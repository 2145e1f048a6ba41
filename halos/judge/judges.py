"""Judge, the interface of every judge, and what comes of a call to one: a Reply, or one of three exceptions.

A judge turns a pair in one order into a request, answers it with a Reply, and reads a verdict from a Reply, now or from
the journal. A verdict is the score of the first slot: 1 if the response shown first is better, 0 if the second is, 0.5
for a tie, and in logprob mode the probability of the first. For a new kind of judge, subclass Judge and let
`make_judges` in comparison.py know its names.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from halos.errors import UserError
from halos.judge.samples import Pair

#### WHAT COMES OF A CALL


@dataclass(frozen=True)
class Reply:
    """A judge's reply, as the journal keeps it.

    text: as it came; if it is not a chat completion, its whole body
    usage: (input tokens, output tokens) that were billed, or None if the server does not say
    latency: seconds
    p_first: in logprob mode P("1") / (P("1") + P("2")), else None
    broken: it is not a chat completion, as from a proxy, so that nobody has judged
    note: why there is no answer in it (a refusal, only reasoning, ...), or None
    """

    text: str
    usage: tuple[int, int] | None = None
    latency: float = 0.0
    id: str | None = None
    finish: str | None = None
    p_first: float | None = None
    broken: bool = False
    note: str | None = None


class Unavailable(Exception):
    """The call failed and may succeed at another time: a rate limit, a busy or broken server, a timeout.

    retry_after: seconds that the server asks to wait, or None
    rate_limited: whether it was a 429
    billed: whether the server may have worked on the request, and charge for it
    """

    def __init__(self, reason: str, retry_after: float | None = None, rate_limited: bool = False, billed: bool = False):
        super().__init__(reason)
        self.retry_after, self.rate_limited, self.billed = retry_after, rate_limited, billed


class Unanswerable(Exception):
    """The call failed and will fail again in this run. final: in every later run as well."""

    def __init__(self, reason: str, final: bool):
        super().__init__(reason)
        self.final = final


class Stop(UserError):
    """The whole run must stop. code: exit code of compare.py (2 input or credentials, 3 quota or cost limit, ...)."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code = code


#### JUDGES


class Judge(ABC):
    """A judge of pairs; FunctionJudge, RewardJudge and ChatJudge are the kinds.

    name: as given with --judge
    has_positions: whether it sees both responses at once; if not, only order 0 is asked
    price: US dollars per million input and output tokens, or None
    expected_tokens: of a reply; 0 if nothing is paid
    """

    name: str
    has_positions = True
    price: tuple[float, float] | None = None
    expected_tokens = 0

    @property
    def max_tokens(self) -> int:
        """Most tokens that a reply can have."""
        return self.expected_tokens

    @abstractmethod
    def request(self, pair: Pair, order: int) -> Any:
        """Make the request for a pair; order 0 shows the candidate first, 1 the baseline."""

    @abstractmethod
    def key(self, request: Any) -> str:
        """Hash all that decides the answer to a request into 32 hex digits."""

    def size(self, request: Any) -> int:
        """Bytes of the texts that are paid for."""
        return 0

    @abstractmethod
    async def ask(self, request: Any, unread: Reply | None = None) -> Reply:
        """Make one call, without retries.

        unread: the previous reply to this request, if no verdict was found in it
        Raises Unavailable, Unanswerable, or Stop.
        """

    @abstractmethod
    def verdict(self, reply: Reply) -> float | None:
        """Read the score of the first slot, in [0, 1], from a reply; None if there is no clear verdict in it."""

    async def open(self) -> None:  # noqa: B027
        """Prepare for calls. Called once, before the first one, in the event loop of the calls."""

    async def close(self) -> None:  # noqa: B027
        """Release what `open` took."""


#### WHAT COMES OF A COMPARISON


@dataclass
class JudgeScores:
    """One judge's verdicts on all pairs, as statistics.py wants them.

    scores: (n_pairs, 2) float64, score of the candidate in [0, 1]; column 0 with the candidate shown first, column 1
        with the baseline shown first; NaN where there is no verdict
    asked: (n_pairs, 2) bool, which verdicts were asked for; one that was asked for and is NaN failed, or is missing
    has_positions: False for a judge that scores responses one by one (only column 0 is asked)
    """

    name: str
    scores: np.ndarray
    asked: np.ndarray
    has_positions: bool = True
