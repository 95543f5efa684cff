"""Fitting a pipeline into a given memory: what is chosen, that it is so afterwards, and that pictures stay."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image
from torch.nn.utils import parametrize
from transformers import T5Config, T5EncoderModel

import kandinsky_diffusers
from kandinsky_diffusers import Kandinsky3UNet, fitting
from kandinsky_diffusers.fitting import as_bytes
from kandinsky_diffusers.memory_estimates import (
    RESERVE,
    Estimates,
    Rung,
    Setting,
    models_of,
    settings,
    sizes_of,
    uses_of,
)
from kandinsky_diffusers.memory_plan import MemoryPlan
from tests.support.parity import assert_close
from tests.support.tiny22 import tiny_components


CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SIZE = {"height": 64, "width": 64}
ALL = ("text_encoder", "unet", "movq")


def make_pipe(repo: Path) -> Any:
    """3.1, whose text encoder is the largest model by far, as published; its UNet has fewer levels and blocks."""
    pipe = AutoPipelineForText2Image.from_pretrained(repo)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    fewer = {"layers_per_block": 2, "block_out_channels": pipe.unet.config.block_out_channels[:2]}
    pipe.unet = Kandinsky3UNet.from_config({**pipe.unet.config, **fewer, "encoder_hid_dim": 256}).eval()
    sizes = {"vocab_size": pipe.text_encoder.config.vocab_size, "d_model": 256, "num_heads": 2, "d_kv": 16}
    config = T5Config(**sizes, d_ff=1024, num_layers=6, feed_forward_proj="gated-gelu")
    pipe.text_encoder = T5EncoderModel(config).eval()
    return pipe


@pytest.fixture(scope="module")
def original(converted_31: Path) -> Any:
    return make_pipe(converted_31 / "kandinsky-3-1")


@pytest.fixture
def pipe(original: Any) -> Any:
    """A pipeline of its own, to be fitted."""
    parts = {
        name: deepcopy(part) if isinstance(part, torch.nn.Module) else part
        for name, part in original.components.items()
    }
    pipe = type(original)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def before(original: Any) -> np.ndarray:
    return draw(original)


@pytest.fixture(scope="module")
def estimates(original: Any) -> Estimates:
    return Estimates(original, (64, 64), 2)


@pytest.fixture(scope="module")
def ladder(original: Any, estimates: Estimates) -> list[Rung]:
    """All settings on an accelerator and what they take, the fastest first."""
    return [Rung(setting, estimates.stages(setting)) for setting in settings(original, (64, 64), 2, CUDA)]


@pytest.fixture
def measured_once(estimates: Estimates, monkeypatch: pytest.MonkeyPatch) -> None:
    """All plans measure the same pipeline in the same size."""
    monkeypatch.setattr(fitting, "Estimates", lambda *arguments: estimates)


def plan_of(pipe: Any, setting: Setting, stages: tuple[Any, ...] = ()) -> MemoryPlan:
    """A plan for the CPU in the place of an accelerator."""
    return MemoryPlan(10**12, CPU, (64, 64), 1, sizes_of(models_of(pipe)), Rung(setting, stages))


def draw(pipe: Any) -> np.ndarray:
    options: Any = {**SIZE, "num_inference_steps": 1, "output_type": "np"}
    return pipe("a fox", generator=torch.Generator().manual_seed(0), **options).images


def cheapest(ladder: list[Rung], wanted: Callable[[Setting], bool]) -> int:
    return min(rung.peak for rung in ladder if wanted(rung.setting))


RUNGS: dict[str, tuple[Callable[[Setting], bool], float]] = {
    "as it is": (lambda s: not s.half and not s.offload and not s.slicing, 1e-5),
    "one picture at a time": (lambda s: not s.half and not s.offload, 1e-5),
    "half precision": (lambda s: s.half and not s.offload, 0.05),
    "model offload": (lambda s: s.offload and not s.streamed and not s.eight_bits, 0.05),
    "text encoder in 8 bits": (lambda s: bool(s.eight_bits), 0.2),
    "text encoder layer by layer": (lambda s: s.streamed == ("text_encoder",), 0.05),
    "all layer by layer": (lambda s: set(s.streamed) == set(ALL), 0.05),
}


# ------------------------------------------------------------------------------------------------ what is chosen


@pytest.mark.parametrize("kind", RUNGS)
@pytest.mark.usefixtures("measured_once")
def test_a_budget_for_a_rung_takes_it_and_draws_as_before(
    pipe: Any, before: np.ndarray, ladder: list[Rung], kind: str
) -> None:
    wanted, tolerance = RUNGS[kind]
    budget = cheapest(ladder, wanted)
    plan = pipe.plan_fit(budget, **SIZE, batch_size=2)
    assert wanted(plan.setting), plan
    assert plan.peak <= budget
    assert all(rung.peak > budget for rung in plan.rejected)
    replace(plan, device=CPU).apply(pipe)
    assert_is_applied(pipe, plan.setting)
    for _ in range(2 if plan.setting.streamed else 1):  # the first call must leave it so
        assert np.abs(draw(pipe) - before).mean() <= tolerance


def is_hooked(layer: torch.nn.Module) -> bool:
    return "group_offloading" in getattr(vars(layer).get("_diffusers_hook"), "hooks", {})


def assert_is_applied(pipe: Any, setting: Setting) -> None:
    half = torch.float16 if setting.half else torch.float32
    assert (pipe.unet.dtype, pipe.text_encoder.dtype, pipe.movq.dtype) == (half, half, torch.float32)
    assert pipe.text_encoder.encoder.block[0].layer[-1].DenseReluDense.wo.weight.dtype == torch.float32
    assert pipe.movq.use_slicing == setting.slicing
    whole = [name for name in ALL if setting.offload and name not in setting.streamed]
    assert [name for name in ALL if hasattr(getattr(pipe, name), "_hf_hook")] == whole
    hooked = {name for name in ALL for layer in getattr(pipe, name).modules() if is_hooked(layer)}
    assert hooked == set(setting.streamed)
    linear = [layer for layer in pipe.text_encoder.modules() if isinstance(layer, torch.nn.Linear)]
    assert all(parametrize.is_parametrized(layer) == bool(setting.eight_bits) for layer in linear)


@pytest.mark.usefixtures("measured_once")
def test_more_memory_never_means_a_slower_way(original: Any, ladder: list[Rung]) -> None:
    places = {rung.setting: place for place, rung in enumerate(ladder)}
    possible = sorted({rung.peak for rung in ladder})
    chosen = [places[original.plan_fit(budget, **SIZE, batch_size=2).setting] for budget in possible]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[-1] == 0


@pytest.mark.usefixtures("measured_once")
def test_what_is_not_allowed_is_not_chosen(original: Any, ladder: list[Rung]) -> None:
    wanted = RUNGS["text encoder in 8 bits"][0]
    plan = original.plan_fit(2 * cheapest(ladder, wanted) - RESERVE, **SIZE, batch_size=2, allow_half=False)
    assert not plan.setting.half
    plan = original.plan_fit(cheapest(ladder, wanted), **SIZE, batch_size=2, allow_quantization=False)
    assert plan.setting.streamed
    assert not plan.setting.eight_bits


@pytest.mark.usefixtures("measured_once")
def test_on_the_cpu_only_the_text_encoder_becomes_smaller(pipe: Any, before: np.ndarray, estimates: Estimates) -> None:
    plan = pipe.fit("2GB", **SIZE, batch_size=2, device="cpu")
    assert plan.setting == Setting()
    assert_close(draw(pipe), before, 1e-5)
    in_eight_bits = Setting(eight_bits=("text_encoder",))
    budget = Rung(in_eight_bits, estimates.stages(in_eight_bits)).peak
    plan = pipe.fit(budget, **SIZE, batch_size=2, device="cpu")
    assert plan.setting.eight_bits == ("text_encoder",)
    assert not plan.setting.half
    assert not plan.setting.offload


@pytest.mark.usefixtures("measured_once")
def test_where_nothing_fits_nothing_is_changed(pipe: Any, ladder: list[Rung]) -> None:
    least = min(ladder, key=lambda rung: rung.peak)
    with pytest.raises(MemoryError, match=rf"`budget` is .* the least is {least.peak / 1e9:.2f} GB.*needs most"):
        pipe.fit(least.peak - 1, **SIZE, batch_size=2)
    assert_is_applied(pipe, Setting())


def test_the_explanation_names_sizes_stages_choice_and_what_was_too_large(original: Any, ladder: list[Rung]) -> None:
    sizes = sizes_of(models_of(original))
    text = str(MemoryPlan(8 * 10**9, CUDA, (64, 64), 2, sizes, ladder[-1], tuple(ladder[:-1])))
    for part in (
        *ALL,
        "8.00 GB on cuda",
        "64 x 64",
        "layer by layer",
        str(ladder[0]),
        f"{ladder[-1].peak / 1e9:.2f} GB",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("budget", "count"),
    [("8GB", 8 * 10**9), ("8GiB", 8 * 2**30), ("512 mb", 512 * 10**6), ("1.5 KiB", 1536), (7, 7), ("9B", 9)],
)
def test_budgets(budget: Any, count: int) -> None:
    assert as_bytes(budget) == count


@pytest.mark.parametrize("budget", ["8", "8G", "GB", "-8GB", "0GB", 0, -1, "eight"])
def test_budgets_that_are_none(budget: Any) -> None:
    with pytest.raises(ValueError, match=r'`budget` is .*accepted is a size such as "8GB"'):
        as_bytes(budget)


@pytest.mark.parametrize("budget", [8e9, True, ("8GB",)])
def test_budgets_of_another_kind(budget: Any) -> None:
    with pytest.raises(TypeError, match="`budget` is"):
        as_bytes(budget)


def test_arguments_that_make_no_sense(pipe: Any) -> None:
    with pytest.raises(ValueError, match="`height` is 0"):
        pipe.fit("8GB", height=0)
    with pytest.raises(ValueError, match="`budget` is None, and cpu"):
        pipe.fit(device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="`device` is cuda"):
            pipe.fit()
    assert_is_applied(pipe, Setting())


# ------------------------------------------------------------------------------------------------ once more


def test_a_pipeline_can_be_fitted_again(pipe: Any, before: np.ndarray) -> None:
    for setting in (Setting(offload=True, streamed=ALL), Setting(offload=True, slicing=True, tile=512), Setting()):
        plan_of(pipe, setting).apply(pipe)
        assert_is_applied(pipe, setting)
        assert_close(draw(pipe), before, 1e-5)


def test_weights_on_disk_are_left_alone(pipe: Any, tmp_path: Path) -> None:
    pipe.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    plan = plan_of(pipe, Setting())
    with pytest.raises(ValueError, match="`text_encoder` are offloaded to disk"):
        plan.apply(pipe)


def test_a_failure_on_the_way_says_what_has_been_done(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipe.movq, "enable_tiling", fail)
    plan = plan_of(pipe, Setting(half=True, slicing=True, tile=512))
    with pytest.raises(RuntimeError, match=r"weights were cast.*8 bits\. out of memory"):
        plan.apply(pipe)


def test_a_plan_is_for_pipelines_with_these_models(original: Any) -> None:
    plan = replace(plan_of(original, Setting()), sizes={"unet": 1})
    with pytest.raises(ValueError, match="`pipe` has text_encoder, unet, movq; accepted is one with unet"):
        plan.apply(original)


# ------------------------------------------------------------------------------------------------ other pipelines


def test_a_combined_pipeline_is_fitted_with_its_prior() -> None:
    pipe = kandinsky_diffusers.KandinskyV22CombinedPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    options: Any = {**SIZE, "num_inference_steps": 1, "prior_num_inference_steps": 2, "output_type": "np"}
    before = pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images
    streamed = Setting(offload=True, streamed=("prior_image_encoder",))
    plan = plan_of(pipe, streamed, Estimates(pipe, (64, 64), 1).stages(streamed))
    names = [stage.component for stage in plan.chosen.stages]
    assert names == ["prior_text_encoder", "prior_prior", "prior_image_encoder", "unet", "movq"]
    plan.apply(pipe)
    for _ in range(2):
        after = pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images
        assert_close(after, before, 1e-5)


def test_estimates_follow_the_order_in_which_models_run() -> None:
    """Model offload sends a model away when the next of the chain comes, so what is loaded depends on the order."""
    pipe = kandinsky_diffusers.KandinskyV22Img2ImgCombinedPipeline(**tiny_components())
    sizes = {name: size + RESERVE for name, size in sizes_of(models_of(pipe)).items()}
    stages = {str(stage): stage for stage in Estimates(pipe, (64, 64), 1).stages(Setting(offload=True), limit=0)}
    assert stages["prior_prior"].peak == sizes["prior_prior"]  # the text encoder is gone
    assert stages["movq (encoding)"].peak > sizes["movq"]  # the image encoder, which comes before the UNet, is not
    assert stages["unet"].peak > stages["movq (encoding)"].peak - sizes["movq"] + RESERVE


@pytest.mark.parametrize("cls", ["KandinskyV22CombinedPipeline", "KandinskyV22Img2ImgCombinedPipeline"])
@pytest.mark.parametrize("negative", [None, "ugly"])
def test_models_run_in_the_order_of_which_the_pipeline_speaks(
    cls: str, negative: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = getattr(kandinsky_diffusers, cls)(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    used: list[str] = []
    for name, model in models_of(pipe).items():
        for function in ("forward", "encode", "decode"):
            if hasattr(model, function):
                monkeypatch.setattr(model, function, noted(getattr(model, function), used, name))
    image = {"image": torch.zeros(1, 3, 64, 64), "strength": 1.0} if "Img2Img" in cls else {}
    steps: Any = {"num_inference_steps": 1, "prior_num_inference_steps": 2}
    pipe("a cat", negative_prompt=negative, **image, **SIZE, **steps, output_type="pt")
    order = [name for name, following in pairwise([*used, ""]) if name != following]
    assert order in [[name for name, _ in way] for way in uses_of(pipe)]


def noted(function: Callable[..., Any], used: list[str], name: str) -> Callable[..., Any]:
    def noting(*arguments: Any, **options: Any) -> Any:
        used.append(name)
        return function(*arguments, **options)

    return noting
