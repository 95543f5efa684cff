"""The released Kandinsky 2.1: its files, and the repositories that a conversion makes of them, as data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .. import autoencoder_weights
from ..components_2 import ancestral_scheduler, ddim_scheduler, ddpm_scheduler, mclip, mclip_tokenizer
from ..conversion import smoke
from ..conversion.files import copy_clip_image_processor, copy_tokenizer, image_processor_check, tokenizer_check
from ..conversion.recipe import (
    ConfigComponent,
    FilesComponent,
    Joined,
    ModelComponent,
    Part,
    Release,
    Repo,
    SourceFile,
)
from . import weights


BETAS = (0.00085, 0.012)

FILES = (
    SourceFile("decoder", ("decoder_fp16.ckpt",), partial(weights.is_unet, in_channels=4)),
    SourceFile("inpainting", ("inpainting_fp16.ckpt",), partial(weights.is_unet, in_channels=9)),
    SourceFile("prior", ("prior_fp16.ckpt",), weights.is_prior),
    SourceFile("stats", ("ViT-L-14_stats.th",), weights.is_stats, names=("clip_mean", "clip_std")),
    SourceFile("movq", ("movq_final.ckpt",), autoencoder_weights.is_movq),
    SourceFile(
        "text_encoder",
        ("text_encoder/pytorch_model.bin", "text_encoder/model.safetensors"),
        weights.is_text_encoder,
    ),
    SourceFile("clip", ("model.safetensors", "pytorch_model.bin"), weights.is_clip, root="clip"),
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
    parts=(Part("movq", autoencoder_weights.movq_rules),),
    configure=autoencoder_weights.movq_config,
    keep_float32=True,
)

MCLIP = mclip("text_encoder", "text_encoder")
TOKENIZER = mclip_tokenizer("text_encoder")

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
    "image_processor",
    "transformers",
    "CLIPImageProcessor",
    write=partial(copy_clip_image_processor, root="clip", folder=""),
    check=partial(image_processor_check, root="clip", folder=""),
)


def _unet(file: str) -> ModelComponent:
    return ModelComponent(
        "unet",
        "diffusers",
        "UNet2DConditionModel",
        parts=(Part(file, weights.unet_rules),),
        configure=weights.unet_config,
    )


def _run_decoder(pipe: Any, **inputs: Any) -> list[Any]:
    return smoke.run_decoder(pipe, pipe.unet.config.cross_attention_dim, **smoke.text(), **inputs)


def _decoder(name: str, pipeline: str, file: str, run: Callable[[Any], list[Any]], joined: Joined) -> Repo:
    return Repo(
        name,
        pipeline,
        main=file,
        components=(
            _unet(file),
            MOVQ,
            MCLIP,
            TOKENIZER,
            ddim_scheduler(BETAS),
        ),
        smoke=run,
        extras=(ddpm_scheduler(BETAS, 2.0), ancestral_scheduler(BETAS, 2.0)),
        joined=joined,
    )


PRIOR_REPO = "kandinsky-2-1-prior"


RELEASE = Release(
    version="2.1",
    title="Kandinsky 2.1",
    files=FILES,
    repos=(
        Repo(
            PRIOR_REPO,
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
            smoke=smoke.run_prior,
        ),
        _decoder(
            "kandinsky-2-1",
            "KandinskyPipeline",
            "decoder",
            _run_decoder,
            Joined(PRIOR_REPO, "prior_", "KandinskyCombinedPipeline", smoke.run_combined),
        ),
        _decoder(
            "kandinsky-2-1-inpaint",
            "KandinskyInpaintPipeline",
            "inpainting",
            lambda pipe: _run_decoder(pipe, **smoke.hole()),
            Joined(
                PRIOR_REPO,
                "prior_",
                "KandinskyInpaintCombinedPipeline",
                lambda pipe: smoke.run_combined(pipe, **smoke.hole()),
            ),
        ),
    ),
)
