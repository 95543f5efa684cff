"""Each converted 2.0 model gives what the original gave, and so do the tokenizers, tables and masks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from kandinsky_diffusers.images import grow_repainted
from kandinsky_diffusers.schedulers import respaced_timesteps, strided_timesteps
from kandinsky_diffusers.text import tokenize
from tests.support.goldens import GoldenFamily
from tests.support.parity import MODULE, assert_close


@cache
def load(folder: Path) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def pipe(converted_20: Path) -> DiffusionPipeline:
    return load(converted_20 / "kandinsky-2-0")


@pytest.mark.parametrize(("case_name", "repo"), [("unet", "kandinsky-2-0"), ("unet_inpaint", "kandinsky-2-0-inpaint")])
@torch.no_grad()
def test_golden_unet(goldens_20: GoldenFamily, converted_20: Path, case_name: str, repo: str) -> None:
    case, unet = goldens_20.case(case_name), load(converted_20 / repo).unet
    sample = case["x"]
    if case_name == "unet_inpaint":
        sample = torch.cat([sample, case["inpaint_image"] * case["inpaint_mask"], case["inpaint_mask"]], dim=1)
    added = {"text_embeds": case["pooled_emb1"], "text_embeds_2": case["full_emb2"]}
    out = unet(sample, case["timesteps"], case["full_emb1"], added_cond_kwargs=added).sample
    assert_close(out, case["out"], MODULE)
    if "xf_proj" in case.tensors:
        assert_close(unet.get_aug_embed(sample, case["full_emb1"], added), case["xf_proj"], MODULE, "pooled texts")
        context = unet.process_encoder_hidden_states(case["full_emb1"], added)
        assert_close(context.transpose(1, 2), case["xf_out"], MODULE, "context")


@torch.no_grad()
def test_golden_vae(goldens_20: GoldenFamily, pipe: DiffusionPipeline) -> None:
    case = goldens_20.case("vae")
    posterior = pipe.vae.encode(case["x"]).latent_dist
    assert_close(posterior.parameters, case["moments"], MODULE, "moments")
    assert_close(posterior.mean + posterior.std * case["noise.posterior"], case["sample"], MODULE, "sample")
    assert_close(pipe.vae.decode(case["z"]).sample, case["decoded"], MODULE, "decoded")
    mean = case["moments"].chunk(2, dim=1)[0] * case.parameters["latent_scale"]
    padded = pipe.encode_pixels(case["x"], torch.device("cpu"))  # to whole blocks of 64 pixels
    assert padded.shape[-2:] == (8, 8)
    assert_close(pipe.encode_pixels(mean, torch.device("cpu")), mean, MODULE, "latents as they are")
    assert pipe.vae.config.scaling_factor == case.parameters["latent_scale"]


@torch.no_grad()
def test_golden_mclip(goldens_20: GoldenFamily, pipe: DiffusionPipeline) -> None:
    case = goldens_20.case("text_encoder1")
    ids, mask = tokenize(pipe.tokenizer, case.info["prompts"], 77)
    assert torch.equal(ids, case["input_ids"])
    assert torch.equal(mask, case["attention_mask"])
    pooled, hidden = pipe.text_encoder(input_ids=ids, attention_mask=mask)
    assert_close(hidden, case["full_emb"], MODULE, "hidden states")
    assert_close(pooled, case["pooled_emb"], MODULE, "pooled states")


@torch.no_grad()
def test_golden_mt5(goldens_20: GoldenFamily, pipe: DiffusionPipeline) -> None:
    case = goldens_20.case("text_encoder2")
    ids, mask = tokenize(pipe.tokenizer_2, case.info["prompts"], 77)
    assert torch.equal(ids, case["input_ids"])
    assert torch.equal(mask, case["attention_mask"])
    hidden = pipe.text_encoder_2(ids, attention_mask=mask).last_hidden_state
    assert_close(hidden, case["full_emb"], MODULE, "hidden states")


def test_golden_timesteps(goldens_20: GoldenFamily) -> None:
    for steps, lists in goldens_20.schedules.items():
        assert respaced_timesteps(1000, int(steps)).tolist() == lists["p_sampler"][::-1]
        # a last timestep of 1000, where the original crashes, becomes 999
        assert strided_timesteps(1000, int(steps)).tolist() == [min(t, 999) for t in lists["ddim_plms"][::-1]]


def test_golden_grown_mask(goldens_20: GoldenFamily) -> None:
    case = goldens_20.case("prepare_mask")
    assert torch.equal(grow_repainted(case["mask"].float()), case["prepared"].float())
