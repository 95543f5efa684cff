"""A short prompt, made rich by a language model, and what Kandinsky 3.1 draws of both.

    python examples/prompt_beautifier.py --repos repos --output pictures --prompt "a cat"

`repos` is what `kandinsky-diffusers convert` has written: `repos/kandinsky-3-1`. The language model is that of
Kandinsky 3.1, `Intel/neural-chat-7b-v3-1` on the Hub, or in the folder `repos/neural-chat-7b-v3-1`; `--model` takes
another. The prompt may be in any language that the model knows, the better one is in English.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoPipelineForText2Image

from kandinsky_diffusers import PromptBeautifier
from kandinsky_diffusers.beautify import MODEL, TEMPLATE


def main(
    repos: Annotated[Path, typer.Option(help="Folder with the converted repositories.")] = Path("repos"),
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 1024,
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 50,
    prompt: Annotated[str, typer.Option(help="What to draw, in a few words.")] = "a red cat",
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of another chat model.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws another wording for each number.")] = None,
) -> None:
    """Draw a prompt as it is and as the beautifier has it, from the same noise, and write down the better prompt."""
    if model is not None:
        beautifier = PromptBeautifier(model, seed=seed, keep_loaded=False)
    else:
        local = repos / MODEL.partition("/")[2]
        place = local if local.is_dir() else MODEL
        beautifier = PromptBeautifier(place, template=TEMPLATE, seed=seed, keep_loaded=False)

    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    pipe = AutoPipelineForText2Image.from_pretrained(repos / "kandinsky-3-1", dtype=dtype)
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()

    output.mkdir(parents=True, exist_ok=True)
    for name, better in {"plain": None, "beautified": beautifier}.items():
        noise = torch.Generator().manual_seed(0)
        options = {"height": size, "width": size, "num_inference_steps": steps, "generator": noise}
        pipe(prompt, prompt_beautifier=better, **options).images[0].save(output / f"{name}.png")
    (output / "beautified.txt").write_text(beautifier(prompt) + "\n", encoding="utf-8")  # known, not asked again
    typer.echo(f"written: {output / 'plain.png'}, {output / 'beautified.png'}, {output / 'beautified.txt'}")


if __name__ == "__main__":
    typer.run(main)
