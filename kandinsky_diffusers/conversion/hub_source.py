"""Sources that are repositories in the Hub's format already: where their weights lie, and what their files tell."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import ConversionError
from .json_files import read_json
from .matching import Shapes
from .recipe import FilesComponent, Inputs


INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler_config.json"

_STEMS = {"diffusers": ("diffusion_pytorch_model",) * 2, "transformers": ("model", "pytorch_model")}
_VARIANTS = ("", ".fp16", ".bf16")  # the weights in full precision, if they are there
_BOOKKEEPING = ("architectures", "dtype", "model_type", "torch_dtype", "transformers_version")
# with these a configuration could make transformers fetch code for attention, or a table of any size
_NOT_OF_A_MODEL = (
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "id2label",
    "label2id",
    "num_labels",
    "per_layer_config",
    "quantization_config",
)


def find_pipelines(folder: Path) -> dict[Path, str]:
    """The repositories that ``folder`` is or holds, each with the class name of its pipeline.

    Raises:
        ConversionError: a ``model_index.json`` cannot be read.
    """
    places = [folder] if (folder / INDEX).is_file() else sorted(path.parent for path in folder.glob(f"*/{INDEX}"))
    return {place: str(read_json(place / INDEX).get("_class_name")) for place in places}


def weight_paths(folder: str, library: str) -> tuple[str, ...]:
    """Where the weights of a component may lie, the best first: safetensors, then pickles, then half precision."""
    return tuple(str(PurePosixPath(folder, name)) for variant in _VARIANTS for name in _weight_names(library, variant))


def _weight_names(library: str, variant: str) -> Iterator[str]:
    for stem, ending in zip(_STEMS[library], ("safetensors", "bin"), strict=True):
        yield f"{stem}{variant}.{ending}"
        yield f"{stem}.{ending}.index{variant}.json"


def published_config(shapes: Shapes, inputs: Inputs, *, root: str, folder: str) -> dict[str, Any] | None:
    """The configuration of a model, from the ``config.json`` beside its weights; None where no folder is known.

    Raises:
        ConversionError: there is none, or it cannot be read.
    """
    if root not in inputs.folders:
        return None
    return model_settings(read_json(inputs.folders[root] / folder / "config.json"))


def model_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """What of a published ``config.json``, or of a part of one, are arguments of the model."""
    left_out = (*_BOOKKEEPING, *_NOT_OF_A_MODEL)
    return {key: value for key, value in content.items() if key not in left_out and not key.startswith("_")}


def copied_scheduler(class_name: str, *, root: str) -> FilesComponent:
    """A scheduler whose configuration is copied; ``class_name`` is the published one, the file may name another."""

    def named(inputs: Inputs) -> str:
        return _scheduler_class(inputs.folders[root] / "scheduler" / SCHEDULER_CONFIG)

    def write(inputs: Inputs, target: Path) -> None:
        target.mkdir(parents=True)
        shutil.copyfile(inputs.folders[root] / "scheduler" / SCHEDULER_CONFIG, target / SCHEDULER_CONFIG)

    def check(inputs: Inputs) -> None:
        named(inputs)

    return FilesComponent("scheduler", "diffusers", class_name, write=write, check=check, named=named)


def _scheduler_class(path: Path) -> str:
    import diffusers

    name = str(read_json(path).get("_class_name"))
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise ConversionError(f"{path} names the class {name}, which is not a scheduler of diffusers.")
    return name
