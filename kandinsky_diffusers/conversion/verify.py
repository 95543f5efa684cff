"""Proof that a written repository is what its source was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConversionError
from .planning import ModelPlan
from .reader import SafetensorsFile, WeightFile
from .recipe import Repo
from .repository import RepoWriter, merged, run_step, weights_stem


if TYPE_CHECKING:
    import torch


def verify_repo(repo: Repo, place: Path, writer: RepoWriter) -> dict[str, Any]:
    """Map every written tensor back, compare it with its source bit for bit, then load the repository and run it once.

    Returns:
        Per model the number of compared tensors, and what was run.

    Raises:
        ConversionError: a tensor differs, or the repository does not load or run.
    """
    compared = {model.label: compare_model(writer.plans[model], place / model.name, writer) for model in repo.models}
    return {"bit_identical_tensors": compared, "loaded_and_run": run_once(repo, place, writer)}


def compare_model(plan: ModelPlan, place: Path, writer: RepoWriter) -> int:
    """Compare the source tensors of a model, cast like the written ones, with the written ones mapped back.

    Returns:
        How many were compared; it is all that the plan does not drop.

    Raises:
        ConversionError: one differs.
    """
    written = _written(place, weights_stem(plan))
    source = merged(plan, writer.inputs)
    compared = 0
    for step in plan.plan.inverse.steps:
        for key, restored in zip(step.targets, run_step(step, written), strict=True):
            original = source[key].tensor(key)
            if not _same_bits(original.to(restored.dtype), restored):
                raise ConversionError(f"{place}: {key} differs from its source after writing.")
            compared += 1
    if compared + len(plan.plan.dropped) + len(plan.plan.elsewhere) != len(source):
        raise ConversionError(f"{place}: only {compared} of {len(source)} source tensors could be compared.")
    return compared


def run_once(repo: Repo, place: Path, writer: RepoWriter) -> str:
    """Load a repository as its users do, in float32, and run it.

    Returns:
        The name of the class of what was loaded.

    Raises:
        ConversionError: it does not load, or does not give finite results.
    """
    import torch

    try:
        loaded = repo.load(place, writer.output.variant)
        results = repo.smoke(loaded)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ConversionError(f"{repo.name} was written, but does not run: {error!r}") from error
    if not all(bool(torch.as_tensor(result).isfinite().all()) for result in results):
        raise ConversionError(f"{repo.name} was written, but its results are not finite.")
    return type(loaded).__name__


def _written(place: Path, stem: str) -> Mapping[str, WeightFile]:
    files = [SafetensorsFile(path) for path in sorted(place.glob(f"{stem}*.safetensors"))]
    return {key: file for file in files for key in file.shapes}


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    import torch

    if first.shape != second.shape:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
