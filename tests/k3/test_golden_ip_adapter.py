"""The converted IP-Adapter in the converted 3.1 gives what the original gave."""

from __future__ import annotations

import re
from typing import Any

import PIL.Image
import pytest
import torch
from diffusers import AutoPipelineForText2Image

from tests.fixtures import Recorded
from tests.k3.test_golden_pipelines import check, fork_arguments, fork_replay, fork_states
from tests.support.goldens import GoldenFamily, golden_family
from tests.support.parity import MODULE, assert_close


@pytest.fixture(scope="module")
def goldens() -> GoldenFamily:
    return golden_family("kandinsky-3-ip-adapter")


@pytest.fixture(scope="module")
def pipe(recorded: Recorded) -> Any:
    pipe = AutoPipelineForText2Image.from_pretrained(recorded("3.1") / "kandinsky-3-1")
    pipe.load_ip_adapter(recorded("3-ip-adapter") / "kandinsky-3-ip-adapter")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_golden_unet(goldens: GoldenFamily, pipe: Any) -> None:
    case, unet = goldens.case("ip_adapter_unet"), pipe.unet
    assert_close(unet.image_proj[0](case["image_embeds"]), case["image_tokens"], MODULE, "image tokens")
    given = (case["x"], case["t"], case["context"], case["context_mask"])
    shown = {"image_embeds": [case["image_embeds"]]}
    for scale, reference in ((1.0, "out"), (0.4, "out_weight_0_4")):
        pipe.set_ip_adapter_scale(scale)
        out = unet(*given, projected=True, added_cond_kwargs=shown).sample
        assert_close(out, case[reference], MODULE, reference)


@torch.no_grad()
def test_golden_attention(goldens: GoldenFamily, pipe: Any) -> None:
    case = goldens.case("ip_attention")
    side, level, block = re.findall(
        r"(up|down)_samples\.(\d+)\.resnet_attn_blocks\.(\d+)", case.info["model"]["module"]
    )[0]
    layer = pipe.unet.get_submodule(f"{side}_blocks.{level}.attentions.{int(block) + 1}.attention")
    pipe.set_ip_adapter_scale(case.parameters["img_weight"])
    context = torch.cat([case["context"], case["image_tokens"]], dim=1)
    mask = torch.zeros(case["context_mask"].shape).masked_fill(case["context_mask"] == 0, torch.finfo().min)
    assert_close(layer(case["x"], context, mask[:, None]), case["out"], MODULE)


@torch.no_grad()
def test_golden_text_and_two_pictures(goldens: GoldenFamily, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = goldens.case("e2e_ip_adapter")
    names = sorted((name for name in case.tensors if name.endswith("_in_uint8")), key=lambda name: (len(name), name))
    pictures = [PIL.Image.fromarray(case[name].numpy()) for name in names]
    embeds, no_embeds = pipe.encode_image(pictures)
    for number, own in enumerate(embeds, start=1):
        assert_close(own[None], case[f"image_embeds_{number}"], MODULE, f"embedding {number}")
    assert_close(no_embeds, case["zero_image_embeds"], MODULE, "embedding of zero pixels")

    draws = fork_replay(case, pipe, monkeypatch)
    states, mask = fork_states(pipe, case.parameters["prompt"])
    pipe.set_ip_adapter_scale(case.parameters["img_weight"])
    latents = pipe(
        ip_adapter_image=pictures,
        ip_adapter_weights=case.parameters["weights"],
        **fork_arguments(case, pipe, (torch.zeros_like(states), torch.zeros_like(mask))),
    ).images
    assert not draws.draws
    check(case, pipe, latents)
