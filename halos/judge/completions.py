"""Replies of chat servers: from the body of an answer to a Reply, whatever the body holds.

`read_completion` never raises. Servers differ in where they put a text, and in why there is none; change `_text_of` for
another one.
"""

import json
import math
from typing import Any, TypeGuard

from halos.judge.judges import Reply

MOST_TOKENS = 10**9  # of a reply; larger counts are a server's mistake


def read_completion(body: str, latency: float) -> Reply:
    """Read the JSON of a chat completion; a body that is anything else becomes a broken Reply. latency: seconds."""
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        message = choice["message"]
        text, note = _text_of(message, choice.get("finish_reason"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Reply(body, latency=latency, broken=True)
    return Reply(
        text=text,
        usage=_usage(answer.get("usage")),
        latency=latency,
        id=_name(answer.get("id")),
        finish=_name(choice.get("finish_reason")),
        p_first=_p_first(choice),
        note=note,
    )


def _text_of(message: dict, finish: Any) -> tuple[str, str | None]:
    """Read (the text of a message, why it is no answer): the latter is None if there is a text and no refusal.

    A text may be a list of parts. Without one there may be a refusal, or reasoning that led to no answer.
    """
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    text = "".join(part if isinstance(part, str) else _part(part, "text") for part in parts)
    if text.strip():
        return text, None
    refusal = message.get("refusal") or "".join(_part(part, "refusal") for part in parts)
    if isinstance(refusal, str) and refusal:
        return refusal, "the judge refused"
    if content and not isinstance(content, str | list):
        return json.dumps(content), None
    reasons = {"content_filter": "the content filter stopped the reply", "length": "the limit of tokens cut it off"}
    reason = reasons.get(finish, f"finish_reason {finish}") if isinstance(finish, str) else "no reason is given"
    kinds = {"reasoning": "only reasoning", "reasoning_content": "only reasoning", "tool_calls": "a call of a tool"}
    kind = next((words for name, words in kinds.items() if message.get(name)), "an empty reply")
    return text, f"{kind}: {reason}"


def _part(part: Any, name: str) -> str:
    """The text of a part of a message: {"type": "text", "text": ...}, or a refusal; "" for others."""
    is_one = isinstance(part, dict) and part.get("type", name) in (name, f"output_{name}")
    return part[name] if is_one and isinstance(part.get(name), str) else ""


def _usage(usage: Any) -> tuple[int, int] | None:
    if not isinstance(usage, dict):
        return None
    tokens_in, tokens_out = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return (tokens_in, tokens_out) if is_count(tokens_in) and is_count(tokens_out) else None


def is_count(n: Any) -> TypeGuard[int]:
    """Return whether this is a number of tokens."""
    return type(n) is int and 0 <= n <= MOST_TOKENS


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _p_first(choice: dict) -> float | None:
    """Compute P("1") / (P("1") + P("2")) of the first token; None if neither is among the most likely tokens."""
    try:
        likely = choice["logprobs"]["content"][0]["top_logprobs"]
        masses = {"1": 0.0, "2": 0.0}
        for token in likely:
            if token["token"].strip() in masses:
                masses[token["token"].strip()] += math.exp(token["logprob"])
    except (LookupError, TypeError, AttributeError, OverflowError):
        return None
    total = sum(masses.values())
    return masses["1"] / total if 0 < total < math.inf else None
