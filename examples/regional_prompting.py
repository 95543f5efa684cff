"""Different prompts for parts of a picture, with Kandinsky 3.1.

    python examples/regional_prompting.py --repos repos --output pictures --left "a cat" --right "a dog"

`repos` is what `kandinsky-diffusers convert` has written; the example uses `repos/kandinsky-3-1`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoPipelineForText2Image
from PIL import Image

import kandinsky_diffusers  # noqa: F401 (its pipelines are used from here on)


def main(
    repos: Annotated[Path, typer.Option(help="Folder with the converted repositories.")] = Path("repos"),
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 1024,
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 50,
    prompt: Annotated[str, typer.Option(help="Of the whole picture.")] = "a sofa in a bright room, 4k photo",
    left: Annotated[str, typer.Option(help="Of the left third.")] = "a red cat, 4k photo",
    right: Annotated[str, typer.Option(help="Of the right third.")] = "a blue dog, 4k photo",
    base_ratio: Annotated[float, typer.Option(help="Share of the whole picture's prompt in the thirds.")] = 0.2,
) -> None:
    """Draw a picture whose sides have prompts of their own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = AutoPipelineForText2Image.from_pretrained(repos / "kandinsky-3-1", dtype=dtype)
    if device == "cuda":
        pipe.enable_model_cpu_offload()

    third = size // 3
    masks = {side: Image.new("L", (size, size)) for side in ("left", "right")}
    masks["left"].paste(255, (0, 0, third, size))
    masks["right"].paste(255, (size - third, 0, size, size))

    picture = pipe(
        prompt,
        regions=[(left, masks["left"]), (right, masks["right"])],
        regional_base_ratio=base_ratio,
        height=size,
        width=size,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
    ).images[0]

    output.mkdir(parents=True, exist_ok=True)
    picture.save(output / "regional_prompting.png")
    typer.echo(f"written: {output / 'regional_prompting.png'}")


if __name__ == "__main__":
    typer.run(main)
