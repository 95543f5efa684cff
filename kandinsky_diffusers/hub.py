"""To the Hub: which files of a repository go there, priors before decoders, and each repository in one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .cards import CARDS, pipeline_card, renamed
from .front_matter import load_card
from .hub_errors import HubError, advice_on


CARD = "README.md"
MARKS = ("model_index.json", "conversion.json", "config.json")  # one of them is in every repository
_QUOTED = re.compile(r"[\"']([\w./-]+)[\"']")
_WEIGHTS = re.compile(
    r"(?P<stem>.+?)(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.safetensors"
    r"|(?P<index_stem>.+?)\.safetensors\.index(\.(?P<index_variant>\w+))?\.json"
)


@dataclass(frozen=True)
class Upload:
    """What is to be pushed of a repository.

    Args:
        repo_id: where to, `namespace/name`.
        files: path in the repository, to the file or, for the card, to its content.
        priors: what the card names as priors.
    """

    repo_id: str
    files: Mapping[str, Path | bytes]
    priors: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Of the commit or the pull request."""
        return f"Upload {self.repo_id.split('/')[-1]}"

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            path: len(content) if isinstance(content, bytes) else content.stat().st_size
            for path, content in self.files.items()
        }


@dataclass(frozen=True)
class Pushed:
    """What became of a push.

    Args:
        repo_id: `namespace/name`.
        info: the Hub client's, of the commit; of the last one, if there was nothing to commit.
        is_new: False if the repository had it all before; nothing was committed then.
        priors: what the card names as priors.
    """

    repo_id: str
    info: CommitInfo
    is_new: bool
    priors: tuple[str, ...]

    @property
    def url(self) -> str:
        """Of the commit or the pull request."""
        return self.info.pr_url or self.info.commit_url


def find_repos(folder: str | Path) -> list[Path]:
    """The repositories in a folder: itself, or those in it.

    Raises:
        HubError: there is none, or one is a link out of the folder.
    """
    place = Path(os.path.abspath(folder))  # a name for "." and for "..", and a link keeps its own
    if _is_repo(place):
        return [place]
    found = sorted(path for path in place.glob("*") if not path.name.startswith(".") and _is_repo(path))
    if not found:
        raise HubError(
            f"`folder` is {str(folder)!r}; accepted is a repository, with one of {', '.join(MARKS)} in it, or a folder"
            " with such repositories."
        )
    for path in found:
        _check_inside(path, place)
    return found


def _is_repo(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS)


def _check_inside(path: Path, folder: Path) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise HubError(f"{path} is a link that leads out of {folder}. Nothing outside is pushed.")


def repo_files(folder: Path) -> dict[str, Path]:
    """Path in the repository and place of each file; what is hidden, such as our temporary folders, is left out.

    Raises:
        HubError: a link leads out of the folder, or to another folder; or something is neither file nor folder.
    """
    root, files = folder.resolve(), {}
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = [name for name in folders if Path(place, name).is_symlink()]
        for path in sorted(Path(place, name) for name in [*names, *links] if not name.startswith(".")):
            _check_inside(path, root)
            if not path.is_file():
                raise HubError(f"{path} is no file; accepted are files, and links to files of the same repository.")
            files[path.relative_to(root).as_posix()] = path
    return files


def plan_push(repos: Sequence[Path], namespace: str, *, also_there: Sequence[str] = ()) -> list[Upload]:
    """What pushing repositories would send; asks nobody. Priors come before the decoders whose cards name them.

    In what is sent the cards name these repositories, as priors and in examples, as they are called in the namespace;
    the files in the folders stay as they are.

    Args:
        repos: folders, whose names are those of the repositories.
        namespace: user or organization.
        also_there: names of further repositories that the namespace has.

    Raises:
        HubError: a name is none for the Hub, a repository has no card, or has what [`repo_files`] refuses.
    """
    cards = {repo: _card(repo) for repo in repos}
    ids = {name: f"{namespace}/{name}" for name in (*also_there, *(repo.name for repo in repos))}
    for repo_id in ids.values():
        _check_id(repo_id)
    in_order = sorted(repos, key=lambda repo: bool(_priors(cards[repo])))
    return [_upload(repo, ids[repo.name], renamed(cards[repo], ids)) for repo in in_order]


def _upload(repo: Path, repo_id: str, card: ModelCard) -> Upload:
    priors = tuple(_priors(card))
    for prior in priors:
        _check_id(prior)
    return Upload(repo_id, {**repo_files(repo), CARD: str(card).encode()}, priors)


def check_access(namespace: str, *, create_pr: bool = False) -> str:
    """See, before anything is sent, that there is a token and that it may write to a namespace.

    Args:
        namespace: user or organization.
        create_pr: whether it is about pull requests, which may go to everybody's repositories.

    Returns:
        The name of the token's owner.

    Raises:
        HubError: there is no token, the Hub does not know it, or it is not for this namespace or not for writing.
    """
    _check_id(f"{namespace}/name")
    if get_token() is None:
        raise HubError("There is no token: log in with `hf auth login`, or set HF_TOKEN. Nothing was sent.")
    with advice_on("The token cannot be checked"):
        owner = HfApi().whoami()
    if owner.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            "The token is for reading only; make one that may write: https://huggingface.co/settings/tokens"
        )
    names = [owner["name"], *(organization["name"] for organization in owner.get("orgs", ()))]
    if namespace not in names and not create_pr:
        raise HubError(f"`namespace` is {namespace!r}; accepted with this token is {' or '.join(names)}.")
    return owner["name"]


def push(
    repos: Sequence[Path], namespace: str, *, private: bool | None = None, create_pr: bool = False
) -> list[Pushed]:
    """Push repositories, each in one commit.

    After a failure the same call goes on: large files that have arrived are not sent again, and a repository that has
    everything is left alone. So is a pull request, if it is still open; one that lacks something is continued.

    Args:
        repos: folders, see [`find_repos`].
        namespace: user or organization.
        private: whether repositories that are not there yet become private; None is public, or the default of the
            organization.
        create_pr: whether to open a pull request instead of committing to the branch `main`.

    Returns:
        What became of each, in the order of pushing.

    Raises:
        HubError: see [`plan_push`] and [`check_access`], or the Hub refuses, fails or is not reached. The message
            names what has been pushed before that.
    """
    plan_push(repos, namespace)  # what is wrong here is found before anything is asked
    owner = check_access(namespace, create_pr=create_pr)
    api, done = HfApi(), []
    uploads = plan_push(repos, namespace, also_there=_also_there(api, repos, namespace))
    for upload in uploads:
        try:
            open_repo(upload.repo_id, private=private)
            revision = _open_pull_request(api, upload, owner) if create_pr else None
            done.append(commit(upload, create_pr=create_pr and revision is None, revision=revision))
        except HubError as error:
            before = ", ".join(pushed.repo_id for pushed in done) or "nothing"
            raise HubError(f"{error} Pushed before that: {before}. The same command goes on from here.") from error
    return done


def open_repo(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Make a repository on the Hub, if it is not there.

    Returns:
        Its full id, with the namespace.

    Raises:
        HubError: the Hub refuses, fails or is not reached, or the repository is public and `private` is True.
    """
    with advice_on(f"Making {repo_id} failed"):
        api = HfApi(token=token)
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_public = bool(private) and not api.model_info(full_id).private
    if is_public:
        raise HubError(f"{full_id} is there and public, but `private` is True. Nothing was sent to it.")
    return full_id


def commit(
    upload: Upload,
    *,
    message: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Send the files of a repository that is there, in one commit.

    Files that would be loaded beside the new ones, such as those of weights that were split otherwise, go with it; all
    others stay.

    Args:
        upload: what and where to.
        message: of the commit.
        create_pr: whether to open a pull request instead.
        revision: the branch, if it is not `main`.
        token: another than that of the Hub client.

    Raises:
        HubError: the Hub refuses, fails or is not reached. The repository has either all of it or nothing.
    """
    with advice_on(f"Pushing {upload.repo_id} failed"):
        api = HfApi(token=token)
        before = api.model_info(upload.repo_id, revision=revision)
        stale = _replaced(upload.files, [file.rfilename for file in before.siblings or ()])
        info: CommitInfo = api.create_commit(
            upload.repo_id,
            [
                *(CommitOperationAdd(path, content) for path, content in upload.files.items()),
                *(CommitOperationDelete(path) for path in stale),
            ],
            commit_message=message or upload.title,
            create_pr=create_pr,
            revision=revision,
        )
    return Pushed(upload.repo_id, info, info.oid != before.sha, upload.priors)


def push_saved(
    pipeline: Any,
    folder: str | os.PathLike,
    repo_id: str,
    *,
    variant: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    **options: Any,
) -> CommitInfo:
    """Push a folder in which a pipeline was saved, with a card, to a repository that is there.

    Args:
        pipeline: for the card.
        folder: where it was saved.
        repo_id: `namespace/name`.
        variant: in the names of the weight files.
        subfolder: folder of the repository to push to; it gets no card then.
        token: another than that of the Hub client.
        options: `message` and `create_pr`, for [`commit`].

    Raises:
        HubError: see [`commit`], or the folder has what [`repo_files`] refuses.
    """
    files: dict[str, Path | bytes] = {**repo_files(Path(folder))}
    if subfolder:
        files = {f"{subfolder.strip('/')}/{path}": file for path, file in files.items()}
    else:
        with advice_on(f"Making the card of {repo_id} failed"):
            card = pipeline_card(pipeline, repo_id, variant=variant, token=token)
            if pipeline.config.get("_name_or_path") != repo_id:
                card = _with_text_on_hub(card, repo_id, token)
        files[CARD] = str(card).encode()
    return commit(Upload(repo_id, files), token=token, **options).info


def _with_text_on_hub(card: ModelCard, repo_id: str, token: str | None) -> ModelCard:
    """The card that the repository has, with what it lacks of this one's front matter; this one if it has none."""
    try:
        there = ModelCard.load(repo_id, token=token)
    except RemoteEntryNotFoundError:
        return card
    for name, value in card.data.to_dict().items():
        if there.data.get(name) is None:
            there.data[name] = value
    return there


def _open_pull_request(api: HfApi, upload: Upload, owner: str) -> str | None:
    """The branch of the pull request that an earlier push has opened, if it is still open."""
    with advice_on(f"Looking for pull requests to {upload.repo_id} failed"):
        pulls = api.get_repo_discussions(upload.repo_id, author=owner, discussion_type="pull_request")
        found = (pull for pull in pulls if pull.title == upload.title and pull.status in ("open", "draft"))
        return next((pull.git_reference for pull in found), None)


def _card(repo: Path) -> ModelCard:
    path = repo / CARD
    if not path.is_file():
        raise HubError(
            f"{repo} has no {CARD}, without which a decoder's prior is not found; `push_to_hub` writes one."
        )
    try:
        return load_card(path)
    except ValueError as error:
        raise HubError(f"The card cannot be read: {error}.") from error


def _priors(card: ModelCard) -> list[str]:
    named = card.data.get("prior")
    return [named] if isinstance(named, str) else list(named or ())


def _also_there(api: HfApi, repos: Sequence[Path], namespace: str) -> list[str]:
    """Names of repositories that the cards of these name, as priors or in examples, and that are in the namespace."""
    named = set().union(*(_names_in(_card(repo)) for repo in repos)) - {repo.name for repo in repos}
    with advice_on(f"The repositories of {namespace} cannot be looked up"):
        return [name for name in sorted(named) if api.repo_exists(f"{namespace}/{name}")]


def _names_in(card: ModelCard) -> set[str]:
    known = {path.stem for path in CARDS.glob("*.md")}
    quoted = {name.split("/")[-1] for name in _QUOTED.findall(card.text)}
    return {prior.split("/")[-1] for prior in _priors(card)} | (quoted & known)


def _replaced(files: Mapping[str, Any], there: Sequence[str]) -> list[str]:
    """Weight files, and indices of such, that are there under other names than those which take their place."""
    new = {_weights(path) for path in files} - {None}
    return [path for path in there if path not in files and _weights(path) in new]


def _weights(path: str) -> tuple[str | None, ...] | None:
    """The same for all files of one model in one variant; None for what is no weight file."""
    found = _WEIGHTS.fullmatch(path)
    if found is None:
        return None
    return found["stem"] or found["index_stem"], found["variant"] or found["index_variant"]


def _check_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id} cannot be the name of a repository on the Hub. {error}") from error
