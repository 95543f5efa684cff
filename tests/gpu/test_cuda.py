"""What only a GPU can show; `make test-gpu` runs it where there is one."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.pipelines.kandinsky2_2 import KandinskyV22Pipeline as StockKandinskyV22Pipeline
from torch._dynamo.utils import counters

from kandinsky_diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline
from kandinsky_diffusers.schedulers import KandinskyAncestralScheduler, KandinskyDDIMScheduler, KandinskyPNDMScheduler
from tests.support import tiny22


pytestmark = pytest.mark.gpu

STEPS = 6
SCHEDULERS = {
    "published": lambda config: DDPMScheduler.from_config(config),
    "DDIM": lambda config: DDIMScheduler.from_config(config),
    "ours: ancestral": lambda config: KandinskyAncestralScheduler(),
    "ours: DDIM": lambda config: KandinskyDDIMScheduler.from_config(config),
    "ours: PNDM": lambda config: KandinskyPNDMScheduler.from_config(config, skip_prk_steps=True),
}


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions round float32 to fewer bits by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return tiny22.decoder_components()


@pytest.fixture
def make(parts: dict[str, Any]) -> Callable[..., Any]:
    """Build a quiet pipeline on the GPU, with models of its own."""

    def build(cls: type = KandinskyV22Pipeline, **replaced: Any) -> Any:
        pipe = cls(**{**deepcopy(parts), **replaced}).to("cuda")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def draw(pipe: Any, seed: int = 0, side: int = 64, **changed: Any) -> torch.Tensor:
    width = pipe.unet.config.encoder_hid_dim
    rng = torch.Generator().manual_seed(seed)
    positive, negative = torch.randn(2, 1, width, generator=rng).to("cuda", pipe.unet.dtype)
    given: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "pt", **changed}
    generator = torch.Generator("cuda").manual_seed(seed)
    embeds = {"image_embeds": positive, "negative_image_embeds": negative}
    return pipe(**embeds, height=side, width=side, generator=generator, **given).images


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_step_waits_for_the_device(make: Any, parts: dict[str, Any], name: str) -> None:
    pipe = make(scheduler=SCHEDULERS[name](parts["scheduler"].config))

    def watch(pipe: Any, index: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        torch.cuda.set_sync_debug_mode("default" if index >= pipe.num_timesteps - 2 else "error")
        return {}

    try:
        draw(pipe, callback_on_step_end=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_step_of_the_prior_waits_for_the_device() -> None:
    pipe = KandinskyV22PriorPipeline(**tiny22.prior_components()).to("cuda")
    pipe.set_progress_bar_config(disable=True)

    def watch(pipe: Any, index: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        torch.cuda.set_sync_debug_mode("default" if index >= STEPS - 2 else "error")
        return {}

    try:
        pipe(
            "a cat",
            num_inference_steps=STEPS,
            generator=torch.Generator("cuda").manual_seed(0),
            callback_on_step_end=watch,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_recorded_pictures_are_the_same(make: Any) -> None:
    """Every size is drawn until it is replayed, and then with other seeds, embeddings and numbers of steps."""
    plain, pipe = make(), make().optimize(compile=False)
    for side in (64, 96, 64):
        for seed in range(3):
            steps = STEPS + seed
            expected = draw(plain, seed, side, num_inference_steps=steps)
            torch.testing.assert_close(draw(pipe, seed, side, num_inference_steps=steps), expected, rtol=0, atol=1e-4)
    pipe.optimize(False)
    torch.testing.assert_close(draw(pipe), draw(plain), rtol=0, atol=1e-5)


def test_compiled_pictures_are_the_same_and_nothing_is_compiled_again(make: Any) -> None:
    plain, pipe = make(), make().optimize()
    torch.testing.assert_close(draw(pipe), draw(plain), rtol=0, atol=1e-3)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    for seed in (1, 2):
        expected = draw(plain, seed, num_inference_steps=STEPS + 1)
        torch.testing.assert_close(draw(pipe, seed, num_inference_steps=STEPS + 1), expected, rtol=0, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == compiled


def test_lora_reaches_a_recorded_model(make: Any) -> None:
    from peft import LoraConfig

    def adapt(pipe: Any) -> None:
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))

    plain, pipe = make(), make().optimize(compile=False)
    before = [draw(pipe) for _ in range(3)][-1]
    for one in (plain, pipe):
        adapt(one)
    expected = draw(plain)
    assert (expected - before).abs().max() > 1e-3
    for _ in range(3):
        torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-4)


def test_decoding_never_takes_more_memory_than_stock(make: Any) -> None:
    def peak(movq: Any) -> int:
        latents = torch.randn(1, 4, 96, 96, device="cuda", dtype=movq.dtype)
        with torch.no_grad():
            movq.decode(latents, force_not_quantize=True)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            movq.decode(latents, force_not_quantize=True)
        return torch.cuda.max_memory_allocated() - before

    assert peak(make().movq) <= peak(make(StockKandinskyV22Pipeline).movq)


def test_model_offload_draws_the_same(make: Any) -> None:
    plain, pipe = make(), make().optimize()
    pipe.enable_model_cpu_offload()
    for _ in range(2):
        torch.testing.assert_close(draw(pipe), draw(plain), rtol=0, atol=1e-4)
