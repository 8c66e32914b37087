"""What the terminal shows before anything is loaded: bars, and the experiments."""

import contextlib
from collections.abc import Callable, Iterator

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tangora.experiments.reproduce.registry import EXPERIMENTS

console = Console()


@contextlib.contextmanager
def interruptible(next_time: Callable[[], str] = lambda: "begins again") -> Iterator[None]:
    """End with one line and exit code 130 when the user interrupts a command.

    Args:
        next_time: Says what the same command does next.

    Raises:
        Exit: Then.
    """
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print(
            f"interrupted; the same command {next_time()}", soft_wrap=True, highlight=False
        )
        raise typer.Exit(130) from None


def experiment_table() -> Table:
    """Return the table of the experiments that can be repeated."""
    table = Table(box=None)
    for heading in ("experiment", "what it is", "source", "full size"):
        table.add_column(heading, overflow="fold")
    for entry in EXPERIMENTS.values():
        table.add_row(entry.name, entry.title, entry.source, entry.duration)
    return table


def progress_bars() -> Progress:
    """Return bars with room for a note, drawn on the console."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )
