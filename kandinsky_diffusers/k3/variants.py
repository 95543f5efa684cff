"""The released Kandinsky 3.0 and 3.1, and the ControlNet for them: their files, and the repositories that a conversion
makes of them, as data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .. import autoencoder_weights, t5_weights
from ..conversion import smoke
from ..conversion.files import copy_tokenizer, tokenizer_check
from ..conversion.hub_source import published_config, weight_paths
from ..conversion.matching import Shapes
from ..conversion.recipe import ConfigComponent, FilesComponent, ModelComponent, Part, Release, Repo, SourceFile
from . import weights
from .hed_weights import HED_FILE, HED_REPO


INPAINTING = {"dynamic_thresholding_ratio": 0.95, "default_guidance_scale": 4.0}


def find_roots(folder: Path) -> dict[str, Path]:
    """The files of the release are in ``weights``, or in the folder itself."""
    return {"release": folder / "weights" if (folder / "weights").is_dir() else folder}


# ------------------------------------------------------------------------------------------------ files
def is_text_encoder(shapes: Shapes) -> bool:
    """Whether these are the keys of Flan-UL2; the mT5 of 2.0 has the same, and is 512 wide."""
    return t5_weights.is_t5(shapes) and shapes["shared.weight"][1:] != (512,)


def _unet_file(name: str, path: str, in_channels: int, renamed: dict[str, str | None]) -> SourceFile:
    return SourceFile(name, (path,), partial(weights.is_unet, in_channels=in_channels), renamed=renamed)


MOVQ_FILE = SourceFile("movq", ("movq.pt",), autoencoder_weights.is_movq_without_codebook)

# In 3.0 a file holds UNet and projection, in 3.1 each has its own.
NESTED: dict[str, str | None] = {"unet/": "", "projections/": None}
NESTED_PROJECTION: dict[str, str | None] = {"projections/": "", "t5.": "t5.", "": None}

FILES_30 = (
    _unet_file("unet", "kandinsky3.pt", 4, NESTED),
    _unet_file("inpainting", "kandinsky3_inpainting.pt", 9, NESTED),
    *(
        SourceFile(
            f"{name} projection", (path,), partial(weights.is_projection, prefix="t5."), renamed=NESTED_PROJECTION
        )
        for name, path in (("unet", "kandinsky3.pt"), ("inpainting", "kandinsky3_inpainting.pt"))
    ),
    MOVQ_FILE,
    SourceFile("text_encoder", weight_paths("", "transformers"), is_text_encoder, root="text_encoder"),
)

FILES_31 = (
    _unet_file("unet", "kandinsky3.pt", 4, {"unet/": ""}),
    _unet_file("flash", "kandinsky3_flash.pt", 4, {"unet/": ""}),
    _unet_file("inpainting", "kandinsky3_inpainting.pt", 9, {"unet/": ""}),
    *(
        SourceFile(f"{name} projection", (f"flan_ul2_encoder/{path}",), weights.is_projection)
        for name, path in (
            ("unet", "projection.pt"),
            ("flash", "projection_flash.pt"),
            ("inpainting", "projection_inpainting.pt"),
        )
    ),
    MOVQ_FILE,
    SourceFile("text_encoder", weight_paths("flan_ul2_encoder", "transformers"), is_text_encoder),
)


# ------------------------------------------------------------------------------------------------ components
MOVQ = ModelComponent(
    "movq",
    "diffusers",
    "VQModel",
    parts=(Part("movq", autoencoder_weights.movq_rules_without_codebook),),
    configure=autoencoder_weights.movq_config,
    keep_float32=True,
)


def _text_encoder(root: str, folder: str) -> ModelComponent:
    return ModelComponent(
        "text_encoder",
        "transformers",
        "T5EncoderModel",
        parts=(Part("text_encoder", t5_weights.t5_encoder_rules),),
        configure=partial(published_config, root=root, folder=folder),
    )


def _tokenizer(root: str, folder: str) -> FilesComponent:
    return FilesComponent(
        "tokenizer",
        "transformers",
        "T5Tokenizer",
        write=partial(copy_tokenizer, root=root, folder=folder, class_name="T5Tokenizer"),
        check=partial(tokenizer_check, root=root, folder=folder),
    )


def unet_component(name: str, published: str, prefix: str, library: str = "diffusers") -> ModelComponent:
    """The UNet.

    Args:
        name: of its file; that of the projection is called ``"<name> projection"``.
        published: file name under which the original config has its arguments.
        prefix: of the keys of the projection.
        library: as in ``model_index.json``.
    """
    projection = f"{name} projection"
    return ModelComponent(
        "unet",
        library,
        "Kandinsky3UNet",
        parts=(
            Part(name, weights.unet_rules),
            Part(projection, partial(weights.projection_rules, prefix=prefix)),
        ),
        configure=partial(weights.unet_config, unet=name, projection=projection, published=f"weights/{published}"),
        module="kandinsky_diffusers.k3.unet",
    )


def _scheduler(class_name: str, **config: Any) -> ConfigComponent:
    return ConfigComponent(
        "scheduler", "kandinsky_diffusers", class_name, config=config, module="kandinsky_diffusers.schedulers"
    )


# stock runs this repository, with its own DDPM; our pipelines see by an entry of the configuration what it is for
STOCK_DDPM = ConfigComponent(
    "scheduler",
    "diffusers",
    "DDPMScheduler",
    config={"kandinsky3_respaced": True},
    module="kandinsky_diffusers.schedulers",
    writer="Kandinsky3DDPMScheduler",
)


# ------------------------------------------------------------------------------------------------ releases
def _release(
    version: str,
    files: tuple[SourceFile, ...],
    text: tuple[str, str],
    unets: tuple[tuple[str, str, ModelComponent, ConfigComponent], ...],
) -> Release:
    """A release whose repositories share text encoder, tokenizer and MoVQ.

    Args:
        version: as in ``--version``.
        files: its weight files.
        text: root and folder of the text encoder.
        unets: of each repository name, class name of the pipeline, UNet and scheduler.
    """
    shared = (_text_encoder(*text), _tokenizer(*text), MOVQ)
    repos = (
        Repo(name, pipeline, main=unet.parts[0].file, components=(unet, scheduler, *shared), smoke=_run(pipeline))
        for name, pipeline, unet, scheduler in unets
    )
    return Release(version, f"Kandinsky {version}", files, tuple(repos), roots=find_roots)


def _run(pipeline: str) -> Callable[[Any], list[Any]]:
    inputs = smoke.hole if pipeline == "Kandinsky3InpaintPipeline" else dict
    return lambda pipe: smoke.run(pipe, **inputs())


RELEASE_30 = _release(
    "3.0",
    FILES_30,
    ("text_encoder", ""),
    (
        ("kandinsky-3", "Kandinsky3Pipeline", unet_component("unet", "kandinsky3.pt", "t5."), STOCK_DDPM),
        (
            "kandinsky-3-inpaint",
            "Kandinsky3InpaintPipeline",
            unet_component("inpainting", "kandinsky3_inpainting.pt", "t5.", library="kandinsky_diffusers"),
            _scheduler("Kandinsky3DDPMScheduler", **INPAINTING),
        ),
    ),
)

RELEASE_31 = _release(
    "3.1",
    FILES_31,
    ("release", "flan_ul2_encoder"),
    (
        (
            "kandinsky-3-1",
            "Kandinsky3Pipeline",
            unet_component("unet", "kandinsky3.pt", ""),
            _scheduler("Kandinsky3AncestralScheduler"),
        ),
        (
            "kandinsky-3-1-flash",
            "Kandinsky3Pipeline",
            unet_component("flash", "kandinsky3_flash.pt", ""),
            _scheduler("Kandinsky3FlashScheduler"),
        ),
        (
            "kandinsky-3-1-inpaint",
            "Kandinsky3InpaintPipeline",
            unet_component("inpainting", "kandinsky3_inpainting.pt", "", library="kandinsky_diffusers"),
            _scheduler("Kandinsky3AncestralScheduler", **INPAINTING),
        ),
    ),
)


# ------------------------------------------------------------------------------------------------ ControlNet
CONTROLNET_FOLDER = "unet_controlnet"


def _load_controlnet(folder: Path, variant: str | None) -> Any:
    import torch

    from .controlnet import Kandinsky3ControlNetModel

    return Kandinsky3ControlNetModel.from_pretrained(folder, variant=variant, torch_dtype=torch.float32)


def _run_controlnet(controlnet: Any) -> list[Any]:
    """The residuals for empty latents, an empty text and a grey control image of 64 x 64 pixels."""
    import torch

    config = controlnet.config
    latents = torch.zeros(1, config.in_channels, 8, 8)
    image = torch.full((1, config.conditioning_channels, 64, 64), 0.5)
    context = torch.zeros(1, 1, config.cross_attention_dim)
    with torch.no_grad():
        return list(controlnet(latents, 500, context, None, image, return_dict=False)[0])


RELEASE_CONTROLNET = Release(
    "3-controlnet",
    "the ControlNet of Kandinsky 3",
    files=(SourceFile("controlnet", weight_paths(CONTROLNET_FOLDER, "diffusers"), weights.is_controlnet), HED_FILE),
    repos=(
        Repo(
            "kandinsky-3-controlnet-hed",
            None,
            main="controlnet",
            components=(
                ModelComponent(
                    "",
                    "kandinsky_diffusers",
                    "Kandinsky3ControlNetModel",
                    parts=(Part("controlnet", weights.controlnet_rules),),
                    configure=partial(weights.controlnet_config, folder=CONTROLNET_FOLDER),
                    module="kandinsky_diffusers.k3.controlnet",
                ),
            ),
            smoke=_run_controlnet,
            load=_load_controlnet,
        ),
        HED_REPO,
    ),
    left_out={"unet": "it is the UNet of Kandinsky 3.1; convert that release for it"},
)
