"""The forward of a model as a CUDA graph: recorded once for each size, and then launched as a whole."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import AttnAddedKVProcessor2_0, AttnProcessor2_0
from diffusers.utils import logging
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from . import compilation
from .attention import IPAdapterAttnProcessor
from .components import remove_leftovers


logger = logging.get_logger(__name__)

HOOK = "kandinsky_cuda_graph"
RECORDINGS = 8  # kept for each model, the last used; each holds its inputs and outputs
_OWN_HOOKS = {HOOK, compilation.HOOK}

_PREPARATIONS = ("project", "post_process")  # calls of our models that come once in a call, and are short
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)
_PROCESSORS = (AttnProcessor2_0, AttnAddedKVProcessor2_0, IPAdapterAttnProcessor)  # ours extend those of diffusers
# what of a module or of its attention processor is a number in the recorded kernels, or decides which ones there are
_SETTINGS = ("scale", "scaling", "merged_adapters", "_active_adapter", "_disable_adapters", "_attention_backend")


class Recorder(Protocol):
    """What can record the work that a function starts.

    Args:
        device_type: of the tensors whose work is recorded.
    """

    device_type: str

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """What does the work again, and where it leaves its output."""
        ...


class CudaRecorder:
    """Records CUDA graphs in one pool of memory, since the models of a pipeline never run at the same time.

    A replay may therefore overwrite the output of any other one, which has to be copied before.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """See [`Recorder.record`]."""
        with torch.cuda.device(device):
            stream = _stream(torch.cuda.current_device())
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # libraries get their memory for this stream
            torch.cuda.current_stream().wait_stream(stream)
            # the pool is that of the graphs there are: one that has lost all of its graphs cannot be used again
            pool = next((graph.pool() for graph in self._graphs), None)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = run()
        self._graphs.add(graph)
        return graph.replay, output


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """All graphs of a device are recorded on one stream, for libraries hold memory for each there is."""
    return torch.cuda.Stream(device)


class GraphedForward(ModelHook):
    """Records the forward of a model for each kind of input, the second time it comes, and replays it from then on.

    The kind is structure, shapes, strides and dtypes of the arguments, and all that is no tensor. Without a recording
    run calls that prepare others (such as projecting texts), that need gradients, autocast or another device, and
    those of a model that trains, or has hooks or attention processors of others.

    A cache that is not filled yet is filled before, so that the first step of a call is replayed like all others, and
    nothing is left to need as much memory again beside the recordings.

    Recordings are dropped when weights have moved, or settings have changed, such as the scale of a LoRA. Whether they
    have is looked at once for each cache, which belongs to one call of a pipeline, and without one at each forward; a
    cache that a forward returns, such as the prefix of a prior, is not looked at again.

    Args:
        recorder: does the recording; models of one pipeline share it.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._known: list[_Kind] = []  # the last used one first
        self._state: list[Any] = []
        self._cache: Callable[[], Any] = lambda: None
        self._usable = True

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward of `module`, as [`HookRegistry`] calls it."""
        run: Any = self.fn_ref.original_forward
        leaves, structure = tree_flatten((args, kwargs))
        if not self._may_record(module, args, kwargs, leaves):
            return run(*args, **kwargs)
        if not all(getattr(cache, "filled", True) for cache in _caches(args, kwargs)):
            run(*args, **kwargs, fill=True)
            leaves, structure = tree_flatten((args, kwargs))
        kind = self._kind_of(structure, leaves)
        if kind is None:
            return run(*args, **kwargs)
        if kind.recording is None:
            try:
                kind.recording = _Recording(run, structure, leaves, self._recorder)
            except RuntimeError as error:
                self._known.clear()
                self._usable = False
                logger.warning(
                    f"`{type(module).__name__}` cannot be recorded as a CUDA graph, and runs without: {error}"
                )
                return run(*args, **kwargs)
        output = kind.recording.replay(leaves)
        for cache in _caches((output,), {}):
            self._cache = weakref.ref(cache)
        return output

    def _may_record(self, module: torch.nn.Module, args: Any, kwargs: Any, leaves: list[Any]) -> bool:
        autocast = torch.is_autocast_enabled(self._recorder.device_type)
        if autocast or not self._usable or torch.is_grad_enabled() or module.training:
            return False
        if any(kwargs.get(name) for name in _PREPARATIONS) or not all(map(self._is_recordable, leaves)):
            return False
        caches = list(_caches(args, kwargs))
        if not caches or self._cache() is not caches[0]:
            state = _state_of(module, self._recorder.device_type)
            if state is None or state != self._state:
                self._known.clear()
            self._state = state or []
            self._cache = weakref.ref(caches[0]) if caches else lambda: None
        return bool(self._state)

    def _is_recordable(self, leaf: Any) -> bool:
        if isinstance(leaf, torch.Tensor):
            return leaf.device.type == self._recorder.device_type
        return isinstance(leaf, _CONSTANTS)

    def _kind_of(self, structure: TreeSpec, leaves: list[Any]) -> _Kind | None:
        """What was known of this kind of input; None where it comes for the first time."""
        looks = [torch.is_inference_mode_enabled(), *map(_look, leaves)]
        found = next((kind for kind in self._known if kind.looks == looks and kind.structure == structure), None)
        if found is not None:
            self._known.remove(found)
        self._known.insert(0, found or _Kind(structure, looks))
        del self._known[RECORDINGS:]
        return found


class _Kind:
    """A kind of input, and its recording once there is one."""

    def __init__(self, structure: TreeSpec, looks: list[Any]) -> None:
        self.structure, self.looks = structure, looks
        self.recording: _Recording | None = None


class _Source:
    """Remembers which tensor an input was copied from, so that what no step changes is copied once."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = weakref.ref(tensor), tensor._version

    def is_still(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is that one, and nothing has been written into it since."""
        return self._tensor() is tensor and self._version == tensor._version


class _Recording:
    """A recorded forward with the tensors that it reads and writes."""

    def __init__(
        self, run: Callable[..., Any], structure: TreeSpec, leaves: Sequence[Any], recorder: Recorder
    ) -> None:
        inputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._inputs = [leaf for leaf in inputs if isinstance(leaf, torch.Tensor)]
        self._sources: list[_Source | None] = [None] * len(self._inputs)
        args, kwargs = tree_unflatten(inputs, structure)
        self._replay, output = recorder.record(lambda: run(*args, **kwargs), self._inputs[0].device)
        self._outputs, self._output_structure = tree_flatten(output)

    def replay(self, leaves: Sequence[Any]) -> Any:
        """The output for other inputs of the same kind, in memory of its own."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        for index, (tensor, source) in enumerate(zip(tensors, self._sources, strict=True)):
            if source is None or not source.is_still(tensor):
                self._inputs[index].copy_(tensor)
                self._sources[index] = None if tensor.is_inference() else _Source(tensor)
        self._replay()
        outputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self._outputs]
        return tree_unflatten(outputs, self._output_structure)


def graph(model: torch.nn.Module, recorder: Recorder) -> None:
    """Let the forward of `model` be recorded and replayed, until [`ungraph`]."""
    HookRegistry.check_if_exists_or_initialize(model).register_hook(GraphedForward(recorder), HOOK)


def ungraph(model: torch.nn.Module) -> None:
    """Take back what [`graph`] has done."""
    HookRegistry.check_if_exists_or_initialize(model).remove_hook(HOOK, recurse=False)
    remove_leftovers(model, type(model))


def foreign_hooks(module: torch.nn.Module) -> set[str]:
    """Names of the hooks of diffusers that a module has, but for those of `optimize`."""
    return {*getattr(vars(module).get("_diffusers_hook"), "hooks", ())} - _OWN_HOOKS


def _look(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf


def _caches(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The objects among the arguments, also in dicts, that hold what one call of a pipeline knows."""
    for value in chain(args, kwargs.values()):
        if isinstance(value, dict):
            yield from _caches((), value)
        elif not isinstance(value, (torch.Tensor, list, tuple, *_CONSTANTS)):
            yield value


def _state_of(model: torch.nn.Module, device_type: str) -> list[Any] | None:
    """What recordings depend on besides inputs: addresses of weights and settings; None where they cannot be made."""
    state: list[Any] = []
    for module in model.modules():
        own = vars(module)  # `getattr` searches long for what is not there, and each call waits for this
        own_tensors = chain(own["_parameters"].values(), own["_buffers"].values())
        tensors = [tensor for tensor in own_tensors if tensor is not None]
        if foreign_hooks(module) or any(tensor.device.type != device_type for tensor in tensors):
            return None
        state += [tensor.data_ptr() for tensor in tensors]
        attending = (own.get(name, own["_modules"].get(name)) for name in ("processor", "text"))  # of an IP-Adapter
        processors = [processor for processor in attending if processor is not None]
        if not all(isinstance(processor, _PROCESSORS) for processor in processors):
            return None
        for settings in (own, *map(vars, processors)):
            state += [(name, repr(settings[name])) for name in _SETTINGS if name in settings]
    return state
