"""How a decoder's repo finds its prior, and how the two act as one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UnCLIPScheduler
from diffusers.pipelines.pipeline_loading_utils import CONNECTED_PIPES_KEYS
from huggingface_hub.errors import EntryNotFoundError

from kandinsky_diffusers import KandinskyCombinedPipeline, KandinskyPriorPipeline, connected
from kandinsky_diffusers.connected import find_prior


DECODER, PRIOR = "kandinsky-2-1", "kandinsky-2-1-prior"
Build = Callable[..., Path]


def write_card(folder: Path, front_matter: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n\n# A decoder\n", encoding="utf-8")
    return folder


def write_index(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    return folder


# --------------------------------------------------------------------------------------------------------- which prior
@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("kandinsky-2-1", ["kandinsky-2-1-prior"]),
        ("kandinsky-2-1-inpaint", ["kandinsky-2-1-inpaint-prior", "kandinsky-2-1-prior"]),
        (
            "kandinsky-2-2-decoder-inpaint",
            ["kandinsky-2-2-decoder-inpaint-prior", "kandinsky-2-2-decoder-prior", "kandinsky-2-2-prior"],
        ),
        (
            "kandinsky-2-2-controlnet-depth",
            [f"kandinsky-2-2{x}-prior" for x in ("-controlnet-depth", "-controlnet", "")],
        ),
        ("mine", ["mine-prior"]),
    ],
)
def test_names_of_a_prior_from_the_nearest_to_the_versions(name: str, names: list[str], tmp_path: Path) -> None:
    decoder = tmp_path / name
    decoder.mkdir()
    for sibling in reversed(names):
        prior = write_index(tmp_path / sibling)
        assert find_prior(decoder) == str(prior)


def test_a_sibling_comes_before_the_card(tmp_path: Path) -> None:
    decoder = write_card(tmp_path / DECODER, "prior:\n- someone/prior")
    assert find_prior(decoder) == "someone/prior"
    (tmp_path / PRIOR).mkdir()
    assert find_prior(decoder) == "someone/prior", "an empty folder is no prior"
    (tmp_path / PRIOR / "model_index.json").write_text("{}")
    assert find_prior(decoder) == str(tmp_path / PRIOR)


@pytest.mark.parametrize(
    "written", ["prior: someone/prior", "prior: [someone/prior]", "prior:\n- someone/prior\n- other"]
)
def test_a_card_names_the_prior_by_itself_or_in_a_list(tmp_path: Path, written: str) -> None:
    assert find_prior(write_card(tmp_path / DECODER, written)) == "someone/prior"


@pytest.mark.parametrize("written", ["license: apache-2.0", "prior: []", "prior:"])
def test_a_decoder_without_a_prior_says_what_to_do(tmp_path: Path, written: str) -> None:
    with pytest.raises(ValueError, match=r"no prior.*`prior=`.*`prior_\.\.\.=`.*'kandinsky-2-1-prior'.*README\.md"):
        find_prior(write_card(tmp_path / DECODER, written))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("prior: {a: b}", "a dict"),
        ("prior: [[a]]", "a list"),
        ("prior: [x", "no YAML"),
        (f"prior: {'[' * 3000}", "no YAML"),
        ("a: &a [x]\nprior: *a", "aliases"),
        ("- prior", "a mapping is expected"),
        (f"a: {'b' * 70_000}\nprior: x", "longer than"),
    ],
)
def test_a_card_that_names_no_prior_in_plain_yaml_is_refused(tmp_path: Path, written: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_prior(write_card(tmp_path / DECODER, written))


def test_ten_lines_of_yaml_do_not_become_a_thousand_million(tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: y}"]
    lines += [f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(ValueError, match="aliases"):
        find_prior(write_card(tmp_path / DECODER, "\n".join(lines)))


@pytest.mark.parametrize("name", ["../../prior", "/srv/prior", "~/prior", "prior"])
def test_a_card_on_the_hub_names_a_repository_and_no_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = write_card(tmp_path / "card", f"prior: {name}") / "README.md"
    monkeypatch.setattr(connected, "hf_hub_download", lambda *arguments, **options: str(card))
    with pytest.raises(ValueError, match="the id of a Hub repository"):
        find_prior("someone/decoder")


def test_a_folder_may_be_given_in_any_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = write_index(tmp_path / PRIOR)
    (tmp_path / DECODER / "unet").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / DECODER)
    for given in (tmp_path / DECODER, str(tmp_path / DECODER), f"{tmp_path / DECODER}/", ".", "unet/.."):
        assert Path(find_prior(given)).samefile(prior), given


def test_a_prior_is_looked_for_beside_a_link_to_the_decoder(tmp_path: Path) -> None:
    """As downloads end up in a cache, whose folders are named by hashes."""
    prior = write_index(tmp_path / "models" / PRIOR)
    (tmp_path / "cache" / "3f2a").mkdir(parents=True)
    decoder = tmp_path / "models" / DECODER
    decoder.symlink_to(tmp_path / "cache" / "3f2a")
    assert Path(find_prior(decoder)).samefile(prior)


def test_the_card_of_a_decoder_on_the_hub_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(*arguments: Any, **options: Any) -> str:
        asked.append((arguments, options))
        return str(write_card(tmp_path / "card", "prior: [someone/prior]") / "README.md")

    monkeypatch.setattr(connected, "hf_hub_download", fetch)
    assert find_prior("someone/decoder", revision="v2", token="secret") == "someone/prior"
    assert asked == [(("someone/decoder", "README.md"), {"revision": "v2", "token": "secret"})]


def test_a_decoder_on_the_hub_without_a_card_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*arguments: Any, **options: Any) -> str:
        raise EntryNotFoundError("404")

    monkeypatch.setattr(connected, "hf_hub_download", fetch)
    with pytest.raises(ValueError, match=r"no prior.*`prior=`"):
        find_prior("someone/decoder")


# ---------------------------------------------------------------------------------------------------------- loading it
@pytest.fixture
def build(converted_21: Path, tmp_path: Path) -> Build:
    """Make a repo of links: a prior marked by a number in its scheduler (`mark_of` reads it), or a bare decoder."""

    def build(name: str, mark: float | None = None) -> Path:
        source = converted_21 / (DECODER if mark is None else PRIOR)
        (tmp_path / name).mkdir()
        for entry in source.iterdir():
            if entry.name not in ("README.md", "scheduler" if mark else ""):
                (tmp_path / name / entry.name).symlink_to(entry)
        if mark:
            scheduler = UnCLIPScheduler.from_pretrained(source, subfolder="scheduler", clip_sample_range=mark)
            scheduler.save_pretrained(tmp_path / name / "scheduler")
        return tmp_path / name

    return build


def mark_of(pipe: Any) -> float:
    return pipe.prior_scheduler.config.clip_sample_range


def test_the_order_in_which_a_prior_is_looked_for(build: Build, tmp_path: Path) -> None:
    decoder = build(DECODER)
    write_card(decoder, f"prior: ['{build('named-by-card', 2.0)}']")
    assert mark_of(KandinskyCombinedPipeline.from_pretrained(decoder)) == 2.0

    build(PRIOR, 3.0)
    pipe = KandinskyCombinedPipeline.from_pretrained(decoder)
    assert mark_of(pipe) == 3.0

    given = build("given", 4.0)
    assert mark_of(KandinskyCombinedPipeline.from_pretrained(decoder, prior=given)) == 4.0
    assert mark_of(KandinskyCombinedPipeline.from_pretrained(decoder, prior=str(given))) == 4.0
    scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    pipe = KandinskyCombinedPipeline.from_pretrained(decoder, prior=given, prior_scheduler=scheduler)
    assert mark_of(pipe) == 5.0
    assert mark_of(KandinskyCombinedPipeline.from_pretrained(decoder, prior_scheduler=scheduler)) == 5.0

    pipe.save_pretrained(tmp_path / "both")
    shutil.rmtree(tmp_path / PRIOR)
    shutil.rmtree(tmp_path / "named-by-card")
    build("both-prior", 6.0)
    assert mark_of(KandinskyCombinedPipeline.from_pretrained(tmp_path / "both")) == 5.0
    assert mark_of(KandinskyCombinedPipeline.from_pretrained(tmp_path / "both", prior=given)) == 4.0


def test_a_prior_that_is_given_is_taken_as_it_is(build: Build) -> None:
    prior = KandinskyPriorPipeline.from_pretrained(build("given", 2.0))
    decoder = build(DECODER)
    by_pipeline = KandinskyCombinedPipeline.from_pretrained(decoder, prior=prior)
    components = {f"prior_{name}": component for name, component in prior.components.items()}
    by_components = KandinskyCombinedPipeline.from_pretrained(decoder, **components)
    for pipe in (by_pipeline, by_components):
        assert all(pipe.components[name] is component for name, component in components.items())


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtypes_by_component_reach_the_prior(build: Build, name: str) -> None:
    build(PRIOR, 2.0)
    dtypes = {"unet": torch.float16, "prior_prior": torch.bfloat16, "default": torch.float64}
    pipe = KandinskyCombinedPipeline.from_pretrained(build(DECODER), **{name: dtypes})
    found = {part: getattr(pipe, part).dtype for part in ("unet", "movq", "prior_prior", "prior_text_encoder")}
    assert found == {
        "unet": torch.float16,
        "movq": torch.float64,
        "prior_prior": torch.bfloat16,
        "prior_text_encoder": torch.float64,
    }


def test_one_dtype_is_that_of_both(build: Build) -> None:
    build(PRIOR, 2.0)
    pipe = KandinskyCombinedPipeline.from_pretrained(build(DECODER), dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.prior_prior.dtype == torch.bfloat16


def test_a_variant_is_that_of_both(converted_21: Path, tmp_path: Path) -> None:
    for repo in (DECODER, PRIOR):
        pipe = DiffusionPipeline.from_pretrained(converted_21 / repo, dtype=torch.float16)
        pipe.save_pretrained(tmp_path / repo, variant="fp16")
    pipe = KandinskyCombinedPipeline.from_pretrained(tmp_path / DECODER, variant="fp16", dtype=torch.float16)
    assert pipe.prior_prior.dtype == torch.float16


def test_a_prior_that_cannot_be_loaded_is_named_with_its_decoder(build: Build, tmp_path: Path) -> None:
    decoder = build(DECODER)
    with pytest.raises(OSError, match=r"The prior '.*nowhere' of '.*kandinsky-2-1' cannot be loaded.*`prior=`"):
        KandinskyCombinedPipeline.from_pretrained(decoder, prior=tmp_path / "nowhere")
    prior = build(PRIOR, 2.0)
    (prior / "text_encoder").unlink()
    with pytest.raises(OSError, match=r"The prior '.*kandinsky-2-1-prior' .*cannot be loaded"):
        KandinskyCombinedPipeline.from_pretrained(decoder)


def test_loading_leaves_diffusers_own_way_as_it_was(build: Build) -> None:
    decoder = build(DECODER)
    with pytest.raises(ValueError, match="no prior"):
        KandinskyCombinedPipeline.from_pretrained(decoder)
    build(PRIOR, 2.0)
    KandinskyCombinedPipeline.from_pretrained(decoder)
    assert KandinskyCombinedPipeline._load_connected_pipes is True
    assert CONNECTED_PIPES_KEYS == ["prior"]


# ------------------------------------------------------------------------------------------------------- acting as one
def test_the_two_inner_pipelines_follow_the_outer_one(build: Build) -> None:
    build(PRIOR, 2.0)
    pipe = KandinskyCombinedPipeline.from_pretrained(build(DECODER))
    prior_pipe, decoder_pipe = pipe.prior_pipe, pipe.decoder_pipe
    pipe.prior_scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=7.0)
    pipe.scheduler = scheduler = type(pipe.scheduler)()
    pipe.exact_reference(True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.prior_pipe is prior_pipe
    assert pipe.decoder_pipe is decoder_pipe
    assert prior_pipe.scheduler is pipe.prior_scheduler
    assert prior_pipe.scheduler.config.clip_sample_range == 7.0
    assert decoder_pipe.scheduler is scheduler
    for inner in (prior_pipe, decoder_pipe):
        assert inner._exact_reference
        assert inner._progress_bar_config == {"disable": True}


def test_a_saved_pipeline_holds_both_and_names_stock_classes(build: Build, tmp_path: Path) -> None:
    build(PRIOR, 2.0)
    KandinskyCombinedPipeline.from_pretrained(build(DECODER)).save_pretrained(tmp_path / "both")
    index = json.loads((tmp_path / "both" / "model_index.json").read_text())
    assert index["_class_name"] == "KandinskyCombinedPipeline"
    assert index["prior_prior"] == ["diffusers", "PriorTransformer"]
    assert index["prior_scheduler"] == ["diffusers", "UnCLIPScheduler"]
    assert index["movq"] == ["diffusers", "VQModel"]
