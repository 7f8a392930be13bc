"""A small server that speaks OpenAI's protocol, with faults on demand. It answers a prompt with its own text."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = tuple[int, dict[str, str], dict[str, Any] | bytes]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away.

        The traceback that the base class prints is parsed in this thread; where pytest parses one meanwhile, Python
        3.11 ends in "AST constructor recursion depth mismatch".
        """


@dataclass
class FakeEndpoint:
    """What the server does and what it saw.

    Attributes:
        models: listed under /models; None = no such path.
        fault: status, headers and body instead of an answer to this text on its n-th time (from 1), or None.
        delay: seconds that an answer takes.
        usage: whether answers report their tokens.
        finish_reason: of all answers.
        gone: open connections are cut instead of answered.
    """

    models: list[str] | None = field(default_factory=lambda: ["org/model"])
    fault: Callable[[str, int], Fault | None] = lambda text, time: None
    delay: float = 0.0
    usage: bool = True
    finish_reason: str = "stop"
    gone: bool = False
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    times: Counter[str] = field(default_factory=Counter)
    running: int = 0
    most_running: int = 0
    lock: Any = field(default_factory=threading.Lock)

    @contextmanager
    def serving(self) -> "Iterator[FakeEndpoint]":
        """The server on a free port of this machine."""
        handler = type("Handler", (_Handler,), {"endpoint": self})
        server = _Server(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield self
        finally:
            self.gone = True
            server.shutdown()
            thread.join()
            server.server_close()

    def answer(self, path: str, request: dict[str, Any]) -> Fault:
        """Status, headers and body for a request."""
        text = request["messages"][-1]["content"] if "messages" in request else repr(request["prompt"])
        with self.lock:
            self.requests.append(request | {"path": path})
            self.times[text] += 1
            count = self.times[text]
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        time.sleep(self.delay)
        with self.lock:
            self.running -= 1
        return self.fault(text, count) or (200, {}, self._body(path, f"answer: {text}"))

    def asked(self) -> list[dict[str, Any]]:
        """The requests but for the check at the start."""
        return self.requests[1:]

    def _body(self, path: str, text: str) -> dict[str, Any]:
        said = {"text": text} if path == "/v1/completions" else {"message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 3, "completion_tokens": len(text), "total_tokens": 3 + len(text)}
        return {
            "id": "x",
            "object": "completion",
            "created": 0,
            "model": "org/model",
            "choices": [{"index": 0, "finish_reason": self.finish_reason, **said}],
            "usage": usage if self.usage else None,
        }


class _Handler(BaseHTTPRequestHandler):
    endpoint: FakeEndpoint
    protocol_version = "HTTP/1.1"
    timeout = 5

    def do_GET(self) -> None:
        models = self.endpoint.models
        self.endpoint.keys.append(self.headers["Authorization"])
        if models is None:
            self._send(404, {}, {"error": {"message": "no such path"}})
        else:
            self._send(200, {}, {"object": "list", "data": [{"id": name, "object": "model"} for name in models]})

    def do_POST(self) -> None:
        self.endpoint.keys.append(self.headers["Authorization"])
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(*self.endpoint.answer(self.path, request))

    def _send(self, status: int, headers: dict[str, str], body: dict[str, Any] | bytes) -> None:
        if self.endpoint.gone:
            self.close_connection = True
            return
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            self.close_connection = True  # the client has gone

    def log_message(self, *args: Any) -> None:
        """Say nothing."""
