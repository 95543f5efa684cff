"""A Hugging Face Hub on this machine: serves local folders as repositories, for tests of what `from_pretrained` does.

    with FakeHub({"someone/some-repo": folder}) as hub:
        subprocess.run([...], env=os.environ | hub.environment(cache))

The client library reads its endpoint when it is imported, so what talks to the hub has to be another process. The
server answers what downloads ask for; an endpoint is one entry of `FakeHub.routes`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


REPO = r"(?P<repo>[^/]+/[^/]+)"


class FakeHub:
    """Serve `repos` (Hub id -> folder) at `url`; `requests` lists what was asked for, as ``"GET /path"``."""

    def __init__(self, repos: Mapping[str, Path]) -> None:
        self.repos = dict(repos)
        self.requests: list[str] = []
        self.routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", rf"/api/models/{REPO}(/revision/[^/]+)?", self.model_info),
            ("GET", rf"/api/models/{REPO}/tree/[^/]+(/(?P<folder>.*))?", self.tree),
            ("GET", rf"/{REPO}/resolve/[^/]+/(?P<path>.+)", self.resolve),
        ]

    def __enter__(self) -> FakeHub:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._thread = Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Where the hub listens, for ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, cache: Path) -> dict[str, str]:
        """Environment variables that make a new process use this hub, with `cache` as its (so far empty) cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # the other transport has no fake
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    # endpoints

    def model_info(self, repo: str) -> Answer:
        """What is in a repository."""
        if repo not in self.repos:
            return _not_found("RepoNotFound")
        files = [{"rfilename": path} for path in self._files(repo)]
        return Answer.of_json({"id": repo, "modelId": repo, "sha": self._commit(repo), "siblings": files, "tags": []})

    def tree(self, repo: str, folder: str | None = None) -> Answer:
        """Sizes and hashes of the files, below `folder` if one is given."""
        if repo not in self.repos:
            return _not_found("RepoNotFound")
        files = {path: file for path, file in self._files(repo).items() if path.startswith(folder or "")}
        return Answer.of_json(
            [
                {"type": "file", "path": path, "size": file.stat().st_size, "oid": _etag(file)}
                for path, file in files.items()
            ]
        )

    def resolve(self, repo: str, path: str) -> Answer:
        """One file."""
        if repo not in self.repos:
            return _not_found("RepoNotFound")
        file = self._files(repo).get(path)
        headers = {"X-Repo-Commit": self._commit(repo)}
        if file is None:
            return _not_found("EntryNotFound", headers)
        return Answer(200, file.read_bytes(), headers | {"ETag": f'"{_etag(file)}"'})

    # helpers

    def _files(self, repo: str) -> dict[str, Path]:
        folder = self.repos[repo]
        return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}

    def _commit(self, repo: str) -> str:
        content = [(path, _etag(file)) for path, file in self._files(repo).items()]
        return hashlib.sha1(repr(content).encode()).hexdigest()

    def answer(self, method: str, url: str) -> Answer:
        """The answer of the first route that matches."""
        path = unquote(urlsplit(url).path)
        self.requests.append(f"{method} {path}")
        for route_method, pattern, endpoint in self.routes:
            match = re.fullmatch(pattern, path)
            if match and route_method == method.replace("HEAD", "GET"):
                return endpoint(**match.groupdict())
        return _not_found("EntryNotFound")


class Answer:
    """Status, body and headers of a response."""

    def __init__(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        self.body = body
        self.headers = {"Content-Length": str(len(body)), **(headers or {})}

    @classmethod
    def of_json(cls, content: Any) -> Answer:
        """A successful answer."""
        return cls(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


def _not_found(code: str, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(404, headers={"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})


def _etag(file: Path) -> str:
    stat = file.stat()
    return hashlib.sha1(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()


def _handler_for(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer = hub.answer(self.command, self.path)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(answer.body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test output quiet; `requests` has it all."""

    return Handler
