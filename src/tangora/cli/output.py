"""What the terminal shows before anything is loaded: the console, and bars."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console()


@contextlib.contextmanager
def interruptible(next_time: Callable[[], str] = lambda: "begins again") -> Iterator[None]:
    """End the program with one line when the user (exit code 130) or a scheduler (143) interrupts a command.

    Args:
        next_time: Says what the same command does next.

    Raises:
        SystemExit: Then.
    """
    alone = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if alone else None
    try:
        yield
    except KeyboardInterrupt as reason:
        Console(stderr=True).print(
            f"interrupted; the same command {next_time()}", soft_wrap=True, highlight=False
        )
        raise SystemExit(128 + (signal.SIGTERM if reason.args else signal.SIGINT)) from None
    finally:
        if alone:
            signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(number)


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
