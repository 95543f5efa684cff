"""`generate`: many pictures from any repository, resumable, the same whatever the number of processes."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from typer.testing import CliRunner

from kandinsky_diffusers import KandinskyV22ControlnetCombinedPipeline
from kandinsky_diffusers.cli import app
from kandinsky_diffusers.generation import GenerationError, Job, Settings, generate, read_jobs
from kandinsky_diffusers.generation.drawing import batches_of, kind_of
from kandinsky_diffusers.generation.folder import Run, RunFolder, read_record
from kandinsky_diffusers.generation.jobs import numbered
from tests.fixtures import Built
from tests.support import tiny22
from tests.support.fake_hub import FakeHub
from tests.support.processes import PythonProcess


SIZE = (64, 48)
QUICK = {"steps": 2, "arguments": {"prior_num_inference_steps": 2}}
LAUNCH = """
import json, sys
from tests.support.launch import launch
result = launch(json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
"""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with something to start from."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(colours).save(folder / "cat.png")
    Image.fromarray(np.tri(SIZE[1], SIZE[0], dtype=np.uint8) * 255).save(folder / "mask.png")
    return folder


def write_jobs(path: Path, *jobs: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(job, ensure_ascii=False)}\n" for job in jobs), encoding="utf-8")
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------------------- jobs


def test_every_bad_line_is_reported_with_its_key_before_anything_is_loaded(pictures: Path, tmp_path: Path) -> None:
    bad = {
        '{"prompt": "a cat", "promt": "a cat"}': "promt",
        '{"prompt": 3}': "`prompt` is 3",
        '{"prompt": "a cat", "seed": -1}': "`seed` is -1",
        '{"prompt": "a cat", "seed": true}': "`seed` is True",
        '{"prompt": "a cat", "size": "0x64"}': "`size` is '0x64'",
        '{"prompt": "a cat", "image": "nowhere.png"}': "`image`",
        '{"prompt": "a cat", "image": "half.jpeg"}': "`image`",
        '{"prompt": "a cat", "mask": "mask.png"}': "`mask` is given without `image`",
        '{"negative": "a cat"}': "`prompt` is missing",
        '{"prompt": "a \\ud800 cat"}': "`prompt`",
        '["a cat"]': "no JSON object",
        "a cat": "no JSON",
    }
    Image.open(pictures / "cat.png").save(pictures / "half.jpeg")
    os.truncate(pictures / "half.jpeg", 1000)
    good = '{"prompt": "a cat", "image": "cat.png", "mask": "mask.png"}'
    (pictures / "jobs.jsonl").write_text("\n".join((good, *bad, "", good)))

    result = run(tmp_path / "no repository", tmp_path / "out", "-f", pictures / "jobs.jsonl")

    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("  line")]
    assert len(lines) == len(bad)
    for number, (line, problem) in enumerate(zip(lines, bad.values(), strict=True), 2):
        assert line.startswith(f"  line {number}: ")
        assert problem in line
    assert not (tmp_path / "out").exists()


def test_paths_are_relative_to_the_file_and_what_a_line_lacks_is_the_default(pictures: Path) -> None:
    path = write_jobs(
        pictures / "jobs.jsonl", {"image": "cat.png", "size": "8x8"}, {"prompt": "ё\u2028", "seed": 2**63 - 1}
    )
    cat = str(pictures / "cat.png")

    jobs = read_jobs(path, {"prompt": "a hat", "negative": "blur", "size": "64x32"})

    assert jobs == [
        Job("a hat", "blur", size="8x8", image=cat),
        Job("ё\u2028", "blur", 2**63 - 1, size="64x32"),
    ]
    assert [job.task for job in jobs] == ["image2image", "text2image"]
    assert Job("a hat", image=cat, mask=cat).task == "inpainting"


def test_seeds_are_those_given_or_follow_from_the_number() -> None:
    jobs = [Job("a"), Job("b", seed=70), Job("c")]

    assert [job.seed for job in numbered(jobs, seed=5)] == [5, 70, 7]
    assert [job.seed for job in numbered(jobs, seed=5, images_per_prompt=2)] == [5, 6, 70, 71, 9, 10]
    with pytest.raises(GenerationError, match="`seed`"):
        numbered([Job("a", seed=2**63 - 1)], images_per_prompt=2)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"strength": 1.5}, "strength"),
        ({"dtype": "int8"}, "dtype"),
        ({"arguments": {"prompt": "b"}}, "`prompt`"),
        ({"arguments": {"latents": np.zeros(3)}}, "`arguments`"),
    ],
)
def test_a_bad_setting_is_named(bad: dict[str, Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        Settings("repo", **bad)


# ------------------------------------------------------------------------------------------------ names and batches

texts = st.text(st.characters(codec="utf-8"))
seeds = st.integers(0, 2**63 - 1)
jobs = st.lists(
    st.builds(
        Job, prompt=texts, negative=st.none() | texts, seed=seeds, size=st.sampled_from([None, "64x64", "64x96"])
    ),
    max_size=30,
)


@settings(max_examples=40)
@example([Job("ж" * 300, seed=0)])
@given(jobs)
def test_file_names_are_distinct_and_stay_in_the_folder(jobs: list[Job]) -> None:
    names = Run(jobs, Settings("repo")).names

    assert len({name.lower() for name in names}) == len(jobs)
    assert names == sorted(names)
    for name, job in zip(names, jobs, strict=True):
        assert not set(name) & set('/\\:*?"<>|\0 \n')
        assert name[:5].isdigit()
        assert name.endswith(f"-{job.seed}.png")
        assert len(name.encode()) <= 255


@settings(max_examples=40)
@given(jobs, st.integers(1, 5), st.integers(1, 4))
def test_batches_hold_every_job_once_whoever_draws_them(jobs: list[Job], size: int, processes: int) -> None:
    batches = batches_of(jobs, size)

    shared = [number for index in range(processes) for batch in batches[index::processes] for number in batch.numbers]
    assert sorted(shared) == list(range(len(jobs)))
    alike = [(kind_of(job), job.size, job.negative is None) for job in jobs]
    for batch in batches:
        assert len({alike[number] for number in batch.numbers}) == 1
        assert 1 <= len(batch.numbers) <= size
    assert len(batches) == sum(math.ceil(jobs_of_a_kind / size) for jobs_of_a_kind in Counter(alike).values())


def test_pictures_whose_inputs_decide_on_their_size_share_a_batch_only_with_their_like(pictures: Path) -> None:
    on_its_side = Image.Exif()
    on_its_side[ExifTags.Base.Orientation] = 6
    Image.new("RGB", SIZE).save(pictures / "turned.jpeg", exif=on_its_side)
    cat, turned = (Job("a", image=str(pictures / name)) for name in ("cat.png", "turned.jpeg"))

    assert turned.inputs["image"].size == SIZE[::-1]
    assert [batch.numbers for batch in batches_of([cat, turned, cat, turned], 4)] == [[0, 2], [1, 3]]


# ------------------------------------------------------------------------------------------------------- the folder


def filled(path: Path, **settings: Any) -> RunFolder:
    """The folder of a run of two pictures, the first of which is there."""
    folder = RunFolder(path, Run([Job("a cat", seed=1), Job("a dog", seed=2)], Settings("repo", **settings)))
    folder.check(overwrite=True)
    folder.prepare()
    assert folder.save(0, Image.new("RGB", (4, 4)), {"job": {}})
    return folder


def test_a_picture_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    before = contents(tmp_path)

    assert not folder.save(0, Image.new("RGB", (8, 8)), {})

    assert contents(tmp_path) == before
    assert [folder.has(0), folder.has(1)] == [True, False]


def test_a_disk_that_is_full_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled(tmp_path)
    before = contents(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        folder.save(1, Image.new("RGB", (4, 4)), {})

    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["somebody.txt", "run.json", "00000-a-cat-1.png"])
def test_a_folder_that_no_run_has_made_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")

    result = run("repo", tmp_path, "a cat", "--seed", 1, "--overwrite")

    assert result.exit_code == 1
    assert "no run has made it" in result.stderr
    assert contents(tmp_path) == {name: b"{}"}


def test_a_file_in_the_place_of_a_picture_is_never_overwritten(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "00001-a-dog-2.png")

    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"00001-a-dog-2\.png"):
            folder.check(overwrite)


def test_another_run_is_replaced_only_when_told_and_other_files_stay(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    Image.new("RGB", (4, 4)).save(tmp_path / "00007-mine.png")
    (tmp_path / "my favourite.png").write_bytes((tmp_path / "00000-a-cat-1.png").read_bytes())
    before = contents(tmp_path)

    result = run("repo", tmp_path, "a cat", "a dog", "--steps", 3)

    assert result.exit_code == 1
    assert "`steps` None and not 3" in result.stderr
    assert contents(tmp_path) == before
    filled(tmp_path, steps=3)
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"run.json", "00000-a-cat-1.png"}


# ---------------------------------------------------------------------------------------------------------- drawing


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many as a machine with two cores has for one process alone; the others have one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_pictures_are_the_same_with_any_number_of_processes_and_after_a_kill(
    converted_21: Path, pictures: Path, tmp_path: Path, from_hub: PythonProcess
) -> None:
    cat, mask = {"image": "cat.png"}, {"mask": "mask.png"}
    path = write_jobs(
        pictures / "jobs.jsonl",
        {"prompt": "a red cat", "seed": 42},
        {"prompt": "../../ёж", "negative": "blur"},
        {"prompt": "a hat", **cat, "size": "64x32"},
        {"prompt": "a hat", **cat, **mask},
        {"prompt": "a dog"},
        {"prompt": "a cup", "negative": "blur"},
    )
    common = ["-f", path, "--size", "64x64", "--steps", 2, "--strength", 0.9, "--batch-size", 2]
    common += ["--set", "prior_num_inference_steps=2"]
    alone, three, resumed = tmp_path / "alone", tmp_path / "three", tmp_path / "resumed"

    def launch(output: Path, processes: int, files: int = -1) -> list[int]:
        arguments = ["generate", str(converted_21 / "kandinsky-2-1"), str(output), *map(str, common)]
        return from_hub.run(LAUNCH, json.dumps(arguments), processes, files)

    too_weak = run(converted_21 / "kandinsky-2-1", alone, *common, "--strength", 0.1)
    assert "picture 2: `strength` of 0.1 leaves none of 2 steps" in too_weak.stderr
    assert not list(alone.glob("*.png"))

    result = run(converted_21 / "kandinsky-2-1", alone, *common, "--offload", "model")
    assert result.exit_code == 0, result.output
    names = [
        "00000-a-red-cat-42.png",
        "00001-ёж-1.png",
        "00002-a-hat-2.png",
        "00003-a-hat-3.png",
        "00004-a-dog-4.png",
        "00005-a-cup-5.png",
    ]
    assert sorted(contents(alone)) == [*names, "manifest.jsonl", "run.json"]
    assert [line["file"] for line in manifest(alone)] == names
    assert [Image.open(alone / name).size for name in names[2:4]] == [(64, 32), (64, 64)]

    assert launch(three, 3) == [0, 0, 0]
    assert contents(three) == contents(alone)

    assert launch(resumed, 1, files=4) == [-signal.SIGKILL]  # run.json, a batch of two, and one of the next two
    there = {path.name: path.stat().st_ino for path in resumed.glob("*.png")}
    assert len(there) == 3
    assert launch(resumed, 2) == [0, 0]
    assert contents(resumed) == contents(alone)
    assert {name: (resumed / name).stat().st_ino for name in there} == there


def test_a_finished_run_does_not_load_the_repository_again(
    converted_superres: Path, pictures: Path, tmp_path: Path, hub: FakeHub, from_hub: PythonProcess
) -> None:
    """From the Hub: all of a run is drawn with the commit that it began with, which the record names."""
    hub.repos["someone/superres"] = converted_superres / "kandisuperres-x2"
    arguments = ["generate", "someone/superres", str(tmp_path / "out"), "--image", str(pictures / "cat.png")]

    assert from_hub.run(LAUNCH, json.dumps(arguments), 1, -1) == [0]
    commit = hub._commit("someone/superres")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    hub.repos.clear()
    hub.requests.clear()
    assert from_hub.run(LAUNCH, json.dumps(arguments), 1, -1) == [0]

    (line,) = manifest(tmp_path / "out")
    assert line["settings"]["revision"] == commit
    assert line["job"] == {"image": str(pictures / "cat.png"), "seed": 0}
    assert Image.open(tmp_path / "out" / line["file"]).size == (2 * SIZE[0], 2 * SIZE[1])
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert not hub.requests


def test_a_record_makes_the_picture_again(
    converted_31: Path, converted_controlnet: Path, pictures: Path, tmp_path: Path
) -> None:
    """All that has a hint goes through the ControlNet, the rest of the file does not."""
    path = write_jobs(
        pictures / "jobs.jsonl",
        {"prompt": "a room", "negative": "blur", "image": "cat.png", "mask": "mask.png", "hint": "cat.png"},
        {"prompt": "a room", "image": "cat.png"},
    )
    repo, control = converted_31 / "kandinsky-3-1", converted_controlnet
    result = run(repo, tmp_path / "out", "-f", path, "--strength", 0.5, "--controlnet", control, "--steps", 2)
    assert result.exit_code == 0, result.output

    for number, line in enumerate(manifest(tmp_path / "out")):
        again = tmp_path / f"again {number}"
        generate([Job(**line["job"])], Settings(**line["settings"]), again)
        (picture,) = again.glob("*.png")
        first = tmp_path / "out" / line["file"]
        assert np.array_equal(np.array(Image.open(picture)), np.array(Image.open(first)))
        assert {**read_record(first), "sha256": line["sha256"]} == line
        assert line["settings"]["guidance_scale"] == 3.0  # the repository's
        assert ("controlnet" in line["settings"]) == ("hint" in line["job"])
    assert [line["job"]["size"] for line in manifest(tmp_path / "out")] == ["64x64", "64x48"]  # the pipelines' own


def test_what_a_pipeline_does_not_take_is_refused(converted_superres: Path, pictures: Path, tmp_path: Path) -> None:
    repo, output = converted_superres / "kandisuperres-x2", tmp_path / "out"
    given = ("--image", pictures / "cat.png", "--size", "8x8", "--guidance-scale", 3)

    result = run(repo, output, "a cat", *given)

    assert result.exit_code == 1
    for name in ("guidance_scale", "prompt", "size"):
        assert f"`{name}` is given, and is none of the arguments of KandiSuperResPipeline" in result.stderr
    assert not list(output.glob("*.png"))
    assert run(repo, output, "--image", pictures / "cat.png").exit_code == 0  # nothing of the other run is in the way


def test_a_depth_map_is_for_the_pipelines_that_take_one(built: Built, pictures: Path, tmp_path: Path) -> None:
    repo = built("generation-depth", write_depth_repo)
    given = ("--size", "64x64", "--steps", 2, "--set", "prior_num_inference_steps=2", "--guidance-scale", 1)

    drawn = run(repo, tmp_path / "out", "a cat", "a dog", "--hint", pictures / "mask.png", "--batch-size", 2, *given)
    missing = run(repo, tmp_path / "other", "a cat", "--strength", 0.3, "--set", "stregnth=1", *given)

    assert drawn.exit_code == 0, drawn.output
    cat, dog = manifest(tmp_path / "out")
    assert cat["settings"]["guidance_scale"] == dog["settings"]["guidance_scale"] == 1.0
    generate([Job(**dog["job"])], Settings(**dog["settings"]), tmp_path / "dog alone")
    together, alone = tmp_path / "out" / dog["file"], next((tmp_path / "dog alone").glob("*.png"))
    assert np.abs(np.array(Image.open(together), np.int16) - np.array(Image.open(alone), np.int16)).max() <= 1
    assert missing.exit_code == 1
    for problem in ("`hint` is missing", "`strength` is given", "`stregnth` is given"):
        assert problem in missing.stderr
    assert not list((tmp_path / "other").glob("*.png"))


def write_depth_repo(folder: Path) -> None:
    KandinskyV22ControlnetCombinedPipeline(**tiny22.tiny_components("controlnet")).save_pretrained(folder)
