"""Cards: front matter that the Hub takes, the sections that readers look for, and the cards of pushed pipelines."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

import kandinsky_diffusers
from kandinsky_diffusers.cards import pipeline_card, renamed, render_card, versions
from kandinsky_diffusers.conversion.releases import releases


REPOS = [repo for release in releases() for repo in release.repos]
NAMES = [repo.name for repo in REPOS]

# of the Hub's tasks (its filter `pipeline_tag`) those with pictures
TASKS = {
    "depth-estimation",
    "image-classification",
    "image-feature-extraction",
    "image-segmentation",
    "image-text-to-image",
    "image-to-image",
    "image-to-text",
    "keypoint-detection",
    "mask-generation",
    "object-detection",
    "text-to-image",
    "unconditional-image-generation",
}
LICENCES = {"apache-2.0", "mit", "openrail", "other"}
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual")  # ISO 639, or the Hub's own word
SECTIONS = [
    "Usage",
    "Limits",
    "Known deviations",
    "How it was checked",
    "Where this comes from",
    "Licence",
    "Citation",
]


def facts(name: str, **options: Any) -> dict[str, Any]:
    """Of a conversion that has not taken place."""
    return {
        "versions": versions(),
        "version": "0",
        "repository": name,
        "options": {"dtype": "auto", "variant": None, "layout": "split", **options},
        "sources": {},
        "components": {},
        "verification": None,
    }


def is_hub_id(name: str) -> bool:
    validate_repo_id(name)
    return name.count("/") == 1


@pytest.mark.parametrize("layout", ["split", "combined"])
@pytest.mark.parametrize("repo", REPOS, ids=NAMES)
def test_front_matter_is_what_the_hub_takes(repo: Any, layout: str) -> None:
    data = ModelCard(str(render_card(repo.name, facts(repo.name, layout=layout)))).data
    assert data.license in LICENCES
    assert data.library_name == "diffusers"
    assert data.pipeline_tag in TASKS
    assert data.language is not None
    assert LANGUAGE.fullmatch(data.language)
    assert isinstance(data.base_model, str)
    assert is_hub_id(data.base_model)
    assert data.get("base_model_relation", "adapter") in RELATIONS
    assert data.tags is not None
    assert "kandinsky" in data.tags
    assert len(set(data.tags)) == len(data.tags)
    named = data.get("prior")
    assert (named is not None) == (repo.joined is not None and layout == "split")
    assert named is None or [is_hub_id(name) for name in named] == [True]
    assert "layout" not in data


@pytest.mark.parametrize("name", NAMES)
def test_a_card_has_the_sections_that_readers_look_for(name: str) -> None:
    text = render_card(name, facts(name)).text
    sections = dict(re.findall(r"^## (.+)\n\n((?:(?!## ).*\n)+)", text, re.MULTILINE))
    assert list(sections) == SECTIONS
    assert all(text.strip() for text in sections.values())
    assert f'{name}"' in sections["Usage"]
    assert "@misc{" in sections["Citation"]
    assert "\n\n\n" not in text


def test_a_card_says_with_what_it_was_written_and_what_was_compared() -> None:
    compared = {"bit_identical_tensors": {"unet": 7, "movq": 5}, "loaded_and_run": "KandinskyPipeline"}
    text = render_card("kandinsky-2-1", {**facts("kandinsky-2-1"), "verification": compared}).text
    assert "7 of `unet`, 5 of `movq`" in text
    assert "`KandinskyPipeline` and run" in text
    assert f"diffusers {versions()['diffusers']}, transformers {versions()['transformers']}" in text
    assert "not verified" in render_card("kandinsky-2-1", facts("kandinsky-2-1")).text


def test_what_a_card_lacks_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-repository"):
        render_card("no-such-repository", facts("no-such-repository"))


# ------------------------------------------------------------------------------------------------ other ids


def test_another_namespace_reaches_examples_links_and_the_prior_but_not_the_source() -> None:
    names = ("kandinsky-2-2-prior", "kandinsky-2-2-decoder", "kandinsky-2-2-decoder-inpaint")
    ids = {name: f"me/{name}" for name in names}
    card = renamed(render_card(names[1], facts(names[1])), ids)
    assert card.data["prior"] == ["me/kandinsky-2-2-prior"]
    assert card.data.base_model == "kandinsky-community/kandinsky-2-2-decoder"
    assert '"me/kandinsky-2-2-decoder"' in card.text
    assert "kandinsky-community" not in card.text
    prior = renamed(render_card(names[0], facts(names[0])), ids).text
    assert "https://huggingface.co/me/kandinsky-2-2-decoder)" in prior
    assert "https://huggingface.co/me/kandinsky-2-2-decoder-inpaint)" in prior
    assert "https://huggingface.co/kandinsky-community/kandinsky-2-2-controlnet-depth)" in prior  # is not pushed


def test_a_folder_becomes_an_id_and_the_note_beside_it_goes() -> None:
    card = render_card("kandinsky-3-controlnet-hed", facts("kandinsky-3-controlnet-hed"))
    before = str(card)
    text = renamed(card, {"kandinsky-3-controlnet-hed": "me/controlnet", "kandinsky-3-1": "me/kandinsky-3-1"}).text
    assert '    "me/controlnet",\n' in text
    assert 'from_pretrained("me/kandinsky-3-1", controlnet' in text
    assert str(card) == before


# ------------------------------------------------------------------------------------------------ pipelines


@pytest.fixture(scope="module")
def decoder(converted_21: Path) -> Any:
    return kandinsky_diffusers.KandinskyPipeline.from_pretrained(converted_21 / "kandinsky-2-1")


@pytest.fixture(scope="module")
def combined(converted_21: Path) -> Any:
    return kandinsky_diffusers.KandinskyCombinedPipeline.from_pretrained(converted_21 / "kandinsky-2-1")


def from_nowhere(pipeline: Any) -> Any:
    return type(pipeline)(**pipeline.components)


def from_card(pipeline: Any, folder: Path, card: ModelCard | str) -> Any:
    """The pipeline as if loaded from a folder with that card."""
    folder.mkdir()
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    pipeline = from_nowhere(pipeline)
    pipeline.register_to_config(_name_or_path=folder)
    return pipeline


def test_the_card_of_a_converted_repository_is_kept_and_says_that_it_is_a_copy(
    decoder: Any, converted_21: Path
) -> None:
    folder = converted_21 / "kandinsky-2-1"
    card, before = pipeline_card(decoder, "me/mine"), ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == before.data.to_dict()
    assert re.findall(r"[0-9a-f]{64}", card.text) == re.findall(r"[0-9a-f]{64}", before.text)
    assert 'from_pretrained(\n    "me/mine",\n' in card.text
    copied = card.text.split("## This copy")[1]
    assert "`me/mine` was saved from a pipeline of class `KandinskyPipeline`" in copied
    assert "they were not checked again" in copied
    assert str(folder.parent) not in card.text


def test_a_pipeline_with_its_prior_inside_names_none_and_says_so(combined: Any) -> None:
    for pipeline in (combined, from_nowhere(combined)):
        card = pipeline_card(pipeline, "me/mine")
        assert "prior" not in card.data.to_dict()
        assert "in the folders `prior_*`" in card.text
        assert "AutoPipeline fetches" not in card.text


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("prior: [someone/a-prior]", ["someone/a-prior"]),
        ("prior: someone/a-prior", ["someone/a-prior"]),
        ("prior: [/a/folder/of/theirs]", ["kandinsky-community/kandinsky-2-1-prior"]),
        ("license: mit", ["kandinsky-community/kandinsky-2-1-prior"]),
    ],
)
def test_a_decoder_always_names_a_prior(decoder: Any, tmp_path: Path, written: str, named: list[str]) -> None:
    own = f"---\n{written}\ntags: [mine]\nmetrics: [fid]\n---\n# Mine\n\nMy own words.\n"
    card = pipeline_card(from_card(decoder, tmp_path / "repo", own), "me/mine")
    assert card.data["prior"] == named
    assert {"mine", "kandinsky", "kandinsky-2.1"} <= set(card.data.tags or ())
    assert (card.data.metrics, card.data.pipeline_tag) == (["fid"], "text-to-image")
    assert "My own words." in card.text
    assert card.data.license == ("mit" if "license" in written else None)


def test_without_a_card_it_is_that_of_such_models(decoder: Any, converted_21: Path) -> None:
    inpaint = kandinsky_diffusers.KandinskyInpaintPipeline.from_pretrained(converted_21 / "kandinsky-2-1-inpaint")
    prior = kandinsky_diffusers.KandinskyPriorPipeline.from_pretrained(converted_21 / "kandinsky-2-1-prior")
    titles = {}
    for pipeline in (decoder, inpaint, prior):
        card = pipeline_card(from_nowhere(pipeline), "me/mine")
        titles[re.findall(r"^# (.+)", card.text, re.MULTILINE)[0]] = card.data.get("prior")
        assert '"me/mine"' in card.text
        assert "SHA-256" not in card.text
        assert "Its files were not compared" in card.text
    named = ["kandinsky-community/kandinsky-2-1-prior"]
    assert titles == {"Kandinsky 2.1": named, "Kandinsky 2.1 inpainting": named, "Kandinsky 2.1 prior": None}


def test_a_copy_of_a_copy_has_one_such_section_and_the_new_id(decoder: Any, tmp_path: Path) -> None:
    first = pipeline_card(from_nowhere(decoder), "me/first")
    second = pipeline_card(from_card(decoder, tmp_path / "repo", first), "me/second", variant="fp16")
    assert second.text.count("## This copy") == 1
    assert "me/first" not in second.text
    assert '"me/second",\n    torch_dtype=torch.float16, variant="fp16",\n' in second.text


def test_a_class_of_the_users_own_has_to_be_registered_and_the_card_says_so(decoder: Any) -> None:
    class OilPainting(kandinsky_diffusers.KandinskyPipeline):
        pass

    assert "`kandinsky_diffusers.register_pipeline`" in pipeline_card(OilPainting(**decoder.components), "me/oil").text
    with pytest.raises(TypeError, match="`pipeline`"):
        pipeline_card(kandinsky_diffusers.KandinskyHEDDetector(), "me/mine")  # pyright: ignore[reportArgumentType]


def test_the_stub_is_told_of_where_it_is_and_not_of_a_copy_which_has_none(decoder: Any, tmp_path: Path) -> None:
    card = render_card("kandinsky-2-1", facts("kandinsky-2-1", stub=True))
    assert "## Without an import" in card.text
    copied = pipeline_card(from_card(decoder, tmp_path / "repo", card), "me/mine")
    assert "## Without an import" not in copied.text
    assert "## Limits" in copied.text


def test_the_source_on_the_hub_is_the_base_and_its_card_is_read_with_the_token(
    decoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text(
        '---\nlicense: mit\n---\n`from_pretrained("someone/model")`\n', encoding="utf-8"
    )
    asked = []

    def download(repo: str, name: str, token: Any) -> str:
        asked.append((repo, name, token))
        return str(tmp_path / name)

    pipeline = from_nowhere(decoder)
    pipeline.register_to_config(_name_or_path="someone/model")
    unreadable = pipeline_card(pipeline, "me/mine")  # tests have no network
    monkeypatch.setattr("kandinsky_diffusers.cards.hf_hub_download", download)
    card = pipeline_card(pipeline, "me/mine", token="a token")
    assert asked == [("someone/model", "README.md", "a token")]
    assert card.data.base_model == unreadable.data.base_model == "someone/model"
    assert (card.data.license, unreadable.data.license) == ("mit", "apache-2.0")
    assert '`from_pretrained("me/mine")`' in card.text
    assert "# Kandinsky 2.1\n" in unreadable.text
    assert "loaded from `someone/model`" in card.text


def pipeline_like(name: str, channels: int, scheduler: str, **parts: Any) -> Any:
    """A pipeline of a class, with no more than what tells of which kind it is."""
    unet = SimpleNamespace(config=SimpleNamespace(in_channels=channels))
    attributes = {
        "unet": unet,
        "scheduler": type(scheduler, (), {})(),
        "components": {"unet": unet, **parts},
        "config": {"scale": 4 if channels == 6 else None},
    }
    return object.__new__(type(name, (getattr(kandinsky_diffusers, name),), attributes))


@pytest.mark.parametrize(
    ("name", "channels", "scheduler", "title"),
    [
        ("KandinskyV20Img2ImgPipeline", 4, "DDIMScheduler", "Kandinsky 2.0"),
        ("KandinskyV20InpaintPipeline", 9, "DDIMScheduler", "Kandinsky 2.0 inpainting"),
        ("KandinskyInpaintPipeline", 4, "DDIMScheduler", "Kandinsky 2.1"),  # repaints with the model for drawing
        ("KandinskyV22Img2ImgPipeline", 4, "DDPMScheduler", "Kandinsky 2.2"),
        ("KandinskyV22InpaintCombinedPipeline", 9, "DDPMScheduler", "Kandinsky 2.2 inpainting"),
        ("KandinskyV22ControlnetImg2ImgPipeline", 8, "DDPMScheduler", "Kandinsky 2.2 ControlNet, depth"),
        ("Kandinsky3Pipeline", 4, "Kandinsky3DDPMScheduler", "Kandinsky 3.0"),
        ("Kandinsky3InpaintPipeline", 9, "Kandinsky3DDPMScheduler", "Kandinsky 3.0 inpainting"),
        ("Kandinsky3Img2ImgPipeline", 4, "Kandinsky3AncestralScheduler", "Kandinsky 3.1"),
        ("Kandinsky3InpaintPipeline", 9, "Kandinsky3AncestralScheduler", "Kandinsky 3.1 inpainting"),
        ("Kandinsky3Pipeline", 4, "Kandinsky3FlashScheduler", "Kandinsky 3.1 Flash"),
        ("KandiSuperResPipeline", 6, "DPMSolverMultistepScheduler", "KandiSuperRes x4"),
        ("KandiSuperResPipeline", 6, "Kandinsky3FlashScheduler", "KandiSuperRes Flash x2"),
    ],
)
def test_models_and_scheduler_tell_which_card_it_is(name: str, channels: int, scheduler: str, title: str) -> None:
    card = pipeline_card(pipeline_like(name, channels, scheduler), "me/mine")
    assert card.text.startswith(f"\n# {title}\n")
    assert '"me/mine"' in card.text


def test_with_a_controlnet_the_example_gives_it_edges(tmp_path: Path) -> None:
    pipeline = pipeline_like("Kandinsky3ControlNetPipeline", 4, "Kandinsky3AncestralScheduler", controlnet="a model")
    (tmp_path / "README.md").write_text(str(render_card("kandinsky-3-1", facts("kandinsky-3-1"))), encoding="utf-8")
    for source in (None, tmp_path):
        pipeline.config["_name_or_path"] = source
        card = pipeline_card(pipeline, "me/mine")
        assert "image=edges" in card.text
        assert "controlnet" in (card.data.tags or ())


def test_the_scale_tells_the_cards_of_super_resolution_apart() -> None:
    pipeline = pipeline_like("KandiSuperResPipeline", 6, "DPMSolverMultistepScheduler")
    pipeline.config["scale"] = 2
    assert "# KandiSuperRes x2\n" in pipeline_card(pipeline, "me/mine").text
