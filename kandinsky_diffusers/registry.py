"""Takes our pipelines and components into diffusers. The only file that touches its private parts.

A class with a stock name replaces the stock class under its key in the AutoPipeline tables and as an attribute of
`diffusers`; a new class is added. Everything is written down, and `unregister` takes exactly that back.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from importlib import import_module
from typing import Any

import diffusers
from diffusers.models.unets import unet_2d_condition
from diffusers.pipelines import auto_pipeline

from . import attention, k3, k20, k21, k22, movq, prior, schedulers, superres
from .compatibility import SUPPORTED_DIFFUSERS, UnsupportedDiffusersError, check_diffusers


LIBRARY = "kandinsky_diffusers"

TASKS = ("text2image", "image2image", "inpainting")

# Key of the AutoPipeline tables -> task -> the class that takes a prompt, and the decoder behind it if there is one.
FAMILIES: dict[str, dict[str, tuple[type, type | None]]] = {
    "kandinsky20": {
        "text2image": (k20.KandinskyV20Pipeline, None),
        "image2image": (k20.KandinskyV20Img2ImgPipeline, None),
        "inpainting": (k20.KandinskyV20InpaintPipeline, None),
    },
    "kandinsky": {
        "text2image": (k21.KandinskyCombinedPipeline, k21.KandinskyPipeline),
        "image2image": (k21.KandinskyImg2ImgCombinedPipeline, k21.KandinskyImg2ImgPipeline),
        "inpainting": (k21.KandinskyInpaintCombinedPipeline, k21.KandinskyInpaintPipeline),
    },
    "kandinsky22": {
        "text2image": (k22.KandinskyV22CombinedPipeline, k22.KandinskyV22Pipeline),
        "image2image": (k22.KandinskyV22Img2ImgCombinedPipeline, k22.KandinskyV22Img2ImgPipeline),
        "inpainting": (k22.KandinskyV22InpaintCombinedPipeline, k22.KandinskyV22InpaintPipeline),
    },
    "kandinsky22-controlnet": {
        "text2image": (k22.KandinskyV22ControlnetCombinedPipeline, k22.KandinskyV22ControlnetPipeline),
        "image2image": (k22.KandinskyV22ControlnetImg2ImgCombinedPipeline, k22.KandinskyV22ControlnetImg2ImgPipeline),
    },
    "kandinsky3": {
        "text2image": (k3.Kandinsky3Pipeline, None),
        "image2image": (k3.Kandinsky3Img2ImgPipeline, None),
        "inpainting": (k3.Kandinsky3InpaintPipeline, None),
    },
    "kandinsky3-controlnet": {
        "text2image": (k3.Kandinsky3ControlNetPipeline, None),
        "image2image": (k3.Kandinsky3ControlNetImg2ImgPipeline, None),
        "inpainting": (k3.Kandinsky3ControlNetInpaintPipeline, None),
    },
    "kandisuperres": {
        "image2image": (superres.KandiSuperResPipeline, None),
    },
}

# Pipelines that no AutoPipeline finds.
OTHER_PIPELINES: tuple[type, ...] = (
    k21.KandinskyPriorPipeline,
    k22.KandinskyV22PriorPipeline,
    k22.KandinskyV22PriorEmb2EmbPipeline,
)

COMPONENTS: tuple[type, ...] = (
    k20.KandinskyV20UNet,
    k3.Kandinsky3ControlNetModel,
    k3.Kandinsky3UNet,
    k3.KandinskyHEDDetector,
    movq.MoVQ,
    prior.CachedPriorTransformer,
    schedulers.Kandinsky3AncestralScheduler,
    schedulers.Kandinsky3DDPMScheduler,
    schedulers.Kandinsky3FlashScheduler,
    schedulers.KandinskyAncestralScheduler,
    schedulers.KandinskyDDIMScheduler,
    schedulers.KandinskyPNDMScheduler,
    schedulers.KandinskyUnCLIPScheduler,
    superres.KandiSuperResContext,
    superres.KandiSuperResUNet,
)

_ABSENT = object()
_journal: list[tuple[MutableMapping[str, Any], str, Any]] = []


def register() -> None:
    """Make diffusers use our classes; a second call changes nothing.

    Raises:
        UnsupportedDiffusersError: the installed diffusers is outside the supported range, or has changed inside.
    """
    if _journal:
        return
    check_diffusers()
    tables, search_order, loadable, importable = _private_parts()
    # first the decoders, so that a user's family, which has them in the tables for prompts, is not taken for ours
    for_decoders = [table for _, table in tables.values()]
    others = [table for table in search_order if not any(table is decoders for decoders in for_decoders)]
    _put(auto_pipeline.__dict__, "SUPPORTED_TASKS_MAPPINGS", [*for_decoders, *others])
    # so that `set_default_attn_processor` of a UNet knows the processors that our pipelines put into it
    processors = (*unet_2d_condition.ADDED_KV_ATTENTION_PROCESSORS, attention.DispatchedAttnAddedKVProcessor)
    _put(unet_2d_condition.__dict__, "ADDED_KV_ATTENTION_PROCESSORS", processors)
    for key, family in FAMILIES.items():
        for task, (pipeline, decoder) in family.items():
            for table, cls in zip(tables[task], (pipeline, decoder), strict=True):
                if cls is not None:
                    _put(table, key, cls)
                    _put(diffusers.__dict__, cls.__name__, cls)
    for cls in (*OTHER_PIPELINES, *COMPONENTS):
        _put(diffusers.__dict__, cls.__name__, cls)
    methods = {cls.__name__: ["save_pretrained", "from_pretrained"] for cls in COMPONENTS}
    _put(loadable, LIBRARY, methods)
    # so that components come from here even if a repository brings modules for where we are not imported, and needs no
    # `trust_remote_code` then
    _put(diffusers.pipelines.__dict__, LIBRARY, import_module(LIBRARY))
    for name, names_of_methods in methods.items():
        _put(importable, name, names_of_methods)


def unregister() -> None:
    """Give diffusers back as it was before [`register`]; a second call changes nothing."""
    while _journal:
        mapping, key, previous = _journal.pop()
        if previous is _ABSENT:
            del mapping[key]
        else:
            mapping[key] = previous


def register_pipeline(cls: type, *, tasks: str | Iterable[str], key: str) -> type:
    """Let the AutoPipelines find your subclass of one of our pipelines.

    The other tasks of the family are there under the same key, so that `from_pipe` leads from your pipeline to them;
    the way back leads to the class that you have subclassed.

    Args:
        cls: your class; repos that it saves name it.
        tasks: one or several of `"text2image"`, `"image2image"`, `"inpainting"`.
        key: a name for the family that the AutoPipelines do not know yet.

    Returns:
        `cls`, so that it can be used in an expression.

    Raises:
        TypeError: `cls` is no subclass of a pipeline of this package.
        ValueError: a task is unknown, the key is taken, or another class is registered under the name of `cls`.
    """
    register()
    wanted = {tasks} if isinstance(tasks, str) else set(tasks)
    if not wanted or not wanted <= set(TASKS):
        raise ValueError(f"`tasks` is {sorted(wanted)}; accepted is one or several of {list(TASKS)}.")
    family = _family_of(cls)
    tables = _private_parts()[0]
    known = {name: entry for table in tables.values() for name, entry in table[0].items()}
    if key in known and cls not in [tables[task][0].get(key) for task in TASKS]:
        raise ValueError(f"`key` {key!r} is taken; choose one that is not among {sorted(known)}.")
    namesake = getattr(diffusers, cls.__name__, cls)
    if namesake is not cls:
        raise ValueError(f"a class named {cls.__name__!r} is registered already; give your class a name of its own.")
    for task in TASKS:
        entry = cls if task in wanted else family.get(task)
        if entry is not None:
            _put(tables[task][0], key, entry)
    _put(diffusers.__dict__, cls.__name__, cls)
    return cls


def _family_of(cls: type) -> dict[str, type]:
    """Task -> class of the family that `cls` comes from: combined pipelines for a combined one, else decoders."""
    columns = [
        {task: found for task, entry in family.items() if (found := entry[column]) is not None}
        for family in FAMILIES.values()
        for column in (0, 1)
    ]
    for base in cls.__mro__[1:]:
        for classes in columns:
            if base in classes.values():
                return classes
    raise TypeError(f"{cls.__name__} is no subclass of a pipeline of {LIBRARY} that AutoPipelines find.")


def _put(mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
    _journal.append((mapping, key, mapping.get(key, _ABSENT)))
    mapping[key] = value


def _private_parts() -> tuple[dict[str, tuple[Any, Any]], Any, Any, Any]:
    """What of diffusers the registry changes.

    Returns:
        The AutoPipeline tables by task (for prompts, for decoders), all of them in the order in which a class is
        looked for, and which classes diffusers loads from where (two tables).
    """
    try:
        from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

        auto = auto_pipeline
        tables = {
            "text2image": (auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, auto._AUTO_TEXT2IMAGE_DECODER_PIPELINES_MAPPING),
            "image2image": (auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, auto._AUTO_IMAGE2IMAGE_DECODER_PIPELINES_MAPPING),
            "inpainting": (auto.AUTO_INPAINT_PIPELINES_MAPPING, auto._AUTO_INPAINT_DECODER_PIPELINES_MAPPING),
        }
        search_order = auto.SUPPORTED_TASKS_MAPPINGS
    except (ImportError, AttributeError) as error:
        raise UnsupportedDiffusersError(
            f"{LIBRARY} supports diffusers {SUPPORTED_DIFFUSERS}; in {diffusers.__version__} a part that it relies on"
            f" is missing: {error}"
        ) from error
    return tables, search_order, LOADABLE_CLASSES, ALL_IMPORTABLE_CLASSES
