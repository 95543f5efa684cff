"""Small runs of freshly written repositories: two steps, the smallest picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


_PROMPT = "a hat"
_SIZE = 64
_FEW_STEPS = {"num_inference_steps": 2}


def load_pipeline(folder: Path, variant: str | None) -> Any:
    """The pipeline that a repository is, in float32."""
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, variant=variant, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_prior(pipe: Any) -> list[Any]:
    """The two embeddings that a prior makes of a text."""
    result = pipe(_PROMPT, **_FEW_STEPS)
    return [result.image_embeds, result.negative_image_embeds]


def run_decoder(pipe: Any, width: int, **inputs: Any) -> list[Any]:
    """The picture that a decoder makes of empty image embeddings of that width."""
    import torch

    embeds = torch.zeros(1, width)
    return _draw(pipe, image_embeds=embeds, negative_image_embeds=embeds, **inputs)


def run(pipe: Any, **inputs: Any) -> list[Any]:
    """The picture that a pipeline makes of a text."""
    return _draw(pipe, prompt=_PROMPT, **inputs)


def run_combined(pipe: Any, **inputs: Any) -> list[Any]:
    """The picture that a pipeline with a prior makes of a text."""
    return run(pipe, prior_num_inference_steps=2, **inputs)


def text() -> dict[str, Any]:
    """What a decoder that reads the text, too, takes."""
    return {"prompt": _PROMPT}


def hole() -> dict[str, Any]:
    """A picture, and a mask of its upper half."""
    import numpy as np
    from PIL import Image

    mask = np.zeros((_SIZE, _SIZE), np.float32)
    mask[: _SIZE // 2] = 1
    return {"image": Image.new("RGB", (_SIZE, _SIZE), "gray"), "mask_image": mask}


def hint() -> dict[str, Any]:
    """A depth map, as tensor."""
    import torch

    return {"hint": torch.full((1, 3, _SIZE, _SIZE), 0.5)}


def _draw(pipe: Any, **inputs: Any) -> list[Any]:
    return [pipe(height=_SIZE, width=_SIZE, output_type="np", **_FEW_STEPS, **inputs).images]
