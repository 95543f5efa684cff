"""From opened files to plans: which models they make, in which configuration, key by key."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .errors import ConversionError
from .matching import Plan, Shapes, match
from .recipe import Inputs, ModelComponent, Release, WeightsComponent
from .rules import RuleTable


_MOST_PARAMETERS = 5_000  # the largest published model has a quarter of it
_SHOWN = 500  # characters of a configuration, in messages


@dataclass(frozen=True)
class ModelPlan:
    """How one model is made.

    Args:
        component: the model's place in a repository.
        files: names of its source files that are there.
        config: its configuration; empty when the file that tells it is not there.
        plan: what becomes of every key.
        model: the model on the meta device, without weights; None when the configuration is not known, or there is no
            model.
        notes: what could not be checked, and why.
    """

    component: ModelComponent
    files: tuple[str, ...]
    config: dict[str, Any]
    plan: Plan
    model: Any
    notes: tuple[str, ...] = ()


def plan_model(component: ModelComponent, inputs: Inputs, drop: Sequence[str] = ()) -> ModelPlan:
    """Plan one model from those of its files that ``inputs`` has.

    Raises:
        ConversionError: see :func:`~.matching.match`; also when a tensor that tells a size is missing, or the sizes
            do not make a model.
    """
    present = [part for part in component.parts if part.file in inputs.files]
    absent = [part for part in component.parts if part.file not in inputs.files]
    shapes = _merge(component, inputs)
    title = f"{' and '.join(inputs.label(part.file) for part in present)} -> {component.class_name}"
    main = component.parts[0]
    config = _configure(component, inputs, title) if main in present else None
    model, expected = None, None
    if config is not None and isinstance(component, WeightsComponent):
        with _sizes_of_a_model(title, config):
            expected = component.shapes(config)
    elif config is not None:
        model = build_on_meta(component, config, title)
        expected = expected_shapes(model)
    tables = {part: part.rules(config or {}) for part in component.parts if part in present or config is not None}
    table = sum((tables[part] for part in present), RuleTable())
    rest = sum((tables[part] for part in absent if part in tables), RuleTable())
    plan = match(table, shapes, expected, drop=drop, excused=rest.produces, title=title)
    notes = [f"{part.file} is not there, its tensors were not checked" for part in absent]
    if config is None and main in present:
        notes.append("without the configuration beside it, keys and shapes were not compared with a model")
    return ModelPlan(component, tuple(part.file for part in present), config or {}, plan, model, tuple(notes))


def plan_all(release: Release, inputs: Inputs, drop: Sequence[str] = ()) -> list[ModelPlan]:
    """Plan every model of ``release`` of which ``inputs`` has a file.

    Raises:
        ConversionError: all that is wrong with any of them.
    """
    models = [model for model in release.models if any(part.file in inputs.files for part in model.parts)]
    return plan_models(models, inputs, drop)


def plan_models(models: Sequence[ModelComponent], inputs: Inputs, drop: Sequence[str] = ()) -> list[ModelPlan]:
    """Plan several models, and report all their faults together.

    Raises:
        ConversionError: all that is wrong with any of them, and ``drop`` patterns without effect.
    """
    plans, faults = [], []
    for model in models:
        try:
            plans.append(plan_model(model, inputs, drop))
        except ConversionError as error:
            faults.append(str(error))
    faults += _idle_patterns(inputs, drop)
    if faults:
        raise ConversionError("\n".join(dict.fromkeys(faults)))
    return plans


def build_on_meta(component: ModelComponent, config: dict[str, Any], title: str) -> Any:
    """The model without weights, for its keys, shapes and configuration file. It is shared, and not to be changed.

    Raises:
        ConversionError: the class refuses the configuration.
    """
    with _sizes_of_a_model(title, config):
        return _built(component.load_class(), json.dumps(config, sort_keys=True))


@functools.lru_cache(maxsize=32)  # repositories of a release often have the same models
def _built(cls: Any, config_json: str) -> Any:
    config = json.loads(config_json)
    if not getattr(cls, "config_class", None):
        return cls.from_config(config)
    model = cls(cls.config_class(**config))
    model.config.to_diff_dict()  # what will be written: a setting can have the name of a method
    return model


@contextmanager
def _sizes_of_a_model(title: str, config: dict[str, Any]) -> Iterator[None]:
    """Models are made on the meta device here, and what their classes say to the configuration is made one error."""
    import torch
    from huggingface_hub.errors import StrictDataclassError

    try:
        with torch.device("meta"), _at_most(_MOST_PARAMETERS):
            yield
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
        ArithmeticError,
        ImportError,
        AssertionError,
        StrictDataclassError,
    ) as error:
        sizes = f"{config}"[:_SHOWN]
        raise ConversionError(f"{title}: the sizes {sizes} do not make a model: {f'{error}'[:_SHOWN]}") from error


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Stop a model that a configuration with ``"num_layers": 1000000000`` would make, before it fills the memory."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    made = itertools.count(1)

    def count(*registered: Any) -> None:
        if next(made) > parameters:
            raise ValueError(f"it would have more than {parameters} tensors")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def expected_shapes(model: Any) -> Shapes:
    """Key to shape of all tensors that a model's file has to hold; of tied ones, which are the same, the first."""
    first: dict[int, tuple[str, Any]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (key, tensor))
    return {key: tuple(tensor.shape) for key, tensor in first.values()}


def _merge(component: ModelComponent, inputs: Inputs) -> Shapes:
    merged: dict[str, tuple[int, ...]] = {}
    for part in component.parts:
        shapes = inputs.files[part.file].shapes if part.file in inputs.files else {}
        if clash := merged.keys() & shapes.keys():
            raise ConversionError(f"{sorted(clash)[0]} is in several files of {component.label}.")
        merged.update(shapes)
    return merged


def _configure(component: ModelComponent, inputs: Inputs, title: str) -> dict[str, Any] | None:
    try:
        return component.configure(inputs.files[component.parts[0].file].shapes, inputs)
    except ConversionError as error:
        raise ConversionError(f"{title}: {error}") from error
    except (IndexError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ConversionError(f"{title}: the shapes do not tell the sizes of the model: {error}") from error


def _idle_patterns(inputs: Inputs, drop: Sequence[str]) -> list[str]:
    from fnmatch import fnmatchcase

    keys = [key for file in inputs.files.values() for key in file.shapes]
    return [f"--drop {glob} matches no key" for glob in drop if not any(fnmatchcase(key, glob) for key in keys)]
