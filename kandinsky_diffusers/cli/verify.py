"""The command that checks repositories, or compares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import plain_errors


if TYPE_CHECKING:
    from rich.table import Table

    from ..conversion import Verification
    from ..conversion.comparison import TensorReport


def verify(
    repo: Annotated[str, typer.Argument(help="Repository: folder or Hub id; or the folder of one of its models.")],
    against: Annotated[
        str | None, typer.Option(help="Repository, or original release (folder or Hub id) or file, to compare with.")
    ] = None,
    version: Annotated[str, typer.Option(help="Version of the original; auto is that of the repository.")] = "auto",
    original_config: Annotated[Path | None, typer.Option(help="JSON with the original's configuration.")] = None,
    clip: Annotated[str | None, typer.Option(help="2.1: folder or Hub id of CLIP ViT-L/14.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="3.0: folder or Hub id of its T5.")] = None,
    refiner: Annotated[str | None, typer.Option(help="superres: folder or Hub id of Kandinsky 3.1.")] = None,
    run: Annotated[bool, typer.Option(help="Without --against: also load and run it.")] = True,
    show_all: Annotated[bool, typer.Option("--all", help="List every tensor, not only those that differ.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a repository; or compare it with another one, or with an original, tensor by tensor."""
    from rich.console import Console

    from .. import conversion

    with plain_errors():
        with Console(stderr=True).status("reading") as status:
            found = conversion.verify(
                repo,
                against,
                version=version,
                original_config=original_config,
                clip=clip,
                text_encoder=text_encoder,
                refiner=refiner,
                run=run,
                tell=status.update,
            )
        if as_json:
            typer.echo(json.dumps(found.as_dict(all_tensors=show_all), indent=2))
        else:
            _show(found, show_all)
        if not found.passed:
            raise conversion.ConversionError(_summary(found))


def _summary(found: Verification) -> str:
    bad = ", ".join(component.name for component in found.components if not component.passed)
    what = "is not sound" if found.against is None else f"is not the same as {found.against}"
    return f"{found.repo} {what}: {'; '.join(filter(None, (bad, *found.problems)))}."


def _show(found: Verification, show_all: bool) -> None:
    from rich.console import Console

    console = Console()
    console.print(_components(found))
    listed = [
        (component.name, tensor)
        for component in found.components
        for tensor in (component.tensors if show_all else component.failures)
    ]
    if listed:
        console.print(_tensors(listed))
    for component in found.components:
        for remark in (*component.problems, *component.notes):
            typer.echo(f"{component.name}: {remark}")
    for note in found.notes:
        typer.echo(note)
    if found.loaded_and_run is not None:
        typer.echo(f"loaded and run: {found.loaded_and_run}")


def _components(found: Verification) -> Table:
    from rich.table import Table

    from ..conversion.reports import Outcome

    alone, compared = [Outcome.SOUND], [Outcome.EQUAL, Outcome.DIFFERENT, Outcome.MISSING, Outcome.EXTRA]
    always = alone if found.against is None else compared
    present = {outcome for component in found.components for outcome in component.outcomes}
    shown = [outcome for outcome in Outcome if outcome in always or outcome in present]
    table = Table("component", "tensors", *shown)
    table.columns[0].overflow = "fold"
    if found.against is not None:
        table.add_column("difference (relative)")
    for component in found.components:
        cells = [str(len(component.tensors)), *(str(component.outcomes.get(outcome, 0)) for outcome in shown)]
        if found.against is not None:
            cells.append(_difference(component.largest))
        table.add_row(component.name, *cells)
    return table


def _tensors(listed: list[tuple[str, TensorReport]]) -> Table:
    from rich.table import Table

    table = Table("component", "tensor", "outcome", "here", "there", "difference (relative)")
    table.columns[0].overflow = table.columns[1].overflow = "fold"
    for name, tensor in listed:
        sides = [
            "" if shape is None else f"{dtype} {list(shape)}"
            for shape, dtype in zip(tensor.shapes, tensor.dtypes, strict=True)
        ]
        table.add_row(name, tensor.key, tensor.outcome, *sides, _difference(tensor))
    return table


def _difference(tensor: TensorReport | None) -> str:
    if tensor is None or tensor.absolute is None:
        return ""
    return f"{tensor.absolute:.3g} ({tensor.relative:.3g})"
