"""The command that draws many pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import Bar, bars_on_stderr, plain_errors


if TYPE_CHECKING:
    from ..generation import Job


def generate(
    repo: Annotated[str, typer.Argument(help="Folder or Hub id of what draws, of any version and task.")],
    output: Annotated[Path, typer.Argument(help="Folder for the pictures; the same run is continued there.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="One picture, or -n, for each.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help="JSON lines with prompt, negative, seed, size, image, mask, hint; paths are relative to the file.",
        ),
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="What not to draw; as the next four for all that do not say.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    image: Annotated[str | None, typer.Option(help="Picture to start from.")] = None,
    mask: Annotated[str | None, typer.Option(help="Mask; white is repainted.")] = None,
    hint: Annotated[str | None, typer.Option(help="Depth map, or picture for the ControlNet.")] = None,
    seed: Annotated[int, typer.Option(help="Picture n has this seed + n, if nothing else is said.")] = 0,
    images_per_prompt: Annotated[int, typer.Option("--images-per-prompt", "-n", help="Pictures for each prompt.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Steps of the scheduler.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How closely to keep to the prompt.")] = None,
    strength: Annotated[float | None, typer.Option(help="0 keeps the picture to start from, 1 forgets it.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, any other argument of the pipeline; may be repeated."),
    ] = None,
    controlnet: Annotated[str | None, typer.Option(help="3.x: folder or Hub id of a ControlNet, for hints.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures drawn at once.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    variant: Annotated[str | None, typer.Option(help="Of the weight files, such as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a Hub repository: branch, tag or commit.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to draw, such as cuda:1 or cpu.")] = None,
    offload: Annotated[str, typer.Option(help="none, model or sequential: what waits in main memory.")] = "none",
    threads: Annotated[
        int | None, typer.Option(help="On the CPU, of each process; last bits depend on it. [1]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the pictures of another run.")] = False,
) -> None:
    """Draw pictures, with their parameters inside, into a folder. Start it again, and it goes on where it was.

    Also under `accelerate launch`, on any number of processes and machines.
    """
    from ..generation import Settings
    from ..generation import generate as draw

    given = {"negative": negative, "size": size, "image": image, "mask": mask, "hint": hint}
    with plain_errors(OSError, TypeError, ValueError), bars_on_stderr() as bars:
        report = draw(
            _jobs(prompts or [], file, {name: value for name, value in given.items() if value is not None}),
            Settings(
                repo,
                revision=revision,
                variant=variant,
                dtype=dtype,
                controlnet=controlnet,
                steps=steps,
                guidance_scale=guidance_scale,
                strength=strength,
                batch_size=batch_size,
                threads=threads,
                arguments=dict(map(_argument, set_ or [])),
            ),
            output,
            seed=seed,
            images_per_prompt=images_per_prompt,
            device=device,
            offload=offload,
            overwrite=overwrite,
            progress=lambda **options: Bar(bars, **options),
        )
    if report.is_main_process:
        typer.echo(f"drawn:  {report.drawn}; {report.there} of {report.pictures} pictures are in {output}")
        if report.manifest is not None:
            typer.echo(f"listed: {report.manifest}")


def _jobs(prompts: list[str], file: Path | None, defaults: dict[str, Any]) -> list[Job]:
    from ..generation import Job, read_jobs

    jobs = [Job(prompt, **defaults) for prompt in prompts]
    if file is not None:
        jobs += read_jobs(file, defaults)
    return jobs or [Job(**defaults)]  # a picture alone may be enough


def _argument(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`, the value as JSON if it is, else as it is."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"`--set` is {text!r}; accepted is NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
