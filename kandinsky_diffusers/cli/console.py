"""What the commands share: errors in one line, and progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer


if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


@contextmanager
def plain_errors(*more: type[Exception]) -> Iterator[None]:
    """Errors of the user's making become one message and the exit code 1, and so do `more` kinds of errors."""
    from ..conversion import ConversionError
    from ..hub_errors import HubError

    try:
        yield
    except (ConversionError, HubError, FileNotFoundError, FileExistsError, *more) as error:
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error


@contextmanager
def bars_on_stderr() -> Iterator[RichProgress]:
    """Progress bars for bytes and pictures; give them to [`Bar`]."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    class ByUnit(ProgressColumn):
        def __init__(self, of_bytes: ProgressColumn, of_pictures: ProgressColumn) -> None:
            super().__init__()
            self._of_bytes, self._of_pictures = of_bytes, of_pictures

        def render(self, task: Task) -> Any:
            return (self._of_bytes if task.fields["unit"] == "B" else self._of_pictures).render(task)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        ByUnit(DownloadColumn(), MofNCompleteColumn()),
        ByUnit(TransferSpeedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield bars


class Bar:
    """A bar of rich behind the part of tqdm's interface that the library uses."""

    def __init__(self, bars: RichProgress, *, total: int, desc: str, unit: str = "it", **_: Any) -> None:
        self._bars = bars
        self._task = bars.add_task(desc, total=total, unit=unit)

    def update(self, n: int) -> None:
        """Advance by `n` bytes, or pictures."""
        self._bars.advance(self._task, n)

    def close(self) -> None:
        """Stop its clock."""
        self._bars.stop_task(self._task)
