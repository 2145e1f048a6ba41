"""A chat-completions server for tests: a judge behind HTTP, with the faults of real servers.

    with serve(delay=0.2, rate_429=0.1, verdict="longer") as server:
        client = openai.AsyncOpenAI(base_url=server.url, api_key="any", max_retries=0)
        ...
        server.stats()["max_in_flight"]

`Settings` lists what can be set, `Stats.report` what is counted. The server is one process with one thread. It supports
only the HTTP/1.1 that clients of an API send (keep-alive, Content-Length), so that it takes little of the CPU.
To start it by hand: python tests/judge_server.py --port 8000 --verdict first --rate_500 0.05
"""

import argparse
import asyncio
import base64
import dataclasses
import hashlib
import http.client
import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
import uuid
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus


@dataclass
class Settings:
    """Settings of the server. Rates are shares of the requests, drawn from (seed, body, number of this body) alone."""

    port: int = 0  # 0: any free one
    delay: float = 0.2  # seconds until a completion; errors come at once
    jitter: float = 0.0  # at most so many seconds more, drawn
    seed: int = 0

    # first, second, tie, longer, hash (a random one that depends on the messages), or module:function, a function of
    # the request (a dict) that returns "1", "2" or "tie".
    verdict: str = "hash"
    # "longer" compares the last group of each pattern, in the texts of all messages. By default that is the text
    # between two equal lines below a heading.
    responses: tuple[str, str] = (r"\[Response 1\]\n(.+)\n([\s\S]*?)\n\1", r"\[Response 2\]\n(.+)\n([\s\S]*?)\n\1")
    confidence: float = 0.9  # the probability of the verdict's token
    cut_first: int = 0  # so many completions end before their verdict, with finish_reason "length"

    rate_429: float = 0.0
    rate_500: float = 0.0
    rate_503: float = 0.0
    rate_hang: float = 0.0  # no answer until the client leaves
    rate_disconnect: float = 0.0  # the connection is closed instead
    rate_malformed: float = 0.0  # a 200 without a verdict
    broken_share: float = 0.5  # share of those that are cut-off JSON
    retry_after: float | None = 0.1  # seconds, as the header of every 429 but insufficient_quota
    script: tuple[int | str, ...] = ()  # outcomes of the first requests: statuses, names in ERRORS, hang, ...

    echo: bool = False  # all answers repeat the credentials of the request: in messages, texts and headers
    message: dict | None = None  # instead of the message of every completion, with `finish` as its finish_reason
    finish: str = "stop"
    error: str | None = None  # a name in ERRORS: the outcome of all requests
    error_after: int = 0  # but so many
    refuse: tuple[str, ...] = ()  # parameters that are refused, or of response_format only json_schema or json_object
    style: str = "openai"  # whose refusals: openai, vllm or llama.cpp
    filtered: str | None = None  # messages that contain this text are refused by the content filter
    too_long: str | None = None  # messages that contain this text exceed the context
    rpm: int | None = None  # requests let through in any `window` seconds; 429 beyond
    window: float = 60.0

    until_stdin_closes: bool = False


#### COUNTS


@dataclass
class Stats:
    """Counts since the start or the last reset. They take about 200 bytes per request."""

    in_flight: int = 0  # requests that have arrived, and have neither an answer nor lost their client
    max_in_flight: int = 0  # a client that gives up and asks again at once can be seen twice for a moment
    connections: int = 0  # opened
    abandoned: int = 0  # the client went away before a completion that was under way
    answered: Counter = field(default_factory=Counter)  # per HTTP status
    outcomes: Counter = field(default_factory=Counter)  # as drawn or decided: "200", "500", "hang", "malformed", ...
    asked: Counter = field(default_factory=Counter)  # requests per digest of the body
    paid: Counter = field(default_factory=Counter)  # 200s per digest of the messages, malformed ones too
    arrivals: array = field(default_factory=lambda: array("d"))  # seconds on the monotonic clock
    headers: dict[str, str] = field(default_factory=dict)  # of the last request, names in lower case
    path: str = ""  # of the last request, with its query
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def completion_id(self) -> str:
        """Make the id of the next completion. Ids are numbered, so that none needs to be stored."""
        return f"chatcmpl-{self.run}-{self.answered[200]}"

    def report(self) -> dict:
        """Return the counts for JSON. `ids`: of all 200s; `retries`: {body sent more than once: times sent again}."""
        return {
            **{name: getattr(self, name) for name in ("in_flight", "max_in_flight", "connections", "abandoned")},
            "requests": len(self.arrivals),
            "answered": self.answered,
            "outcomes": self.outcomes,
            "retries": {body.hex(): n - 1 for body, n in self.asked.items() if n > 1},
            "paid": {messages.hex(): n for messages, n in self.paid.items()},
            "ids": [f"chatcmpl-{self.run}-{n}" for n in range(self.answered[200])],
            "arrivals": self.arrivals.tolist(),
            "headers": self.headers,
            "path": self.path,
        }


def messages_digest(messages: list[dict]) -> bytes:
    """Hash messages into 8 bytes, whose hex is the key in `paid`."""
    return hashlib.blake2b(json.dumps(messages).encode(), digest_size=8).digest()


#### ERRORS, IN THE WORDS OF OPENAI

# name: (status, message, type, param, code)
INVALID = "invalid_request_error"
ERRORS = {
    "rate_limit_exceeded": (429, "Rate limit reached for requests.", "requests", None, "rate_limit_exceeded"),
    "insufficient_quota": (
        429,
        "You exceeded your current quota, please check your plan and billing details.",
        "insufficient_quota",
        None,
        "insufficient_quota",
    ),
    "invalid_api_key": (401, "Incorrect API key provided: sk-wrong.", INVALID, None, "invalid_api_key"),
    "forbidden": (403, "Country, region, or territory not supported.", "request_forbidden", None, "unsupported_region"),
    "model_not_found": (
        404,
        "The model `m` does not exist or you do not have access.",
        INVALID,
        None,
        "model_not_found",
    ),
    "content_filter": (400, "The prompt triggered the content management policy.", None, "prompt", "content_filter"),
    "context_length_exceeded": (
        400,
        "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.",
        INVALID,
        "messages",
        "context_length_exceeded",
    ),
    "server_error": (500, "The server had an error while processing your request.", "server_error", None, None),
    "overloaded": (503, "The engine is currently overloaded, please try again later.", "server_error", None, None),
}
BY_STATUS = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "model_not_found",
    429: "rate_limit_exceeded",
    500: "server_error",
    503: "overloaded",
}


def error_answer(outcome: int | str) -> tuple[int, dict]:
    """Make (status, body) for a name in ERRORS or any status."""
    name = BY_STATUS.get(outcome, outcome)
    if name in ERRORS:
        status, message, kind, param, code = ERRORS[name]
    else:
        status, message, kind, param, code = outcome, HTTPStatus(outcome).description, None, None, None
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(request: dict, settings: Settings) -> tuple[int, dict] | None:
    """Make (status, body) that refuses a parameter of the request, as the server that `style` names does; or None."""
    form = (request.get("response_format") or {}).get("type")
    sent = {name for name in request if not (name == "temperature" and request[name] == 1)} | {form}
    refused = next((name for name in settings.refuse if name in sent), None)
    if refused is None:
        return None
    name = "response_format" if refused == form else refused
    value = form if name == "response_format" else request[name]
    return REFUSALS[settings.style](name, value)


def _openai_refusal(name: str, value) -> tuple[int, dict]:
    status, code, param = 400, "unsupported_parameter", name
    message = f"Unsupported parameter: '{name}' is not supported with this model."
    if name == "max_tokens":
        message += " Use 'max_completion_tokens' instead."
    elif name == "temperature":
        message = f"Unsupported value: 'temperature' does not support {value} with this model. "
        message += "Only the default (1) value is supported."
        code = "unsupported_value"
    elif name == "response_format":
        message = f"Invalid parameter: 'response_format' of type '{value}' is not supported with this model."
        code = None
    elif name == "logprobs":
        status, message, code, param = 403, "You are not allowed to request logprobs from this model.", None, None
    return status, {"error": {"message": message, "type": INVALID, "param": param, "code": code}}


def _vllm_refusal(name: str, value) -> tuple[int, dict]:
    detail = [
        {"type": "extra_forbidden", "loc": ("body", name), "msg": "Extra inputs are not permitted", "input": value}
    ]
    body = {"object": "error", "message": str(detail), "type": "BadRequestError", "param": None, "code": 400}
    return 400, body


def _llama_cpp_refusal(name: str, value) -> tuple[int, dict]:
    message = f"Unsupported param: {name}"
    if name == "response_format":
        message = f'response_format type must be one of "text" or "json_object", but got: {value}'
    return 400, {"error": {"code": 400, "message": message, "type": INVALID}}


REFUSALS = {"openai": _openai_refusal, "vllm": _vllm_refusal, "llama.cpp": _llama_cpp_refusal}


#### THE JUDGE


def verdict_policy(settings: Settings) -> Callable[[dict], str]:
    """Make a function of the request that returns "1", "2" or "tie"."""
    fixed = {"first": "1", "second": "2", "tie": "tie"}
    if settings.verdict in fixed:
        return lambda request: fixed[settings.verdict]
    if settings.verdict == "hash":
        return lambda request: ("1", "2", "tie")[messages_digest(request["messages"])[0] % 3]
    if settings.verdict == "longer":
        patterns = [re.compile(pattern) for pattern in settings.responses]
        return lambda request: _longer(texts_of(request), patterns)
    module, _, function = settings.verdict.partition(":")
    return getattr(importlib.import_module(module), function)


def _longer(text: str, patterns: list[re.Pattern]) -> str:
    """Find the longer response. Raises ValueError if the test's patterns do not fit its prompts."""
    found = [pattern.search(text) for pattern in patterns]
    if None in found:
        raise ValueError(f"no responses in {text[:200]!r}")
    first, second = (len(match[match.re.groups]) for match in found)
    return "1" if first > second else "2" if second > first else "tie"


def texts_of(request: dict) -> str:
    return "\n\n".join(message["content"] for message in request["messages"])


def completion(request: dict, verdict: str, settings: Settings, id: str, cut: bool) -> dict:
    """Make a completion that states the verdict in the form that the request asks for. A token is four characters."""
    logprobs = None
    if request.get("logprobs"):
        text, logprobs = first_token(verdict, settings.confidence, request.get("top_logprobs") or 0)
    elif (request.get("response_format") or {}).get("type") in ("json_schema", "json_object"):
        text = json.dumps({"explanation": "One response answers better than the other.", "verdict": verdict})
    else:
        text = f"One response answers better than the other.\nVerdict: {verdict}"
    limit = request.get("max_completion_tokens") or request.get("max_tokens") or 4096
    needed, shown = math.ceil(len(text) / 4), 2 if cut else limit  # what is cut has thought until the limit
    cut = cut or needed > limit
    usage = {"prompt_tokens": math.ceil(len(texts_of(request)) / 4), "completion_tokens": limit if cut else needed}
    return {
        "id": id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text[: 4 * shown]},
                "logprobs": logprobs,
                "finish_reason": "length" if cut else "stop",
            }
        ],
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }


def first_token(verdict: str, confidence: float, n_top: int) -> tuple[str, dict]:
    """Make (text, logprobs) of a reply of one token. In a tie both tokens are equally likely."""
    p_first = {"1": confidence, "2": 1 - confidence, "tie": 0.5}[verdict]
    likely = sorted({"1": p_first, "2": 1 - p_first}.items(), key=lambda item: -item[1])
    top = [{"token": token, "logprob": math.log(max(p, 1e-9)), "bytes": list(token.encode())} for token, p in likely]
    return top[0]["token"], {"content": [{**top[0], "top_logprobs": top[:n_top]}], "refusal": None}


#### REQUESTS


class JudgeServer:
    def __init__(self, settings: Settings):
        self.reset(settings)

    def reset(self, settings: Settings) -> None:
        """Reset the counts. Requests in flight still end as they were decided, and count for the old run."""
        self.settings, self.stats, self.policy = settings, Stats(), verdict_policy(settings)
        self.admitted: deque[float] = deque()  # arrivals within the window that were let through
        self.to_cut = settings.cut_first

    def draw(self, body: bytes) -> tuple[float, float, float]:
        """Draw three numbers in [0, 1) from (seed, body, number of this body), whatever the requests between them."""
        key = hashlib.blake2b(body, digest_size=8).digest()
        seed = f"{self.settings.seed} {self.stats.asked[key]} ".encode()
        self.stats.asked[key] += 1
        drawn = hashlib.blake2b(seed + key, digest_size=24).digest()
        return tuple(int.from_bytes(drawn[at : at + 8], "big") / 2**64 for at in (0, 8, 16))

    def outcome(self, draw: float, draw_broken: float) -> int | str:
        """Decide the outcome: 200, an error's status or name, hang, disconnect, malformed, or broken."""
        settings, n = self.settings, len(self.stats.arrivals)
        if settings.error and n > settings.error_after:
            return settings.error
        if settings.rpm is not None and not self.admit(self.stats.arrivals[-1]):
            return 429
        if n <= len(settings.script):
            return settings.script[n - 1]
        for outcome in (429, 500, 503, "hang", "disconnect", "malformed"):
            draw -= getattr(settings, f"rate_{outcome}")
            if draw < 0:
                return "broken" if outcome == "malformed" and draw_broken < settings.broken_share else outcome
        return 200

    def admit(self, now: float) -> bool:
        """Whether the request is within the limit of a sliding window; requests beyond it do not count."""
        while self.admitted and self.admitted[0] <= now - self.settings.window:
            self.admitted.popleft()
        if len(self.admitted) >= self.settings.rpm:
            return False
        self.admitted.append(now)
        return True

    def retry_after(self, outcome: int | str) -> float | None:
        return self.settings.retry_after if outcome in (429, "rate_limit_exceeded") else None

    def refused(self, request: dict) -> tuple[int, dict] | None:
        """Make (status, body) of an error that this request gets each time; or None."""
        text = texts_of(request)
        if self.settings.filtered and self.settings.filtered in text:
            return error_answer("content_filter")
        if self.settings.too_long and self.settings.too_long in text:
            return error_answer("context_length_exceeded")
        return refusal(request, self.settings)

    def completed(self, request: dict, outcome: int | str, stats: Stats) -> bytes:
        """Make the body of a 200, and count it as paid."""
        cut = outcome == 200 and self.to_cut > 0
        self.to_cut -= cut
        answer = completion(request, self.policy(request), self.settings, stats.completion_id(), cut)
        stats.paid[messages_digest(request["messages"])] += 1
        if self.settings.message is not None:
            answer["choices"][0].update(message=self.settings.message, finish_reason=self.settings.finish)
        if self.settings.echo:
            message = answer["choices"][0]["message"]
            message["content"] = f"Your key is {self.credentials()}.\n{message['content']}"
        if outcome == "malformed":
            answer["choices"][0].update(message={"role": "assistant", "content": "I cannot decide."}, logprobs=None)
        data = json.dumps(answer).encode()
        return data[: len(data) // 2] if outcome == "broken" else data

    def credentials(self) -> str:
        """What the last request had as its credentials: headers, in base64 too, and the address."""
        headers = [self.stats.headers.get(name, "") for name in ("authorization", "api-key")]
        decoded = [base64.b64decode(header.removeprefix("Basic ")) for header in headers if header.startswith("Basic ")]
        return " ".join([*headers, *(text.decode() for text in decoded), self.stats.path])


#### HTTP


class Connection(asyncio.Protocol):
    """One connection of a client. It takes one request at a time."""

    def __init__(self, server: JudgeServer):
        self.server, self.buffer, self.waiting, self.stats = server, bytearray(), None, None

    def connection_made(self, transport):
        self.transport = transport
        self.server.stats.connections += 1

    def data_received(self, data):
        self.buffer += data
        if self.stats is None:
            self.next_request()

    def connection_lost(self, error):
        if self.waiting is not None:
            self.waiting.cancel()
            self.stats.abandoned += 1
        self.end()

    def next_request(self) -> None:
        head, separator, _ = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        start = len(head) + 4
        end = start + int(headers.get("content-length", 0))
        if len(self.buffer) < end:
            return
        body = bytes(self.buffer[start:end])
        del self.buffer[:end]
        method, path, *_ = first.split(" ")
        if method == "POST" and path.partition("?")[0].endswith("/chat/completions"):
            self.server.stats.path = path
            self.judge(body, headers)
        elif (method, path) == ("GET", "/stats"):
            self.write(200, self.server.stats.report())
        elif (method, path) == ("POST", "/reset"):
            self.server.reset(dataclasses.replace(self.server.settings, **json.loads(body or b"{}")))
            self.write(200, {})
        else:
            self.write(404, {"error": {"message": f"Invalid URL ({method} {path})", "type": INVALID}})

    def judge(self, body: bytes, headers: dict[str, str]) -> None:
        loop, server, stats = asyncio.get_running_loop(), self.server, self.server.stats
        self.stats = stats
        stats.arrivals.append(loop.time())
        stats.headers = headers
        stats.in_flight += 1
        stats.max_in_flight = max(stats.max_in_flight, stats.in_flight)
        draw, draw_broken, draw_jitter = server.draw(body)
        outcome = server.outcome(draw, draw_broken)
        request = json.loads(body)
        refused = server.refused(request) if outcome in (200, "malformed", "broken") else None
        stats.outcomes[str(refused[0] if refused else outcome)] += 1
        if refused:
            self.answer(*refused)
        elif outcome == "disconnect":
            self.transport.close()
        elif outcome in (200, "malformed", "broken"):
            delay = server.settings.delay + server.settings.jitter * draw_jitter
            if delay > 0:
                self.waiting = loop.call_later(delay, self.complete, request, outcome)
            else:
                self.complete(request, outcome)
        elif outcome != "hang":
            status, body = error_answer(outcome)
            if server.settings.echo:
                body["error"]["message"] = f"{server.credentials()} is wrong. {body['error']['message']}"
            self.answer(status, body, retry_after=server.retry_after(outcome))

    def complete(self, request: dict, outcome: int | str) -> None:
        self.waiting = None
        self.answer(200, self.server.completed(request, outcome, self.stats))

    def answer(self, status: int, body: dict | bytes, retry_after: float | None = None) -> None:
        """Count the answer and write it, in this order, so that the client's next request cannot be counted first."""
        self.stats.answered[status] += 1
        self.end()
        self.write(status, body, retry_after)

    def end(self) -> None:
        if self.stats is not None:
            self.stats.in_flight -= 1
            self.stats = None

    def write(self, status: int, body: dict | bytes, retry_after: float | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Content-Type: application/json"]
        lines.append(f"Content-Length: {len(data)}")
        if self.server.settings.echo:
            lines.append(f"X-Your-Key: {self.server.credentials()}")
        if retry_after is not None:
            lines.append(f"Retry-After: {retry_after:g}")
        self.transport.write("\r\n".join([*lines, "\r\n"]).encode() + data)
        if self.buffer:
            self.next_request()


def crash(loop: asyncio.AbstractEventLoop, context: dict) -> None:
    """End the process after a mistake in a test's settings or function, rather than leave a client waiting."""
    loop.default_exception_handler(context)
    os._exit(1)


async def run(settings: Settings) -> None:
    loop, judge_server = asyncio.get_running_loop(), JudgeServer(settings)
    loop.set_exception_handler(crash)
    listening = await loop.create_server(lambda: Connection(judge_server), "127.0.0.1", settings.port, backlog=1024)
    print(listening.sockets[0].getsockname()[1], flush=True)
    stopped = asyncio.Event()
    if settings.until_stdin_closes:
        loop.add_reader(sys.stdin, stopped.set)  # nothing is ever written there: readable means closed
    await stopped.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    for option in dataclasses.fields(Settings):
        parser.add_argument(f"--{option.name}", type=_json_or_text, default=option.default, help=str(option.type))
    asyncio.run(run(Settings(**vars(parser.parse_args()))))


def _json_or_text(value: str):
    try:
        return json.loads(value)
    except ValueError:
        return value


#### FOR TESTS


class Server:
    """A server in a process of its own. It ends when this process ends."""

    def __init__(self, **settings):
        words = [f"--{name}={json.dumps(value)}" for name, value in {**settings, "until_stdin_closes": True}.items()]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server has not started; its exit code is {self.process.wait()}")
        self.port = int(line)
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict:
        """Return `Stats.report`. Keys are strings, as in JSON: stats()["answered"]["200"]."""
        return self._request("GET", "/stats")

    def reset(self, **settings) -> None:
        """Reset the counts, and replace these settings."""
        self._request("POST", "/reset", json.dumps(settings))

    def stop(self) -> None:
        """Kill the server; requests in flight get no answer."""
        self.process.kill()
        self.process.communicate()

    def _request(self, method: str, path: str, body: str | None = None) -> dict:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


@contextmanager
def serve(**settings) -> Iterator[Server]:
    """Start a server with these settings, and stop it at the end."""
    server = Server(**settings)
    try:
        yield server
    finally:
        server.stop()


if __name__ == "__main__":
    main()
