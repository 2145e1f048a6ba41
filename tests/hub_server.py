"""A small hub for tests, in a thread of this process: it makes repositories and takes commits, as huggingface.co does.

with serve() as hub:
    subprocess.run(..., env={"HF_ENDPOINT": hub.url})
    hub.repos["me/model"]["README.md"]
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """repos: name -> {path: content}; private: names of private repositories; tokens: of all requests

    refuse: status of every request, with the credentials of the request in the message
    """

    daemon_threads = True

    def __init__(self, refuse: int | None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.tokens: list[str | None] = []
        self.refuse = refuse
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_POST(self) -> None:
        body = self.body()
        self.server.tokens.append(self.headers["Authorization"])
        if self.server.refuse:
            return self.answer(self.server.refuse, {"error": f"no: {self.headers['Authorization']}"})
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        _, _, _, owner, name, what, _ = self.path.split("/")  # /api/models/OWNER/NAME/WHAT/main
        if f"{owner}/{name}" not in self.server.repos:
            return self.answer(404, {"error": "Repository not found"})
        if what == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.answer(200, {"files": [file | {"shouldIgnore": False} for file in files]})
        self.commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])

    def create(self, wanted: dict) -> None:
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if repo in self.server.repos:
            return self.answer(
                409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"}
            )
        self.server.repos[repo] = {}
        self.server.private |= {repo} if wanted.get("private") or wanted.get("visibility") == "private" else set()
        self.answer(200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": "1"})

    def commit(self, repo: str, lines: list[dict]) -> None:
        files = [line["value"] for line in lines if line["key"] == "file"]
        self.server.repos[repo] |= {file["path"]: base64.b64decode(file["content"]) for file in files}
        url = f"{self.server.url}/{repo}/commit/{'0' * 40}"
        self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})

    def body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def serve(refuse: int | None = None) -> Iterator[Hub]:
    hub = Hub(refuse)
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
