"""Prompts that a model is to answer: conversations of which only the user's turns are given."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tangora._checks import InputError
from tangora.training.data.readers import RawRow, excerpt, listed
from tangora.training.data.sources import read_data

_TURNS = ("prompt", "turns")  # names of MT-Bench's column on the hub and in FastChat
_IDS = ("prompt_id", "question_id", "id")


class Prompt(NamedTuple):
    """The user's turns of one conversation."""

    id: str
    turns: tuple[str, ...]


def read_prompts(given: str | Sequence[Sequence[str]]) -> list[Prompt]:
    """Read the prompts of a data set by its name, or those that are given themselves."""
    if not isinstance(given, str):
        return [Prompt(str(number), tuple(turns)) for number, turns in enumerate(given, start=1)]
    splits = read_data(given).splits
    return [_prompt(row, number) for number, row in enumerate(splits.get("test") or splits["train"], start=1)]


def _prompt(row: RawRow, number: int) -> Prompt:
    column = next((name for name in _TURNS if name in row.values), None)
    if column is None:
        raise InputError(
            f"{row.where}: a prompt must stand in a column {' or '.join(map(repr, _TURNS))}; "
            f"it has {listed(list(row.values))}"
        )
    value: Any = row.values[column]
    turns = [value] if isinstance(value, str) else value
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(each, str) and each.strip() for each in turns)
    ):
        raise InputError(
            f"{row.where}: column {column!r} must hold a text or a list of texts; got {excerpt(value)}"
        )
    known = (row.values[name] for name in _IDS if row.values.get(name) is not None)
    return Prompt(str(next(known, number)), tuple(turns))
