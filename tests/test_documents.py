"""Every code block of the README and of every card runs as it is written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import kandinsky_diffusers
from kandinsky_diffusers.conversion.releases import releases
from kandinsky_diffusers.generation import read_jobs
from tests.support.documents import COMMAND, Block, blocks, furnish, made_small, make_quick, run_python, run_shell
from tests.support.goldens import GoldenFamily


ROOT = Path(__file__).resolve().parents[1]
README = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
CARDS = [repo.name for release in releases() for repo in release.repos]
NO_CODE = ("bibtex", "text")
JOBS = "prompts.jsonl"  # what a block of JSON is


@pytest.fixture(scope="session")
def repos(
    converted_20: Path, converted_21: Path, converted_22: Path, converted_30: Path, tiny_repos: Path
) -> dict[str, Path]:
    """Of every repository that is converted, a tiny one."""
    folders = (converted_20, converted_21, converted_22, converted_30, tiny_repos)
    found = {place.name: place for folder in folders for place in folder.iterdir()}
    return {name: found[name] for name in CARDS}


@pytest.fixture
def world(
    repos: dict[str, Path], release_21: Path, tiny_repos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A working directory in which the names of the documents are known."""
    places = {f"{folder}{name}": repos[name] for name in repos for folder in ("", "repos/", "kandinsky-community/")}
    places["Intel/neural-chat-7b-v3-1"] = tiny_repos / "neural-chat-7b-v3-1"
    places["openai/clip-vit-large-patch14"] = release_21 / "clip"
    places["Kandinsky_2.1"] = release_21
    furnish(tmp_path, places)
    jobs = [block.code for block in README if block.language == "json"]
    (tmp_path / JOBS).write_text(made_small("".join(jobs)))
    make_quick(monkeypatch)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    kandinsky_diffusers.unregister()  # what a block has registered goes
    kandinsky_diffusers.register()


@pytest.mark.parametrize("block", README, ids=lambda block: f"line {block.line}")
def test_a_block_of_the_readme_runs(block: Block, world: Path, goldens_21: GoldenFamily) -> None:
    run(block, world, goldens_21)


@pytest.mark.parametrize("name", CARDS)
def test_the_blocks_of_a_card_run_and_leave_what_they_save(
    name: str, repos: dict[str, Path], world: Path, goldens_21: GoldenFamily
) -> None:
    card = (repos[name] / "README.md").read_text(encoding="utf-8")
    found = blocks(card)
    assert "python" in [block.language for block in found]
    for block in found:
        run(block, world, goldens_21)
    for saved in re.findall(r'\.save\("(.+?)"\)', card):
        assert (world / saved).stat().st_mtime_ns > (world / "furnished").stat().st_mtime_ns


def run(block: Block, world: Path, goldens_21: GoldenFamily) -> None:
    if block.language == "python":
        run_python(block.code)
    elif block.language == "sh":
        for line in block.lines:
            run_line(line, world, goldens_21)
    elif block.language == "json":
        assert read_jobs(world / JOBS)
    else:
        assert block.language in NO_CODE or block.code.startswith("kandinsky_diffusers/\n")  # the map of the tree


def run_line(line: str, world: Path, goldens_21: GoldenFamily) -> None:
    """Ours is run; of others it is known what they are."""
    if f"{COMMAND} " in line:
        if f"{COMMAND} convert" in line:
            shutil.rmtree(world / "repos")  # it writes them
        settings = str(goldens_21.path / "hyperparameters.json")
        extra = {
            **dict.fromkeys(("convert", "verify"), ("--original-config", settings)),  # of sizes that are tiny
            "push": ("--dry-run",),  # there is no Hub
        }
        result = run_shell(line, extra)
        assert result.exit_code == 0, result.output
    elif line.startswith("make "):
        target = line.split()[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    else:
        assert line in ("pip install .", "hf auth login")
