"""What all pipelines share: components of ours in the place of stock ones, saving, and the MoVQ's memory savings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.hooks import apply_group_offloading
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME, SchedulerMixin
from diffusers.utils.torch_utils import unwrap_module
from huggingface_hub import CommitInfo
from transformers import PreTrainedModel

from .attention import enable_xformers, use_dispatched_attention
from .components import adopt, hidden, stock_identity
from .eight_bits import check_savable
from .fitting import FittingMixin
from .hub import open_repo, push_saved
from .movq import MoVQ
from .optimization import Optimization, optimizable, take_back
from .options import complete_arguments


HALF_PRECISION = (torch.float16, torch.bfloat16)
SIDE_SCHEDULERS = ("ddpm_scheduler", "ancestral_scheduler")


_dtypes_are_chosen: ContextVar[bool] = ContextVar("dtypes_are_chosen", default=False)


class KandinskyPipelineMixin(FittingMixin):
    """Mixed in before the stock pipeline class.

    A stock component for which there is a better class is taken on as a view of that class; `model_index.json` goes on
    naming the stock class, so that what is saved loads without this package.
    """

    _exact_reference = False
    _optimization: Optimization | None = None
    _weights_are_changing = False
    _float32_components: tuple[str, ...] = ()  # half precision is not for these
    _adopted_schedulers: tuple[str, ...] = ()  # components for which a scheduler of ours may replace the stock one

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._adopted_schedulers or not isinstance(value, SchedulerMixin):
            value = adopt(value)
        if isinstance(value, UNet2DConditionModel):
            use_dispatched_attention(value)
        super().__setattr__(name, value)
        identity = stock_identity(value)
        if identity is not None and name in self.config:
            self.register_to_config(**{name: identity})

    @property
    def _autoencoder(self) -> Any:
        """The component between pixels and latents."""
        return self.movq

    @property
    def _decoding(self) -> dict[str, Any]:
        """What the MoVQ's `decode` is told besides; one that is not ours has nothing to switch off."""
        movq = unwrap_module(self._autoencoder)
        return {"exact_reference": self._exact_reference} if isinstance(movq, MoVQ) else {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """As diffusers does; in a family whose MoVQ needs float32 a half-precision `dtype` is for the other models.

        A dict, such as `dtype={"default": torch.float16}`, is taken at its word.
        """
        name = "dtype" if "dtype" in kwargs else "torch_dtype"
        dtype = kwargs.get(name)
        if cls._float32_components and dtype in HALF_PRECISION:
            kwargs[name] = {"default": dtype, **dict.fromkeys(cls._float32_components, torch.float32)}
        token = _dtypes_are_chosen.set(isinstance(dtype, dict))
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        finally:
            _dtypes_are_chosen.reset(token)

    def _in_float32(self, component: Any) -> Any:
        """A model that needs float32, in it, unless the user has chosen the dtype of each component."""
        if component is not None and component.dtype in HALF_PRECISION and not _dtypes_are_chosen.get():
            component.float()  # cast by a `from_pretrained` that is not ours
        return component

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As diffusers does; in a family whose MoVQ needs float32, half precision leaves it as it is."""
        with self._weights_change():
            return self._moved(*args, **kwargs)

    def _moved(self, *args: Any, **kwargs: Any) -> Self:
        dtype = kwargs.get("dtype", next((value for value in args if isinstance(value, torch.dtype)), None))
        if dtype not in HALF_PRECISION or not self._float32_components:
            return super().to(*args, **kwargs)
        device = kwargs.pop("device", next((value for value in args if not isinstance(value, torch.dtype)), None))
        with hidden(self, self._float32_components):
            super().to(**{**kwargs, "dtype": dtype})
        return self if device is None else super().to(device, **{**kwargs, "dtype": None})

    def check_call(self, **arguments: Any) -> dict[str, Any]:
        """Check what a call would be given; no model runs.

        Returns:
            All arguments of the call by their names, with what the pipeline or its repository has for those left out.

        Raises:
            TypeError, ValueError: as the call would.
        """
        completed = complete_arguments(self, arguments)
        self._plan(completed)
        return self._with_defaults(completed)

    def _plan(self, arguments: Mapping[str, Any]) -> Any:
        """All of a call that can be done without a model."""
        return self._check(arguments)

    def _with_defaults(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return dict(arguments)

    def exact_reference(self, enabled: bool = True) -> Self:
        """Switch off, or on again, every saving that moves last bits, such as the prior's cache; returns `self`.

        It is this pipeline's alone: others that share models with it go on as they were told, but for [`optimize`],
        which is on the models, and is off meanwhile.
        """
        self._exact_reference = enabled
        if self._optimization is not None:
            self._reoptimize()
        return self

    def optimize(
        self,
        enabled: bool = True,
        *,
        channels_last: bool = True,
        fuse_projections: bool = True,
        compile: bool | Mapping[str, Any] = True,
        packed_weights: bool = True,
        cuda_graph: bool = True,
        attention_backend: str | None = None,
    ) -> Self:
        """Make the models faster by what moves only last bits, or take that back; returns `self`.

        What is not possible for a model is left out, and a message says why. The choice holds for the pipeline: it is
        applied anew when models are moved, offloaded or given adapters, and waits while `exact_reference(True)` holds.
        For a model that is put in later call it again. Pipelines that share models share what is done to them. Weights
        are saved as ever.

        Args:
            enabled: False takes everything back, whatever the other arguments are.
            channels_last: keep weights of convolutions in `torch.channels_last`.
            fuse_projections: compute queries, keys and values that are of the same input in one matrix product. Not
                with LoRA, and not where weights are offloaded or quantized.
            compile: run torch.compile on the repeated blocks of each model (`_repeated_blocks`), with these options.
                The first size of a picture is compiled for, and at the second any other. On the CPU only where
                options are given.
            packed_weights: on the CPU, keep beside the weights of convolutions copies in the layout in which oneDNN
                computes, which else are made at each call. They are made when a layer first runs, and take as much
                memory as these weights again, which [`fit`] does not count. Not where layers are compiled, offloaded
                or quantized.
            cuda_graph: record the forward of each model as a CUDA graph, the second time that inputs of the same sizes
                come, and replay it from then on; up to eight for a model. Not where weights are offloaded or
                quantized. The graphs share memory, so do not run models of one pipeline in several threads at once.
            attention_backend: as for diffusers' `set_attention_backend`; None leaves it. Models whose attention has
                masks are left out by one that takes none.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        if not isinstance(enabled, bool):
            raise TypeError(f"`enabled` is {enabled!r}; accepted is True or False.")
        settings = {
            "channels_last": channels_last,
            "fuse_projections": fuse_projections,
            "compile": compile,
            "packed_weights": packed_weights,
            "cuda_graph": cuda_graph,
            "attention_backend": attention_backend,
        }
        optimization = Optimization(settings)
        if not enabled or self._optimization is None or optimization.chosen != self._optimization.chosen:
            take_back(optimizable(self.components).values())
            self._optimization = optimization if enabled else None
        self._reoptimize()
        return self

    def _reoptimize(self) -> None:
        """Bring the models in line with what was chosen."""
        models = optimizable(self.components)
        if self._exact_reference:
            take_back(models.values())
        elif self._optimization is not None:
            self._optimization.apply(models)

    @contextmanager
    def _weights_change(self) -> Iterator[None]:
        """Around what moves or replaces weights, or puts hooks on models: what cannot stay is off meanwhile."""
        if self._optimization is None or self._weights_are_changing:
            yield
            return
        take_back(optimizable(self.components).values(), keep_what_stays=True)
        self._weights_are_changing = True
        try:
            yield
        finally:
            self._weights_are_changing = False
            self._reoptimize()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        *,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> None:
        """As diffusers does, and keeps the side folders with further schedulers of the repo it was loaded from.

        With `push_to_hub=True` what is in the folder afterwards is pushed, as by [`push_to_hub`], to `repo_id`, or to
        the name of the folder. The card is in the repository only.

        Raises:
            HubError: see [`push_to_hub`].
        """
        check_savable(self.components)
        if push_to_hub:
            repo_id = open_repo(repo_id or Path(save_directory).name, private=private, token=token)
        side_schedulers = _side_schedulers(self.config.get("_name_or_path"))
        super().save_pretrained(
            save_directory, safe_serialization, variant, max_shard_size, use_flashpack=use_flashpack
        )
        for name, config in side_schedulers.items():
            folder = Path(save_directory) / name
            folder.mkdir(exist_ok=True)
            (folder / SCHEDULER_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            options = {"token": token, "message": commit_message, "create_pr": create_pr}
            push_saved(self, save_directory, str(repo_id), variant=variant, **options)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> CommitInfo:
        """Push the pipeline to the Hub, in one commit and with a card with which AutoPipelines load the repository.

        The card is that of the repository the pipeline was loaded from, if there is one, see
        [`kandinsky_diffusers.cards.pipeline_card`]. What a card that is on the Hub already says stays.

        Args:
            repo_id: `namespace/name`, or a name in the namespace of the token.
            commit_message: the first line of the commit's message.
            private: whether the repository becomes private, if it is not there; None is public, or the default of the
                organization.
            token: another than that of `hf auth login` or HF_TOKEN.
            create_pr: whether to open a pull request instead of committing.
            safe_serialization: whether weights are written as safetensors.
            variant: part of the names of the weight files.
            subfolder: folder of the repository to push to; it gets no card then.

        Raises:
            HubError: the Hub refuses, fails or is not reached, or the repository is public and `private` is True. The
                repository has either all of it or nothing.
        """
        repo_id = open_repo(repo_id, private=private, token=token)
        options = {"token": token, "message": commit_message, "create_pr": create_pr}
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant)
            return push_saved(self, folder, repo_id, variant=variant, subfolder=subfolder, **options)

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers does; what `optimize` cannot do with weights that move is left out from then on."""
        with self._weights_change():
            super().enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers does, likewise; and not as its combined pipelines do, which hook parts of themselves."""
        with self._weights_change():
            DiffusionPipeline.enable_sequential_cpu_offload(self, *args, **kwargs)  # pyright: ignore

    def remove_all_hooks(self) -> None:
        """As diffusers does; what `optimize` had left out because of them is done."""
        with self._weights_change():
            super().remove_all_hooks()

    def enable_group_offload(
        self,
        onload_device: torch.device,
        *args: Any,
        offload_to_disk_path: str | os.PathLike | None = None,
        exclude_modules: str | list[str] | None = None,
        **options: Any,
    ) -> None:
        """As diffusers does, but each model gets a folder of its own below `offload_to_disk_path`.

        In one folder the files of layers that are called the same in two models would overwrite each other.
        """
        with self._weights_change():
            self._offload_groups(onload_device, args, offload_to_disk_path, exclude_modules, options)

    def _offload_groups(
        self,
        onload_device: torch.device,
        args: tuple[Any, ...],
        offload_to_disk_path: str | os.PathLike | None,
        exclude_modules: str | list[str] | None,
        options: dict[str, Any],
    ) -> None:
        if offload_to_disk_path is None:
            super().enable_group_offload(onload_device, *args, exclude_modules=exclude_modules, **options)
            return
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
        for name, component in self.components.items():
            if not isinstance(component, torch.nn.Module):
                continue
            if name in excluded:
                component.to(onload_device)
                continue
            if isinstance(component, PreTrainedModel) and component._tied_weights_keys:
                # tied embeddings become one layer: of two with the same weights the second would be stored empty
                component.set_input_embeddings(component.get_input_embeddings())
            enable = getattr(component, "enable_group_offload", partial(apply_group_offloading, component))
            enable(onload_device, *args, offload_to_disk_path=str(Path(offload_to_disk_path, name)), **options)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Run the attention of every model that can on xformers.

        Raises:
            ValueError: `attention_op` is given; xformers chooses the operator here.
            ModuleNotFoundError, ValueError: xformers or a CUDA device is missing.
        """
        if attention_op is not None:
            raise ValueError("`attention_op` is not supported; accepted is None, xformers then chooses the operator.")
        for component in self.components.values():
            if isinstance(component, torch.nn.Module):
                enable_xformers(component)

    def enable_movq_slicing(self) -> None:
        """Encode and decode the pictures of a batch one after the other."""
        self._autoencoder.enable_slicing()

    def disable_movq_slicing(self) -> None:
        """Encode and decode a batch at once."""
        self._autoencoder.disable_slicing()

    def enable_movq_tiling(self, *args: Any, **kwargs: Any) -> None:
        """Encode and decode large pictures in tiles; arguments as for [`MoVQ.enable_tiling`]."""
        self._autoencoder.enable_tiling(*args, **kwargs)

    def disable_movq_tiling(self) -> None:
        """Encode and decode pictures whole."""
        self._autoencoder.disable_tiling()

    enable_vae_slicing, disable_vae_slicing = enable_movq_slicing, disable_movq_slicing
    enable_vae_tiling, disable_vae_tiling = enable_movq_tiling, disable_movq_tiling


def _side_schedulers(repo: str | None) -> dict[str, dict[str, Any]]:
    """Configurations of the schedulers beside the one that a repo's index names, from folder or Hub."""
    configs: dict[str, Any] = {}
    if repo is None:
        return configs
    for name in SIDE_SCHEDULERS:
        with suppress(OSError):  # most repos have none (any scheduler class can read the file)
            configs[name] = DDPMScheduler.load_config(repo, subfolder=name)
    return configs
