"""A small hub on loopback: repositories in memory, spoken to by the real client."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_the_test"


class Hub:
    """Files by repository ("model ORG/NAME") and revision, each revision the sha1 of its files."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.main: dict[str, str] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str | None] = set()
        self.address = ""

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        merged = {**self.files(repository), **files}
        sha = hashlib.sha1(repr(sorted(merged.items())).encode()).hexdigest()
        self.commits.setdefault(repository, {})[sha] = merged
        self.main[repository] = sha
        return sha

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        sha = self.main.get(repository, "") if revision == "main" else revision
        return self.commits.get(repository, {}).get(sha, {})


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(\w+)", self.path.partition("?")[0]):
            repository, revision = f"model {found[1]}", found[2]
            files = self.hub.files(repository, revision)
            if not files:
                return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            sha = self.hub.main[repository] if revision == "main" else revision
            siblings = [{"rfilename": name} for name in files]
            return self.answer(200, {"id": found[1], "sha": sha, "siblings": siblings, "private": False, "tags": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(\w+)", self.path.partition("?")[0]):
            files = self.hub.files(f"model {found[1]}", found[2])
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return self.answer(200, entries)
        return self.send_file(body=True)

    def do_HEAD(self) -> None:
        self.send_file(body=False)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.tokens.add(token)
        if token != TOKEN:
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            order = json.loads(content)
            repository = f"{order.get('type', 'model')} {order['organization']}/{order['name']}"
            self.hub.private[repository] = order.get("visibility") == "private" or bool(order.get("private"))
            return self.answer(200, {"url": f"{self.hub.address}/{order['organization']}/{order['name']}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        found = re.fullmatch(
            r"/api/(model|dataset)s/([^/]+/[^/]+)/(preupload|commit)/main", self.path.partition("?")[0]
        )
        if found is None:
            return self.answer(404, {"error": self.path})
        if found[3] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(content)["files"]]
            return self.answer(200, {"files": [{**file, "shouldIgnore": False} for file in files]})
        lines = [json.loads(line) for line in content.splitlines()]
        added = [line["value"] for line in lines if line["key"] == "file"]
        sha = self.hub.commit(
            f"{found[1]} {found[2]}", {file["path"]: base64.b64decode(file["content"]) for file in added}
        )
        address = f"{self.hub.address}/{'datasets/' if found[1] == 'dataset' else ''}{found[2]}/commit/{sha}"
        return self.answer(200, {"success": True, "commitUrl": address, "commitOid": sha})

    def send_file(self, *, body: bool) -> None:
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", self.path.partition("?")[0])
        content = self.hub.files(f"model {found[1]}", found[2]).get(found[3]) if found else None
        if content is None or found is None:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", found[2])
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(content))}.items():
            self.send_header(name, text)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the tests read what the hub holds."""


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at `address` until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
