"""What the terminal shows before anything is loaded: the console, and bars."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console()


@contextlib.contextmanager
def interruptible(next_time: Callable[[], str] = lambda: "begins again") -> Iterator[None]:
    """End the program with one line and exit code 130 when the user interrupts a command.

    Args:
        next_time: Says what the same command does next.

    Raises:
        SystemExit: Then.
    """
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print(
            f"interrupted; the same command {next_time()}", soft_wrap=True, highlight=False
        )
        raise SystemExit(130) from None


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
