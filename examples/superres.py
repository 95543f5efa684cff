"""A picture enlarged with KandiSuperRes: four times by x4, and twice by Flash, which then refines it.

    python examples/superres.py --repos repos --output pictures --image small.png

`repos` is what `kandinsky-diffusers convert` has written; the example uses `repos/kandisuperres-x4` and
`repos/kandisuperres-flash-x2`. Without `--image` a small picture is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoPipelineForImage2Image
from PIL import Image, ImageDraw

import kandinsky_diffusers  # noqa: F401 (its pipelines are used from here on)


def sun(size: int) -> Image.Image:
    """A yellow disc on blue."""
    picture = Image.new("RGB", (size, size), "steelblue")
    ImageDraw.Draw(picture).ellipse((size // 4, size // 4, size * 3 // 4, size * 3 // 4), fill="gold")
    return picture


def main(
    repos: Annotated[Path, typer.Option(help="Folder with the converted repositories.")] = Path("repos"),
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    size: Annotated[int, typer.Option(help="Side of the drawn picture enlarged four times, in pixels.")] = 1024,
    steps: Annotated[int, typer.Option(help="Number of steps of x4; the original takes 5.")] = 5,
    image: Annotated[Path | None, typer.Option(help="Picture to enlarge, of any size.")] = None,
) -> None:
    """Enlarge a picture in two ways."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    small = sun(size // 4) if image is None else Image.open(image)
    output.mkdir(parents=True, exist_ok=True)

    for name, options in (("x4", {"num_inference_steps": steps}), ("flash-x2", {})):
        pipe = AutoPipelineForImage2Image.from_pretrained(repos / f"kandisuperres-{name}", dtype=dtype)
        if device == "cuda":
            pipe.enable_model_cpu_offload()
        pipe(small, seed=0, **options).images[0].save(output / f"superres_{name}.png")
        typer.echo(f"written: {output / f'superres_{name}.png'}")


if __name__ == "__main__":
    typer.run(main)
