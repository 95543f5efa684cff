"""The converted KandiSuperRes repos give what the original gave: modules, whole runs, and the refiner's tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from diffusers import AutoPipelineForImage2Image

from kandinsky_diffusers import KandiSuperResPipeline, KandiSuperResUNet
from kandinsky_diffusers.superres.refiner import Refiner
from tests.fixtures import Recorded
from tests.support.goldens import GoldenCase, GoldenFamily
from tests.support.parity import MODULE, SAMPLER, Replay, assert_close, assert_same_picture


OUTPUTS = {"out": "x4", "out_x2": "x2", "out_flash_x2": "flash-x2"}


def load(converted: Path, kind: str) -> Any:
    pipe = AutoPipelineForImage2Image.from_pretrained(converted / f"kandisuperres-{kind}")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def recorded_draws(case: GoldenCase) -> list[torch.Tensor]:
    draws = case.random()
    return [draws[name] for name in sorted(draws)]


def picture(case: GoldenCase) -> PIL.Image.Image:
    return PIL.Image.fromarray(case["image_in_uint8"].numpy())


def drawn_by(pipe: Any, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels after the last step, and the picture."""
    seen, denoise = [], KandiSuperResPipeline._denoise
    monkeypatch.setattr(
        KandiSuperResPipeline, "_denoise", lambda *given: seen.append(denoise(*given)) or seen[-1].clone()
    )
    return pipe(output_type="pt", **arguments).images, seen[0]


def levels(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes, cut off as in the original."""
    return (pixels[0].permute(1, 2, 0) * 255).floor()


@pytest.mark.parametrize("name", OUTPUTS)
@torch.no_grad()
def test_golden_unet(goldens_superres: GoldenFamily, recorded: Recorded, name: str) -> None:
    case = goldens_superres.case("sr_unet")
    unet: Any = KandiSuperResUNet.from_pretrained(recorded("superres") / f"kandisuperres-{OUTPUTS[name]}/unet")
    assert_close(unet(case["x"], case["t"], case["lowres_img"]).sample, case[name], MODULE)


@pytest.mark.parametrize("name", ["e2e_x4_single", "e2e_x4_multiwindow", "e2e_x2_single"])
def test_golden_enlargement(
    goldens_superres: GoldenFamily, recorded: Recorded, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With the seed alone, which is enough: the original's noise comes from a generator, too."""
    case = goldens_superres.case(name)
    pipe = load(recorded("superres"), f"x{case.parameters['scale']}")
    same = {key: value for key, value in case.parameters.items() if key in ("scale", "seed", "view_batch_size")}
    steps = case.parameters["steps"]
    image, pixels = drawn_by(pipe, monkeypatch, image=picture(case), num_inference_steps=steps, **same)
    assert pipe.scheduler.timesteps.tolist() == case["timesteps"].tolist()
    assert_close(pipe.scheduler.sigmas, case["sigmas"], MODULE, "sigmas")
    assert_close(pixels, case["sr"], SAMPLER)
    assert_same_picture(levels(image), case["image_uint8"])


@pytest.mark.parametrize("refine", [False, True], ids=["plain", "refined"])
def test_golden_flash(
    goldens_superres: GoldenFamily, recorded: Recorded, monkeypatch: pytest.MonkeyPatch, refine: bool
) -> None:
    case, pipe = goldens_superres.case("e2e_flash_x2"), load(recorded("superres"), "flash-x2")
    tiles = case.info["model"]["tile"]
    pipe.enable_movq_tiling(tiles["tile_sample_min_size"], tiles["tile_overlap_factor_dec"])
    latents = seen_by_refiner(monkeypatch)
    draws = Replay.into(monkeypatch, recorded_draws(case))
    image, pixels = drawn_by(pipe, monkeypatch, image=picture(case), refine=refine)
    assert_close(pixels, case["sr"], SAMPLER)
    if refine:
        assert not draws.draws
        assert_close(latents["encode"], case["sr_latent"], SAMPLER, "latents")
        assert_close(latents["redraw"], case["refined_latent"], SAMPLER, "refined latents")
    assert_same_picture(levels(image), case["image_uint8" if refine else "image_no_refine_uint8"])


def seen_by_refiner(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}

    def record(name: str) -> None:
        function = getattr(Refiner, name)

        def recording(self: Refiner, given: torch.Tensor) -> torch.Tensor:
            seen[name] = function(self, given)
            return seen[name]

        monkeypatch.setattr(Refiner, name, recording)

    record("encode")
    record("redraw")
    return seen


@torch.no_grad()
def test_golden_refiner(goldens_superres: GoldenFamily, recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    case, pipe = goldens_superres.case("refine_tiled"), load(recorded("superres"), "flash-x2")
    draws = Replay.into(monkeypatch, recorded_draws(case))
    parts = pipe.movq, pipe.refiner, pipe.refiner_scheduler, pipe.context
    refined = Refiner(*parts, device=torch.device("cpu")).redraw(case["latent"])
    assert not draws.draws
    assert_close(refined, case["out"], MODULE)
