"""IP-Adapters of Kandinsky 3.x: pictures as prompts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple, TypedDict
from weakref import WeakSet

import torch
from diffusers.loaders import IPAdapterMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from ..conversion.reader import open_weights
from ..decoding import Call, Conditions
from ..images import Images
from ..inputs import as_rows
from ..options import Embeds
from .image_prompt import WEIGHTS, Mixture, mixtures, pil_pictures
from .ip_adapter_unet import LAYERS, PROJECTION


WEIGHT_NAME = "ip_adapter.safetensors"
PICTURES = "ip_adapter_image"
EMBEDS = "ip_adapter_image_embeds"
NEGATIVES = "negative_ip_adapter_image_embeds"

_COMPONENTS = ("image_encoder", "feature_extractor")
_loaded_with_adapters: WeakSet[Any] = WeakSet()  # image encoders and processors that are not the user's

Source = str | os.PathLike | Mapping[str, Any]


class IPAdapterOptions(TypedDict, total=False):
    """What pipelines with an IP-Adapter take besides.

    Args:
        ip_adapter_image: PIL pictures, arrays or tensors: one for all that is drawn; or a list, one for each prompt
            or picture drawn, or, with weights, to be mixed; or a list of lists, to be mixed for each. With several
            adapters a list with all this for each adapter.
        ip_adapter_image_embeds: embeddings `[width]` or `[rows, width]` instead, as `encode_image` makes them; in
            lists as the pictures.
        negative_ip_adapter_image_embeds: embeddings for the unconditional half, with several adapters a list of them;
            None is what the image encoder makes of pixels that are all zero.
        ip_adapter_weights: a number for each of the pictures that are mixed; they need not sum up to 1. With several
            adapters a list with the weights, or None, for each.
    """

    ip_adapter_image: Annotated[Images | list[Any] | None, None]
    ip_adapter_image_embeds: Annotated[Embeds | list[Any] | None, None]
    negative_ip_adapter_image_embeds: Annotated[Embeds | None, None]
    ip_adapter_weights: Annotated[Sequence[Any] | None, None]


@dataclass(frozen=True)
class ImagePrompts:
    """What a call shows to IP-Adapters, checked.

    Args:
        shown: pictures or embeddings, one for each adapter.
        negatives: the same for the unconditional half; empty without guidance.
    """

    shown: list[Mixture]
    negatives: list[Mixture]


class Kandinsky3IPAdapterMixin(IPAdapterMixin):
    """Mixed in before a 3.x pipeline: `load_ip_adapter` and its like of diffusers.

    The components `image_encoder` and `feature_extractor` are None until an adapter brings them, or the user.
    """

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Source | list[Source],
        subfolder: str | list[str] | None = None,
        weight_name: str | list[str] = WEIGHT_NAME,
        image_encoder_folder: str | None = "image_encoder",
        variant: str | None = None,
        **hub_options: Any,
    ) -> None:
        """Load one IP-Adapter, or several at once, in the place of those that were loaded before.

        The image encoder beside its weights is loaded, too, unless the pipeline has one. Nothing changes where
        anything does not fit.

        Args:
            pretrained_model_name_or_path_or_dict: folder or Hub id, with what `convert` writes, or weights: a dict
                with the keys of the file, or with the two dicts `image_proj` and `ip_adapter`. A list for several.
            subfolder: of the folder; a list for several.
            weight_name: of the safetensors file; a list for several.
            image_encoder_folder: where the image encoder lies, below `subfolder` unless it has a `/`; None loads none.
            variant: of the image encoder's file, such as `"fp16"`.
            hub_options: `cache_dir`, `force_download`, `local_files_only`, `token` and `revision`.

        Raises:
            OSError: a file is not there.
            ValueError: weights do not fit the UNet, lists have different lengths, or a model is offloaded by groups:
                load first, and offload then.
        """
        adapters = _sources(pretrained_model_name_or_path_or_dict, subfolder, weight_name)
        weights = [_read(adapter, **hub_options) for adapter in adapters]
        brought = {}
        if image_encoder_folder is not None:
            brought = self._read_encoder(adapters, image_encoder_folder, variant, hub_options)
        with self._offloaded_anew():
            self.unet.load_ip_adapters(weights)
            if "image_encoder" in brought:
                brought["image_encoder"].to(self.unet.device)
            self.register_modules(**brought)
        _loaded_with_adapters.update(brought.values())

    def set_ip_adapter_scale(self, scale: float | list[float]) -> None:
        """How much pictures count beside the text: 0 is not at all, 1 as in training.

        Args:
            scale: one number for all adapters, or a list with one for each.

        Raises:
            TypeError: it is something else, such as the settings for each block that other models have.
            ValueError: no adapter is loaded, or the list has another length.
        """
        count = len(self.unet.ip_adapter_widths)
        if not count:
            raise ValueError("`scale` is that of an IP-Adapter, and none is loaded; `load_ip_adapter` comes first.")
        scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * count
        if not all(isinstance(number, Real) and math.isfinite(number) for number in scales):
            raise TypeError(f"`scale` is {scale!r}; accepted is a number, or a list with one for each IP-Adapter.")
        self.unet.set_ip_adapter_scale([float(number) for number in scales])

    def unload_ip_adapter(self) -> None:
        """Take out all adapters, and the image encoder that came with them; the UNet is then as it was before.

        Raises:
            ValueError: a model is offloaded by groups.
        """
        with self._offloaded_anew():
            self.unet.unload_ip_adapters()
            self.register_modules(**dict.fromkeys(self._brought))

    @torch.no_grad()
    def encode_image(self, image: Images, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of pictures, to be given as `ip_adapter_image_embeds` and `negative_ip_adapter_image_embeds`.

        Args:
            image: one, or several.
            device: where the image encoder runs.

        Returns:
            Embeddings `[pictures, width]`; and that of pixels that are all zero, `[1, width]`, for the unconditional
            half (`get_zero_embed` of the original's pipeline).

        Raises:
            TypeError, ValueError: an item is no picture, or the pipeline has no image encoder.
        """
        self._check_image_encoder("`image` is given")
        images = image if isinstance(image, (list, tuple)) else [image]
        pixels = torch.stack([pixels for item in images for pixels in self._pixel_values(item, "image")])
        device = device or self._execution_device
        return self._embed(pixels, device), self._embed(torch.zeros_like(pixels[:1]), device)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As diffusers does; adapters, and the image encoder that came with them, are left out."""
        brought = {name: getattr(self, name) for name in self._brought}
        self.register_modules(**dict.fromkeys(brought))
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.register_modules(**brought)

    def to_json_string(self) -> str:
        """The configuration as JSON; of the components for pictures those that are there, for stock knows none."""
        config = json.loads(super().to_json_string())
        absent = [name for name in config if name.lstrip("_") in _COMPONENTS and config[name] == [None, None]]
        kept = {name: value for name, value in config.items() if name not in absent}
        return json.dumps(kept, indent=2, sort_keys=True) + "\n"

    @property
    def components(self) -> dict[str, Any]:
        """As in diffusers; those for pictures only where they are there, so that pipelines of stock take all."""
        found = super().components
        return {name: part for name, part in found.items() if part is not None or name not in _COMPONENTS}

    @property
    def _brought(self) -> list[str]:
        """Names of the components that have come with an adapter."""
        return [name for name in _COMPONENTS if getattr(self, name) in _loaded_with_adapters]

    def _read_encoder(
        self, adapters: list[_Adapter], folder: str, variant: str | None, hub_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Image encoder and processor, if the pipeline lacks them, from beside the first weights that are no dict."""
        found = next((adapter for adapter in adapters if not isinstance(adapter.source, Mapping)), None)
        if found is None:
            return {}
        source: Any = found.source
        subfolder = folder if "/" in folder else PurePosixPath(found.subfolder or "", folder).as_posix()
        options = {"subfolder": subfolder, **hub_options}
        brought, encoder = {}, self.image_encoder
        if encoder is None:
            encoder = CLIPVisionModelWithProjection.from_pretrained(
                source, dtype=self.unet.dtype, variant=variant, **options
            )
            brought["image_encoder"] = encoder
        if self.feature_extractor is None:
            try:
                brought["feature_extractor"] = CLIPImageProcessor.from_pretrained(source, **options)
            except OSError:  # many repositories have none
                side = encoder.config.image_size
                brought["feature_extractor"] = CLIPImageProcessor(size=side, crop_size=side)
        return brought

    @contextmanager
    def _offloaded_anew(self) -> Iterator[None]:
        """Hooks that offload belong to the layers that there are; when these change, they are put on anew."""
        offload = self._offloading()
        if offload is not None:
            self.remove_all_hooks()
        try:
            yield
        finally:
            if offload is not None:
                offload(device=self._offload_device)

    def _offloading(self) -> Callable[..., None] | None:
        """What has offloaded the UNet, if anything has."""
        from accelerate.hooks import CpuOffload

        hook = getattr(self.unet, "_hf_hook", None)
        by_group = any(_is_in_a_group(layer) for layer in self.unet.modules())
        if by_group or (hook is not None and not hasattr(self, "_offload_device")):
            raise ValueError(
                "the layers of a UNet with group offloading, or with hooks of your own, cannot be changed; accepted is"
                " to load IP-Adapters before and unload them before you offload."
            )
        if hook is None:
            return None
        return self.enable_model_cpu_offload if isinstance(hook, CpuOffload) else self.enable_sequential_cpu_offload

    # -------------------------------------------------------------------------------------------- in a call
    def _check_image_prompts(self, call: Call) -> ImagePrompts | None:
        """What a call shows to the adapters; None where there are none.

        Raises:
            TypeError, ValueError: something is missing, or not as [`IPAdapterOptions`] describes it.
        """
        given = [name for name in IPAdapterOptions.__annotations__ if call[name] is not None]
        widths = self.unet.ip_adapter_widths
        if not widths and given:
            raise ValueError(f"`{given[0]}` is given, and no IP-Adapter is loaded; `load_ip_adapter` comes first.")
        if not widths:
            return None
        if (PICTURES in given) == (EMBEDS in given):
            what = "both given" if EMBEDS in given else "missing, and an IP-Adapter is loaded"
            raise ValueError(f"`{PICTURES}` and `{EMBEDS}` are {what}; accepted is one of them.")
        name = PICTURES if PICTURES in given else EMBEDS
        shown = self._mixtures(name, call, call[WEIGHTS])
        if not self.do_classifier_free_guidance:
            return ImagePrompts(shown, [])
        if call[NEGATIVES] is not None:
            return ImagePrompts(shown, self._mixtures(NEGATIVES, call, None))
        self._check_image_encoder(f"`{NEGATIVES}` is missing", *widths)
        side = self.image_encoder.config.image_size
        return ImagePrompts(shown, [Mixture(torch.zeros(1, 3, side, side), torch.ones(1, 1))] * len(widths))

    def _mixtures(self, name: str, call: Call, weights: Any) -> list[Mixture]:
        leaves = self._pictures if name == PICTURES else self._embeddings
        widths = self.unet.ip_adapter_widths
        found = mixtures(call[name], weights, name, [partial(leaves, width=width, name=name) for width in widths])
        batch = call.batch
        for rows in (len(mixture.weights) for mixture in found):
            if rows not in (1, batch.prompts, batch.images):
                raise ValueError(
                    f"`{name}` has {rows} items, and {batch.images} pictures are drawn; accepted is one for all, or"
                    f" one for each prompt or picture. To mix several, give `{WEIGHTS}`."
                )
        return found

    def _pictures(self, picture: Any, width: int, name: str) -> list[torch.Tensor]:
        self._check_image_encoder(f"`{name}` is given", width)
        return self._pixel_values(picture, name)

    def _check_image_encoder(self, why: str, *widths: int) -> None:
        accepted = f"accepted are `{EMBEDS}` and `{NEGATIVES}`"
        if self.image_encoder is None or self.feature_extractor is None:
            raise ValueError(f"{why}, and the pipeline has no image encoder with feature extractor; {accepted}.")
        made = self.image_encoder.config.projection_dim
        if any(width != made for width in widths):
            raise ValueError(
                f"{why}, and the embeddings of the image encoder are {made} wide, those for the IP-Adapters"
                f" {', '.join(map(str, widths))}; {accepted}."
            )

    def _embeddings(self, embeds: Any, width: int, name: str) -> list[torch.Tensor]:
        return list(as_rows(embeds, width, name))

    def _pixel_values(self, picture: Any, name: str) -> list[torch.Tensor]:
        """Each `[3, side, side]`, as the image encoder takes them."""
        return list(self.feature_extractor(pil_pictures(picture, name), return_tensors="pt").pixel_values)

    def _embed(self, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
        return self.image_encoder(pixels.to(device, self.image_encoder.dtype)).image_embeds

    def _image_conditions(self, call: Call, device: torch.device) -> Conditions:
        """The embeddings for all adapters side by side, for each picture that is drawn; unconditional ones first."""
        if call.image_prompts is None:
            return {}
        halves = [half for half in (call.image_prompts.negatives, call.image_prompts.shown) if half]
        rows = [torch.cat([self._rows(mixture, call, device) for mixture in half], dim=1) for half in halves]
        return {EMBEDS: torch.cat(rows)}

    def _rows(self, mixture: Mixture, call: Call, device: torch.device) -> torch.Tensor:
        embeds = self._embed(mixture.items, device) if mixture.has_pictures else mixture.items.to(device)
        return call.batch.expand(mixture.mix(embeds), EMBEDS).to(self.unet.dtype)

    def _added_conditions(self, conditions: Conditions, rows: int) -> dict[str, Any] | None:
        """What the UNet shows to its adapters, for the last `rows`: all, or those of the conditional half."""
        if EMBEDS not in conditions:
            return None
        return {"image_embeds": conditions[EMBEDS][-rows:].split(self.unet.ip_adapter_widths, dim=1)}


class _Adapter(NamedTuple):
    """Where an adapter comes from."""

    source: Source
    subfolder: str | None
    weight_name: str


def _sources(source: Any, subfolder: Any, weight_name: Any) -> list[_Adapter]:
    columns = [list(values) if isinstance(values, list) else [values] for values in (source, subfolder, weight_name)]
    count = max(map(len, columns))
    if any(len(column) not in (1, count) for column in columns) or not all(columns):
        counts = ", ".join(str(len(column)) for column in columns)
        raise ValueError(
            f"`pretrained_model_name_or_path_or_dict`, `subfolder` and `weight_name` have {counts} items; accepted are"
            " as many in each, or one for all."
        )
    return [_Adapter(*row) for row in zip(*(column * (count // len(column)) for column in columns), strict=True)]


def _read(adapter: _Adapter, **hub_options: Any) -> dict[str, torch.Tensor]:
    if isinstance(adapter.source, Mapping):
        return _flattened(adapter.source)
    if not adapter.weight_name.endswith(".safetensors"):
        raise ValueError(f"`weight_name` is {adapter.weight_name!r}; accepted is the name of a safetensors file.")
    if Path(adapter.source).is_dir():
        return _tensors_of(Path(adapter.source, adapter.subfolder or "", adapter.weight_name))
    try:
        path = hf_hub_download(str(adapter.source), adapter.weight_name, subfolder=adapter.subfolder, **hub_options)
    except HFValidationError as error:
        raise OSError(f"{str(adapter.source)!r} is no folder, and cannot be the id of a Hub repository.") from error
    return _tensors_of(Path(path))


def _tensors_of(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    file = open_weights(path)
    return {key: file.tensor(key) for key in file.shapes}


def _flattened(weights: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Dicts in the dict, as diffusers has them in pickled adapters, become prefixes."""
    nested = {f"{place}.{key}": t for place in (PROJECTION, LAYERS) for key, t in weights.get(place, {}).items()}
    return nested | {key: tensor for key, tensor in weights.items() if key not in (PROJECTION, LAYERS)}


def _is_in_a_group(layer: torch.nn.Module) -> bool:
    return "group_offloading" in getattr(vars(layer).get("_diffusers_hook"), "hooks", {})
