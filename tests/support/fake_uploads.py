"""What the fake Hub answers to uploads; it keeps what is pushed, and serves it from then on.

The client sends small files inside the request that makes the commit, and large ones before, each under its SHA-256,
by the protocol of Git LFS. Large is here what ends in ``.safetensors``. The other transport for large files, Xet, has
no fake; `FakeHub.environment` switches it off.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any


USER, ORGANIZATION, TOKEN = "someone", "ns", "hf_of_someone"


@dataclass
class Request:
    """A request as far as the endpoints read it."""

    body: bytes = b""
    query: str = ""
    authorization: str | None = None

    @property
    def content(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)


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

    @classmethod
    def error(cls, status: int, code: str, headers: Mapping[str, str] | None = None) -> Answer:
        """An answer that the client makes an exception of."""
        return cls(status, headers={"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})


class Uploads:
    """The endpoints for uploads, mixed into `FakeHub`.

    `commits` has the files of each commit to a repository, `received` the SHA-256 of each large file that was sent,
    `private` the repositories that not everybody sees; `role` is what the token is for. The branch of a pull request
    is a repository called ``namespace/name@refs/pr/1``; `titles` has its title.
    """

    repos: dict[str, Path]

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._blobs: dict[str, bytes] = {}
        self.commits: dict[str, list[list[str]]] = {}
        self.titles: dict[str, str] = {}
        self.received: list[str] = []
        self.private: set[str] = set()
        self.role = "write"
        repo = r"(?P<repo>[^/]+/[^/]+)"
        self.upload_routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", "/api/whoami-v2", self.who),
            ("POST", "/api/repos/create", self.create),
            ("POST", "/api/validate-yaml", self.validate_card),
            ("POST", rf"/api/models/{repo}/preupload/(?P<revision>.+)", self.upload_modes),
            ("POST", rf"/{repo}\.git/info/lfs/objects/batch", self.missing_blobs),
            ("PUT", r"/blobs/(?P<oid>\w+)", self.keep_blob),
            ("POST", rf"/api/models/{repo}/commit/(?P<revision>.+)", self.commit),
            ("GET", rf"/api/models/{repo}/discussions", self.pull_requests),
        ]

    def forget(self) -> None:
        """Forget what was pushed, and all repositories."""
        for memory in (self._blobs, self.repos, self.commits, self.titles, self.received, self.private):
            memory.clear()
        self.role = "write"

    @property
    def url(self) -> str:
        """Where the hub listens."""
        raise NotImplementedError

    def who(self, request: Request) -> Answer:
        """Whose token it is."""
        return Answer.of_json(
            {"name": USER, "orgs": [{"name": ORGANIZATION}], "auth": {"accessToken": {"role": self.role}}}
        )

    def create(self, request: Request) -> Answer:
        """Make a repository."""
        owner, name = request.content["organization"] or USER, request.content["name"]
        repo = f"{owner}/{name}"
        if owner not in (USER, ORGANIZATION):
            return Answer.error(403, "Forbidden")
        answer = Answer.of_json({"url": f"{self.url}/{repo}"})
        if repo in self.repos:
            answer.status = 409
            return answer
        self.repos[repo] = Path(mkdtemp(dir=self._folder))
        if request.content.get("visibility") == "private" or request.content.get("private"):
            self.private.add(repo)
        return answer

    def validate_card(self, request: Request) -> Answer:
        """Accept every card."""
        return Answer.of_json({"errors": [], "warnings": []})

    def upload_modes(self, request: Request, repo: str, revision: str) -> Answer:
        """Which files are large, and what the repository has under their names."""
        if (repo := branch(repo, revision)) not in self.repos:
            return Answer.error(404, "RepoNotFound")
        there = {file["path"]: self.repos[repo] / file["path"] for file in request.content["files"]}
        return Answer.of_json(
            {
                "files": [
                    {"path": path, "uploadMode": _mode(path), "shouldIgnore": False, "oid": _oid(file)}
                    for path, file in there.items()
                ]
            }
        )

    def missing_blobs(self, request: Request, repo: str) -> Answer:
        """Where to send the large files that are not there yet."""
        objects = [{"oid": blob["oid"], "size": blob["size"]} for blob in request.content["objects"]]
        for blob in objects:
            if blob["oid"] not in self._blobs:
                blob["actions"] = {"upload": {"href": f"{self.url}/blobs/{blob['oid']}"}}
        return Answer.of_json({"objects": objects})

    def keep_blob(self, request: Request, oid: str) -> Answer:
        """Receive a large file."""
        assert hashlib.sha256(request.body).hexdigest() == oid
        self._blobs[oid] = request.body
        self.received.append(oid)
        return Answer(200)

    def commit(self, request: Request, repo: str, revision: str) -> Answer:
        """Make a commit, or open a pull request."""
        header, *changes = [json.loads(line) for line in request.body.splitlines()]
        place, answer = branch(repo, revision), {}
        if "create_pr=1" in request.query:
            number = 1 + sum(pull.startswith(f"{repo}@") for pull in self.titles)
            answer["pullRequestUrl"] = f"{self.url}/{repo}/discussions/{number}"
            self.repos[pull := branch(repo, f"refs/pr/{number}")] = self.repos[place]
            self.titles[pull] = header["value"]["summary"]
            place = pull
        self._apply(place, changes)
        made = self.commits.setdefault(place, [])
        made.append([change["value"]["path"] for change in changes])
        oid = hashlib.sha1(f"{place} {len(made)}".encode()).hexdigest()
        return Answer.of_json(answer | {"commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"})

    def pull_requests(self, request: Request, repo: str) -> Answer:
        """All of them are open."""
        facts = {"author": {"name": USER}, "createdAt": "2026-01-01T00:00:00.000Z", "isPullRequest": True}
        pulls = [
            {**facts, "title": title, "num": int(pull.split("/")[-1]), "status": "open"}
            for pull, title in self.titles.items()
            if pull.startswith(f"{repo}@")
        ]
        found = [{**pull, "repo": {"name": repo, "type": "model"}} for pull in pulls]
        return Answer.of_json({"discussions": found, "count": len(found), "start": 0})

    def _apply(self, repo: str, changes: list[dict[str, Any]]) -> None:
        """A commit is a folder of its own, so that repositories given by a test stay as they are."""
        folder = Path(mkdtemp(dir=self._folder))
        shutil.copytree(self.repos[repo], folder, dirs_exist_ok=True)
        for path, content in self._contents(changes):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        for change in changes:
            if change["key"] == "deletedFile":
                (folder / change["value"]["path"]).unlink()
        self.repos[repo] = folder

    def _contents(self, changes: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
        for change in changes:
            if change["key"] == "file":
                yield change["value"]["path"], b64decode(change["value"]["content"])
            elif change["key"] == "lfsFile":
                yield change["value"]["path"], self._blobs[change["value"]["oid"]]


def branch(repo: str, revision: str) -> str:
    """The name in `FakeHub.repos` of a branch."""
    return f"{repo}@{revision}" if revision.startswith("refs/") else repo


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def _oid(file: Path) -> str | None:
    """By what the client knows that a file is there already."""
    if not file.is_file():
        return None
    content = file.read_bytes()
    if _mode(file.name) == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
