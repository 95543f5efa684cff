"""Each converted 2.1 model gives what the original gave, and so do the tokenizers, tables and masks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline

from kandinsky_diffusers.images import grow_repainted, pixels_from
from kandinsky_diffusers.schedulers import respaced_timesteps, strided_timesteps
from kandinsky_diffusers.text import clean_text, tokenize
from tests.support.goldens import GoldenFamily
from tests.support.parity import MODULE, assert_close


@cache
def load(folder: Path) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def prior_pipe(converted_21: Path) -> DiffusionPipeline:
    return load(converted_21 / "kandinsky-2-1-prior")


@pytest.fixture(scope="module")
def decoder(converted_21: Path) -> DiffusionPipeline:
    return load(converted_21 / "kandinsky-2-1")


@pytest.mark.parametrize(("case_name", "repo"), [("unet", "kandinsky-2-1"), ("unet_inpaint", "kandinsky-2-1-inpaint")])
@torch.no_grad()
def test_golden_unet(goldens_21: GoldenFamily, converted_21: Path, case_name: str, repo: str) -> None:
    case, unet = goldens_21.case(case_name), load(converted_21 / repo).unet
    sample = case["x"]
    if case_name == "unet_inpaint":
        sample = torch.cat([sample, case["inpaint_image"] * case["inpaint_mask"], case["inpaint_mask"]], dim=1)
    added = {"text_embeds": case["pooled_emb"], "image_embeds": case["image_emb"]}
    out = unet(sample, case["timesteps"], case["full_emb"], added_cond_kwargs=added).sample
    assert_close(out, case["out"], MODULE)


@torch.no_grad()
def test_golden_movq(goldens_21: GoldenFamily, decoder: DiffusionPipeline) -> None:
    case, movq = goldens_21.case("movq"), decoder.movq
    assert_close(movq.encode(case["x"]).latents, case["encoded"], MODULE, "encoded")
    assert_close(movq.decode(case["z"], force_not_quantize=True).sample, case["decoded"], MODULE, "decoded")
    assert_close(movq.decode(case["z"]).sample, case["decoded_quantized"], MODULE, "decoded after quantisation")


@torch.no_grad()
def test_golden_text_encoder(goldens_21: GoldenFamily, decoder: DiffusionPipeline) -> None:
    case = goldens_21.case("text_encoder")
    ids, mask = tokenize(decoder.tokenizer, case.info["prompts"], 77)
    assert torch.equal(mask, case["attention_mask"])
    assert torch.equal(ids * mask, case["input_ids"] * mask)
    pooled, hidden = decoder.text_encoder(input_ids=ids, attention_mask=mask)
    assert_close(hidden * mask[..., None], case["full_emb"] * mask[..., None], MODULE, "hidden states")
    assert_close(pooled, case["pooled_emb"], MODULE, "pooled states")


@torch.no_grad()
def test_golden_clip_text(goldens_21: GoldenFamily, prior_pipe: DiffusionPipeline) -> None:
    case = goldens_21.case("clip")
    ids, mask = tokenize(prior_pipe.tokenizer, [clean_text(text) for text in case.info["prompts"]], 77)
    real = case["mask"]
    assert torch.equal(mask.bool(), real)
    assert torch.equal(ids[real], case["tokens"][real].long())
    encoded = prior_pipe.text_encoder(ids)
    assert_close(encoded.text_embeds, case["text_emb"], MODULE, "text embeddings")
    assert_close(encoded.last_hidden_state[real], case["text_enc"][real], MODULE, "hidden states of tokens")


@torch.no_grad()
def test_golden_clip_image(goldens_21: GoldenFamily, prior_pipe: DiffusionPipeline) -> None:
    case = goldens_21.case("clip")
    picture = PIL.Image.fromarray(goldens_21.case("source_image")["image"].numpy())
    pixel_values = prior_pipe.image_processor(picture, return_tensors="pt").pixel_values
    assert_close(pixel_values, case["pixel_values"], MODULE, "pixel values")
    assert_close(prior_pipe.image_encoder(pixel_values).image_embeds, case["image_emb"], MODULE, "image embedding")
    assert_close(prior_pipe.get_zero_embed(), case["zero_image_emb"], MODULE, "embedding of no picture")


@torch.no_grad()
def test_golden_prior(goldens_21: GoldenFamily, prior_pipe: DiffusionPipeline) -> None:
    case, prior = goldens_21.case("prior"), prior_pipe.prior
    known = {
        "proj_embedding": case["text_emb"],
        "encoder_hidden_states": case["text_enc"],
        "attention_mask": case["mask"],
    }
    out = prior(case["x"], case["timesteps"], **known).predicted_image_embedding
    assert_close(out, case["out"], MODULE)
    prefix = prior(prefill=True, **known)
    cached = prior(case["x"], case["timesteps"], prefix=prefix).predicted_image_embedding
    assert_close(cached, case["out"], MODULE, "with the cache")
    assert torch.equal(prior.clip_mean, case["clip_mean"])
    assert torch.equal(prior.clip_std, case["clip_std"])


def test_golden_timesteps(goldens_21: GoldenFamily) -> None:
    for steps, lists in goldens_21.schedules.items():
        assert respaced_timesteps(1000, int(steps)).tolist() == lists["p_sampler"][::-1]
        # a last timestep of 1000, where the original crashes, becomes 999
        assert strided_timesteps(1000, int(steps)).tolist() == [min(t, 999) for t in lists["ddim_plms"][::-1]]


def test_golden_grown_mask(goldens_21: GoldenFamily) -> None:
    case = goldens_21.case("prepare_mask")
    assert torch.equal(grow_repainted(case["mask"].float()), case["prepared"].float())


def test_golden_resized_image(goldens_21: GoldenFamily) -> None:
    case = goldens_21.case("source_image")
    picture = PIL.Image.fromarray(case["image"].numpy())
    for name, resized in case.tensors.items():
        if name.startswith("resized_"):
            height, width, _ = resized.shape
            pixels = pixels_from(picture, height, width)
            levels = ((pixels + 1.0) * 127.5).round().to(torch.uint8)[0].permute(1, 2, 0)
            assert np.array_equal(levels.numpy(), resized.numpy()), name
