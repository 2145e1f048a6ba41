"""RewardJudge: a reward model as a judge, `--judge reward:DIR`. The response with the higher score is better.

The model and the rendering of conversations are in halos/scoring.py, which is reached by its name: the judge's rooms
import no torch. Pairs that are asked for at the same time are scored in one batch.
"""

import asyncio
import json
import time
from typing import Any

from halos.judge.functions import python_object, said, verdict_of_scores
from halos.judge.judges import Judge, Reply, Unanswerable
from halos.judge.samples import Pair, digest, slots

PREFIX = "reward:"
SCORER = "halos.scoring:Scorer"


class RewardJudge(Judge):
    """A reward model that scores each response by itself, in one thread.

    name: reward:DIR, where DIR is the directory of a run with loss=reward, or an export
    The contents of the model's files are part of the key of each request: another model judges anew.
    """

    has_positions = False

    def __init__(self, name: str):
        self.name = name
        self.scorer = python_object(SCORER, "--judge")(name.removeprefix(PREFIX), f"--judge {PREFIX}")
        self.waiting: list[tuple[tuple, asyncio.Future]] = []
        self.scoring: asyncio.Task | None = None

    def request(self, pair: Pair, order: int) -> tuple[Any, str, str]:
        """Make (prompt, first response, second response); the prompt is the row's messages, if it has them."""
        return pair.source[0] if pair.source else pair.prompt, *slots(pair, order)

    def key(self, request: tuple[Any, str, str]) -> str:
        prompt, first, second = request
        return digest("reward", self.scorer.identity, json.dumps(prompt), first, second).hex()

    def verdict(self, reply: Reply) -> float | None:
        return verdict_of_scores(reply.text)

    async def ask(self, request: tuple[Any, str, str], unread: Reply | None = None) -> Reply:
        """Score both responses, together with the other requests that wait. The text has the scores as a JSON list."""
        started = time.perf_counter()
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((request, answer))
        if len(self.waiting) == 1:
            self.scoring = asyncio.create_task(self._score_all())
        scores = await answer
        return Reply(json.dumps(scores), latency=time.perf_counter() - started)

    async def _score_all(self) -> None:
        """Score all requests that wait, in a thread, so that others come meanwhile; and again until none waits."""
        while self.waiting:
            await asyncio.sleep(0)
            batch = list(self.waiting)
            try:
                scores: list[Any] = await asyncio.to_thread(self._scores, [request for request, _ in batch])
            except Exception as error:
                scores = [Unanswerable(said(error), final=False) for _ in batch]
            del self.waiting[: len(batch)]
            for (_, answer), found in zip(batch, scores, strict=True):
                if not answer.done():  # as one that a second Ctrl-C has cancelled
                    answer.set_exception(found) if isinstance(found, Exception) else answer.set_result(found)

    def _scores(self, requests: list[tuple[Any, str, str]]) -> list[list[float]]:
        """Return both scores of each request."""
        scores = iter(self.scorer.scores([(prompt, text) for prompt, *texts in requests for text in texts]))
        return [[first, second] for first, second in zip(scores, scores, strict=True)]

    async def open(self) -> None:
        """Load the model."""
        await asyncio.to_thread(lambda: self.scorer.model)

    async def close(self) -> None:
        if line := self.scorer.describe():
            print(line)
