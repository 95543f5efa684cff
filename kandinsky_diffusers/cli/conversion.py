"""Commands that convert original checkpoints, or look at them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cards import by_reason
from .console import Bar, bars_on_stderr, plain_errors
from .push import show_pushed


if TYPE_CHECKING:
    from ..conversion import FileReport, ModelPlan


def convert(
    source: Annotated[
        str,
        typer.Argument(help="Folder with the original files or repositories, or a Hub id. With --plan also a file."),
    ],
    output: Annotated[Path | None, typer.Argument(help="Folder that gets one folder per repository.")] = None,
    version: Annotated[
        str,
        typer.Option(
            help="Which release it is: auto, 2.0, 2.1, 2.2, 3.0, 3.1, superres, 3-controlnet, 3-ip-adapter, 3-lora."
        ),
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (each tensor's own), float32, float16 or bfloat16.")] = "auto",
    variant: Annotated[str | None, typer.Option(help="fp16 or bf16: cast, and name the files so.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    original_config: Annotated[Path | None, typer.Option(help="JSON with the original's configuration.")] = None,
    clip: Annotated[
        str, typer.Option(help="2.1: folder or Hub id of CLIP ViT-L/14.")
    ] = "openai/clip-vit-large-patch14",
    text_encoder: Annotated[
        str, typer.Option(help="3.0: folder or Hub id of the T5 whose encoder it uses.")
    ] = "google/flan-ul2",
    refiner: Annotated[
        str, typer.Option(help="superres: folder or Hub id of Kandinsky 3.1, for Flash; none leaves the refiner out.")
    ] = "ai-forever/Kandinsky3.1",
    drop: Annotated[list[str] | None, typer.Option(help="Glob of keys to leave out; may be repeated.")] = None,
    layout: Annotated[
        str, typer.Option(help="split (prior and decoders apart) or combined (the prior inside each decoder's).")
    ] = "split",
    link_shared: Annotated[
        bool, typer.Option("--link-shared", help="Hard links for models that several repositories share.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace repositories that are there.")] = False,
    trust_remote_code_stub: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code-stub",
            help="Add a pipeline.py, for custom_pipeline=REPO, trust_remote_code=True without an import.",
        ),
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would become of every key.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read back, compare bit for bit, run once.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="NAMESPACE", help="Push to this user or organization afterwards, as `push`.")
    ] = None,
) -> None:
    """Turn an original release into repositories that load with from_pretrained."""
    from .. import conversion, hub

    of_release: dict[str, Any] = {
        "version": version,
        "original_config": original_config,
        "clip": clip,
        "text_encoder": text_encoder,
        "refiner": None if refiner == "none" else refiner,
        "drop": drop or (),
        "layout": layout,
    }
    with plain_errors():
        if plan:
            found, plans = conversion.plan_source(source, **of_release)
            _show_plans(plans, found.ignored)
            return
        if output is None:
            raise conversion.ConversionError("The argument OUTPUT is missing; only --plan does without.")
        if push_to_hub is not None:
            hub.check_access(push_to_hub)
        with bars_on_stderr() as bars:
            report = conversion.convert(
                source,
                output,
                **of_release,
                dtype=dtype,
                variant=variant,
                max_shard_size=max_shard_size,
                link_shared=link_shared,
                overwrite=overwrite,
                trust_remote_code_stub=trust_remote_code_stub,
                verify=verify,
                progress=lambda **options: Bar(bars, **options),
            )
    for name, reason in report.skipped.items():
        typer.echo(f"left out: {name}, because {reason}")
    for file in dict.fromkeys(file for file, _, _ in report.dropped):
        for reason, keys in by_reason({key: reason for owner, key, reason in report.dropped if owner == file}).items():
            typer.echo(f"dropped:  {keys} of {file} ({reason})")
    for path in report.repos:
        typer.echo(f"{'verified' if verify else 'written'}:  {path}")
    if push_to_hub is not None:
        with plain_errors():
            show_pushed(hub.push(report.repos, push_to_hub))


def inspect(
    place: Annotated[Path, typer.Argument(help="Weight file, inventory, or folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what files are: version, part, dtype, parameters, SHA-256."""
    from ..conversion import inspect as describe
    from ..conversion.inspection import weight_files

    with plain_errors(), bars_on_stderr() as bars:
        bar = Bar(bars, total=sum(path.stat().st_size for path in weight_files(place)), desc="reading", unit="B")
        reports = describe(place, bar.update)
        bar.close()
    if as_json:
        typer.echo(json.dumps([{**asdict(report), "path": str(report.path)} for report in reports], indent=2))
    else:
        _show_files(reports, place)


def _show_plans(plans: list[ModelPlan], ignored: tuple[str, ...]) -> None:
    for model in plans:
        made, plan = len(model.plan.target_shapes), model.plan
        used = sum(len(step.sources) for step in plan.steps)
        typer.echo(
            f"{' + '.join(model.files)} -> {model.component.label} ({model.component.class_name}): {used} keys make "
            f"{made} tensors, {len(plan.dropped)} dropped, {len(plan.elsewhere)} for other models"
        )
        for reason, keys in by_reason(plan.dropped).items():
            typer.echo(f"  dropped: {keys} ({reason})")
        for note in model.notes:
            typer.echo(f"  note: {note}")
    for name in ignored:
        typer.echo(f"not planned: {name}")


def _show_files(reports: list[FileReport], place: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("file, SHA-256", "version", "part", "dtype", "parameters", "bytes")
    table.columns[0].overflow = table.columns[2].overflow = "fold"
    for report in reports:
        dtypes = ", ".join(sorted(report.dtypes, key=lambda name: -report.dtypes[name]))
        kind = (report.version or "?", report.part or report.problem or "?", dtypes)
        name = report.path.relative_to(place) if place.is_dir() else report.path.name
        table.add_row(f"{name}\n{report.sha256}", *kind, f"{report.parameters:,}", f"{report.size:,}")
    Console().print(table)
