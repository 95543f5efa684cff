"""Pushing to the Hub (a fake one on this machine): what arrives, in which order, and what a failure leaves behind."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError

from kandinsky_diffusers.hub import find_repos, plan_push
from kandinsky_diffusers.hub_errors import HubError, advice_on
from tests.support.fake_hub import FakeHub, Fault
from tests.support.goldens import GoldenFamily
from tests.support.processes import PythonProcess


RUN = """
import sys
from unittest.mock import patch
from typer.testing import CliRunner
from kandinsky_diffusers.cli import app

with patch("time.sleep"):  # the client waits before it tries again
    done = CliRunner().invoke(app, sys.argv[1:])
if not isinstance(done.exception, SystemExit | None):
    raise done.exception
result = [done.exit_code, done.stdout, done.stderr]
"""
RUN_WITHOUT_TOKEN = f"""
import os
from unittest.mock import patch

with patch.dict(os.environ):
    del os.environ["HF_TOKEN"]
    exec({RUN!r})
"""


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """The folder with a decoder and its prior, as far as a push looks at them."""
    for name, prior in (("a-decoder", "prior:\n- kandinsky-community/the-prior\n"), ("the-prior", "")):
        repo = tmp_path / "release" / name
        (repo / "unet").mkdir(parents=True)
        (repo / "model_index.json").write_text("{}")
        (repo / "README.md").write_text(f'---\nlibrary_name: diffusers\n{prior}---\n\n    load("{name}")\n')
        (repo / "unet" / "config.json").write_text("{}")
        (repo / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(name.encode() * 3000)
    return tmp_path / "release"


def pushed_from(folder: Path) -> dict[str, set[str]]:
    """Hub id and files of the repositories in a folder."""
    return {
        f"ns/{repo.name}": {file.relative_to(repo).as_posix() for file in repo.rglob("*") if file.is_file()}
        for repo in folder.iterdir()
    }


def on_hub(hub: FakeHub) -> dict[str, set[str]]:
    """Hub id and files of the repositories that have any."""
    return {repo: set(hub.files(repo)) for repo in hub.repos if hub.files(repo)}


DRAW = """
import sys
import kandinsky_diffusers
from diffusers import AutoPipelineForText2Image

pipe = AutoPipelineForText2Image.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image = pipe("red cat", num_inference_steps=2, prior_num_inference_steps=2, height=64, width=64).images[0]
result = {"class": type(pipe).__name__, "size": image.size, "colours": len(set(image.getdata()))}
"""


def test_what_a_conversion_has_pushed_is_loaded_with_the_prior_that_the_card_names_and_draws(
    hub: FakeHub, from_hub: PythonProcess, release_21: Path, goldens_21: GoldenFamily, tmp_path: Path
) -> None:
    config = goldens_21.path / "hyperparameters.json"
    options = ("--clip", release_21 / "clip", "--original-config", config, "--push-to-hub", "ns")

    code, output, message = from_hub.run(RUN, "convert", release_21, tmp_path / "repos", *options)

    assert code == 0, message
    assert output.count("written: ") == output.count("pushed: ") == 3
    assert on_hub(hub) == pushed_from(tmp_path / "repos")

    shutil.rmtree(tmp_path / "repos")
    hub.requests.clear()
    drawn = from_hub.run(DRAW, "ns/kandinsky-2-1")
    assert drawn["class"] == "KandinskyCombinedPipeline"
    assert drawn["size"] == [64, 64]
    assert drawn["colours"] > 100
    assert any("/ns/kandinsky-2-1-prior/resolve/" in request for request in hub.requests)


# what arrives


def test_the_repositories_of_a_conversion_are_pushed_in_one_commit_each_the_prior_first(
    hub: FakeHub, from_hub: PythonProcess, release: Path
) -> None:
    files = pushed_from(release)
    before = {file: file.read_bytes() for file in release.rglob("*") if file.is_file()}
    (release / ".kandinsky-diffusers-x" / "new").mkdir(parents=True)
    (release / "the-prior" / ".cache").mkdir()
    (release / "the-prior" / ".cache" / "secret").write_text("x")
    (release / "the-prior" / ".DS_Store").write_text("x")

    code, output, _ = from_hub.run(RUN, "push", release, "ns")

    assert code == 0
    assert [line.split("/commit/")[0] for line in output.splitlines()] == [
        f"pushed: {hub.url}/ns/the-prior",
        f"pushed: {hub.url}/ns/a-decoder",
    ]
    assert {repo: [set(files) for files in commits] for repo, commits in hub.commits.items()} == {
        repo: [names] for repo, names in files.items()
    }
    for path, content in before.items():
        assert path.read_bytes() == content
        if path.name != "README.md":
            place = path.relative_to(release)
            assert hub.files(f"ns/{place.parts[0]}")[Path(*place.parts[1:]).as_posix()].read_bytes() == content


def test_cards_name_what_was_pushed_beside(hub: FakeHub, from_hub: PythonProcess, release: Path) -> None:
    from_hub.run(RUN, "push", release, "ns")

    card = ModelCard.load(hub.repos["ns/a-decoder"] / "README.md")
    assert card.data["prior"] == ["ns/the-prior"]
    assert 'load("ns/a-decoder")' in card.text


@pytest.mark.parametrize("namespace", ["ns", "kandinsky-community"])
def test_a_card_names_the_repositories_of_the_namespace_that_were_pushed_before(
    hub: FakeHub, from_hub: PythonProcess, release: Path, namespace: str
) -> None:
    card = release / "a-decoder" / "README.md"
    card.write_text(card.read_text() + '    load("kandinsky-community/kandinsky-3-1")\n')
    hub.repos |= {f"{namespace}/the-prior": release / "the-prior", f"{namespace}/kandinsky-3-1": release / "the-prior"}

    output = from_hub.run(RUN, "push", release / "a-decoder", "ns")[1]

    pushed = ModelCard.load(hub.repos["ns/a-decoder"] / "README.md")
    assert pushed.data["prior"] == [f"{namespace}/the-prior"]
    assert f'load("{namespace}/kandinsky-3-1")' in pushed.text
    assert f"(its prior: {namespace}/the-prior)" in output
    assert hub.commits.keys() == {"ns/a-decoder"}


def test_what_is_there_already_is_not_committed_again(hub: FakeHub, from_hub: PythonProcess, release: Path) -> None:
    from_hub.run(RUN, "push", release, "ns")
    (release / "a-decoder" / "unet" / "config.json").write_text('{"changed": true}')

    code, output, _ = from_hub.run(RUN, "push", release, "ns")

    assert code == 0
    assert f"unchanged: {hub.url}/ns/the-prior" in output
    assert f"pushed: {hub.url}/ns/a-decoder" in output
    assert len(hub.commits["ns/the-prior"]) == 1
    assert hub.commits["ns/a-decoder"][1] == ["unet/config.json"]
    assert len(hub.received) == 2


def test_weights_that_are_split_otherwise_replace_the_old_ones_and_nothing_else(
    hub: FakeHub, from_hub: PythonProcess, release: Path
) -> None:
    unet, stem = release / "the-prior" / "unet", "diffusion_pytorch_model"
    old = {
        f"{stem}.safetensors.index.json",
        f"{stem}-00001-of-00002.safetensors",
        f"{stem}-00002-of-00002.safetensors",
    }
    kept = {f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.bf16.json", "other-00001-of-00002.safetensors"}
    hub.repos["ns/the-prior"] = release.parent / "on the hub"
    for name in (*old, *kept):
        (release.parent / "on the hub" / "unet").mkdir(parents=True, exist_ok=True)
        (release.parent / "on the hub" / "unet" / name).write_text("x")

    from_hub.run(RUN, "push", release / "the-prior", "ns")

    assert {path.name for path in (hub.repos["ns/the-prior"] / "unet").iterdir()} == {
        *(path.name for path in unet.iterdir()),
        *kept,
    }
    assert len(hub.commits["ns/the-prior"]) == 1


def test_repositories_are_private_if_asked_for(hub: FakeHub, from_hub: PythonProcess, release: Path) -> None:
    assert from_hub.run(RUN, "push", release / "the-prior", "ns", "--private")[0] == 0
    assert from_hub.run(RUN, "push", release, "ns")[0] == 0
    assert hub.private == {"ns/the-prior"}

    code, _, message = from_hub.run(RUN, "push", release / "a-decoder", "ns", "--private")
    assert code == 1
    assert "ns/a-decoder is there and public, but `private` is True. Nothing was sent" in message


def test_a_pull_request_is_opened_once_and_continued(hub: FakeHub, from_hub: PythonProcess, release: Path) -> None:
    asked, pull = ("push", release / "the-prior", "ns", "--pr"), "ns/the-prior@refs/pr/1"
    outputs = [from_hub.run(RUN, *asked)[1] for _ in range(2)]
    (release / "the-prior" / "model_index.json").write_text('{"changed": true}')
    outputs.append(from_hub.run(RUN, *asked)[1])

    assert f"pushed: {hub.url}/ns/the-prior/discussions/1" in outputs[0]
    assert outputs[1].startswith("unchanged: ")
    assert outputs[2].startswith("pushed: ")
    assert {repo: [set(files) for files in commits] for repo, commits in hub.commits.items()} == {
        pull: [pushed_from(release)["ns/the-prior"], {"model_index.json"}]
    }
    assert not hub.files("ns/the-prior")


def test_a_dry_run_shows_files_and_sizes_and_asks_nobody(hub: FakeHub, from_hub: PythonProcess, release: Path) -> None:
    code, output, _ = from_hub.run(RUN_WITHOUT_TOKEN, "push", release, "ns", "--dry-run")

    assert code == 0
    assert not hub.requests
    assert output.index("ns/the-prior") < output.index("ns/a-decoder")
    assert "27.0 kB" in output
    assert output.count("4 files") == 2
    assert "its prior: ns/the-prior" in output


# what goes wrong


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "answers 500": (".", {"status": 500}),
    "breaks the connection": ("the-prior", {"status": None}),
    "breaks it after the work": ("the-prior", {"status": None, "is_late": True}),
}


@pytest.mark.parametrize(("pushed", "fault"), FAULTS.values(), ids=FAULTS.keys())
def test_a_hub_that_fails_at_any_request_has_whole_repositories_and_the_next_push_sends_the_rest(
    hub: FakeHub, from_hub: PythonProcess, release: Path, pushed: str, fault: Mapping[str, Any]
) -> None:
    whole = pushed_from(release)
    if pushed != ".":
        whole = {f"ns/{pushed}": whole[f"ns/{pushed}"]}
    number, was_hit = 0, True
    while was_hit:
        number += 1
        hub.forget()
        hub.fault = Fault(number, **fault)
        code, _, message = from_hub.run(RUN, "push", release / pushed, "ns")
        was_hit = hub.fault.first <= 0

        assert (code, message.count("Error: ")) == ((1, 1) if was_hit else (0, 0)), message
        assert on_hub(hub).items() <= whole.items()
        assert set(on_hub(hub)) != {"ns/a-decoder"}
        if not fault.get("is_late"):
            assert ("before that: ns/the-prior." in message) == (was_hit and "ns/the-prior" in on_hub(hub))

        hub.fault, received = None, set(hub.received)
        hub.received.clear()
        code, output, _ = from_hub.run(RUN, "push", release / pushed, "ns")

        assert code == 0, output
        assert on_hub(hub).items() == (
            whole.items() if pushed == "." else {"ns/the-prior": whole["ns/the-prior"]}.items()
        )
        assert all(len(commits) == 1 for commits in hub.commits.values())
        assert received.isdisjoint(hub.received)
    assert number > 8


def test_a_hub_that_fails_once_is_asked_again(hub: FakeHub, from_hub: PythonProcess, release: Path) -> None:
    from_hub.run(RUN, "push", release / "the-prior", "ns")
    upload = next(number for number, request in enumerate(hub.requests, start=1) if request.startswith("PUT"))
    hub.forget()
    hub.fault = Fault(upload, 500, times=1)

    assert from_hub.run(RUN, "push", release / "the-prior", "ns")[0] == 0
    assert on_hub(hub) == {"ns/the-prior": pushed_from(release)["ns/the-prior"]}


ANSWERS = {
    401: "log in again with `hf auth login`",
    403: "the token may not write there",
    404: "the Hub has no such user, organization or repository",
    409: "try again",
    429: "too many requests",
    503: "the Hub has a fault of its own",
}


@pytest.mark.parametrize(("status", "advice"), ANSWERS.items())
def test_what_the_hub_refuses_becomes_one_message(
    hub: FakeHub, from_hub: PythonProcess, release: Path, status: int, advice: str
) -> None:
    hub.fault = Fault(3, status)

    code, _, message = from_hub.run(RUN, "push", release, "ns")

    message = message.strip().removeprefix("Error: ")
    assert code == 1
    assert advice in message
    assert f"HTTP {status}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "error", [TimeoutError("timed out"), HTTPError("timed out"), ConnectionResetError("timed out")]
)
def test_a_lost_connection_can_be_tried_again(error: Exception) -> None:
    with (
        pytest.raises(HubError, match=r"It failed: the connection to the Hub failed \(timed out\): try again\."),
        advice_on("It failed"),
    ):
        raise error


def test_without_a_token_nothing_is_sent(hub: FakeHub, from_hub: PythonProcess, release: Path) -> None:
    code, _, message = from_hub.run(RUN_WITHOUT_TOKEN, "push", release, "ns")

    assert code == 1
    assert "log in with `hf auth login`, or set HF_TOKEN" in message
    assert not hub.requests


def test_a_namespace_that_is_not_the_tokens_is_refused_before_a_conversion_starts(
    hub: FakeHub, from_hub: PythonProcess, release: Path
) -> None:
    for command in (("push", release, "nobody"), ("convert", release, "out", "--push-to-hub", "nobody")):
        code, _, message = from_hub.run(RUN, *command)

        assert code == 1
        assert "`namespace` is 'nobody'; accepted with this token is someone or ns." in message
        assert set(hub.requests) == {"GET /api/whoami-v2"}


def test_a_token_for_reading_is_refused(hub: FakeHub, from_hub: PythonProcess, release: Path) -> None:
    hub.role = "read"

    code, _, message = from_hub.run(RUN, "push", release, "ns")

    assert code == 1
    assert "The token is for reading only" in message


def test_links_that_lead_out_of_the_folder_are_refused(release: Path) -> None:
    link = release / "the-prior" / "unet" / "more.json"
    link.symlink_to("config.json")
    assert "unet/more.json" in plan_push([release / "the-prior"], "ns")[0].files
    for target, refusal in (
        (release / "a-decoder" / "model_index.json", "leads out of"),
        (release / "a-decoder" / "unet", "leads out of"),
        (release / "the-prior" / "unet", "is no file"),
        (Path("nowhere"), "is no file"),
    ):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(HubError, match=rf"more\.json .*{refusal}"):
            plan_push([release / "the-prior"], "ns")

    (release.parent / "other").mkdir()
    (release.parent / "other" / "a-link").symlink_to(release / "a-decoder")
    with pytest.raises(HubError, match=r"a-link .*leads out of"):
        find_repos(release.parent / "other")


def test_what_cannot_be_pushed_is_named(release: Path) -> None:
    with pytest.raises(HubError, match=r"`folder` is .*/nothing'; accepted is a repository"):
        find_repos(release / "the-prior" / "nothing")
    with pytest.raises(HubError, match="ns/x/a-decoder cannot be the name of a repository"):
        plan_push(find_repos(release), "ns/x")
    card = release / "a-decoder" / "README.md"
    card.write_text(card.read_text().replace("kandinsky-community/the-prior", "../the-prior"))
    with pytest.raises(HubError, match=r"\.\./the-prior cannot be the name of a repository"):
        plan_push([release / "a-decoder"], "ns")
    card.write_text("---\nprior: [unclosed\n---\n")
    with pytest.raises(HubError, match=r"The card cannot be read: .*a-decoder/README\.md is no YAML"):
        plan_push([release / "a-decoder"], "ns")
    card.unlink()
    with pytest.raises(HubError, match=r"a-decoder has no README\.md"):
        plan_push(find_repos(release), "ns")
