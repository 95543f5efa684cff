"""Kandinsky 3.1 with a ControlNet: edges say what is where, the prompt says what it is.

python examples/controlnet.py --repos repos --output pictures --size 1024 --steps 50

`repos` holds the conversions `kandinsky-3-1` (of `ai-forever/Kandinsky3.1`) and `kandinsky-3-controlnet-hed`. The
edges are drawn here; `--edges FILE` takes others, white on black. Of a photo `KandinskyHEDDetector` makes them:

    from kandinsky_diffusers import KandinskyHEDDetector

    edges = KandinskyHEDDetector.from_pretrained("repos/kandinsky-hed-detector")(photo)
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image
from PIL import Image, ImageDraw, ImageFilter

from kandinsky_diffusers import Kandinsky3ControlNetModel


PROMPT = "a red house by the sea, oil painting"


def draw_edges(size: int) -> Image.Image:
    """A house, in soft white lines on black."""
    edges = Image.new("L", (size, size))
    draw, width = ImageDraw.Draw(edges), max(size // 100, 1)
    draw.rectangle((size // 4, size // 2, 3 * size // 4, 7 * size // 8), outline=255, width=width)
    draw.polygon((size // 5, size // 2, size // 2, size // 5, 4 * size // 5, size // 2), outline=255, width=width)
    return edges.filter(ImageFilter.GaussianBlur(size / 500))


def main(
    repos: Path = Path("repos"),
    output: Path = Path("pictures"),
    size: int = 1024,
    steps: int = 50,
    edges: Path | None = None,
) -> None:
    """Draw with edges, then draw the result anew as a watercolour that keeps to them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    controlnet = Kandinsky3ControlNetModel.from_pretrained(repos / "kandinsky-3-controlnet-hed", torch_dtype=dtype)
    pipe = AutoPipelineForText2Image.from_pretrained(repos / "kandinsky-3-1", controlnet=controlnet, torch_dtype=dtype)
    pipe.enable_model_cpu_offload(device=device)
    control = Image.open(edges) if edges else draw_edges(size)
    shape = {"height": size, "width": size, "num_inference_steps": steps}

    drawn = pipe(PROMPT, image=control, controlnet_conditioning_scale=0.8, control_guidance_end=0.7, **shape).images[0]
    repaint = AutoPipelineForImage2Image.from_pipe(pipe)
    again = repaint("watercolour", image=drawn, control_image=control, strength=0.5, **shape).images[0]

    output.mkdir(parents=True, exist_ok=True)
    for name, picture in (("edges", control), ("controlnet", drawn), ("controlnet-watercolour", again)):
        picture.save(output / f"{name}.png")
        typer.echo(f"written: {output / name}.png")


if __name__ == "__main__":
    typer.run(main)
