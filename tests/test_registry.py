"""Registration: diffusers finds our classes, gives them back unharmed, and downstream classes join in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from diffusers.pipelines import auto_pipeline, kandinsky, kandinsky2_2, kandinsky3, pipeline_loading_utils

import kandinsky_diffusers
from kandinsky_diffusers import KandinskyAncestralScheduler, KandinskyPipeline, registry
from tests.support.processes import PythonProcess


AUTO = {
    "text2image": AutoPipelineForText2Image,
    "image2image": AutoPipelineForImage2Image,
    "inpainting": AutoPipelineForInpainting,
}
STOCK_FAMILIES = {"kandinsky": kandinsky}
STOCK = (kandinsky, kandinsky2_2, kandinsky3)
NEW = {
    "KandinskyV20Img2ImgPipeline",
    "KandinskyV20InpaintPipeline",
    "KandinskyV20Pipeline",
    "KandinskyV22ControlnetCombinedPipeline",
    "KandinskyV22ControlnetImg2ImgCombinedPipeline",
    "Kandinsky3ControlNetImg2ImgPipeline",
    "Kandinsky3ControlNetInpaintPipeline",
    "Kandinsky3ControlNetPipeline",
    "Kandinsky3InpaintPipeline",
    "KandiSuperResPipeline",
}
PIPELINES = [cls for family in registry.FAMILIES.values() for entry in family.values() for cls in entry if cls]


def snapshot() -> dict[str, Any]:
    tables, _, loadable, importable = registry._private_parts()
    listed = {
        f"{task} {column}": list(table.items()) for task, pair in tables.items() for column, table in enumerate(pair)
    }
    ours = (*PIPELINES, *registry.OTHER_PIPELINES, *registry.COMPONENTS)
    attributes = {cls.__name__: vars(diffusers).get(cls.__name__) for cls in ours}
    attributes["pipelines"] = vars(diffusers.pipelines).get(registry.LIBRARY)
    return {**listed, "loadable": list(loadable), "importable": list(importable), "attributes": attributes}


@pytest.fixture
def fresh_registration() -> Iterator[None]:
    """Whatever a test registers is gone after it."""
    yield
    registry.unregister()
    registry.register()


@pytest.mark.parametrize("cls", [*PIPELINES, *registry.OTHER_PIPELINES], ids=lambda cls: cls.__name__)
def test_a_pipeline_with_a_stock_name_is_a_stock_pipeline(cls: type) -> None:
    stock = next((getattr(of, cls.__name__) for of in STOCK if hasattr(of, cls.__name__)), None)
    if stock is None:
        assert cls.__name__ in NEW
    else:
        assert issubclass(cls, stock)
        assert cls is not stock
    assert getattr(diffusers, cls.__name__) is cls
    assert getattr(kandinsky_diffusers, cls.__name__) is cls


def test_registering_twice_is_once_and_unregistering_restores(fresh_registration: None) -> None:
    registry.unregister()
    before = snapshot()
    registry.register()
    during = snapshot()
    registry.register()
    assert snapshot() == during != before
    registry.unregister()
    assert snapshot() == before
    registry.unregister()
    assert snapshot() == before
    assert auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["kandinsky"] is kandinsky.KandinskyCombinedPipeline
    assert diffusers.KandinskyPipeline is kandinsky.KandinskyPipeline


def test_importing_and_unregistering_leaves_diffusers_as_it_was(stock: PythonProcess) -> None:
    code = """
import diffusers
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils
def state():
    tables = [list(table.items()) for table in auto_pipeline.SUPPORTED_TASKS_MAPPINGS]
    return tables, dict(pipeline_loading_utils.LOADABLE_CLASSES), dict(pipeline_loading_utils.ALL_IMPORTABLE_CLASSES)
before, stock = state(), diffusers.KandinskyPipeline
import kandinsky_diffusers
assert state() != before and diffusers.KandinskyPipeline is not stock
kandinsky_diffusers.unregister()
assert state() == before and diffusers.KandinskyPipeline is stock
assert not hasattr(diffusers, "MoVQ")
"""
    stock.run_in_child(code)


@pytest.mark.parametrize(
    ("task", "repo"),
    [("text2image", "kandinsky-2-1"), ("image2image", "kandinsky-2-1"), ("inpainting", "kandinsky-2-1-inpaint")],
)
def test_auto_pipelines_load_our_combined_pipelines(converted_21: Path, task: str, repo: str) -> None:
    pipe = AUTO[task].from_pretrained(converted_21 / repo)
    assert type(pipe) is registry.FAMILIES["kandinsky"][task][0]


@pytest.mark.parametrize(
    ("repo", "name"),
    [
        ("kandinsky-2-1", "KandinskyPipeline"),
        ("kandinsky-2-1-inpaint", "KandinskyInpaintPipeline"),
        ("kandinsky-2-1-prior", "KandinskyPriorPipeline"),
    ],
)
def test_diffusion_pipeline_loads_our_classes(converted_21: Path, repo: str, name: str) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(converted_21 / repo)
    assert type(pipe) is getattr(kandinsky_diffusers, name)
    assert isinstance(pipe, getattr(kandinsky, name))


def test_from_pipe_leads_between_tasks_with_the_same_components(converted_21: Path) -> None:
    pipe = AutoPipelineForText2Image.from_pretrained(converted_21 / "kandinsky-2-1")
    for task in ("image2image", "inpainting", "text2image"):
        other = AUTO[task].from_pipe(pipe)
        assert type(other) is registry.FAMILIES["kandinsky"][task][0]
        assert all(other.components[name] is component for name, component in pipe.components.items())
        pipe = other


LOAD_IN_STOCK = """
import sys, diffusers
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipe).__module__.startswith("diffusers."), type(pipe)
assert all(not type(part).__module__.startswith("kandinsky_diffusers") for part in pipe.components.values())
"""


@pytest.mark.parametrize("repo", ["kandinsky-2-1", "kandinsky-2-1-inpaint", "kandinsky-2-1-prior"])
def test_what_is_saved_loads_without_this_package(
    converted_21: Path, tmp_path: Path, stock: PythonProcess, repo: str
) -> None:
    diffusers.DiffusionPipeline.from_pretrained(converted_21 / repo).save_pretrained(tmp_path / repo)
    stock.run(LOAD_IN_STOCK, tmp_path / repo)


def test_side_schedulers_survive_saving(converted_21: Path, tmp_path: Path) -> None:
    pipe = AutoPipelineForText2Image.from_pretrained(converted_21 / "kandinsky-2-1")
    pipe.save_pretrained(tmp_path / "combined")
    pipe.decoder_pipe.save_pretrained(tmp_path / "decoder")
    for repo in ("combined", "decoder"):
        scheduler = KandinskyAncestralScheduler.from_pretrained(tmp_path / repo, subfolder="ancestral_scheduler")
        assert scheduler.config.beta_end == 0.012
        assert diffusers.DDPMScheduler.from_pretrained(tmp_path / repo, subfolder="ddpm_scheduler")


def test_a_component_that_stock_lacks_is_named_as_ours_and_loads(converted_21: Path, tmp_path: Path) -> None:
    repo = converted_21 / "kandinsky-2-1"
    scheduler = KandinskyAncestralScheduler.from_pretrained(repo, subfolder="ancestral_scheduler")
    KandinskyPipeline.from_pretrained(repo, scheduler=scheduler).save_pretrained(tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert pipe.config["scheduler"] == ("kandinsky_diffusers", "KandinskyAncestralScheduler")
    assert type(pipe.scheduler) is KandinskyAncestralScheduler


class OilPainting(KandinskyPipeline):
    """A user's subclass, as in the README."""

    def encode_prompt(self, prompt: Any, **kwargs: Any) -> Any:
        return super().encode_prompt(f"oil painting of {prompt}", **kwargs)


def embeds(pipe: Any) -> dict[str, torch.Tensor]:
    width = pipe.unet.config.encoder_hid_dim and pipe.unet.add_embedding.image_proj.in_features
    return {"image_embeds": torch.ones(1, width), "negative_image_embeds": torch.zeros(1, width)}


def test_a_users_subclass_joins_in(converted_21: Path, tmp_path: Path, fresh_registration: None) -> None:
    kandinsky_diffusers.register_pipeline(OilPainting, tasks="text2image", key="oil-painting")
    pipe = OilPainting.from_pretrained(converted_21 / "kandinsky-2-1")
    pipe.save_pretrained(tmp_path)

    again = AutoPipelineForText2Image.from_pretrained(tmp_path)
    assert type(again) is OilPainting
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is OilPainting
    assert type(AutoPipelineForText2Image.from_pipe(again)) is OilPainting
    other = AutoPipelineForImage2Image.from_pipe(again)
    assert type(other) is kandinsky_diffusers.KandinskyImg2ImgPipeline
    assert other.unet is again.unet

    arguments = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent", **embeds(again)}
    seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
    painted = again("a cat", generator=seeded[0], **arguments).images
    plain = KandinskyPipeline.from_pipe(again)("oil painting of a cat", generator=seeded[1], **arguments).images
    torch.testing.assert_close(painted, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("auto", "name"),
    [(AutoPipelineForText2Image, "kandinsky-2-1"), (AutoPipelineForInpainting, "kandinsky-2-1-inpaint")],
)
def test_a_users_decoder_does_not_stand_for_the_pipelines_with_a_prior(
    auto: Any, name: str, converted_21: Path, fresh_registration: None
) -> None:
    kandinsky_diffusers.register_pipeline(OilPainting, tasks="image2image", key="oil-painting")
    assert "prior_prior" in auto.from_pretrained(converted_21 / name).components


@pytest.mark.parametrize(
    ("cls", "tasks", "key", "error"),
    [
        (OilPainting, "text2video", "oil", "`tasks`"),
        (OilPainting, (), "oil", "`tasks`"),
        (OilPainting, "text2image", "stable-diffusion", "`key`"),
        (torch.nn.Module, "text2image", "oil", "no subclass"),
        (type("MoVQ", (KandinskyPipeline,), {}), "text2image", "oil", "name of its own"),
    ],
)
def test_wrong_registrations_are_refused(cls: type, tasks: Any, key: str, error: str) -> None:
    before = snapshot()
    with pytest.raises((ValueError, TypeError), match=error):
        kandinsky_diffusers.register_pipeline(cls, tasks=tasks, key=key)
    assert snapshot() == before


def test_an_unknown_diffusers_is_refused(monkeypatch: pytest.MonkeyPatch, fresh_registration: None) -> None:
    registry.unregister()
    with monkeypatch.context() as patch:
        patch.setattr(diffusers, "__version__", "9.0.0")
        with pytest.raises(kandinsky_diffusers.UnsupportedDiffusersError, match=r"supports diffusers .*9\.0\.0"):
            registry.register()


def test_a_changed_diffusers_is_refused(monkeypatch: pytest.MonkeyPatch, fresh_registration: None) -> None:
    registry.unregister()
    before = snapshot()
    with monkeypatch.context() as patch:
        patch.delattr(auto_pipeline, "_AUTO_INPAINT_DECODER_PIPELINES_MAPPING")
        with pytest.raises(kandinsky_diffusers.UnsupportedDiffusersError, match="_AUTO_INPAINT_DECODER"):
            registry.register()
    assert snapshot() == before


class TestPrivateFactsOfDiffusers:
    """What the registry relies on, and no document promises; a failure here names what a release has changed."""

    def test_tables_map_keys_to_classes(self) -> None:
        tables, *_ = registry._private_parts()
        for pair in tables.values():
            for table in pair:
                assert table in auto_pipeline.SUPPORTED_TASKS_MAPPINGS
                assert all(isinstance(key, str) and isinstance(cls, type) for key, cls in table.items())

    def test_classes_are_found_by_name_and_then_by_key(self) -> None:
        assert auto_pipeline._get_model("KandinskyPipeline") == "kandinsky"
        mapping = auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING
        assert auto_pipeline._get_task_class(mapping, "KandinskyPipeline") is mapping["kandinsky"]

    def test_stock_families_have_the_keys_that_we_replace(self, fresh_registration: None) -> None:
        registry.unregister()
        for key, module in STOCK_FAMILIES.items():
            for task, pair in registry._private_parts()[0].items():
                for table, ours in zip(pair, registry.FAMILIES[key][task], strict=True):
                    assert ours is None or table[key] is getattr(module, ours.__name__), (key, task)

    def test_the_index_names_a_loadable_library_by_its_package(self) -> None:
        scheduler = KandinskyAncestralScheduler()
        recorded = pipeline_loading_utils._fetch_class_library_tuple(scheduler)
        assert recorded == ("kandinsky_diffusers", "KandinskyAncestralScheduler")

    def test_pipelines_say_whether_they_load_a_connected_one(self) -> None:
        assert diffusers.DiffusionPipeline._load_connected_pipes is False
        assert kandinsky.KandinskyCombinedPipeline._load_connected_pipes is True
        assert pipeline_loading_utils.CONNECTED_PIPES_KEYS == ["prior"]

    def test_pipelines_are_looked_up_as_attributes_of_diffusers(self) -> None:
        config = {"_class_name": "KandinskyPipeline"}
        assert pipeline_loading_utils._get_pipeline_class(diffusers.DiffusionPipeline, config) is KandinskyPipeline
