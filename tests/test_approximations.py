"""What is approximate when asked for: guidance in a part of the run, and steps that compute a part of the UNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kandinsky_diffusers
from kandinsky_diffusers.guidance_interval import guided_steps
from kandinsky_diffusers.optimization import PARTS
from kandinsky_diffusers.step_cache import CachedSteps
from tests.support.parity import relative_difference


SIDE = 64
STEPS = 3
GRADIENT = torch.linspace(0, 1, SIDE).expand(1, 3, SIDE, SIDE)
LEFT = torch.cat([torch.ones(1, 1, SIDE, SIDE // 2), torch.zeros(1, 1, SIDE, SIDE // 2)], dim=3)
DEPTH, INPAINTING = {"hint": GRADIENT}, {"image": GRADIENT, "mask_image": LEFT}

CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "2.0": ("converted_20", "kandinsky-2-0", "KandinskyV20Pipeline", {}),
    "2.1 inpainting": ("converted_21", "kandinsky-2-1-inpaint", "KandinskyInpaintPipeline", INPAINTING),
    "2.2 inpainting": ("converted_22", "kandinsky-2-2-decoder-inpaint", "KandinskyV22InpaintPipeline", INPAINTING),
    "2.2 depth": (
        "converted_22",
        "kandinsky-2-2-controlnet-depth",
        "KandinskyV22ControlnetPipeline",
        {"hint": GRADIENT},
    ),
    "3.1": ("converted_31", "kandinsky-3-1", "Kandinsky3Img2ImgPipeline", {"image": GRADIENT, "strength": 1.0}),
}

CACHED = ["2.1 inpainting", "2.2 depth", "3.1"]
LOWER_LEVELS = ("down_blocks.1", "up_blocks.0")


class Runs:
    """Draws with one pipeline, and keeps what its UNet is called with."""

    def __init__(self, pipe: Any, **arguments: Any):
        self.pipe, self.calls = pipe, []
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.register_forward_pre_hook(self._keep_call, with_kwargs=True)
        self.computed = dict.fromkeys((*LOWER_LEVELS, *self.first_level), 0)
        for name in self.computed:
            first = next(m for m in pipe.unet.get_submodule(name).modules() if isinstance(m, torch.nn.Conv2d))
            first.register_forward_hook(partial(self._count, name))
        rng = torch.Generator().manual_seed(1)
        width = pipe._embeds_width
        names = ("image_embeds", "negative_image_embeds") if width else ()
        embeds = {name: torch.randn(1, width, generator=rng) for name in names}
        text = {} if "22" in type(pipe).__name__ else {"prompt": "a red cat", "negative_prompt": "ugly"}
        common = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "output_type": "latent"}
        self.arguments = {**common, **embeds, **text, **arguments}

    def __call__(self, **changed: Any) -> list[torch.Tensor]:
        """The latents after each step."""
        self.calls, latents = [], []
        self.computed = dict.fromkeys(self.computed, 0)

        def keep(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            latents.append(tensors["latents"])
            return {}

        options = {"callback_on_step_end": keep, "generator": torch.Generator().manual_seed(0)}
        self.pipe(**{**self.arguments, **options, **changed})
        return latents

    @cached_property
    def plain(self) -> list[torch.Tensor]:
        """The latents of a run without approximations."""
        return self()

    @property
    def first_level(self) -> tuple[str, str]:
        return "down_blocks.0", f"up_blocks.{len(self.pipe.unet.up_blocks) - 1}"

    def _count(self, name: str, *_: Any) -> None:
        self.computed[name] += 1

    def _keep_call(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not kwargs.get("project"):
            self.calls.append({**dict(zip(("sample", "timestep"), args, strict=False)), **kwargs})

    @property
    def rows(self) -> list[int]:
        """How many rows the UNet has seen at each step."""
        return [len(call["sample"]) for call in self.calls]


def read_by_unet(call: dict[str, Any]) -> torch.Tensor:
    """One of the conditions that a UNet is called with."""
    states = call["encoder_hidden_states"]
    return call["added_cond_kwargs"]["image_embeds"] if states is None else states


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Callable[[str], Runs]:
    """`runs(case)`: those of a case, loaded once."""

    @cache
    def load(case: str) -> Runs:
        fixture, repo, name, arguments = CASES[case]
        pipe = getattr(kandinsky_diffusers, name).from_pretrained(request.getfixturevalue(fixture) / repo)
        return Runs(pipe, **arguments)

    return load


@pytest.mark.parametrize("case", CASES)
def test_only_the_conditional_half_runs_outside_of_the_interval(runs: Any, case: str) -> None:
    draw = runs(case)
    unguided = draw(guidance_scale=draw.pipe._scale_without_guidance)
    assert draw.rows == [1, 1, 1]
    between = draw(guidance_interval=(0.3, 0.7))
    assert draw.rows == [1, 2, 1]
    assert torch.equal(between[0], unguided[0])
    assert not torch.equal(between[1], unguided[1])
    first, guided, last = map(read_by_unet, draw.calls)
    assert first is last is not guided, "what is computed of conditions could not be kept"


@pytest.mark.parametrize("case", ["2.1 inpainting", "2.2 depth"])
def test_inside_of_the_interval_nothing_changes(runs: Any, case: str) -> None:
    draw = runs(case)
    early = draw(guidance_interval=(0.0, 0.7))
    assert draw.rows == [2, 2, 1]
    assert all(map(torch.equal, early[:2], draw.plain[:2]))
    assert not torch.equal(early[2], draw.plain[2])
    assert all(map(torch.equal, draw(guidance_interval=(0, 1)), draw.plain))


@pytest.mark.parametrize("case", ["2.1 inpainting", "3.1"])
def test_what_a_callback_swaps_counts_outside_of_the_interval_too(runs: Any, case: str) -> None:
    draw = runs(case)

    def swap(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return {"prompt_embeds": -tensors["prompt_embeds"]} if index == 1 else {}

    seen: list[torch.Tensor] = []
    named = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    unswapped = draw(guidance_interval=(0.0, 0.3))
    draw(guidance_interval=(0.0, 0.3), **named)
    assert draw.rows == [2, 1, 1]
    assert torch.equal(seen[1], unswapped[1])
    assert not torch.equal(seen[2], unswapped[2])


def test_regions_pictures_and_control_are_those_of_the_conditional_half(
    converted_31: Path, converted_controlnet: Path, ip_adapter: Path
) -> None:
    controlnet = kandinsky_diffusers.Kandinsky3ControlNetModel.from_pretrained(converted_controlnet)
    pipe = kandinsky_diffusers.Kandinsky3ControlNetPipeline.from_pretrained(
        converted_31 / "kandinsky-3-1", controlnet=controlnet
    )
    pipe.load_ip_adapter(ip_adapter)
    shown = {"regions": [("a blue dog", LEFT[0, 0])], "ip_adapter_image": GRADIENT}
    draw = Runs(pipe, image=GRADIENT, **shown, num_inference_steps=2)
    unguided = draw(guidance_scale=0.0)
    late = draw(guidance_interval=(0.5, 1.0))
    assert draw.rows == [1, 2]
    assert torch.equal(late[0], unguided[0])
    assert not torch.equal(late[1], unguided[1])


@pytest.mark.parametrize(
    ("interval", "error"),
    [
        ((0.5, 0.5), ValueError),
        ((0.8, 0.2), ValueError),
        ((-0.1, 1.0), ValueError),
        ((0.0, 1.1), ValueError),
        ((0.0, float("nan")), ValueError),
        ((0.2, 0.3), ValueError),  # none of three steps
        (0.5, TypeError),
        ((0.0, 0.5, 1.0), TypeError),
        (("0", "1"), TypeError),
        (None, TypeError),
    ],
)
def test_what_is_no_interval_is_refused_before_anything_runs(runs: Any, interval: Any, error: type) -> None:
    draw = runs("2.2 depth")
    with pytest.raises(error, match="`guidance_interval` is"):
        draw.pipe.check_call(**draw.arguments, guidance_interval=interval)


def test_a_combined_pipeline_hands_both_to_its_decoder(converted_22: Path) -> None:
    pipe = kandinsky_diffusers.KandinskyV22CombinedPipeline.from_pretrained(converted_22 / "kandinsky-2-2-decoder")
    pipe.set_progress_bar_config(disable=True)
    rows: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["sample"])), with_kwargs=True)
    quick = {"num_inference_steps": 3, "prior_num_inference_steps": 2, "height": SIDE, "width": SIDE}
    pipe("a cat", **quick, guidance_interval=(0.0, 0.34), output_type="latent")
    assert rows == [2, 1, 1]
    pipe.enable_step_cache()
    assert pipe.decoder_pipe.unet.is_cache_enabled


def test_which_steps_are_guided() -> None:
    assert guided_steps(50, (0.0, 1.0)) == range(50)
    assert guided_steps(50, (0.1, 0.58)) == range(5, 29)
    assert guided_steps(0, (0.0, 0.1)) == range(0)


# ---------------------------------------------------------------------------------------------------------- step cache
@pytest.fixture(params=CACHED)
def cached(request: pytest.FixtureRequest, runs: Any) -> Iterator[Runs]:
    draw = runs(request.param)
    assert draw.plain  # drawn before a cache is enabled
    yield draw
    draw.pipe.disable_step_cache()


def computed(draw: Runs) -> tuple[int, int]:
    """How many steps have computed the first level, and the lower ones."""
    (first,), (lower,) = ({draw.computed[name] for name in level} for level in (draw.first_level, LOWER_LEVELS))
    return first, lower


def test_the_lower_levels_are_computed_at_some_steps_only(cached: Runs) -> None:
    cached.pipe.enable_step_cache()
    near = cached()
    assert computed(cached) == (3, 2)
    assert torch.equal(near[0], cached.plain[0])
    assert not torch.equal(near[1], cached.plain[1])


def test_it_is_off_by_default_and_can_be_taken_back(runs: Any) -> None:
    draw = runs("2.2 depth")
    assert not draw.pipe.unet.is_cache_enabled
    draw.pipe.enable_step_cache()
    draw.pipe.disable_step_cache()
    draw.pipe.disable_step_cache()
    assert all(map(torch.equal, draw(), draw.plain))
    assert computed(draw) == (3, 3)


def test_a_step_from_the_cache_is_a_whole_one_where_nothing_has_changed(cached: Runs) -> None:
    cached(num_inference_steps=1)
    arguments, unet = cached.calls[0], cached.pipe.unet
    whole = unet(**arguments)[0]
    cached.pipe.enable_step_cache()
    steps = CachedSteps(unet)
    cached.computed = dict.fromkeys(cached.computed, 0)
    for _ in range(2):
        with steps.step(2, {}):
            assert torch.equal(unet(**arguments)[0], whole)
    assert computed(cached) == (2, 1)


@pytest.mark.parametrize(("interval", "whole"), [(2, [0, 2, 4, 6]), (3, [0, 2, 5])])
def test_every_so_many_steps_are_whole(runs: Any, interval: int, whole: list[int]) -> None:
    draw = runs("2.2 depth")
    draw.pipe.enable_step_cache(interval)
    seen: list[int] = []

    def count(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        seen.append(computed(draw)[1])
        return {}

    draw(num_inference_steps=7, callback_on_step_end=count)
    draw.pipe.disable_step_cache()
    assert [step for step, before in enumerate([0, *seen[:-1]]) if seen[step] > before] == whole


def test_a_step_is_whole_when_guidance_begins_or_a_callback_swaps_conditions(runs: Any) -> None:
    draw = runs("3.1")
    draw.pipe.enable_step_cache()
    seen: list[int] = []

    def swap(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(computed(draw)[1])
        return {"prompt_embeds": -tensors["prompt_embeds"]} if index == 2 else {}  # after 1 guided step from the cache

    named = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    draw(**named, guidance_interval=(0.25, 1.0), num_inference_steps=4)
    draw.pipe.disable_step_cache()
    assert draw.rows == [1, 2, 2, 2]
    assert seen == [1, 2, 2, 3]


def test_a_call_that_was_stopped_leaves_nothing_behind(runs: Any) -> None:
    draw = runs("2.2 depth")
    draw.pipe.enable_step_cache(3)
    whole = draw()

    def stop(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(callback_on_step_end=stop)
    again = draw()
    draw.pipe.disable_step_cache()
    assert all(map(torch.equal, again, whole))


def test_it_goes_on_under_group_offload_and_is_not_saved(converted_22: Path, tmp_path: Path) -> None:
    cls: Any = kandinsky_diffusers.KandinskyV22Pipeline
    draw = Runs(cls.from_pretrained(converted_22 / "kandinsky-2-2-decoder"))
    exact = draw()
    draw.pipe.enable_step_cache()
    near = draw()
    draw.pipe.save_pretrained(tmp_path)
    draw.pipe.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    assert relative_difference(draw()[-1], near[-1]) < 1e-4
    assert computed(draw) == (3, 2)
    assert all(map(torch.equal, Runs(cls.from_pretrained(tmp_path))(), exact))


def test_pipelines_that_share_a_unet_share_its_step_cache(runs: Any) -> None:
    draw = runs("2.2 depth")
    draw.pipe.enable_step_cache()
    other = kandinsky_diffusers.KandinskyV22ControlnetImg2ImgPipeline.from_pipe(draw.pipe)
    other.set_progress_bar_config(disable=True)
    draw.computed = dict.fromkeys(draw.computed, 0)
    other(**draw.arguments, image=GRADIENT, strength=1.0)
    other.disable_step_cache()
    assert computed(draw) == (3, 2)
    assert not draw.pipe.unet.is_cache_enabled


def test_order_1_goes_on_in_a_straight_line(runs: Any) -> None:
    draw = runs("2.2 depth")
    latents = []
    for order in (0, 1):
        draw.pipe.enable_step_cache(2, order)
        latents.append(draw(num_inference_steps=4))
        draw.pipe.disable_step_cache()
    constant, linear = latents
    assert all(map(torch.equal, linear[:3], constant[:3])), "there is one whole step to go on from"
    assert not torch.equal(linear[3], constant[3])


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"interval": 1}, ValueError, "`interval`"),
        ({"interval": 2.0}, TypeError, "`interval`"),
        ({"order": -1}, ValueError, "`order`"),
        ({"order": 3}, ValueError, "`order`"),
    ],
)
def test_what_it_cannot_do_is_refused(runs: Any, arguments: Any, error: type, named: str) -> None:
    pipe = runs("3.1").pipe
    with pytest.raises(error, match=named):
        pipe.enable_step_cache(**arguments)
    assert not pipe.unet.is_cache_enabled


@pytest.mark.parametrize(("case", "stays"), [("2.2 depth", False), ("3.1", True)])
def test_optimize_leaves_out_what_cannot_be_beside_it(runs: Any, case: str, stays: bool) -> None:
    """In 3.x the blocks that are compiled lie within those that are skipped."""
    pipe, own = runs(case).pipe, {"compile": {"backend": "eager"}}
    layers, graph = list(pipe.unet.modules()), next(part for part in PARTS if part.name == "cuda_graph")
    pipe.optimize(**own, channels_last=False, fuse_projections=False, cuda_graph=False)
    assert any(map(is_compiled, layers))
    pipe.enable_step_cache()
    assert any(map(is_compiled, layers)) is stays
    on_this_machine = {"compile": False, "recorder": SimpleNamespace(device_type="cpu")}
    assert "step cache" in (graph.why_not(pipe.unet, on_this_machine) or "")
    pipe.disable_step_cache()
    assert any(map(is_compiled, layers))
    assert graph.why_not(pipe.unet, on_this_machine) is None
    pipe.optimize(False)


def is_compiled(layer: Any) -> bool:
    return layer._compiled_call_impl is not None


def test_compiled_models_and_a_step_cache_are_one_too_many(converted_20: Path) -> None:
    pipe = kandinsky_diffusers.KandinskyV20Pipeline.from_pretrained(converted_20 / "kandinsky-2-0")
    pipe.enable_step_cache()
    with pytest.raises(ValueError, match="already been enabled"):
        pipe.enable_step_cache()
    pipe.unet.mid_block.resnets[0].compile(backend="eager")
    pipe.unet.down_blocks[1].resnets[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"`down_blocks.1.resnets.0`"):
        Runs(pipe)()
    pipe.disable_step_cache()
    with pytest.raises(ValueError, match="1 layers"):
        pipe.enable_step_cache()
    assert not pipe.unet.is_cache_enabled
    pipe.unet.compile(backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="compiled as a whole"):
        pipe.enable_step_cache()
