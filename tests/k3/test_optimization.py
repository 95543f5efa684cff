"""`pipe.optimize(...)` of the 3.x pipelines: what changes between two calls is seen by recorded forwards."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from kandinsky_diffusers import Kandinsky3Pipeline
from kandinsky_diffusers.optimization import Optimization
from tests.k3.conftest import SIZE, seeded
from tests.support.parity import assert_close
from tests.test_cuda_graphs import StandIn
from tests.test_optimization import NOTHING


def test_adapters_and_regions_act_on_recorded_models(components: Any, ip_adapter: Path, picture: Any) -> None:
    parts = {name: deepcopy(part) for name, part in components("3.1").items()}
    pipe = Kandinsky3Pipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1
    options = {**SIZE, "num_inference_steps": 3, "output_type": "latent", "guidance_scale": 0.0}

    def draw(**more: Any) -> torch.Tensor:
        return pipe("a fox", generator=seeded(0), **options, **more).images

    def drawn() -> list[torch.Tensor]:
        latents = [draw(), draw(regions=[("a dog", mask)])]
        pipe.load_ip_adapter(ip_adapter)
        for scale in (1.0, 0.5):
            pipe.set_ip_adapter_scale(scale)
            latents.append(draw(ip_adapter_image=picture))
        pipe.unload_ip_adapter()
        return latents

    plain = drawn()
    recorder = StandIn()
    pipe._optimization = Optimization({**NOTHING, "cuda_graph": True}, recorder)
    pipe._reoptimize()
    for latents, expected in zip(drawn(), plain, strict=True):
        assert_close(latents, expected, 1e-5)
    assert recorder.recorded == 3  # all but regions, whose processors hold tensors
