"""Chat models as judges, behind any OpenAI-compatible server.

`ChatJudge.ask` is one call, without retries. If the server refuses a parameter, the parameter is replaced here
(`refused_parameter`, `replacement`); `classified` says what an error means for the request and for the whole run.
Waiting and retrying are in run.py; addresses and keys in servers.py; what a reply says in completions.py. Change PRICES
for new models, and MODES for another way of asking for a verdict.
"""

import asyncio
import json
import math
import re
import time
from email.utils import parsedate_to_datetime

from halos import secrets
from halos.judge.completions import read_completion
from halos.judge.judges import Judge, Reply, Stop, Unanswerable, Unavailable
from halos.judge.prompts import INSTRUCTIONS, REMINDER, PromptTemplate, messages_of
from halos.judge.samples import Pair, digest, slots
from halos.judge.servers import OPENAI_URL, key_names, make_client
from halos.judge.verdicts import parse_verdict

# US dollars per million input and output tokens at OpenAI, as published in June 2026; --price overrides them.
PRICES = {
    "gpt-5.5": (5.0, 30.0),
    "gpt-5.4": (2.5, 15.0),
    "gpt-5.4-mini": (0.75, 4.5),
    "gpt-5.4-nano": (0.2, 1.25),
    "gpt-4.1": (2.0, 8.0),
    "gpt-4.1-mini": (0.4, 1.6),
    "gpt-4o": (2.5, 10.0),
    "gpt-4o-mini": (0.15, 0.6),
}

POOL_SIZE = 8  # connections per client
MAX_TOKENS = 8192  # of a reply, however often its limit is raised

# What is asked of the server, by mode.
SCHEMA = {
    "type": "object",
    "properties": {"explanation": {"type": "string"}, "verdict": {"type": "string", "enum": ["1", "2", "tie"]}},
    "required": ["explanation", "verdict"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}}
MODES: dict[str, dict] = {
    "json": {"response_format": JSON_SCHEMA},
    "text": {},
    "logprob": {"logprobs": True, "top_logprobs": 20, "max_tokens": 1},
}


class ChatJudge(Judge):
    """A chat model behind an OpenAI-compatible server.

    The first call finds out which parameters the server supports. A parameter that it refuses is replaced, for all
    later calls. Keys of requests cover the parameters of the first call, so that a restart finds its replies.

    mode: json, text or logprob
    api_key: sent as it is; servers without keys take any
    price: US dollars per million input and output tokens
    connections: most calls in flight
    timeout: seconds for one call
    """

    def __init__(
        self,
        model: str,
        mode: str,
        template: PromptTemplate,
        base_url: str,
        api_key: str,
        price: tuple[float, float] | None = None,
        connections: int = 32,
        timeout: float = 60.0,
    ):
        self.name, self.mode, self.template, self.price, self.timeout = model, mode, template, price, timeout
        self.base_url, self.api_key, self.connections = base_url, api_key, connections
        self.parameters: dict = {"temperature": 0, "max_tokens": 512, **MODES[mode]}
        self.expected_tokens = 1 if mode == "logprob" else 60
        self.wishes = json.dumps(self.parameters, sort_keys=True)
        self.clients: list = []
        self.calls = 0

    def request(self, pair: Pair, order: int) -> list[dict]:
        """Make the chat messages."""
        texts = pair.prompt, *slots(pair, order), INSTRUCTIONS[self.mode]
        return messages_of(self.template, f"--template, for row {pair.row}", *texts)

    def key(self, request: list[dict]) -> str:
        return digest(self.name, self.wishes, json.dumps(request)).hex()

    def size(self, request: list[dict]) -> int:
        return sum(len(message["content"].encode("utf-8", "surrogatepass")) for message in request)

    @property
    def max_tokens(self) -> int:
        return self.parameters.get("max_tokens") or self.parameters.get("max_completion_tokens") or 4096

    def verdict(self, reply: Reply) -> float | None:
        if reply.p_first is not None:
            return reply.p_first
        if reply.finish == "length" and not reply.text.lstrip().startswith("{"):
            return None  # "Verdict: 1" may have gone on with "or 2"
        winner = parse_verdict(reply.text)
        return None if winner is None else (0.5, 1.0, 0.0)[winner]

    async def ask(self, request: list[dict], unread: Reply | None = None) -> Reply:
        """Make one call. After an unread reply, allow more tokens if it was cut off, else ask for the verdict alone."""
        if unread is not None and unread.finish == "length":
            self._raise_limit(unread)
        elif unread is not None:
            said = {"role": "assistant", "content": unread.text or "-"}
            request = [*request, said, {"role": "user", "content": REMINDER}]
        return await self._negotiate(request)

    async def _negotiate(self, request: list[dict]) -> Reply:
        """Send the request, and replace one refused parameter at a time until the server accepts them all."""
        from openai import APIStatusError

        while True:
            parameters = self.parameters
            try:
                return await self._post({"model": self.name, "messages": request, **parameters})
            except APIStatusError as error:
                refused = refused_parameter(error, parameters)
                if refused is None:
                    raise classified(error, self) from error
                if self.parameters is parameters:  # no other call has replaced it meanwhile
                    self.parameters = replacement(parameters, refused)

    async def _post(self, body: dict) -> Reply:
        """Send one HTTP request. The journal keeps the body as it came, so it is not parsed by the client's models."""
        import httpx2
        import openai

        self.calls += 1
        client = self.clients[self.calls % len(self.clients)]
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout):
                response = await client.post("/chat/completions", body=body, cast_to=httpx2.Response)
        except TimeoutError as error:
            raise Unavailable(f"no answer within {self.timeout:g} s", billed=True) from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            reason = secrets.redact(f"{type(cause).__name__} {cause}".strip())
            raise Unavailable(reason, billed=not _unconnected(cause)) from error
        return read_completion(response.text, time.perf_counter() - started)

    async def open(self) -> None:
        """Make one client per POOL_SIZE calls in flight: a pool looks through all its connections for each call."""
        import httpx2
        import openai

        try:
            ssl = httpx2.create_ssl_context()
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=POOL_SIZE)
            for _ in range(math.ceil(self.connections / POOL_SIZE)):
                http_client = openai.DefaultAsyncHttpxClient(verify=ssl, limits=limits)
                options = {"max_retries": 0, "timeout": None, "http_client": http_client}
                self.clients.append(make_client(self.base_url, self.api_key, **options))
        except (OSError, ValueError, httpx2.InvalidURL, openai.OpenAIError) as error:
            remedy = "check --base_url, and the variables of proxies and certificates"
            raise Stop(2, f"{self.name}: no client can be made ({secrets.redact(str(error))}); {remedy}") from error

    def _raise_limit(self, cut: Reply) -> None:
        """Allow twice the tokens of a reply that was cut off before its verdict, as those of reasoning models are."""
        for name in ("max_tokens", "max_completion_tokens"):
            if name in self.parameters:
                taken = cut.usage[1] if cut.usage else self.parameters[name]
                limit = max(self.parameters[name], min(2 * taken, MAX_TOKENS))
                self.parameters = {**self.parameters, name: limit}

    async def close(self) -> None:
        for client in self.clients:
            await client.close()


#### PARAMETERS THAT A SERVER REFUSES


def refused_parameter(error, parameters: dict) -> str | None:
    """Find the parameter that an error is about, among those that were sent; None if it is about something else.

    error: an openai.APIStatusError
    OpenAI names the parameter in `param`, other servers in their message only. OpenAI refuses logprobs with a 403;
    servers built on FastAPI refuse unknown parameters with a 422.
    """
    detail = error.body if isinstance(error.body, dict) else {}
    if error.status_code not in (400, 403, 422) or ABOUT_THE_TEXTS.search(error.response.text):
        return None
    named = str(detail.get("param") or "").split(".")[0]
    if named in parameters:
        return named
    words = {**{name: name for name in parameters}, "json_schema": "response_format", "json_object": "response_format"}
    said = set(re.findall(r"\w+", error.response.text.lower()))
    return next((name for word, name in words.items() if name in parameters and word in said), None)


# Errors about the texts of this request. Some of them name max_tokens, which is supported nevertheless.
ABOUT_THE_TEXTS = re.compile(
    r"content.?(filter|policy|management)|invalid_prompt|context.?(length|window|size)|too (long|large)", re.IGNORECASE
)


def replacement(parameters: dict, refused: str) -> dict:
    """Leave a refused parameter out, or put what the server may accept in its place."""
    rest = {name: value for name, value in parameters.items() if name != refused}
    if refused == "max_tokens":
        return {**rest, "max_completion_tokens": parameters[refused]}
    if refused == "response_format" and parameters[refused] == JSON_SCHEMA:
        return {**rest, "response_format": {"type": "json_object"}}
    if refused in ("logprobs", "top_logprobs"):  # the verdict is then read from a text, which needs more than a token
        rest = {name: value for name, value in rest.items() if name not in ("logprobs", "top_logprobs")}
        return {name: 512 if name.startswith("max_") else value for name, value in rest.items()}
    return rest


#### ERRORS


def classified(error, judge: ChatJudge) -> Exception:
    """Turn an HTTP error (openai.APIStatusError) into Stop, Unavailable or Unanswerable."""
    status, body = error.status_code, error.body if isinstance(error.body, dict) else {}
    code = str(body.get("code") or body.get("type") or "")
    words = secrets.redact(str(body.get("message") or error.response.text or code)).split()  # before it is cut off
    reason = f"{status} {' '.join(words)[:300]}"
    if status == 402 or "insufficient_quota" in (code, str(body.get("type"))):
        return Stop(3, f"{judge.name}: {reason}; add credit and run the command again: nothing is paid twice")
    if status in REMEDIES:
        remedy = REMEDIES[status].format(key=" or ".join(key_names(judge.base_url)))
        return Stop(2, f"{judge.name} at {secrets.redact(judge.base_url)}: {reason}; {remedy}")
    if status == 429 or status in (408, 409) or status >= 500:
        return Unavailable(reason, retry_after(error.response.headers), status == 429, billed=status in (408, 504))
    return Unanswerable(reason, final=status == 413 or bool(ABOUT_THE_TEXTS.search(error.response.text)))


REMEDIES = {
    401: "check {key}",
    403: "this key may not use the model; check the key, or choose another --judge",
    404: "check --judge and --base_url",
}


def retry_after(headers) -> float | None:
    """Read the seconds to wait from Retry-After-Ms or Retry-After (seconds, or a date); None without a valid one."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) * unit)
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, TypeError, OverflowError):
            pass
    return None


def _unconnected(error: BaseException) -> bool:
    """Return whether no connection was made, so that nothing was billed."""
    import httpx2

    return isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.UnsupportedProtocol)


#### PRICES


def published_price(model: str, base_url: str) -> tuple[float, float] | None:
    """Look up the price of a model at OpenAI. A dated snapshot costs what its family costs. None if it is not known."""
    if base_url != OPENAI_URL:
        return None
    return PRICES.get(re.sub(r"-\d{4}-\d\d-\d\d$", "", model))
