"""Edges of a picture, as a hint for ControlNet of Kandinsky 3.1.

    python examples/hed.py --repos repos --output pictures --image cat.png

`repos` is what `kandinsky-diffusers convert` has written from a folder with `ControlNetHED.pth`
(`lllyasviel/Annotators` on the Hub): `repos/kandinsky-hed-detector`. Without `--image` Kandinsky 3.1 draws a picture
first, from `repos/kandinsky-3-1`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoPipelineForText2Image
from diffusers.utils import load_image

from kandinsky_diffusers import KandinskyHEDDetector


def main(
    repos: Annotated[Path, typer.Option(help="Folder with the converted repositories.")] = Path("repos"),
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    size: Annotated[int, typer.Option(help="Height and width in pixels of a drawn picture.")] = 1024,
    steps: Annotated[int, typer.Option(help="Number of steps in which it is drawn.")] = 50,
    image: Annotated[Path | None, typer.Option(help="A picture, instead of a drawn one.")] = None,
    prompt: Annotated[str, typer.Option(help="What is drawn.")] = "a red cat on a chair, 4k photo",
) -> None:
    """Find the edges of a picture, and write both into a folder."""
    if image is None:
        dtype = torch.float16 if torch.cuda.is_available() else torch.float32
        pipe = AutoPipelineForText2Image.from_pretrained(repos / "kandinsky-3-1", dtype=dtype)
        if torch.cuda.is_available():
            pipe.enable_model_cpu_offload()
        picture = pipe(prompt, height=size, width=size, num_inference_steps=steps).images[0]
    else:
        picture = load_image(str(image))

    detector = KandinskyHEDDetector.from_pretrained(repos / "kandinsky-hed-detector")
    edges = detector(picture)

    output.mkdir(parents=True, exist_ok=True)
    for name, result in {"picture": picture, "edges": edges}.items():
        result.save(output / f"hed_{name}.png")
    typer.echo(f"written: {output / 'hed_picture.png'}, {output / 'hed_edges.png'}")


if __name__ == "__main__":
    typer.run(main)
