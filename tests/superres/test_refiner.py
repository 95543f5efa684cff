"""Flash with its refiner, as converted: memory, precision, offloading, loading, and what it leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image, DiffusionPipeline

from kandinsky_diffusers import Kandinsky3FlashScheduler, Kandinsky3UNet, KandiSuperResPipeline, MoVQ
from kandinsky_diffusers.superres import refiner
from tests.superres.conftest import picture
from tests.support.counting import calls_of, rows_of
from tests.support.parity import assert_close


MODELS = ("unet", "refiner", "movq", "context")


@pytest.fixture(scope="session")
def shared_pipe(converted_superres: Path) -> Any:
    return load(converted_superres)


@pytest.fixture
def pipe(shared_pipe: Any) -> Iterator[Any]:
    """A pipeline on components that all tests share."""
    settings = {name: shared_pipe.config[name] for name in ("scale", "size_multiple", "shrinks_input")}
    pipe: Any = KandiSuperResPipeline(**shared_pipe.components, **settings)
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    pipe.disable_movq_tiling()


@pytest.fixture
def own_pipe(converted_superres: Path) -> Any:
    """A pipeline whose models a test may change."""
    return load(converted_superres)


def load(repos: Path, **options: Any) -> Any:
    pipe = AutoPipelineForImage2Image.from_pretrained(repos / "kandisuperres-flash-x2", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, height: int = 32, width: int = 40, **changed: Any) -> np.ndarray:
    return pipe(picture(height, width), **{"num_inference_steps": 1, "output_type": "np", **changed}).images


def test_the_repo_loads_with_our_classes_and_its_settings(shared_pipe: Any) -> None:
    pipe = shared_pipe
    assert type(pipe) is KandiSuperResPipeline
    assert (type(pipe.refiner), type(pipe.movq)) == (Kandinsky3UNet, MoVQ)
    assert pipe.refiner_scheduler.config.timesteps == [229]
    assert (pipe.config.scale, pipe.config.size_multiple, pipe.config.shrinks_input) == (2, 32, True)


def test_what_the_refiner_sees_does_not_grow_with_the_picture(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents, and pixels before and after MoVQ; with small tiles, and more than one of each."""
    monkeypatch.setattr(refiner, "TILE", 16)
    monkeypatch.setattr(refiner, "STRIDE", 8)
    pipe.enable_movq_tiling(64)
    sides: dict[str, list[int]] = {"refiner": [], "encode": [], "decode": []}

    def watch(owner: Any, method: str, name: str) -> None:
        function = getattr(owner, method)

        def watched(sample: torch.Tensor, *rest: Any, **named: Any) -> Any:
            sides[name].append(max(sample.shape[-2:]))
            return function(sample, *rest, **named)

        monkeypatch.setattr(owner, method, watched)

    watch(pipe.refiner, "forward", "refiner")
    watch(pipe.movq, "encode", "encode")
    watch(pipe.movq, "decode", "decode")
    assert draw(pipe, 64, 96).shape == (1, 128, 192, 3)
    assert {name: max(seen) for name, seen in sides.items()} == {"refiner": 16, "encode": 64, "decode": 8}


def test_a_picture_no_larger_than_a_tile_is_decoded_whole(pipe: Any) -> None:
    whole = draw(pipe, 32, 32)
    pipe.enable_movq_tiling(64)
    assert_close(draw(pipe, 32, 32), whole, 1e-6)


@pytest.mark.parametrize("tiled", [False, True])
def test_the_movq_stays_as_the_user_has_set_it(pipe: Any, tiled: bool) -> None:
    if tiled:
        pipe.enable_movq_tiling(512, 0.5)
    before = {name: getattr(pipe.movq, name) for name in ("use_tiling", "tile_sample_min_size", "tile_overlap")}
    draw(pipe)
    assert before == {name: getattr(pipe.movq, name) for name in before}


def test_each_refined_picture_of_a_batch_is_the_one_made_alone(pipe: Any) -> None:
    pictures = [picture(33, 40, 1), picture(33, 40, 2)]
    quick = {"num_inference_steps": 1, "output_type": "pt"}
    together = pipe(pictures, generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)], **quick).images
    for image, one, seed in zip(together, pictures, (3, 4), strict=True):
        alone = pipe(one, generator=torch.Generator().manual_seed(seed), **quick).images[0]
        assert torch.equal(image, alone)


def test_pictures_below_a_multiple_of_32_are_refined_too(pipe: Any) -> None:
    assert draw(pipe, 5, 70).shape == (1, 10, 140, 3)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision_stays_near_single(
    pipe: Any, converted_superres: Path, dtype: torch.dtype, allowed: float
) -> None:
    """Mean difference of pixel values in [0, 1]."""
    half = load(converted_superres, dtype=dtype)
    assert [getattr(half, name).dtype for name in MODELS] == [dtype, dtype, torch.float32, dtype]
    assert np.abs(draw(half) - draw(pipe)).mean() <= allowed


def test_a_cast_leaves_the_movq_in_single_precision(own_pipe: Any) -> None:
    half = own_pipe.to(torch.float16)
    assert (half.refiner.dtype, half.movq.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("way", ["model", "sequential", "group"])
def test_offloading_draws_the_same(own_pipe: Any, tmp_path: Path, way: str) -> None:
    pipe = own_pipe
    before, device = draw(pipe), torch.device("cpu")
    if way == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif way == "sequential":
        for name in MODELS:
            component = getattr(pipe, name)
            cpu_offload(component, device, offload_buffers=len(component._parameters) > 0)
    else:
        options = {"offload_type": "block_level", "num_blocks_per_group": 1, "offload_to_disk_path": str(tmp_path)}
        pipe.enable_group_offload(onload_device=device, **options)
    assert_close(draw(pipe), before, 1e-4)
    assert_close(draw(pipe), before, 1e-4)


def test_what_is_saved_is_loaded_again(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    ours = {name: value for name, value in pipe.config.items() if not name.startswith("_")}
    assert {name: again.config[name] for name in ours} == ours
    assert_close(draw(again), draw(pipe), 0.0)


def test_from_pipe_keeps_settings_and_takes_the_refiner_of_kandinsky_3(pipe: Any, converted_31: Path) -> None:
    there = AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(there) is KandiSuperResPipeline
    assert (there.config.scale, there.config.shrinks_input) == (2, True)
    assert all(there.components[name] is component for name, component in pipe.components.items())

    flash = AutoPipelineForText2Image.from_pretrained(converted_31 / "kandinsky-3-1-flash")
    parts = {name: pipe.components[name] for name in ("unet", "scheduler", "refiner_scheduler", "context")}
    settings = {name: pipe.config[name] for name in ("scale", "size_multiple", "shrinks_input")}
    shared = KandiSuperResPipeline.from_pipe(flash, refiner=flash.unet, **parts, **settings)
    shared.set_progress_bar_config(disable=True)
    assert shared.movq is flash.movq
    assert shared.refiner is flash.unet
    assert_close(draw(shared), draw(pipe), 1e-6)


def test_more_can_be_redrawn(pipe: Any) -> None:
    before = draw(pipe)
    pipe.refiner_scheduler = Kandinsky3FlashScheduler(timesteps=[479, 229])
    assert np.abs(draw(pipe) - before).mean() > 1e-4


def test_a_part_of_the_refiner_is_not_enough(pipe: Any) -> None:
    pipe.register_modules(context=None)
    with pytest.raises(ValueError, match="`refine` is True, and the pipeline has no `context`"):
        draw(pipe)
    assert draw(pipe, refine=False).shape == (1, 64, 80, 3)


def test_the_refiner_reads_its_context_once_for_all_tiles(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refiner, "TILE", 8)
    monkeypatch.setattr(refiner, "STRIDE", 8)
    with calls_of(pipe.refiner.add_time_condition, "to_k") as calls, rows_of(pipe.refiner) as rows:
        draw(pipe, 64, 32)
    assert len(rows) > 1
    assert calls == {"to_k": {1}}
