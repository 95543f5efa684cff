"""An IP-Adapter and a ControlNet on one UNet."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image

from kandinsky_diffusers import (
    Kandinsky3ControlNetImg2ImgPipeline,
    Kandinsky3ControlNetModel,
    Kandinsky3ControlNetPipeline,
    Kandinsky3Pipeline,
)
from tests.k3.conftest import seeded


@pytest.mark.parametrize("cls", [Kandinsky3ControlNetPipeline, Kandinsky3ControlNetImg2ImgPipeline])
def test_pictures_and_control_both_decide(
    components: Any, converted_controlnet: Path, ip_adapter: Path, inputs: Any, picture: Any, mask: Any, cls: type
) -> None:
    controlnet = Kandinsky3ControlNetModel.from_pretrained(converted_controlnet)
    pipe: Any = cls(**{name: deepcopy(part) for name, part in components("3.1").items()}, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    given = inputs(cls.__name__, output_type="latent", control_image=mask)

    def draw(**changed: Any) -> torch.Tensor:
        return pipe(**{**given, **changed}, generator=seeded(0)[0]).images

    bare = draw()
    pipe.load_ip_adapter(ip_adapter)
    seen = draw(ip_adapter_image=picture)
    assert not torch.allclose(seen, bare, atol=1e-3)
    assert not torch.allclose(draw(ip_adapter_image=mask), seen, atol=1e-3)
    assert not torch.allclose(draw(ip_adapter_image=picture, controlnet_conditioning_scale=0.0), seen, atol=1e-3)
    without = AutoPipelineForText2Image.from_pipe(pipe, controlnet=None)
    assert type(without) is Kandinsky3Pipeline
    assert without.image_encoder is pipe.image_encoder
    pipe.unload_ip_adapter()
    assert torch.equal(draw(), bare)
