"""Fitting a pipeline into a given memory: `pipe.fit(budget="8GB")`."""

from __future__ import annotations

import re
from typing import Any

import torch

from .components import hidden
from .footprint import Load, named_tensors
from .images import latent_size
from .inputs import check_counts
from .memory_estimates import Estimates, Rung, autoencoder_of, gigabytes, models_of, settings, sizes_of
from .memory_plan import MemoryPlan, check_available
from .movq import pixels_per_latent


_PREFIXES = enumerate("KMGT", 1)
_UNITS = {"B": 1} | {unit: size for n, p in _PREFIXES for unit, size in ((f"{p}B", 1000**n), (f"{p}IB", 1024**n))}
_SIZE = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})")


class FittingMixin:
    """Part of [`KandinskyPipelineMixin`]."""

    model_cpu_offload_seq: str
    _orders_of_use: tuple[str, ...] = ()  # of models in a call, like `model_cpu_offload_seq`, if it differs from that
    _side = 512  # pixels, of a picture when no size is given
    _streamed: tuple[str, ...] = ()  # models that `fit` has offloaded layer by layer

    def fit(
        self,
        budget: str | int | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
        device: torch.device | str = "cuda",
        allow_half: bool = True,
        allow_quantization: bool = True,
    ) -> MemoryPlan:
        """Run in a given memory: choose precision, offloading, slicing and tiling, and bring the pipeline there.

        Sizes of weights are summed, and what models need while they run is counted on copies without numbers, in the
        size asked for; nothing is computed. Settings are tried from the fastest to the slowest:

        1. all models on the device, as they are;
        2. in half precision, as `from_pretrained(dtype=torch.float16)` loads it;
        3. model offload: a model is on the device only while it is used;
        4. the text encoders in 8 bits besides, see [`eight_bits.in_eight_bits`], which changes what they say a little;
        5. the largest models layer by layer, those that run once per call first, at last all.

        Within each, the autoencoder works on all pictures at once, then on one at a time, then in tiles, which change
        pixels a little ([`MoVQ.enable_tiling`]). On the CPU there are only 1 and 4. Slicing, tiling and offloading
        that were set before are replaced; what has been cast or brought into 8 bits stays so. Call it before
        `optimize()`.

        Args:
            budget: a size such as `"8GB"` (10^9 bytes), `"8GiB"` (2^30) or `"512MB"`, or bytes; None for what is free
                on the device.
            height: of the pictures in pixels; None for the pipeline's default. For KandiSuperRes, of what comes out.
            width: likewise.
            batch_size: pictures at once.
            device: where the models run.
            allow_half: whether float32 may become float16.
            allow_quantization: whether text encoders may be brought into 8 bits.

        Returns:
            The plan; `print(plan)` explains it.

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
            MemoryError: nothing fits; the message has the least that would do. Nothing has been changed then.
            RuntimeError: something failed on the way; the message says what has been done.
        """
        options = {"height": height, "width": width, "batch_size": batch_size, "device": device}
        plan = self.plan_fit(budget, **options, allow_half=allow_half, allow_quantization=allow_quantization)
        plan.apply(self)
        return plan

    def plan_fit(
        self,
        budget: str | int | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
        device: torch.device | str = "cuda",
        allow_half: bool = True,
        allow_quantization: bool = True,
    ) -> MemoryPlan:
        """What [`fit`] would do; nothing is changed, and with a budget the device need not be there."""
        size = (self._side if height is None else height, self._side if width is None else width)
        check_counts(height=size[0], width=size[1], batch_size=batch_size)
        place = torch.device(device)
        limit = free_bytes(self, place) if budget is None else as_bytes(budget)
        estimates = Estimates(self, size, batch_size)
        rejected: list[Rung] = []
        for setting in settings(self, size, batch_size, place, allow_half, allow_quantization):
            rung = Rung(setting, estimates.stages(setting, limit))
            if rung.peak <= limit:
                return MemoryPlan(limit, place, size, batch_size, sizes_of(models_of(self)), rung, tuple(rejected))
            rejected.append(rung)
        rungs = (Rung(rung.setting, estimates.stages(rung.setting)) for rung in rejected)
        least = min(rungs, key=lambda rung: rung.peak)
        raise MemoryError(
            f"`budget` is {gigabytes(limit)}, into which nothing fits; the least is {gigabytes(least.peak)}, with"
            f" {least.setting}, of which {least.largest} needs most. Smaller or fewer pictures at once need less."
        )

    def _load_of(self, component: str, size: tuple[int, int], batch_size: int) -> Load:
        """What a model gets at once; the denoisers see each picture twice, for guidance."""
        scale = pixels_per_latent(autoencoder_of(self))
        latents = latent_size(*size, scale)
        return Load(batch_size, 2 * batch_size, (latents[0] * scale, latents[1] * scale), latents)

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """As diffusers does, but models that [`fit`] has offloaded layer by layer stay so."""
        with hidden(self, self._streamed):
            super().enable_model_cpu_offload(gpu_id, device)


def as_bytes(budget: Any) -> int:
    """Bytes of "8GB", "7.5 GiB" or an int.

    Raises:
        TypeError: it is neither str nor int.
        ValueError: the str has another form, or there are no bytes.
    """
    accepted = 'a size such as "8GB" (10^9 bytes), "8GiB" (2^30) or "512MB", or a positive int, bytes'
    if isinstance(budget, bool) or not isinstance(budget, (int, str)):
        raise TypeError(f"`budget` is {budget!r}; accepted is {accepted}.")
    count = budget if isinstance(budget, int) else 0
    if isinstance(budget, str):
        match = _SIZE.fullmatch(budget.strip().upper())
        count = int(float(match[1]) * _UNITS[match[2]]) if match is not None else 0
    if count < 1:
        raise ValueError(f"`budget` is {budget!r}; accepted is {accepted}.")
    return count


def free_bytes(pipe: Any, device: torch.device) -> int:
    """What is free on a device now, with what the pipeline has there, and what torch keeps there unused.

    Raises:
        ValueError: the device does not tell.
    """
    check_available(device)
    backend: Any = getattr(torch, device.type, None)
    if not hasattr(backend, "mem_get_info"):
        raise ValueError(
            f'`budget` is None, and {device} does not tell what is free; accepted is a size such as "8GB".'
        )
    own = sum(t.nbytes for m in models_of(pipe).values() for _, t in named_tensors(m) if t.device.type == device.type)
    unused = backend.memory_reserved(device) - backend.memory_allocated(device)
    return backend.mem_get_info(device)[0] + unused + own
