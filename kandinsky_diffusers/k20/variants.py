"""The released Kandinsky 2.0: its files, and the repositories that a conversion makes of them, as data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .. import autoencoder_weights, mclip_weights, t5_weights
from ..components_2 import ancestral_scheduler, ddim_scheduler, ddpm_scheduler, mclip, mclip_tokenizer
from ..conversion import smoke
from ..conversion.files import copy_tokenizer, tokenizer_check
from ..conversion.hub_source import published_config, weight_paths
from ..conversion.recipe import FilesComponent, ModelComponent, Part, Release, Repo, SourceFile
from . import weights


BETAS = (1e-4, 0.02)

FILES = (
    SourceFile("unet", ("Kandinsky-2-0.pt",), partial(weights.is_unet, in_channels=4)),
    SourceFile("inpainting", ("Kandinsky-2-0-inpainting.pt",), partial(weights.is_unet, in_channels=9)),
    SourceFile("vae", ("vae.ckpt",), autoencoder_weights.is_vae, renamed={"state_dict/": ""}),
    SourceFile("text_encoder", weight_paths("text_encoder1", "transformers"), mclip_weights.is_mclip),
    SourceFile("text_encoder_2", weight_paths("text_encoder2", "transformers"), weights.is_mt5),
)

MT5 = ModelComponent(
    "text_encoder_2",
    "transformers",
    "MT5EncoderModel",
    parts=(Part("text_encoder_2", t5_weights.t5_encoder_rules),),
    configure=partial(published_config, root="release", folder="text_encoder2"),
)

MT5_TOKENIZER = FilesComponent(
    "tokenizer_2",
    "transformers",
    "T5Tokenizer",
    write=partial(copy_tokenizer, root="release", folder="text_encoder2", class_name="T5Tokenizer"),
    check=partial(tokenizer_check, root="release", folder="text_encoder2"),
)

VAE = ModelComponent(
    "vae",
    "diffusers",
    "AutoencoderKL",
    parts=(Part("vae", autoencoder_weights.vae_rules),),
    configure=autoencoder_weights.vae_config,
    keep_float32=True,
)

SHARED = (
    mclip("text_encoder", "text_encoder1"),
    mclip_tokenizer("text_encoder1"),
    MT5,
    MT5_TOKENIZER,
    VAE,
    ddim_scheduler(BETAS),
)


def _repo(name: str, pipeline: str, file: str, inputs: Callable[[], dict[str, Any]]) -> Repo:
    unet = ModelComponent(
        "unet",
        "kandinsky_diffusers",
        "KandinskyV20UNet",
        parts=(Part(file, weights.unet_rules),),
        configure=weights.unet_config,
        module="kandinsky_diffusers.k20.unet",
    )
    return Repo(
        name,
        pipeline,
        main=file,
        components=(unet, *SHARED),
        smoke=lambda pipe: smoke.run(pipe, **inputs()),
        extras=(ddpm_scheduler(BETAS, None), ancestral_scheduler(BETAS, None, denoised_thresholding=True)),
    )


RELEASE = Release(
    version="2.0",
    title="Kandinsky 2.0",
    files=FILES,
    repos=(
        _repo("kandinsky-2-0", "KandinskyV20Pipeline", "unet", dict),
        _repo("kandinsky-2-0-inpaint", "KandinskyV20InpaintPipeline", "inpainting", smoke.hole),
    ),
)
