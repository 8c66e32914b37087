"""What an experiment of a paper is: settings, a function of them, and what is known about its source."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from tangora.experiments.values import Settings

if TYPE_CHECKING:  # experiments are listed without what they are made of
    import tangora.report.reproduction.records

Progress: TypeAlias = Callable[[int, int], None]
"""``progress(done, total)``: how many parts of the work are done, and how many there are."""


@dataclass(frozen=True)
class Parts:
    """What an experiment is made of.

    Attributes:
        stand_ins: What the source leaves open or what was made smaller, one sentence each; empty if nothing.
        settings: Class of its settings; the defaults are the full size.
        quick: Settings of a run of less than five seconds.
        run: ``run(settings, progress)``; deterministic in the settings, yields data and draws nothing.
    """

    stand_ins: tuple[str, ...]
    settings: type[Settings]
    quick: Mapping[str, Any]
    run: Callable[[Any, Progress], "tangora.report.reproduction.records.Result"]


@dataclass(frozen=True)
class Experiment:
    """An experiment that can be repeated by name.

    Attributes:
        name: As on the command line.
        title: One line.
        source: Paper and place in it.
        load: Imports the rest.
        duration: How long the full size takes on two cores, in words.
    """

    name: str
    title: str
    source: str
    load: Callable[[], Parts]
    duration: str = ""

    @cached_property
    def parts(self) -> Parts:
        """Settings and what is done with them."""
        return self.load()
