"""What is written down about a conversion: ``conversion.json`` and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..cards import render_card, versions
from .planning import ModelPlan
from .recipe import Inputs, ModelComponent, Release, Repo
from .repository import Output
from .writer import write_json


@dataclass(frozen=True)
class SourceRecord:
    """A source file and its SHA-256."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Record:
    """The facts about a conversion.

    Args:
        release: what was converted.
        sources: per file name of the release, what it consists of (one file, or the parts of a sharded one), each
            with its path, size and SHA-256.
        models: per model what it was made from.
        options: how it was written.
        dropped: source file, key and reason of all tensors that were left out.
    """

    release: Release
    sources: Mapping[str, dict[str, dict[str, Any]]]
    models: Mapping[ModelComponent, dict[str, Any]]
    options: dict[str, Any]
    dropped: list[tuple[str, str, str]]

    @classmethod
    def of(
        cls,
        release: Release,
        inputs: Inputs,
        plans: Mapping[ModelComponent, ModelPlan],
        output: Output,
        hashes: Mapping[str, list[SourceRecord]],
    ) -> Record:
        """Collect the facts."""
        sources = {name: _described(name, found, release.file(name).root, inputs) for name, found in hashes.items()}
        models = {
            component: {
                "class": component.class_name,
                "sources": list(plan.files),
                "tensors": len(plan.plan.target_shapes),
                "parameters": sum(prod(shape) for shape in plan.plan.target_shapes.values()),
                "dropped": dict(plan.plan.dropped),
            }
            for component, plan in plans.items()
        }
        options = {"dtype": output.dtype, "variant": output.variant, "layout": release.layout, "stub": output.stub}
        return cls(release, sources, models, options, _dropped(plans, inputs))

    def of_repo(self, repo: Repo, check: dict[str, Any] | None) -> dict[str, Any]:
        """What ``conversion.json`` of one repository says."""
        models = {model.label: self.models[model] for model in repo.models}
        used = dict.fromkeys(name for model in models.values() for name in model["sources"])
        return {
            "converter": "kandinsky_diffusers",
            "versions": versions(),
            "version": self.release.version,
            "repository": repo.name,
            "options": self.options | {"stub": self.options["stub"] and repo.pipeline is not None},
            "sources": {label: facts for name in used for label, facts in self.sources[name].items()},
            "components": models,
            "verification": check,
        }


def _described(name: str, found: list[SourceRecord], root: str, inputs: Inputs) -> dict[str, dict[str, Any]]:
    labels = [name] if len(found) == 1 else [f"{name} {number} of {len(found)}" for number in range(1, len(found) + 1)]
    return {
        label: {
            "file": record.path.relative_to(inputs.folders[root]).as_posix(),
            "folder": root,
            "bytes": record.path.stat().st_size,
            "sha256": record.sha256,
        }
        for label, record in zip(labels, found, strict=True)
    }


def write_card(place: Path, repo: Repo, record: Record, check: dict[str, Any] | None) -> None:
    """Write ``conversion.json`` and ``README.md``."""
    facts = record.of_repo(repo, check)
    write_json(place / "conversion.json", facts)
    render_card(repo.name, facts).save(place / "README.md")


def _dropped(plans: Mapping[ModelComponent, ModelPlan], inputs: Inputs) -> list[tuple[str, str, str]]:
    found = []
    for plan in plans.values():
        owners = {key: inputs.label(name) for name in plan.files for key in inputs.files[name].shapes}
        found += [(owners[key], key, reason) for key, reason in plan.plan.dropped.items()]
    return list(dict.fromkeys(found))
