"""Every module of the converted 3.0 and 3.1 repos gives what the original gave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from kandinsky_diffusers.k3.text import context_of
from tests.fixtures import Recorded
from tests.support.goldens import GoldenFamily, golden_family
from tests.support.parity import MODULE, assert_close


REPOS = {
    ("3.0", ""): "kandinsky-3",
    ("3.0", "_inpainting"): "kandinsky-3-inpaint",
    ("3.1", ""): "kandinsky-3-1",
    ("3.1", "_flash"): "kandinsky-3-1-flash",
    ("3.1", "_inpainting"): "kandinsky-3-1-inpaint",
}
VERSIONS = ["3.0", "3.1"]


@pytest.fixture
def goldens(request: pytest.FixtureRequest, version: str) -> GoldenFamily:
    return request.getfixturevalue(f"goldens_{version.replace('.', '')}")


@pytest.fixture
def load(recorded: Recorded, version: str) -> Any:
    """Load the repo of a suffix of the golden's file names: `load("_flash")`."""
    folder = recorded(version)
    return lambda suffix="": DiffusionPipeline.from_pretrained(folder / REPOS[version, suffix])


@pytest.mark.parametrize(("version", "suffix"), REPOS)
@torch.no_grad()
def test_golden_unet(goldens: GoldenFamily, load: Any, version: str, suffix: str) -> None:
    case, unet = goldens.case(f"unet{suffix}"), load(suffix).unet
    out = unet(case["x"], case["t"], case["context"], case["context_mask"], projected=True).sample
    assert_close(out, case["out"], MODULE)
    assert_close(unet(project=True)[0, 0], case["null_embedding"], 0.0, "null embedding")


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_golden_movq(goldens: GoldenFamily, load: Any, version: str) -> None:
    case, movq = goldens.case("movq"), load().movq
    assert_close(movq.encode(case["image"]).latents, case["encoded"], MODULE, "latents")
    assert_close(movq.decode(case["latent"], force_not_quantize=True).sample, case["decoded"], MODULE, "pixels")


@torch.no_grad()
def test_golden_tiles(recorded: Recorded) -> None:
    """KandiSuperRes, whose MoVQ is that of 3.1, encodes and decodes large pictures in tiles."""
    case = golden_family("kandisuperres").case("movq_tiled")
    movq: Any = DiffusionPipeline.from_pretrained(recorded("3.1") / "kandinsky-3-1").movq
    settings = case.info["model"]
    movq.enable_tiling(settings["tile_sample_min_size"], settings["tile_overlap_factor_dec"])
    assert_close(movq.encode(case["image"]).latents, case["encoded"], MODULE, "latents")
    assert_close(movq.decode(case["latent"], force_not_quantize=True).sample, case["decoded"], MODULE, "pixels")


def seen_by_text_encoder(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and masks of all later calls of the text encoder."""
    calls, forward = [], pipe.text_encoder.forward

    def recording(ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        calls.append((ids, attention_mask))
        return forward(ids, attention_mask=attention_mask)

    monkeypatch.setattr(pipe.text_encoder, "forward", recording)
    return calls


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_golden_text(goldens: GoldenFamily, load: Any, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, pipe = goldens.case("text_encoder"), load()
    seen = seen_by_text_encoder(pipe, monkeypatch)
    text, negative_text = case.parameters["text"], case.parameters["negative_text"]
    states, negative_states, mask, negative_mask = pipe.encode_prompt(text, negative_prompt=negative_text)
    for (ids, full_mask), sign in zip(seen, ("", "negative_"), strict=True):
        assert torch.equal(ids[0], case[f"{sign}input_ids"])
        assert torch.equal(full_mask[0], case[f"{sign}attention_mask"])
    tokens = states.shape[1]
    assert_close(states, case["t5_last_hidden_state"][:, :tokens], MODULE, "states")
    for sign, own_states, own_mask in (("", states, mask), ("negative_", negative_states, negative_mask)):
        assert torch.equal(own_mask, case[f"{sign}context_mask"])
        context = context_of(pipe.unet, own_states, own_mask, 1)
        assert_close(context["context"], case[f"{sign}context"], MODULE, f"{sign}context")


@pytest.mark.parametrize(("version", "suffix"), [key for key in REPOS if key[1]])
@torch.no_grad()
def test_golden_text_of_other_repos(goldens: GoldenFamily, load: Any, version: str, suffix: str) -> None:
    case, pipe = goldens.case("text_encoder"), load(suffix)
    states, _, mask, _ = pipe.encode_prompt(case.parameters["text"], do_classifier_free_guidance=False)
    context = context_of(pipe.unet, states, mask, 1)["context"]
    assert_close(context, case[f"context{suffix}"], MODULE, "context")


@torch.no_grad()
def test_golden_text_of_a_batch(goldens_31: GoldenFamily, recorded: Recorded) -> None:
    case, pipe = goldens_31.case("text_encoder"), DiffusionPipeline.from_pretrained(recorded("3.1") / "kandinsky-3-1")
    states, _, mask, _ = pipe.encode_prompt([case.parameters["text"], ""], do_classifier_free_guidance=False)
    assert torch.equal(mask, case["batch2_context_mask"])
    assert_close(context_of(pipe.unet, states, mask, 2)["context"], case["batch2_context"], MODULE, "context")


@torch.no_grad()
def test_golden_unet_of_the_fork(goldens_31: GoldenFamily, recorded: Recorded) -> None:
    """The UNet of 3.1 as the diffusers-based code base has it, where it does not use an image mask."""
    case = goldens_31.case("fork_unet")
    unet: Any = DiffusionPipeline.from_pretrained(recorded("3.1") / "kandinsky-3-1").unet
    out = unet(case["x"], case["t"], case["context"], case["context_mask"], projected=True).sample
    assert_close(out, case["out"], MODULE)
    context = unet(project=True, encoder_hidden_states=case["raw_embeds"])
    context[1] = 0.0  # the unconditional sample
    out = unet(case["x"], case["t"], context, case["context_mask"], projected=True).sample
    assert_close(out, case["out_use_projections"], MODULE, "with projections")
