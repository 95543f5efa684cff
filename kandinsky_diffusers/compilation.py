"""Compiling the repeated blocks of a model, so that neither prompt, seed nor steps make it compile again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.utils.torch_utils import is_compiled_module
from torch.fx.experimental import _config as shape_config

from .components import remove_leftovers


HOOK = "kandinsky_compiled"
VARIANTS = 256  # of one kind of block that are compiled: all widths there are, at several sizes


class CompiledBlocks(ModelHook):
    """Says how the blocks of a model are compiled, while its forward runs and comes to compile some.

    All blocks of one kind share their code, and torch.compile would give up after eight widths. Nor may it take one
    width after the other for one that varies: at the first size of the picture (the only tensor with four dimensions
    among the arguments) all blocks are compiled for just this one, at the second for any. Where there is no picture,
    as in the prior, the size of the batch takes its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self._first_sizes: dict[int, torch.Size] = {}  # by their number of dimensions

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward of `module`, as [`HookRegistry`] calls it."""
        size = _size_of([value for value in chain(args, kwargs.values()) if isinstance(value, torch.Tensor)])
        settings = {
            "recompile_limit": VARIANTS,
            "accumulated_recompile_limit": VARIANTS * 4,
            "automatic_dynamic_shapes": False,
            "assume_static_by_default": size == self._first_sizes.setdefault(len(size), size),
        }
        # sizes that happen to be equal are not taken for the same
        with torch._dynamo.config.patch(settings), shape_config.patch(use_duck_shape=False):
            return self.fn_ref.original_forward(*args, **kwargs)


def _size_of(tensors: Sequence[torch.Tensor]) -> torch.Size:
    picture = next((tensor.shape for tensor in tensors if tensor.ndim == 4), None)
    return picture or next((tensor.shape[:1] for tensor in tensors), torch.Size())


def is_compiled(module: Any) -> bool:
    """Whether `module.compile()` has been called, and not taken back."""
    return getattr(module, "_compiled_call_impl", None) is not None


def is_compiled_whole(model: Any) -> bool:
    """Whether a model is compiled in either way, by `torch.compile(model)` or `model.compile()`."""
    return is_compiled_module(model) or is_compiled(model)


def has_blocks(model: Any) -> bool:
    """Whether a model says which of its blocks are repeated (`_repeated_blocks`), and has them."""
    return any(type(module).__name__ in model._repeated_blocks for module in model.modules())


def compile_blocks(model: Any, called: Iterable[torch.nn.Module], options: Mapping[str, Any]) -> list[torch.nn.Module]:
    """Compile the repeated blocks of a model.

    Args:
        model: with `_repeated_blocks`.
        called: its modules whose forward is called.
        options: of torch.compile.

    Returns:
        The blocks.
    """
    model.compile_repeated_blocks(**options)
    for module in called:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(CompiledBlocks(), HOOK)
    return [module for module in model.modules() if is_compiled(module)]


def uncompile_blocks(blocks: Iterable[torch.nn.Module], called: Iterable[torch.nn.Module]) -> None:
    """Take back what [`compile_blocks`] has done."""
    for block in blocks:
        del block._compiled_call_impl  # that of the class is None
    for module in called:
        HookRegistry.check_if_exists_or_initialize(module).remove_hook(HOOK, recurse=False)
        remove_leftovers(module, type(module))
