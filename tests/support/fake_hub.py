"""A Hugging Face Hub on this machine: serves local folders as repositories, for tests of what `from_pretrained` does.

    with FakeHub({"someone/some-repo": folder}, pushed) as hub:
        subprocess.run([...], env=os.environ | hub.environment(cache))

The client library reads its endpoint when it is imported, so what talks to the hub has to be another process. The
server answers what downloads ask for and, in `fake_uploads.py`, what uploads do; a `Fault` may stand in the way. An
endpoint is one entry of `FakeHub.routes`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

from tests.support.fake_uploads import TOKEN, Answer, Request, Uploads, branch


REPO = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Fault:
    """What goes wrong from some request on.

    Args:
        first: the first request that it hits; the next one is 1.
        status: of the answer; None for a connection that breaks when half of the request has arrived.
        times: how many requests it hits.
        is_late: whether the server does what is asked, and the connection breaks before the answer.
    """

    first: int
    status: int | None
    times: int = 10**6
    is_late: bool = False

    def hits(self) -> bool:
        """Count a request."""
        self.first -= 1
        return -self.times < self.first <= 0


class FakeHub(Uploads):
    """Serve `repos` (Hub id -> folder) at `url`; `requests` lists what was asked for, as ``"GET /path"``.

    Args:
        repos: Hub id to folder.
        folder: where to keep what is pushed.
    """

    def __init__(self, repos: Mapping[str, Path], folder: Path) -> None:
        super().__init__(folder)
        self.repos = dict(repos)
        self.requests: list[str] = []
        self.fault: Fault | None = None
        self.routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", rf"/api/models/{REPO}(/revision/(?P<revision>.+))?", self.model_info),
            ("GET", rf"/api/models/{REPO}/tree/[^/]+(/(?P<folder>.*))?", self.tree),
            ("GET", rf"/{REPO}/resolve/[^/]+/(?P<path>.+)", self.resolve),
            *self.upload_routes,
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
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # the other transport has no fake
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    # endpoints

    def model_info(self, request: Request, repo: str, revision: str = "main") -> Answer:
        """What is in a repository."""
        if (repo := branch(repo, revision)) not in self.repos:
            return Answer.error(404, "RepoNotFound")
        files = [{"rfilename": path} for path in self.files(repo)]
        facts = {"id": repo, "modelId": repo, "sha": self._commit(repo), "private": repo in self.private}
        return Answer.of_json({**facts, "siblings": files, "tags": []})

    def tree(self, request: Request, repo: str, folder: str | None = None) -> Answer:
        """Sizes and hashes of the files, below `folder` if one is given."""
        if repo not in self.repos:
            return Answer.error(404, "RepoNotFound")
        files = {path: file for path, file in self.files(repo).items() if path.startswith(folder or "")}
        return Answer.of_json(
            [
                {"type": "file", "path": path, "size": file.stat().st_size, "oid": _etag(file)}
                for path, file in files.items()
            ]
        )

    def resolve(self, request: Request, repo: str, path: str) -> Answer:
        """One file."""
        if repo not in self.repos:
            return Answer.error(404, "RepoNotFound")
        file = self.files(repo).get(path)
        headers = {"X-Repo-Commit": self._commit(repo)}
        if file is None:
            return Answer.error(404, "EntryNotFound", headers)
        return Answer(200, file.read_bytes(), headers | {"ETag": f'"{_etag(file)}"'})

    # helpers

    def files(self, repo: str) -> dict[str, Path]:
        """Path in the repository, and place, of each file."""
        folder = self.repos[repo]
        return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}

    def _commit(self, repo: str) -> str:
        content = [(path, _etag(file)) for path, file in self.files(repo).items()]
        return hashlib.sha1(repr(content).encode()).hexdigest()

    def next_fault(self) -> Fault | None:
        """What hits the next request."""
        return self.fault if self.fault is not None and self.fault.hits() else None

    def answer(self, method: str, path: str, request: Request) -> Answer:
        """The answer of the first route that matches."""
        needs_token = method == "POST" or path == "/api/whoami-v2"
        if needs_token and request.authorization != f"Bearer {TOKEN}":
            return Answer.error(401, "Unauthorized")
        for route_method, pattern, endpoint in self.routes:
            match = re.fullmatch(pattern, path)
            if match and route_method == method.replace("HEAD", "GET"):
                return endpoint(request, **{name: value for name, value in match.groupdict().items() if value})
        return Answer.error(404, "EntryNotFound")


def _etag(file: Path) -> str:
    stat = file.stat()
    return hashlib.sha1(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()


def _handler_for(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet; the second would wait for the first to be acknowledged

        def do_GET(self) -> None:
            url, length = urlsplit(self.path), int(self.headers.get("Content-Length", 0))
            path = unquote(url.path)
            hub.requests.append(f"{self.command} {path}")
            fault = hub.next_fault()
            if fault is not None and not fault.is_late:
                self.rfile.read(length if fault.status else length // 2)
                self._send(Answer.error(fault.status, "Fault") if fault.status else None)
                return
            body = self.rfile.read(length)
            answer = hub.answer(self.command, path, Request(body, url.query, self.headers["Authorization"]))
            self._send(answer if fault is None else None)

        def _send(self, answer: Answer | None) -> None:
            if answer is None:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_HEAD = do_POST = do_PUT = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test output quiet; `requests` has it all."""

    return Handler
