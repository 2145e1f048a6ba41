"""Chat judges without a network: keys, what a completion says, refused parameters, and what an error means."""

import json
import math
from types import SimpleNamespace

import pytest

from halos.judge.chat import (
    JSON_SCHEMA,
    MODES,
    OPENAI_URL,
    ChatJudge,
    classified,
    published_price,
    refused_parameter,
    replacement,
    retry_after,
)
from halos.judge.completions import read_completion
from halos.judge.judges import Reply, Stop, Unanswerable, Unavailable
from halos.judge.prompts import PromptTemplate
from halos.judge.samples import Pair

PAIR = Pair(1, "Why?", "Because.", "I do not know.")


def chat(mode: str = "json", model: str = "m") -> ChatJudge:
    return ChatJudge(model, mode, PromptTemplate(), "http://localhost/v1", "none")


def http_error(status: int, body: dict | str, **headers: str) -> SimpleNamespace:
    """Imitate an openai.APIStatusError: its `body` is the inner object, its `response` the whole."""
    inner = body.get("error", body) if isinstance(body, dict) else body
    text = json.dumps(body) if isinstance(body, dict) else body
    return SimpleNamespace(status_code=status, body=inner, response=SimpleNamespace(text=text, headers=headers))


def test_keys_cover_judge_mode_texts_and_order():
    judges = [chat(), chat("text"), chat("logprob"), chat(model="other")]
    keys = [judge.key(judge.request(PAIR, order)) for judge in judges for order in (0, 1)]
    assert len(set(keys)) == 8
    again = chat()
    again.parameters = replacement(again.parameters, "max_tokens")  # what was negotiated changes no key
    assert again.key(again.request(PAIR, 0)) == keys[0]


def test_a_completion():
    body = {"id": "x", "choices": [{"message": {"content": "1"}, "finish_reason": "stop"}]}
    usage = {"usage": {"prompt_tokens": 7, "completion_tokens": 2}}
    assert read_completion(json.dumps(body | usage), 0.5) == Reply("1", (7, 2), 0.5, "x", "stop")
    assert read_completion(json.dumps(body), 0.5).usage is None
    for broken in ("<html>", "{}", '{"choices": []}', "[1]", "null", ""):
        assert read_completion(broken, 0.0) == Reply(broken, broken=True)


def test_probabilities():
    """P(1) = 0.5 + 0.1 in two spellings, P(2) = 0.2: the verdict is 0.6 / 0.8 = 0.75."""
    likely = [{"token": "1", "logprob": math.log(0.5)}, {"token": " 1", "logprob": math.log(0.1)}]
    likely += [{"token": "2", "logprob": math.log(0.2)}, {"token": "The", "logprob": math.log(0.2)}]
    choice = {"message": {"content": "1"}, "logprobs": {"content": [{"top_logprobs": likely}]}}
    reply = read_completion(json.dumps({"choices": [choice]}), 0.0)
    assert chat("logprob").verdict(reply) == pytest.approx(0.75)


def test_a_text_that_was_cut_off_is_no_verdict():
    """It might have continued with "or 2"."""
    assert chat("text").verdict(Reply("Verdict: 1", finish="length")) is None
    assert chat("text").verdict(Reply("Verdict: 1", finish="stop")) == 1.0
    assert chat().verdict(Reply('{"verdict": "2", "explanation": "It', finish="length")) == 0.0


OPENAI = {
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'.",
    "temperature": "Unsupported value: 'temperature' does not support 0 with this model.",
    "response_format": "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
}


@pytest.mark.parametrize("name", OPENAI)
def test_refused_parameters(name):
    error = http_error(400, {"error": {"message": OPENAI[name], "param": name, "code": "unsupported_parameter"}})
    assert refused_parameter(error, chat().parameters) == name
    unnamed = http_error(422, {"detail": [{"loc": ["body", name], "msg": "Extra inputs are not permitted"}]})
    assert refused_parameter(unnamed, chat().parameters) == name


def test_logprobs_are_refused_with_403():
    body = {"error": {"message": "You are not allowed to request logprobs from this model.", "param": None}}
    assert refused_parameter(http_error(403, body), chat("logprob").parameters) == "logprobs"
    left = replacement(chat("logprob").parameters, "logprobs")
    assert "logprobs" not in left and "top_logprobs" not in left and left["max_tokens"] > 1


def test_replacements():
    assert replacement({"max_tokens": 5}, "max_tokens") == {"max_completion_tokens": 5}
    once = replacement(MODES["json"], "response_format")
    assert MODES["json"]["response_format"] == JSON_SCHEMA and once == {"response_format": {"type": "json_object"}}
    assert replacement(once, "response_format") == {} == replacement({"temperature": 0}, "temperature")


def test_a_text_that_is_too_long_refuses_no_parameter():
    """vLLM's error names max_tokens, which it supports."""
    body = {"message": "'max_tokens' is too large: 512. This model's maximum context length is 2048 tokens"}
    error = http_error(400, body)
    assert refused_parameter(error, chat().parameters) is None
    meaning = classified(error, chat())
    assert isinstance(meaning, Unanswerable) and meaning.final


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"),
    [
        (401, {"error": {"message": "Incorrect API key"}}, Stop, 2),
        (403, {"error": {"message": "no access"}}, Stop, 2),
        (404, {"error": {"message": "no such model", "code": "model_not_found"}}, Stop, 2),
        (429, {"error": {"message": "quota", "code": "insufficient_quota"}}, Stop, 3),
        (429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, Unavailable, None),
        (408, "timeout", Unavailable, None),
        (409, "conflict", Unavailable, None),
        (503, "<html>busy</html>", Unavailable, None),
        (400, {"error": {"message": "odd", "code": None}}, Unanswerable, None),
    ],
)
def test_what_errors_mean(status, body, kind, code):
    meaning = classified(http_error(status, body), chat())
    assert type(meaning) is kind
    if code:
        assert meaning.code == code and "\n" not in str(meaning)
    if kind is Unavailable:
        assert meaning.rate_limited == (status == 429)
    if kind is Unanswerable:
        assert not meaning.final  # it may be the command's fault: another run asks again


def test_retry_after():
    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None


def test_published_prices_are_of_openai_alone():
    assert published_price("gpt-4o-2024-08-06", OPENAI_URL) == published_price("gpt-4o", OPENAI_URL) == (2.5, 10.0)
    assert published_price("gpt-4o", "http://localhost:8000/v1") is None
    assert published_price("gpt-4", OPENAI_URL) is None
