"""The test server: its answers and counts, asked by plain HTTP and by the openai client."""

import asyncio
import http.client
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter

import openai
import pytest

from judge_server import Settings, messages_digest, serve

SCHEMA = {"name": "verdict", "schema": {"type": "object"}}


def body(text="Which is better?", **parameters) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **parameters}


class PlainClient:
    """One keep-alive connection of http.client."""

    def __init__(self, server, timeout=10):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)

    def post(self, request: dict) -> tuple[int, dict, bytes]:
        """(status, headers, body)"""
        self.connection.request("POST", "/v1/chat/completions", json.dumps(request))
        response = self.connection.getresponse()
        return response.status, dict(response.headers), response.read()

    def reply(self, text="Which is better?", **parameters) -> dict:
        """Send a request that succeeds and return the completion."""
        status, _, data = self.post(body(text, **parameters))
        assert status == 200, data
        return json.loads(data)

    def error(self, text="Which is better?", **parameters) -> tuple[int, dict]:
        status, _, data = self.post(body(text, **parameters))
        return status, json.loads(data)


@pytest.fixture(scope="module")
def running():
    with serve() as server:
        yield server


@pytest.fixture
def server(running):
    """server(**settings): the server of this file with these settings, by default without delay, and counts of 0."""

    def set_up(**settings):
        running.reset(**vars(Settings(**{"delay": 0, "verdict": "first", **settings})))
        return running

    return set_up


def client_of(server, **options) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.url, api_key="any", max_retries=0, **options)


#### THE JUDGE


def content(completion: dict) -> str:
    return completion["choices"][0]["message"]["content"]


@pytest.mark.parametrize("verdict, said", [("first", "1"), ("second", "2"), ("tie", "tie")])
def test_the_reply_has_the_form_that_was_asked_for(server, verdict, said):
    client = PlainClient(server(verdict=verdict))
    assert content(client.reply()).splitlines()[-1] == f"Verdict: {said}"
    for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": SCHEMA}):
        assert json.loads(content(client.reply(response_format=form)))["verdict"] == said


def test_logprobs_are_those_of_the_confidence(server):
    client = PlainClient(server(verdict="second", confidence=0.8))
    completion = client.reply(logprobs=True, top_logprobs=20, max_tokens=1)
    assert content(completion) == "2"
    (token,) = completion["choices"][0]["logprobs"]["content"]
    likely = {top["token"]: math.exp(top["logprob"]) for top in token["top_logprobs"]}
    assert likely == pytest.approx({"1": 0.2, "2": 0.8})
    assert client.reply()["choices"][0]["logprobs"] is None


def test_a_completion_has_what_clients_read(server):
    """24 characters are 6 tokens; the text with its verdict has 54 characters, which are 14."""
    completion = PlainClient(server()).reply("x" * 24)
    assert completion["object"] == "chat.completion" and completion["model"] == "m"
    assert abs(completion["created"] - time.time()) < 60
    assert completion["usage"] == {"prompt_tokens": 6, "completion_tokens": 14, "total_tokens": 20}
    assert completion["choices"][0]["finish_reason"] == "stop"


def test_replies_are_cut_at_the_limit_and_where_set(server):
    client = PlainClient(server(cut_first=1))
    first, second, limited = client.reply(max_tokens=64), client.reply(), client.reply(max_completion_tokens=5)
    assert [c["choices"][0]["finish_reason"] for c in (first, second, limited)] == ["length", "stop", "length"]
    assert "Verdict" not in content(first) and first["usage"]["completion_tokens"] == 64
    assert len(content(limited)) == 20 and limited["usage"]["completion_tokens"] == 5


def fenced(first: str, second: str) -> str:
    line = "==== 0f ===="
    parts = [f"[{name}]\n{line}\n{text}\n{line}\n" for name, text in (("Response 1", first), ("Response 2", second))]
    return "Compare.\n\n" + "\n".join(parts)


def test_longer_finds_the_responses(server):
    client = PlainClient(server(verdict="longer"))
    for first, second, winner in [("a\n\nb", "ab", "1"), ("", "a", "2"), ("ab", "cd", "tie")]:
        assert content(client.reply(fenced(first, second))).endswith(f"Verdict: {winner}")
    client = PlainClient(server(verdict="longer", responses=["A=(.*);", "B=(.*);"]))
    assert content(client.reply("A=x;\nB=xyz;")).endswith("Verdict: 2")


def judge_by_model(request: dict) -> str:
    return {"one": "1", "two": "2"}.get(request["model"], "tie")


def test_a_function_judges():
    """Modules in the folder of the server are found."""
    with serve(delay=0, verdict="test_judge_server:judge_by_model") as server:
        client = PlainClient(server)
        assert [content(client.reply(model=name))[-1] for name in ("one", "two", "three")] == ["1", "2", "e"]


def test_hash_depends_on_the_messages_alone(server):
    client = PlainClient(server(verdict="hash"))
    texts = [f"question {n}" for n in range(60)]
    verdicts = [content(client.reply(text)).split()[-1] for text in texts]
    assert min(Counter(verdicts).values()) >= 10 and len(set(verdicts)) == 3
    assert verdicts == [content(client.reply(text, temperature=0)).split()[-1] for text in texts]


#### FAULTS


def test_a_script_is_answered_in_turn(server):
    script = [429, 500, 503, 408, "malformed", "broken", 200]
    client = PlainClient(server(script=script, retry_after=0.25))
    answers = [client.post(body()) for _ in [*script, "beyond"]]
    assert [status for status, _, _ in answers] == [429, 500, 503, 408, 200, 200, 200, 200]
    assert [headers.get("Retry-After") for _, headers, _ in answers] == ["0.25"] + [None] * 7
    assert content(json.loads(answers[4][2])) == "I cannot decide."
    with pytest.raises(ValueError):
        json.loads(answers[5][2])
    assert content(json.loads(answers[6][2])).endswith("Verdict: 1")


def faults_of(client, texts) -> dict[str, list]:
    """Send each text three times; return the outcomes: a status, or "malformed" for a 200 without a verdict."""
    found = {text: [] for text in texts}
    for text in [*texts, *texts, *texts]:
        status, _, data = client.post(body(text))
        found[text].append("malformed" if status == 200 and b"Verdict" not in data else status)
    return found


def test_faults_are_drawn_by_the_body_and_not_by_the_order(server):
    """3 of 10 requests fail: 270 of 900, with a standard deviation of 14."""
    rates = {"rate_429": 0.1, "rate_500": 0.05, "rate_503": 0.05, "rate_malformed": 0.1}
    texts = [f"question {n}" for n in range(300)]
    forwards = faults_of(PlainClient(server(seed=1, **rates)), texts)
    backwards = faults_of(PlainClient(server(seed=1, **rates)), texts[::-1])
    reseeded = faults_of(PlainClient(server(seed=2, **rates)), texts)
    assert forwards == backwards != reseeded
    counts = Counter(itertools.chain(*forwards.values()))
    assert abs(900 - counts[200] - 270) < 60
    assert set(counts) == {200, 429, 500, 503, "malformed"}


def test_a_hang_and_a_disconnect(server):
    running = server(script=["hang", "disconnect", 200])
    with pytest.raises(TimeoutError):
        PlainClient(running, timeout=0.2).post(body())
    with pytest.raises(http.client.RemoteDisconnected):
        PlainClient(running).post(body())
    assert PlainClient(running).post(body())[0] == 200
    stats = running.stats()
    assert stats["outcomes"] == {"hang": 1, "disconnect": 1, "200": 1}
    assert stats["answered"] == {"200": 1} and stats["in_flight"] == 0 and stats["connections"] == 4


REFUSED = [
    ("max_tokens", 400, "Use 'max_completion_tokens' instead", "max_tokens", "unsupported_parameter"),
    ("temperature", 400, "'temperature' does not support 0", "temperature", "unsupported_value"),
    ("response_format", 400, "'response_format' of type 'json_schema' is not", "response_format", None),
    ("json_schema", 400, "'response_format' of type 'json_schema' is not", "response_format", None),
    ("top_logprobs", 400, "'top_logprobs' is not supported", "top_logprobs", "unsupported_parameter"),
    ("logprobs", 403, "not allowed to request logprobs", None, None),
]
PARAMETERS = {
    "max_tokens": 5,
    "temperature": 0,
    "logprobs": True,
    "top_logprobs": 2,
    "response_format": {"type": "json_schema", "json_schema": SCHEMA},
}


@pytest.mark.parametrize("refused, status, message, param, code", REFUSED)
def test_parameters_are_refused_as_openai_does(server, refused, status, message, param, code):
    client = PlainClient(server(refuse=[refused]))
    answered, answer = client.error(**PARAMETERS)
    error = answer["error"]
    assert (answered, error["type"], error["param"], error["code"]) == (status, "invalid_request_error", param, code)
    assert message in error["message"]
    name = "response_format" if refused == "json_schema" else refused
    assert client.post(body(**{key: value for key, value in PARAMETERS.items() if key != name}))[0] == 200


def test_only_the_json_schema_is_refused(server):
    client = PlainClient(server(refuse=["json_schema"]))
    assert client.reply(response_format={"type": "json_object"}, temperature=0)
    client = PlainClient(server(refuse=["response_format", "temperature"]))
    assert client.error(response_format={"type": "json_object"})[0] == 400
    assert client.reply(temperature=1), "the default is never refused"


def test_refusals_in_the_form_of_other_servers(server):
    status, answer = PlainClient(server(refuse=["max_tokens"], style="vllm")).error(max_tokens=5)
    assert (status, answer["object"], answer["code"]) == (400, "error", 400)
    assert "('body', 'max_tokens')" in answer["message"] and "error" not in answer
    client = PlainClient(server(refuse=["json_schema"], style="llama.cpp"))
    status, answer = client.error(response_format=PARAMETERS["response_format"])
    assert (status, answer["error"]["code"]) == (400, 400)
    assert "but got: json_schema" in answer["error"]["message"]


@pytest.mark.parametrize(
    "error, status, code",
    [
        ("invalid_api_key", 401, "invalid_api_key"),
        ("forbidden", 403, "unsupported_region"),
        ("model_not_found", 404, "model_not_found"),
        ("insufficient_quota", 429, "insufficient_quota"),
    ],
)
def test_errors_from_the_nth_request_on(server, error, status, code):
    client = PlainClient(server(error=error, error_after=2))
    answers = [client.post(body()) for _ in range(4)]
    assert [answer[0] for answer in answers] == [200, 200, status, status]
    assert json.loads(answers[-1][2])["error"]["code"] == code
    assert "Retry-After" not in answers[-1][1]


def test_texts_that_are_refused(server):
    client = PlainClient(server(filtered="BOMB", too_long="EPIC"))
    assert [client.error(text)[0] for text in ("a BOMB", "an EPIC", "a poem")] == [400, 400, 200]
    assert client.error("a BOMB")[1]["error"]["code"] == "content_filter"
    assert client.error("an EPIC")[1]["error"]["code"] == "context_length_exceeded"


def test_a_sliding_window_limits_requests(server):
    client = PlainClient(server(rpm=3, window=0.3, retry_after=0.5))
    answers = [client.post(body()) for _ in range(5)]
    assert [answer[0] for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[-1][1]["Retry-After"] == "0.5"
    time.sleep(0.35)
    assert client.post(body())[0] == 200


#### COUNTS


def test_what_is_counted(server):
    running = server(script=[500])
    client = PlainClient(running)
    replies = [json.loads(client.post(body(text))[2]) for text in ("a", "a", "b", "b")]
    client.reply("b", temperature=0)
    stats = running.stats()
    assert stats["requests"] == len(stats["arrivals"]) == 5
    assert stats["answered"] == {"500": 1, "200": 4}
    assert stats["ids"][:3] == [reply["id"] for reply in replies[1:]] and len(set(stats["ids"])) == 4
    assert sorted(stats["retries"].values()) == [1, 1], "the two bodies that were sent twice"
    assert stats["paid"] == {messages_digest(body(text)["messages"]).hex(): n for text, n in (("a", 1), ("b", 3))}
    assert stats["arrivals"] == sorted(stats["arrivals"])
    assert stats["headers"]["content-length"] == str(len(json.dumps(body("b", temperature=0))))
    running.reset()
    assert running.stats()["requests"] == 0 and running.stats()["ids"] == []


def test_a_client_that_leaves_is_counted_and_not_paid(server):
    running = server(delay=0.2)
    with pytest.raises(TimeoutError):
        PlainClient(running, timeout=0.05).post(body())
    time.sleep(0.25)  # past the delay
    stats = running.stats()
    assert (stats["abandoned"], stats["in_flight"], stats["paid"], stats["ids"]) == (1, 0, {}, [])


#### THE OPENAI CLIENT


def test_the_openai_client_reads_answers_and_errors(server):
    running = server(script=[200, 429, "insufficient_quota", 500, "disconnect", "broken"], retry_after=1.5)

    async def ask():
        async with client_of(running) as client:
            calls = [client.chat.completions.create(**body()) for _ in range(6)]
            return [(await asyncio.gather(call, return_exceptions=True))[0] for call in calls]

    good, limited, quota, failed, lost, broken = asyncio.run(ask())
    assert good.choices[0].message.content.endswith("Verdict: 1") and good.usage.total_tokens == 18
    assert isinstance(limited, openai.RateLimitError) and limited.response.headers["retry-after"] == "1.5"
    assert isinstance(quota, openai.RateLimitError) and quota.code == "insufficient_quota"
    assert isinstance(failed, openai.InternalServerError)
    assert isinstance(lost, openai.APIConnectionError)
    assert isinstance(broken, ValueError)
    assert running.stats()["headers"]["authorization"] == "Bearer any"


def test_128_requests_in_flight_with_the_openai_client(server):
    """All requests are sent before the first answer: the client takes milliseconds for each, an answer a second."""
    running = server(delay=1, jitter=0.05)

    async def ask_all():
        async with client_of(running) as client:
            calls = [client.chat.completions.create(**body(f"question {n}")) for n in range(128)]
            return await asyncio.gather(*calls)

    completions = asyncio.run(ask_all())
    stats = running.stats()
    assert sorted(completion.id for completion in completions) == sorted(stats["ids"])
    assert stats["max_in_flight"] == 128 and stats["in_flight"] == 0
    assert len(stats["paid"]) == 128 and stats["connections"] <= 130


#### ITS PROCESS


def test_it_ends_with_the_process_that_started_it():
    start = "import os, judge_server; s = judge_server.Server(); print(s.process.pid, flush=True); os._exit(9)"
    done = subprocess.run(
        [sys.executable, "-c", start], cwd=os.path.dirname(__file__), stdout=subprocess.PIPE, text=True, timeout=30
    )
    pid, deadline = int(done.stdout), time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert done.returncode == 9 and not is_alive(pid)


def is_alive(pid: int) -> bool:
    """Whether a process runs. One that has ended may remain as a zombie if no init process collects it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_setting_that_does_not_exist_is_an_error(capfd):
    with pytest.raises(RuntimeError, match="exit code is 2"), serve(dealy=1):
        pass
    assert "--dealy" in capfd.readouterr().err


def test_a_mistake_in_the_test_ends_the_server(capfd):
    """These messages have no responses to compare. The server must end, since clients retry errors."""
    with serve(delay=0, verdict="longer") as server:
        with pytest.raises(http.client.RemoteDisconnected):
            PlainClient(server).post(body())
        assert server.process.wait(timeout=5) == 1
    assert "ValueError: no responses in 'Which is better?'" in capfd.readouterr().err


def test_a_port_can_be_taken_again_after_a_stop():
    with serve(delay=0) as first:
        port = first.port
        assert PlainClient(first).post(body())[0] == 200
    with serve(delay=0, port=port) as second:
        assert second.port == port and PlainClient(second).post(body())[0] == 200
