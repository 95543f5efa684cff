"""Which releases there are: the one file of the engine that names families.

A family's own knowledge lies in its ``variants.py`` and ``weights.py``; here stands only where to find it, and by
which published file names a folder is told.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .hub_source import find_pipelines
from .json_files import read_json
from .recipe import Release


CONVERTIBLE = {
    "2.1": "kandinsky_diffusers.k21.variants:RELEASE",
    "2.0": "kandinsky_diffusers.k20.variants:RELEASE",  # after 2.1, whose M-CLIP it would take for its own
    "2.2": "kandinsky_diffusers.k22.variants:RELEASE",
    "3-ip-adapter": "kandinsky_diffusers.k3.ip_adapter_variants:RELEASE",  # before 3.1, whose UNet is in it
    "3.1": "kandinsky_diffusers.k3.variants:RELEASE_31",  # before 3.0, which takes its UNets for its own
    "3.0": "kandinsky_diffusers.k3.variants:RELEASE_30",
    "3-controlnet": "kandinsky_diffusers.k3.variants:RELEASE_CONTROLNET",
    "3-lora": "kandinsky_diffusers.k3.lora:RELEASE_LORA",
    "superres": "kandinsky_diffusers.superres.variants:RELEASE",  # after 3.1, of which its refiner is
}

PUBLISHED_FILES = {
    "2.0": ("Kandinsky-2-0.pt", "Kandinsky-2-0-inpainting.pt", "vae.ckpt", "text_encoder1", "text_encoder2"),
    "2.1": ("decoder_fp16.ckpt", "inpainting_fp16.ckpt", "prior_fp16.ckpt", "movq_final.ckpt", "ViT-L-14_stats.th"),
    "3.0": ("kandinsky3.pt", "kandinsky3_inpainting.pt", "movq.pt"),
    "3.1": (
        "kandinsky3.pt",
        "kandinsky3_inpainting.pt",
        "movq.pt",
        "kandinsky3_flash.pt",
        "flan_ul2_encoder",
    ),
    "superres": ("KandiSuperRes.ckpt", "KandiSuperRes_x2.ckpt", "KandiSuperRes_flash_x2.pt"),
    "3-controlnet": ("unet_controlnet", "ControlNetHED.pth"),
    "3-lora": ("pytorch_model.bin",),
}

# releases that were published as repositories in the Hub's format, by how the names of their pipelines begin
PUBLISHED_PIPELINES = {"2.2": "KandinskyV22"}

# releases that are models in folders without an index: a folder, and the class that its configuration names
PUBLISHED_MODELS = {"3-ip-adapter": ("unet", "UNetKandi3IpAdapter")}

# what belongs to no release, such as a LoRA: functions from the keys of a file to version and part, or None
OTHER_KINDS = ("kandinsky_diffusers.lora_files:identify_lora",)


def release(version: str) -> Release:
    """What is known of ``version``.

    Raises:
        ConversionError: it cannot be converted.
    """
    if version not in CONVERTIBLE:
        known = ", ".join(CONVERTIBLE)
        raise ConversionError(f"version is {version!r}; accepted are auto, {known}.")
    return _named(CONVERTIBLE[version])


def releases() -> Iterable[Release]:
    """All releases that can be converted."""
    return (release(version) for version in CONVERTIBLE)


def other_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """Version and part of a file with these keys, if it is one of the kinds that belong to no release."""
    names = list(keys)
    return next((found for kind in OTHER_KINDS if (found := _named(kind)(names))), None)


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def guess_version(folder: Path) -> str | None:
    """The version whose published files the folder holds most of, else whose repositories or models, or None.

    Of two versions with as many files there, it is the older one.
    """
    places = (folder, folder / "weights")  # where the releases of 3.x have them
    found = {
        version: sum(any((place / name).exists() for place in places) for name in names)
        for version, names in PUBLISHED_FILES.items()
    }
    best = max(found, key=lambda version: found[version])
    return (
        best if found[best] else _guess_from_pipelines(find_pipelines(folder).values()) or _guess_from_models(folder)
    )


def _guess_from_pipelines(names: Iterable[str]) -> str | None:
    found = (version for name in names for version, start in PUBLISHED_PIPELINES.items() if name.startswith(start))
    return next(found, None)


def _guess_from_models(folder: Path) -> str | None:
    configs = {version: (folder / place / "config.json", name) for version, (place, name) in PUBLISHED_MODELS.items()}
    found = (v for v, (path, name) in configs.items() if path.is_file() and read_json(path).get("_class_name") == name)
    return next(found, None)
