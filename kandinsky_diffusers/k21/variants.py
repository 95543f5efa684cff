"""The released Kandinsky 2.1: its files, and the repositories that a conversion makes of them, as data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..conversion.files import copy_clip_image_processor, copy_tokenizer, tokenizer_check
from ..conversion.recipe import ConfigComponent, FilesComponent, ModelComponent, Part, Release, Repo, SourceFile
from . import weights


BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}

FILES = (
    SourceFile("decoder", ("decoder_fp16.ckpt",), partial(weights.is_unet, in_channels=4)),
    SourceFile("inpainting", ("inpainting_fp16.ckpt",), partial(weights.is_unet, in_channels=9)),
    SourceFile("prior", ("prior_fp16.ckpt",), weights.is_prior),
    SourceFile("stats", ("ViT-L-14_stats.th",), weights.is_stats, names=("clip_mean", "clip_std")),
    SourceFile("movq", ("movq_final.ckpt",), weights.is_movq),
    SourceFile(
        "text_encoder",
        ("text_encoder/pytorch_model.bin", "text_encoder/model.safetensors"),
        weights.is_text_encoder,
    ),
    SourceFile("clip", ("model.safetensors", "pytorch_model.bin"), weights.is_clip, root="clip"),
)

DDIM_SCHEDULER = ConfigComponent(
    "scheduler",
    "diffusers",
    "DDIMScheduler",
    config={
        **BETAS,
        "beta_schedule": "linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
    },
)

# as near to the original's ancestral sampler as stock comes: float32 tables, but the same timesteps and threshold
DDPM_SCHEDULER = ConfigComponent(
    "ddpm_scheduler",
    "diffusers",
    "DDPMScheduler",
    config={
        **BETAS,
        "beta_schedule": "linear",
        "variance_type": "learned_range",
        "clip_sample": False,
        "prediction_type": "epsilon",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 2.0,
        "timestep_spacing": "linspace",
    },
)

ANCESTRAL_SCHEDULER = ConfigComponent(
    "ancestral_scheduler",
    "kandinsky_diffusers",
    "KandinskyAncestralScheduler",
    config={
        **BETAS,
        "denoised_range": 2.0,
        "dynamic_thresholding_ratio": 0.995,
        "variance_type": "learned_range",
        "prediction_type": "epsilon",
    },
    module="kandinsky_diffusers.schedulers",
)

PRIOR_SCHEDULER = ConfigComponent(
    "scheduler",
    "diffusers",
    "UnCLIPScheduler",
    config={
        "num_train_timesteps": 1000,
        "variance_type": "fixed_small_log",
        "clip_sample": True,
        "clip_sample_range": 10.0,
        "prediction_type": "sample",
    },
)

MOVQ = ModelComponent(
    "movq",
    "diffusers",
    "VQModel",
    parts=(Part("movq", weights.movq_rules),),
    configure=weights.movq_config,
    keep_float32=True,
)

TEXT_ENCODER = ModelComponent(
    "text_encoder",
    "kandinsky",
    "MultilingualCLIP",
    parts=(Part("text_encoder", weights.text_encoder_rules),),
    configure=weights.text_encoder_config,
)

TOKENIZER = FilesComponent(
    "tokenizer",
    "transformers",
    "XLMRobertaTokenizer",
    write=partial(copy_tokenizer, root="release", folder="text_encoder", class_name="XLMRobertaTokenizer"),
    check=partial(tokenizer_check, root="release", folder="text_encoder"),
)

PRIOR = ModelComponent(
    "prior",
    "diffusers",
    "PriorTransformer",
    parts=(Part("prior", weights.prior_rules), Part("stats", weights.stats_rules)),
    configure=weights.prior_config,
)

CLIP_TEXT_ENCODER = ModelComponent(
    "text_encoder",
    "transformers",
    "CLIPTextModelWithProjection",
    parts=(Part("clip", weights.clip_text_rules),),
    configure=weights.clip_text_config,
)

CLIP_IMAGE_ENCODER = ModelComponent(
    "image_encoder",
    "transformers",
    "CLIPVisionModelWithProjection",
    parts=(Part("clip", weights.clip_vision_rules),),
    configure=weights.clip_vision_config,
)

CLIP_TOKENIZER = FilesComponent(
    "tokenizer",
    "transformers",
    "CLIPTokenizer",
    write=partial(copy_tokenizer, root="clip", folder="", class_name="CLIPTokenizer"),
    check=partial(tokenizer_check, root="clip", folder=""),
)

CLIP_IMAGE_PROCESSOR = FilesComponent(
    "image_processor", "transformers", "CLIPImageProcessor", write=partial(copy_clip_image_processor, root="clip")
)


def _unet(file: str) -> ModelComponent:
    return ModelComponent(
        "unet",
        "diffusers",
        "UNet2DConditionModel",
        parts=(Part(file, weights.unet_rules),),
        configure=weights.unet_config,
    )


def _run_prior(pipe: Any) -> list[Any]:
    result = pipe("a hat", num_inference_steps=2)
    return [result.image_embeds, result.negative_image_embeds]


def _run_decoder(pipe: Any, **inputs: Any) -> list[Any]:
    import numpy as np
    import torch

    embeds = torch.zeros(1, pipe.unet.config.cross_attention_dim)
    images = pipe(
        "a hat",
        image_embeds=embeds,
        negative_image_embeds=embeds,
        num_inference_steps=2,
        height=64,
        width=64,
        output_type="np",
        **inputs,
    ).images
    return [np.asarray(images)]


def _run_inpaint(pipe: Any) -> list[Any]:
    import numpy as np
    from PIL import Image

    mask = np.zeros((64, 64), np.float32)
    mask[:32] = 1
    return _run_decoder(pipe, image=Image.new("RGB", (64, 64), "gray"), mask_image=mask)


def _decoder(name: str, pipeline: str, file: str, smoke: Callable[[Any], list[Any]]) -> Repo:
    return Repo(
        name,
        pipeline,
        main=file,
        components=(_unet(file), MOVQ, TEXT_ENCODER, TOKENIZER, DDIM_SCHEDULER),
        smoke=smoke,
        extras=(DDPM_SCHEDULER, ANCESTRAL_SCHEDULER),
    )


RELEASE = Release(
    version="2.1",
    title="Kandinsky 2.1",
    files=FILES,
    repos=(
        Repo(
            "kandinsky-2-1-prior",
            "KandinskyPriorPipeline",
            main="prior",
            components=(
                PRIOR,
                CLIP_TEXT_ENCODER,
                CLIP_IMAGE_ENCODER,
                CLIP_TOKENIZER,
                CLIP_IMAGE_PROCESSOR,
                PRIOR_SCHEDULER,
            ),
            smoke=_run_prior,
        ),
        _decoder("kandinsky-2-1", "KandinskyPipeline", "decoder", _run_decoder),
        _decoder("kandinsky-2-1-inpaint", "KandinskyInpaintPipeline", "inpainting", _run_inpaint),
    ),
)
