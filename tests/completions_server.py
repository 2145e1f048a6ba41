"""A completions server for tests, in a thread of this process: what vLLM and others serve at /v1/completions.

    with serve(errors=[503, 429]) as server:
        ...
        server.requests[0]["prompt"]

Its text for a request depends on the prompt and the seed alone, as that of a real server does at a fixed seed.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class CompletionsServer(ThreadingHTTPServer):
    """errors: statuses of the first requests; requests: bodies of those that were answered, in order

    echo: every answer repeats the credentials of its request
    """

    daemon_threads = True

    def __init__(self, errors: list[int], echo: bool):
        super().__init__(("127.0.0.1", 0), Handler)
        self.errors, self.requests, self.lock, self.echo = list(errors), [], threading.Lock(), echo
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CompletionsServer

    def do_GET(self) -> None:
        """Answer GET /v1/models."""
        self.answer(200, {"object": "list", "data": [{"id": "the-export", "object": "model"}]})

    def do_POST(self) -> None:
        """Answer POST /v1/completions, or with the next error."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            status = self.server.errors.pop(0) if self.server.errors else 200
            if status == 200:
                self.server.requests.append(body)
        if status != 200:
            return self.answer(status, {"error": {"message": f"the test says no{self.echoed()}", "code": status}})
        text = text_of(body["prompt"], body["seed"]) + self.echoed()
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        self.answer(200, {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]})

    def echoed(self) -> str:
        return f" {self.headers['Authorization']} {self.path}" if self.server.echo else ""

    def answer(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        """Print nothing."""


def text_of(prompt: list[int], seed: int) -> str:
    return " " + hashlib.blake2b(f"{prompt} {seed}".encode(), digest_size=8).hexdigest()


@contextmanager
def serve(errors: list[int] | None = None, echo: bool = False) -> Iterator[CompletionsServer]:
    """Start a server, and stop it at the end."""
    server = CompletionsServer(errors or [], echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
