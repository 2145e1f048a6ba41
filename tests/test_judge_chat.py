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


#### WHAT A REPLY SAYS


def answered(message, finish="stop", **more) -> str:
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}], "usage": usage, **more})


TEXT = {"type": "text", "text": "Verdict: "}


@pytest.mark.parametrize(
    ("message", "finish", "text", "note"),
    [
        ({"content": [TEXT, {"type": "text", "text": "2"}]}, "stop", "Verdict: 2", None),
        ({"content": [{"type": "output_text", "text": "Verdict: 2"}]}, "stop", "Verdict: 2", None),
        ({"content": ["Verdict: ", {"text": "2"}, None, 5]}, "stop", "Verdict: 2", None),
        ({"content": [{"type": "reasoning", "text": "1?"}, TEXT]}, "stop", "Verdict: ", None),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "stop", "No.", "the judge refused"),
        ({"content": None, "refusal": "No."}, "stop", "No.", "the judge refused"),
        ({"content": None}, "content_filter", "", "an empty reply: the content filter stopped the reply"),
        ({"content": None, "reasoning_content": "2?"}, "length", "", "only reasoning: the limit of tokens cut it off"),
        ({"content": "", "reasoning": "2?"}, "stop", "", "only reasoning: finish_reason stop"),
        ({"content": None, "tool_calls": [{}]}, "tool_calls", "", "a call of a tool: finish_reason tool_calls"),
        ({}, None, "", "an empty reply: no reason is given"),
    ],
)
def test_contents_of_all_kinds(message, finish, text, note):
    """Before, a list of parts was shown as JSON and never read, and an empty reply did not say why it was empty."""
    reply = read_completion(answered(message, finish), 0.1)
    assert (reply.text, reply.note, reply.usage, reply.broken) == (text, note, (1, 2), False)
    assert chat().verdict(reply) == (0.0 if text == "Verdict: 2" else None)


@pytest.mark.parametrize(
    "more",
    [
        {"usage": [1]},
        {"usage": {"prompt_tokens": -5, "completion_tokens": 1}},
        {"usage": {"prompt_tokens": True, "completion_tokens": 10**20}},
        {"id": 5, "usage": "many"},
    ],
)
def test_what_a_server_counts_wrongly_is_not_counted(more):
    reply = read_completion(answered({"content": "Verdict: 1"}, **more), 0.1)
    assert (reply.usage, reply.id, chat().verdict(reply)) == (None, None, 1.0)


@pytest.mark.parametrize("logprob", ["NaN", "Infinity", "1000", '"x"', "null", "-Infinity"])
def test_a_probability_that_is_none(logprob):
    """Before, NaN went into the journal as a verdict, and 1000 was an OverflowError."""
    top = f'{{"token": "1", "logprob": {logprob}}}'
    choice = f'{{"message": {{"content": "-"}}, "logprobs": {{"content": [{{"top_logprobs": [{top}]}}]}}}}'
    assert read_completion(f'{{"choices": [{choice}]}}', 0.1).p_first is None


@pytest.mark.parametrize("body", ["", "[]", "5", '{"choices": []}', '{"choices": [[]]}', "[" * 100_000, "data: {}"])
def test_what_is_no_completion_is_broken(body):
    assert read_completion(body, 0.1).broken
