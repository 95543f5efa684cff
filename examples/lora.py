"""A LoRA on Kandinsky 3.1, weaker and stronger.

    python examples/lora.py --repos repos --output pictures --lora repos/kandinsky-3-lora --weight 0.8

`repos` is what `kandinsky-diffusers convert` has written; the example uses `repos/kandinsky-3-1`. The LoRA is a
folder, a file or a Hub id, in the format of peft, of diffusers or of the fork kandinsky3_diffusers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoPipelineForText2Image
from diffusers.utils import make_image_grid

import kandinsky_diffusers  # noqa: F401 (its pipelines are used from here on)


def main(
    repos: Annotated[Path, typer.Option(help="Folder with the converted repositories.")] = Path("repos"),
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 1024,
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 50,
    lora: Annotated[str | None, typer.Option(help="The LoRA; of the repositories for None.")] = None,
    weight: Annotated[float, typer.Option(help="How much it counts.")] = 0.8,
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "a red cat, 4k photo",
) -> None:
    """Draw the same picture without a LoRA, with it, and with a part of it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = AutoPipelineForText2Image.from_pretrained(repos / "kandinsky-3-1", dtype=dtype)
    if device == "cuda":
        pipe.enable_model_cpu_offload()

    def draw() -> list:
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt, height=size, width=size, num_inference_steps=steps, generator=generator).images

    pictures = draw()
    pipe.load_lora_weights(lora or repos / "kandinsky-3-lora", adapter_name="style")
    pictures += draw()
    pipe.set_adapters("style", weight)
    pictures += draw()
    pipe.unload_lora_weights()

    output.mkdir(parents=True, exist_ok=True)
    make_image_grid(pictures, rows=1, cols=3).save(output / "lora.png")
    typer.echo(f"written: {output / 'lora.png'}")


if __name__ == "__main__":
    typer.run(main)
