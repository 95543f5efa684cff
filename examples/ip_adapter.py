"""Pictures as prompts, with Kandinsky 3.1 and its IP-Adapter.

    python examples/ip_adapter.py --repos repos --output pictures --image cat.png --image painting.png \\
        --weight 0.7 --weight 0.3

`repos` is what `kandinsky-diffusers convert` has written; the example uses `repos/kandinsky-3-1` and
`repos/kandinsky-3-ip-adapter`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoPipelineForText2Image
from PIL import Image, ImageDraw

import kandinsky_diffusers  # noqa: F401 (its pipelines are used from here on)


def main(
    repos: Annotated[Path, typer.Option(help="Folder with the converted repositories.")] = Path("repos"),
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 1024,
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 50,
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "a house by the sea, 4k photo",
    image: Annotated[
        list[Path] | None, typer.Option(help="Pictures to mix; without any, two that are made up.")
    ] = None,
    weight: Annotated[list[float] | None, typer.Option(help="How much each counts; without any, all alike.")] = None,
    scale: Annotated[float, typer.Option(help="How much pictures count beside the prompt.")] = 0.8,
) -> None:
    """Draw what the prompt says in the manner of some pictures."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = AutoPipelineForText2Image.from_pretrained(repos / "kandinsky-3-1", dtype=dtype)
    pipe.load_ip_adapter(repos / "kandinsky-3-ip-adapter")
    pipe.set_ip_adapter_scale(scale)
    if device == "cuda":
        pipe.enable_model_cpu_offload()

    shown = [Image.open(path) for path in image] if image else [circle("gold", "navy"), circle("white", "darkred")]
    picture = pipe(
        prompt,
        ip_adapter_image=shown,
        ip_adapter_weights=weight or [1 / len(shown)] * len(shown),
        height=size,
        width=size,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
    ).images[0]

    output.mkdir(parents=True, exist_ok=True)
    picture.save(output / "ip_adapter.png")
    typer.echo(f"written: {output / 'ip_adapter.png'}")


def circle(color: str, ground: str) -> Image.Image:
    """A disc on a plain ground."""
    picture = Image.new("RGB", (512, 512), ground)
    ImageDraw.Draw(picture).ellipse((96, 96, 416, 416), fill=color)
    return picture


if __name__ == "__main__":
    typer.run(main)
