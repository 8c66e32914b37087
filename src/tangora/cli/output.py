"""What the terminal shows before anything is loaded: bars, and the experiments."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tangora.experiments.reproduce.registry import EXPERIMENTS

console = Console()


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
