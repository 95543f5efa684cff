"""How much memory a model takes, for its weights and while it runs, measured on a copy that has no numbers."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, PriorTransformer, UNet2DConditionModel, VQModel
from diffusers.models.unets.unet_kandinsky3 import Kandinsky3UNet as StockKandinsky3UNet
from torch import nn
from transformers import PreTrainedModel

from .components import is_quantised
from .eight_bits import DtypeOf
from .measuring import peak_bytes


Model = TypeVar("Model", bound=nn.Module)

TEXT_LENGTH = 128  # tokens, of the longest texts that a Kandinsky reads
UNKNOWN_SHARE = 0.25  # of its weights; what a model is taken to need besides where it cannot be measured

# what hooks and compilation put in the place of a model's own `forward`
_HOOKS = ("_hf_hook", "_old_forward", "_diffusers_hook", "forward", "_compiled_call_impl")
_OFFLOADED_ALONE = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)  # by diffusers' group offload at leaf level


@dataclass(frozen=True)
class Load:
    """What a model gets at once.

    Args:
        pictures: how many.
        rows: of the denoiser's batch, twice as many with guidance.
        pixels: height and width of a picture.
        latents: height and width of its latents.
    """

    pictures: int
    rows: int
    pixels: tuple[int, int]
    latents: tuple[int, int]

    def piece(self, side: int | None) -> Load:
        """One picture of it, or a tile of one, with a side of so many pixels."""
        if side is None:
            return replace(self, pictures=1)
        scale = max(self.pixels[0] // self.latents[0], 1)
        pixels = tuple(min(length, side) for length in self.pixels)
        return replace(self, pictures=1, pixels=pixels, latents=tuple(length // scale for length in pixels))


def weight_bytes(model: nn.Module, dtype_of: DtypeOf) -> int:
    """Bytes of parameters and buffers, each counted once."""
    return sum(tensor.numel() * dtype_of(name, tensor).itemsize for name, tensor in named_tensors(model))


def streamed_bytes(model: nn.Module, dtype_of: DtypeOf) -> int:
    """Bytes of weights on the device while a model whose layers are offloaded one by one runs, at most.

    It is the largest layer, and all weights that are in none, such as those of norms.
    """
    sizes = {name: tensor.numel() * dtype_of(name, tensor).itemsize for name, tensor in named_tensors(model)}
    layers = [f"{name}." for name, layer in model.named_modules() if isinstance(layer, _OFFLOADED_ALONE)]
    owned = {layer: [name for name in sizes if name.startswith(layer)] for layer in layers}
    largest = max((sum(sizes[name] for name in names) for names in owned.values()), default=0)
    return largest + sum(sizes.values()) - sum(sizes[name] for names in owned.values() for name in names)


def named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers by their names, each once."""
    return [*model.named_parameters(), *model.named_buffers()]


@torch.no_grad()
def running_bytes(model: nn.Module, dtype_of: DtypeOf, load: Load, encodes: bool = False) -> int:
    """Most bytes of tensors alive at once while `model` runs, besides its weights.

    They are counted on a copy of the model without numbers, in the wanted size and dtype, which takes no memory and
    about a second for a large model. A model of an unknown kind, or quantised by a library, is not run: a share
    of its weights is taken, [`UNKNOWN_SHARE`].

    Args:
        model: as loaded, on any device, offloaded or not; it is not touched.
        dtype_of: dtypes of its weights.
        load: what it gets.
        encodes: of an autoencoder, whether it encodes; else it decodes.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    run = run_once.dispatch(type(model))
    if run is run_once.dispatch(object) or is_quantised(model):
        return int(weight_bytes(model, dtype_of) * UNKNOWN_SHARE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin = twin_without_numbers(model, dtype_of)
        return peak_bytes(lambda: run(twin, load, encodes))


def twin_without_numbers(model: Model, dtype_of: DtypeOf) -> Model:
    """A copy of a model that shares nothing with it but configurations, for the `FakeTensorMode` that is on.

    It is on the CPU, and has no hooks and nothing compiled.
    """
    made: dict[int, Any] = {}

    def tensor_like(name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is not None and id(tensor) not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype_of(name, tensor))
            made[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
        return made.get(id(tensor))

    def module_like(name: str, module: nn.Module | None) -> Any:
        if module is None or id(module) in made:
            return made.get(id(module))
        twin = made[id(module)] = type(module).__new__(type(module))
        prefix = f"{name}." if name else ""
        vars(twin).update({name: value for name, value in vars(module).items() if name not in _HOOKS})
        for kind, like in (("_parameters", tensor_like), ("_buffers", tensor_like), ("_modules", module_like)):
            parts = vars(module)[kind].items()
            vars(twin)[kind] = {name: like(f"{prefix}{name}", part) for name, part in parts}
        return twin

    return module_like("", model)


# ------------------------------------------------------------------------------------------------ how models are run


@functools.singledispatch
def run_once(model: Any, load: Load, encodes: bool) -> None:
    """Run a model as a pipeline would; register here how a new kind of model is run.

    Args:
        model: a copy without numbers, see [`twin_without_numbers`].
        load: what it gets.
        encodes: of an autoencoder, whether it encodes; else it decodes.
    """
    raise TypeError(f"`model` is a {type(model).__name__}; accepted are {', '.join(map(str, run_once.registry))}.")


@run_once.register
def _(model: PreTrainedModel, load: Load, encodes: bool) -> None:
    config: Any = model.config
    if model.main_input_name == "pixel_values":
        shape = (load.pictures, config.num_channels, config.image_size, config.image_size)
        model(torch.empty(shape, dtype=model.dtype))
        return
    length = min(getattr(config, "max_position_embeddings", TEXT_LENGTH), TEXT_LENGTH)
    ids = torch.ones(load.pictures, length, dtype=torch.long)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))


@run_once.register
def _(model: PriorTransformer, load: Load, encodes: bool) -> None:
    width, tokens = model.config.embedding_dim, model.config.num_embeddings
    embedding = torch.empty(load.rows, width, dtype=model.dtype)
    states = torch.empty(load.rows, tokens, width, dtype=model.dtype)
    mask = torch.ones(load.rows, tokens, dtype=torch.bool)
    model(embedding, 1, proj_embedding=embedding, encoder_hidden_states=states, attention_mask=mask)


@run_once.register
def _(model: UNet2DConditionModel, load: Load, encodes: bool) -> None:
    config = model.config
    empty = functools.partial(torch.empty, dtype=model.dtype)
    states = None
    if config.get("text_dim_2") is not None:  # 2.0
        states = empty(load.rows, TEXT_LENGTH, config.text_dim)
        added = {"text_embeds": empty(load.rows, config.pooled_text_dim)}
        added["text_embeds_2"] = empty(load.rows, TEXT_LENGTH, config.text_dim_2)
    elif config.addition_embed_type == "text_image":  # 2.1
        states = empty(load.rows, TEXT_LENGTH, config.encoder_hid_dim)
        added = dict.fromkeys(("text_embeds", "image_embeds"), empty(load.rows, config.cross_attention_dim))
    else:  # 2.2, with or without a depth map
        added = {"image_embeds": empty(load.rows, config.encoder_hid_dim)}
        if config.addition_embed_type == "image_hint":
            added["hint"] = empty(load.rows, 3, *(8 * side for side in load.latents))
            config = {**config, "in_channels": config.in_channels // 2}
    sample = empty(load.rows, config["in_channels"], *load.latents)
    model(sample, 1, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False)


@run_once.register
def _(model: StockKandinsky3UNet, load: Load, encodes: bool) -> None:
    config: Any = model.config
    sample = torch.empty(load.rows, config.in_channels, *load.latents, dtype=model.dtype)
    states = torch.empty(load.rows, TEXT_LENGTH, config.encoder_hid_dim, dtype=model.dtype)
    model(sample, 1, states, torch.ones(load.rows, TEXT_LENGTH, dtype=torch.long), return_dict=False)


@run_once.register(VQModel)
@run_once.register(AutoencoderKL)
def _(model: Any, load: Load, encodes: bool) -> None:
    if encodes:
        model.encode(torch.empty(load.pictures, 3, *load.pixels, dtype=model.dtype))
    else:
        latents = torch.empty(load.pictures, model.config.latent_channels, *load.latents, dtype=model.dtype)
        model.decode(latents, **({"force_not_quantize": True} if isinstance(model, VQModel) else {}))
