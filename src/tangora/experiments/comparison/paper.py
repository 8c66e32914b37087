"""The numbers that a paper prints for what a comparison repeats: shown beside its results, and part of no statistic."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from tangora._checks import InputError
from tangora.experiments.values import Settings


class Paper(Settings):
    """Published results."""

    source: str = Field(min_length=1, description="Paper, table and setting.")
    results: dict[str, dict[str, float]] = Field(
        min_length=1,
        description="By column of the table, such as GSM8K or a task's name, and by recipe: numbers as printed, in "
        "percent where they are shares. A column with the name of a benchmark stands beside its results, else the "
        "first one beside those of the comparison's metric.",
    )
    notes: list[str] = Field(
        default_factory=list,
        description="Where the paper's setting differs, and what else a reader must know.",
    )

    @field_validator("notes", mode="before")
    @classmethod
    def _one_note(cls, notes: Any) -> Any:
        return [notes] if isinstance(notes, str) else notes


def by_task(paper: Paper, titles: Mapping[str, str], source: str = "") -> dict[str, Paper]:
    """Give each task of a plan the column that has its name or its title, in whatever case."""
    names = {label.casefold(): name for name, title in titles.items() for label in (title, name)}
    place, found = f"{source}: paper".lstrip(": "), {}
    for column, numbers in paper.results.items():
        if (name := names.get(column.casefold())) is None:
            raise InputError(
                f"{place}: results must be columns with the names or titles of tasks ({', '.join(titles)}); "
                f"got {column!r}"
            )
        if name in found:
            raise InputError(f"{place}: results has two columns for task {name}; leave {column!r} out")
        found[name] = paper.model_copy(update={"results": {column: numbers}})
    return found
