"""The command that takes repositories to the Hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import plain_errors


if TYPE_CHECKING:
    from ..hub import Pushed, Upload


def push(
    folder: Annotated[Path, typer.Argument(help="A repository, or what a conversion has written: all in it.")],
    namespace: Annotated[str, typer.Argument(help="User or organization on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Repositories that are made become private.")] = False,
    pr: Annotated[bool, typer.Option("--pr", help="Open pull requests instead of committing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show files and sizes; nobody is asked.")] = False,
) -> None:
    """Upload repositories to the Hub, each in one commit; a second time only what is missing.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from .. import hub

    with plain_errors():
        repos = hub.find_repos(folder)
        if dry_run:
            _show(hub.plan_push(repos, namespace))
            return
        show_pushed(hub.push(repos, namespace, private=private or None, create_pr=pr))


def show_pushed(results: Iterable[Pushed]) -> None:
    """Say where repositories are now."""
    for pushed in results:
        prior = f" (its prior: {', '.join(pushed.priors)})" if pushed.priors else ""
        typer.echo(f"{'pushed' if pushed.is_new else 'unchanged'}: {pushed.url}{prior}")


def _show(uploads: Iterable[Upload]) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    for upload in uploads:
        sizes = upload.sizes
        prior = f"its prior: {', '.join(upload.priors)}" if upload.priors else None
        table = Table("file", "size", title=upload.repo_id, caption=prior, title_justify="left", show_footer=True)
        table.columns[0].overflow, table.columns[1].justify = "fold", "right"
        table.columns[0].footer, table.columns[1].footer = f"{len(sizes)} files", decimal(sum(sizes.values()))
        for path, size in sorted(sizes.items()):
            table.add_row(path, decimal(size))
        Console().print(table)
