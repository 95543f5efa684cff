"""The released KandiSuperRes: its files, and the repositories that a conversion makes of them, as data."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from .. import autoencoder_weights
from ..conversion import smoke
from ..conversion.recipe import Component, ConfigComponent, ModelComponent, Part, Release, Repo, SourceFile
from ..k3 import variants as k3
from ..k3 import weights as k3_weights
from . import weights


MODULE = "kandinsky_diffusers.superres"


# ------------------------------------------------------------------------------------------------ files
PUBLISHED = {
    "x4": "KandiSuperRes.ckpt",
    "x2": "KandiSuperRes_x2.ckpt",
    "flash x2": "KandiSuperRes_flash_x2.pt",
}
# A checkpoint holds the tensors as they are, or under `unet`, or is one of the training with a moving average.
FORMS: dict[str, str | None] = {"unet/": "", "callbacks/EMA/ema_state_dict/unet.": ""}

FILES = (
    *(SourceFile(name, (path,), weights.is_unet, renamed=FORMS) for name, path in PUBLISHED.items()),
    SourceFile("context", ("weights/context.pt", "context.pt"), weights.is_context, names=("context",)),
    SourceFile(
        "context mask",
        ("weights/context_mask.pt", "context_mask.pt"),
        weights.is_context_mask,
        names=("context",),
        renamed={"context": "context_mask"},
    ),
    SourceFile(
        "refiner",
        ("weights/kandinsky3_flash.pt", "kandinsky3_flash.pt"),
        partial(k3_weights.is_unet, in_channels=4),
        root="refiner",
        renamed={"unet/": ""},
    ),
    SourceFile(
        "refiner projection",
        ("weights/flan_ul2_encoder/projection_flash.pt", "flan_ul2_encoder/projection_flash.pt"),
        k3_weights.is_projection,
        root="refiner",
    ),
    SourceFile("movq", ("weights/movq.pt", "movq.pt"), autoencoder_weights.is_movq_without_codebook, root="refiner"),
)


# ------------------------------------------------------------------------------------------------ components
def _unet(name: str) -> ModelComponent:
    return ModelComponent(
        "unet",
        "kandinsky_diffusers",
        "KandiSuperResUNet",
        parts=(Part(name, weights.unet_rules),),
        configure=partial(weights.unet_config, published=PUBLISHED[name]),
        module=MODULE,
    )


SOLVER = ConfigComponent(
    "scheduler",
    "diffusers",
    "DPMSolverMultistepScheduler",
    config={"beta_schedule": "linear", "prediction_type": "sample"},
)


def _flash(name: str, **config: Any) -> ConfigComponent:
    return ConfigComponent(
        name,
        "kandinsky_diffusers",
        "Kandinsky3FlashScheduler",
        config=config,
        module="kandinsky_diffusers.schedulers",
    )


CONTEXT = ModelComponent(
    "context",
    "kandinsky_diffusers",
    "KandiSuperResContext",
    parts=(Part("context", weights.context_rules), Part("context mask", weights.context_mask_rules)),
    configure=weights.context_config,
    module=MODULE,
)
REFINING = (
    replace(k3.unet_component("refiner", "kandinsky3_flash.pt", ""), name="refiner"),
    _flash("refiner_scheduler", timesteps=[229], default_num_inference_steps=1),
    k3.MOVQ,
    CONTEXT,
)


# ------------------------------------------------------------------------------------------------ release
def _repo(name: str, file: str, components: tuple[Component, ...], **settings: Any) -> Repo:
    return Repo(
        name,
        "KandiSuperResPipeline",
        main=file,
        components=(_unet(file), *components),
        smoke=smoke.enlarge,
        settings=settings,
        optional=tuple(component for component in components if component in REFINING),
    )


RELEASE = Release(
    "superres",
    "KandiSuperRes",
    FILES,
    (
        _repo("kandisuperres-x4", "x4", (SOLVER,), scale=4),
        _repo("kandisuperres-x2", "x2", (SOLVER,), scale=2),
        # drawn whole by the original; the windows are so large that 1024 x 1024 still is
        _repo(
            "kandisuperres-flash-x2",
            "flash x2",
            (_flash("scheduler", beta_schedule="linear", prediction_type="sample"), *REFINING),
            scale=2,
            size_multiple=32,
            shrinks_input=True,
            window_size=2048,
            window_stride=1600,
            view_batch_size=1,
        ),
    ),
)
