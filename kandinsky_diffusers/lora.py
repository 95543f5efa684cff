"""LoRA for every pipeline: loading in any format, saving in that of diffusers, fusing, weighting, unloading."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils.torch_utils import unwrap_module

from .inputs import check_choice
from .lora_files import ALPHA, find_lora, lora_from, prefix_of, read_lora
from .lora_fit import config_for, parts_for


_changes: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # how often adapters of a model came, went or were fused
_SCALING_BEFORE_FUSING = "scaling_before_fusing"


class _OnClassOrPipeline:
    """A method whose first argument is the pipeline, or the class when it is called on that."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, pipeline: Any, cls: type) -> Callable[..., Any]:
        return partial(self._function, cls if pipeline is None else pipeline)


class KandinskyLoraMixin(LoraBaseMixin):
    """The LoRA methods of diffusers' pipelines, for the models named in `_lora_loadable_modules`."""

    _lora_loadable_modules: ClassVar[list[str]] = ["unet"]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
        **hub_options: Any,
    ) -> None:
        """Load a LoRA and make it the active one.

        Files of peft, of diffusers (new and old) and of the fork kandinsky3_diffusers are told by their keys. A file
        with parts for UNet and prior is loaded into both, where the pipeline has both. Pickled files are read as data,
        code in them is not run. Nothing is changed unless everything fits.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, a Hub id, or named tensors.
            adapter_name: a name for it, without dots; `default_0` and so on for None.
            hotswap: put it in the place of the adapter of this name, see diffusers.
            weight_name: the file in the folder or repository; None for the usual names.
            subfolder: where the file lies in it.
            use_safetensors: True for safetensors files only, False for pickled ones only.
            low_cpu_mem_usage: do not draw random numbers for the layers before the weights are put in.
            hub_options: as for [`huggingface_hub.snapshot_download`]: `revision`, `token`, `cache_dir` ....

        Raises:
            ImportError: peft is missing.
            FileNotFoundError: there is no such file.
            ValueError: it is no LoRA, belongs to another model, does not fit the layers, or the name is taken.
        """
        _require_peft()
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, Mapping):
            lora = lora_from(source)
        else:
            lora = read_lora(find_lora(source, weight_name, subfolder, use_safetensors, **hub_options))
        models = self._lora_models()
        parts = parts_for(models, lora, type(self).__name__)
        configs = {name: config_for(models[name], tensors, stored, lora) for name, (tensors, stored) in parts.items()}
        adapter_name = self._checked_name(adapter_name, list(parts), hotswap)
        with self._open_layers():
            for name, (tensors, _) in parts.items():
                _remember_trainable(models[name])
                models[name].load_lora_adapter(
                    {key: tensor.clone() for key, tensor in tensors.items() if not key.endswith(f".{ALPHA}")},
                    prefix=None,
                    adapter_name=adapter_name,
                    metadata=configs[name],
                    hotswap=hotswap,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                )
                for layer in _lora_layers(models[name]):
                    layer.train(models[name].training)  # dropout, where the configuration has some

    @_OnClassOrPipeline
    def save_lora_weights(  # pyright: ignore (that of diffusers is only for the class)
        self,
        save_directory: str | os.PathLike,
        unet_lora_layers: Mapping[str, Any] | torch.nn.Module | None = None,
        prior_lora_layers: Mapping[str, Any] | torch.nn.Module | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        prior_lora_adapter_metadata: Mapping[str, Any] | None = None,
        *,
        adapter_name: str | None = None,
    ) -> None:
        """Save a LoRA in the format of diffusers, `pytorch_lora_weights.safetensors`.

        On a pipeline, `pipe.save_lora_weights(folder)` saves the adapter that is loaded. As in diffusers, weights can
        be given instead, and then it can be called on the class.

        Args:
            save_directory: a folder; it is made if it is not there.
            unet_lora_layers: peft's state dict of the UNet's LoRA.
            prior_lora_layers: peft's state dict of the prior's LoRA.
            is_main_process: False writes nothing.
            weight_name: another name for the file.
            save_function: another function to write it with; takes tensors and path.
            safe_serialization: False writes a pickled file, which cannot hold the configuration.
            unet_lora_adapter_metadata: `LoraConfig.to_dict()` of given layers; without it alpha is the rank.
            prior_lora_adapter_metadata: likewise.
            adapter_name: which of several loaded adapters.

        Raises:
            ValueError: there is nothing to save, or it is not said which of several adapters; or the folder is a file.
        """
        if Path(save_directory).is_file():
            raise ValueError(f"`save_directory` is {str(save_directory)!r}, a file; accepted is a folder.")
        if not is_main_process:
            return
        given = {"unet": unet_lora_layers, "prior": prior_lora_layers}
        layers: dict[str, Any] = {prefix: tensors for prefix, tensors in given.items() if tensors is not None}
        configs: dict[str, Any] = {"unet": unet_lora_adapter_metadata, "prior": prior_lora_adapter_metadata}
        if not layers and isinstance(self, type):
            raise ValueError(
                "`unet_lora_layers` and `prior_lora_layers` are None; on the class, accepted is one of them."
            )
        if not layers:
            layers, configs = self._loaded_lora(adapter_name)
        options: dict[str, Any] = {"weight_name": weight_name, "save_function": save_function}
        self._save_lora_weights(
            save_directory=save_directory,
            lora_layers=layers,
            lora_metadata={prefix: config and _plain(config) for prefix, config in configs.items()},
            safe_serialization=safe_serialization,
            **options,
        )

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As diffusers does.

        Raises:
            ValueError: adapters are loaded; their layers would be saved as parts of models that nothing can load.
        """
        if loaded := self.get_list_adapters():
            raise ValueError(
                f"The adapters {loaded} are loaded, with which a model cannot be saved. Call `fuse_lora()` and"
                " `unload_lora_weights()` to save them as part of it; `save_lora_weights()` saves them alone."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Mapping[str, Any] | Sequence[float | Mapping[str, Any] | None] | None = None,
    ) -> None:
        """Choose the active adapters, and how much each of them counts.

        Args:
            adapter_names: one or several that are loaded.
            adapter_weights: one for all, or one for each; 1 for None. A dict gives one for each model (`unet`,
                `prior`, `prior_prior`), which may be, as in diffusers, a dict by blocks.

        Raises:
            ValueError: an adapter is not loaded, numbers do not agree, a model is unknown, or adapters are fused.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        several = isinstance(adapter_weights, Sequence)
        weights = list(adapter_weights) if several else [adapter_weights] * len(names)  # pyright: ignore
        if len(weights) != len(names):
            raise ValueError(
                f"`adapter_weights` are {len(weights)}; accepted is one for each of {len(names)} adapters."
            )
        self._check_loaded(names)
        self._check_not_fused()
        for weight in weights:
            for component in weight if isinstance(weight, Mapping) else ():
                check_choice("adapter_weights", component, list(self._lora_loadable_modules))
        for component, model in self._lora_models().items():
            model.set_adapters(names, [_weight_for(component, weight) for weight in weights])

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Add adapters to the weights of the model, which then runs as fast as without them.

        `unload_lora_weights` leaves fused adapters in the weights; to be rid of them, call `unfuse_lora` before.

        Args:
            components: models of this pipeline; all of them for None.
            lora_scale: factor on the adapters.
            safe_fusing: refuse results that are not finite.
            adapter_names: which of the loaded ones; the active ones for None.

        Raises:
            ValueError: a component or adapter is unknown, or a result is not finite.
        """
        self._check_loaded(adapter_names or ())
        try:
            with self._open_layers():
                for layer in self._layers_of(components):
                    _fuse(layer, adapter_names or layer.active_adapters, lora_scale, safe_fusing)
        except ValueError:
            self.unfuse_lora(components)
            raise
        self._merged_adapters = self._merged_adapters | self._fused_now()

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Take fused adapters out of the weights again; they act beside them, as before.

        Args:
            components: models of this pipeline; all of them for None.

        Raises:
            ValueError: a component is unknown.
        """
        with self._open_layers():
            for layer in self._layers_of(components):
                if layer.merged:
                    layer.unmerge()
                layer.scaling.update(vars(layer).pop(_SCALING_BEFORE_FUSING, {}))
        self._merged_adapters = self._fused_now()

    def unload_lora_weights(self) -> None:
        """Take all adapters off; the models are as they were before, but for what was fused."""
        with self._open_layers():
            for model in self._lora_models().values():
                _unload(model)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take some adapters off.

        Args:
            adapter_names: one or several that are loaded.

        Raises:
            ValueError: one of them is not loaded, or adapters are fused.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_loaded(names)
        self._check_not_fused()
        with self._open_layers():
            for model in self._lora_models().values():
                model.delete_adapters([name for name in names if name in _adapters(model)])
                if not _adapters(model):
                    _unload(model)

    def enable_lora(self) -> None:
        """Let adapters act again."""
        for model in self._lora_models().values():
            model.enable_lora()

    def disable_lora(self) -> None:
        """Draw as if there were no adapters."""
        for model in self._lora_models().values():
            model.disable_lora()

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The loaded adapters of each model."""
        return {name: _adapters(model) for name, model in self._lora_models().items() if _adapters(model)}

    def get_active_adapters(self) -> list[str]:
        """The adapters that act on one of the models."""
        return list(dict.fromkeys(name for layer in self._layers_of(None) for name in layer.active_adapters))

    def _lora_models(self) -> dict[str, Any]:
        """The models that take LoRA, also those behind `torch.compile(model)`, by component."""
        components = {name: getattr(self, name, None) for name in self._lora_loadable_modules}
        return {name: unwrap_module(model) for name, model in components.items() if model is not None}

    def _layers_of(self, components: Sequence[str] | None) -> list[Any]:
        for component in components or ():
            check_choice("components", component, list(self._lora_loadable_modules))
        models = self._lora_models()
        return [layer for name in components or models if name in models for layer in _lora_layers(models[name])]

    def _loaded_lora(self, adapter_name: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors and configurations of a loaded adapter, by the prefixes that they have in a file."""
        from peft import get_peft_model_state_dict

        loaded = sorted({name for names in self.get_list_adapters().values() for name in names})
        if adapter_name is None and len(loaded) != 1:
            raise ValueError(f"`adapter_name` is None; accepted is one of the loaded adapters: {loaded}.")
        name = adapter_name or loaded[0]
        self._check_loaded([name])
        models = {prefix_of(key): model for key, model in self._lora_models().items() if name in _adapters(model)}
        with self._open_layers():
            layers = {key: get_peft_model_state_dict(model, adapter_name=name) for key, model in models.items()}
        return layers, {key: model.peft_config[name].to_dict() for key, model in models.items()}

    def _checked_name(self, name: str | None, components: Sequence[str], hotswap: bool) -> str:
        self._check_not_fused()
        loaded = self.get_list_adapters()
        known = {name for names in loaded.values() for name in names}
        if hotswap and not all(name in loaded.get(component, ()) for component in components):
            raise ValueError(f"`adapter_name` is {name!r}; with `hotswap=True` accepted is one of {sorted(known)}.")
        if name is None:
            return next(free for number in range(len(known) + 1) if (free := f"default_{number}") not in known)
        if not name or "." in name:
            raise ValueError(f"`adapter_name` is {name!r}; accepted is a name without dots.")
        if name in known and not hotswap:
            raise ValueError(f"`adapter_name` {name!r} is taken; loaded are {sorted(known)}.")
        return name

    def _check_loaded(self, names: Sequence[str]) -> None:
        known = {name for names in self.get_list_adapters().values() for name in names}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"`adapter_names` has {unknown[0]!r}; loaded are {sorted(known)}.")

    def _fused_now(self) -> set[str]:
        return {name for layer in self._layers_of(None) for name in layer.merged_adapters}

    def _check_not_fused(self) -> None:
        if fused := sorted(self._fused_now()):
            raise ValueError(
                f"{', '.join(fused)} is fused into the weights, beside which no other adapter acts. Call"
                " `unfuse_lora()` before, or `unload_lora_weights()`, which leaves it in the weights."
            )

    @contextmanager
    def _open_layers(self) -> Iterator[None]:
        """While layers are changed: without the hooks of sequential offload, and with those of group offload renewed.

        The hook of model offload is on the whole model, and need not know.
        """
        models = self._lora_models()
        for name, model in models.items():
            if _is_offloaded_to_disk(model):
                raise ValueError(
                    f"`{name}` is offloaded to disk layer by layer, where layers cannot be changed or saved. Do so"
                    " first, and then call `enable_group_offload(offload_to_disk_path=...)`."
                )
        sequential = any(_is_offloaded_by_layer(model) for model in models.values())
        device = getattr(self, "_offload_device", None)
        if sequential and device is None:
            raise ValueError(
                "Models of this pipeline are offloaded layer by layer, but not by its own "
                "`enable_sequential_cpu_offload()`. Load and fuse LoRAs first, and offload then."
            )
        with self._weights_change():
            if sequential:
                self.remove_all_hooks()
            try:
                yield
            finally:
                for model in models.values():
                    model.delete_adapters(())  # which makes diffusers renew the hooks of group offload
                    _changes[model] = times_changed(model) + 1
                if sequential:
                    self.enable_sequential_cpu_offload(device=device)


def times_changed(model: Any) -> int:
    """How often the pipelines have given a model adapters, taken them off, or fused them."""
    return _changes.get(unwrap_module(model), 0)


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("LoRA needs peft: `pip install kandinsky-diffusers[lora]`.") from error


def _lora_layers(model: torch.nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


def _fuse(layer: Any, names: Sequence[str], scale: float, safe: bool) -> None:
    """Fuse those adapters that the layer has; what they are scaled by is kept, to be given back with the weights."""
    names = [name for name in names if name in layer.scaling and name not in layer.merged_adapters]
    kept = vars(layer).setdefault(_SCALING_BEFORE_FUSING, {})
    for name in names:
        kept[name] = layer.scaling[name]
        layer.scaling[name] *= scale
    if names:
        layer.merge(safe_merge=safe, adapter_names=names)


def _adapters(model: Any) -> list[str]:
    return list(getattr(model, "peft_config", ()))


def _remember_trainable(model: Any) -> None:
    """Loading the first adapter freezes the model; unloading gives back what could be trained before."""
    if not _adapters(model):
        model._trainable_before_lora = [name for name, tensor in model.named_parameters() if tensor.requires_grad]


def _unload(model: Any) -> None:
    model.unload_lora()
    for name in vars(model).pop("_trainable_before_lora", ()):
        model.get_parameter(name).requires_grad_(True)
    vars(model).pop("_hf_peft_config_loaded", None)  # back to the class's own


def _is_offloaded_to_disk(model: torch.nn.Module) -> bool:
    registries = (getattr(layer, "_diffusers_hook", None) for layer in model.modules())
    hooks = (registry.get_hook("group_offloading") for registry in registries if registry is not None)
    return any(hook.config.offload_to_disk_path is not None for hook in hooks if hook is not None)


def _is_offloaded_by_layer(model: torch.nn.Module) -> bool:
    return any(getattr(getattr(layer, "_hf_hook", None), "offload", False) for layer in model.modules())


def _weight_for(component: str, weight: Any) -> Any:
    return weight.get(component) if isinstance(weight, Mapping) else weight


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON, and the same in every process: sets as sorted lists."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
