"""The console and progress bars, without heavy imports."""

import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from tangora._checks import OtherRankError
from tangora._launched import launched, launched_as
from tangora._names import STATUSES, USER_LOG

console = Console()

_LAST_WORDS, _LONGEST_LAST_WORDS = 15.0, 60.0
"""Seconds in which the launcher ends a process after another has told of an error."""

_PAUSE, _LONG_PAUSE = 30.0, 300.0
"""Seconds between lines on the progress of a run, and of a run of a comparison, where no terminal shows bars."""


@contextlib.contextmanager
def interruptible(
    next_time: Callable[[], str] = lambda: "begins again", is_told: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """End the program with one line when the user (exit code 130) or a scheduler (143) interrupts a command.

    ``next_time`` returns what the same command does next. The line is left out where ``is_told`` says that another
    process has told why all end, and by all processes of a launcher but the first.
    """
    alone = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if alone else None
    try:
        yield
    except KeyboardInterrupt as reason:
        if launched_as() == 0 and not is_told():
            Console(stderr=True).print(
                f"interrupted; the same command {next_time()}", soft_wrap=True, highlight=False
            )
        raise SystemExit(128 + (signal.SIGTERM if reason.args else signal.SIGINT)) from None
    finally:
        if alone:
            signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, _frame: object) -> None:
    if launched():  # its launcher hears of Ctrl-C, too, and ends what is ending
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def wait_for_the_first(error: BaseException) -> None:
    """Let one process of a launcher tell of an error: the launcher ends the others when that one has ended."""
    if isinstance(error, OtherRankError):
        time.sleep(_LONGEST_LAST_WORDS)
    elif launched_as() > 0:  # what all find out, the first tells
        time.sleep(_LAST_WORDS)


class _Bars(Bars):
    """Bars that vanish before an error is printed."""

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        if kind is not None and issubclass(kind, Exception):
            for task in self.tasks:
                self.update(task.id, visible=False)
        super().__exit__(kind, error, trace)


def progress_bars() -> Bars:
    """Return bars with room for a note, drawn on the console if it is a terminal; lines tell of progress elsewhere."""
    return _Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


class _Lines:
    """Lines on stderr that tell of progress, with some time between them."""

    def __init__(self, pause: float):
        self._pause = pause
        self._began = self._last = time.monotonic()

    def tell(self, sentence: str) -> None:
        """Print a line, with the time since the beginning; the first process of a launcher alone does."""
        self._last = time.monotonic()
        if not console.quiet:
            elapsed = timedelta(seconds=int(self._last - self._began))
            print(f"{sentence} ({elapsed})", file=sys.stderr, flush=True)

    def tell_sometimes(self, name: str, done: int, total: int) -> None:
        """Print how far something is, unless a line has been printed just before."""
        if time.monotonic() - self._last >= self._pause:
            self.tell(f"{name}: {done} of {total}" if total else name)


def bar_of(bars: Bars, name: str, *, visible: bool = True) -> Callable[[str, int, int], object]:
    """Add a bar that follows a command; its note is what goes on."""
    if bars.disable:
        lines = _Lines(_PAUSE)
        return lambda what, done, total: lines.tell_sometimes(f"{name}: {what}", done, total)
    bar = bars.add_task(name, total=None, note="", visible=visible)
    return lambda what, done, total: bars.update(bar, note=what, completed=done, total=total or None)


class ComparisonBars:
    """One bar for all runs of a comparison, and one for each run that is going on; or a line for each that ended."""

    def __init__(self, bars: Bars):
        self._bars = bars
        self._lines = _Lines(_LONG_PAUSE) if bars.disable else None
        self._runs = bars.add_task("runs", total=None, note="")
        self._steps: dict[str, TaskID] = {}
        self._ended = self._total = self._told = 0
        self.has_run = False

    @property
    def next_time(self) -> str:
        """Behaviour of the same command after an interruption."""
        return f"goes on: {self._ended} of {self._total} runs are done" if self._ended else "begins again"

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show the progress of a comparison or of one of its runs."""
        if what == "runs":
            self._ended, self._total, self._told = done, total, done
            self._bars.update(self._runs, completed=done, total=total)
            return
        self.has_run = True
        run, _, note = what.partition(": ")
        if self._lines is not None:
            self._tell(self._lines, f"{run} {note.replace('_', ' ')}", done, total, ended=note in STATUSES)
        if run not in self._steps:
            self._steps[run] = self._bars.add_task(run, total=None, note="")
        self._bars.update(self._steps[run], note=note, completed=done, total=total or None)
        if note in STATUSES:
            self._bars.remove_task(self._steps.pop(run))

    def _tell(self, lines: _Lines, what: str, done: int, total: int, *, ended: bool) -> None:
        if ended:
            self._told += 1
            lines.tell(f"{self._told} of {self._total} runs: {what}")
        else:
            lines.tell_sometimes(what, done, total)


@contextlib.contextmanager
def notes_printed() -> Iterator[None]:
    """Print what a command says of its data and its failed runs."""
    logger, handler = logging.getLogger(USER_LOG), logging.Handler()
    handler.emit = lambda record: console.print(escape(record.getMessage()), soft_wrap=True)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
