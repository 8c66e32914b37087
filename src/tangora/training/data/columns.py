"""Turns rows into examples: which column is the text, which the label, and what number a label has."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from tangora._checks import InputError, check_choice
from tangora.training.data.sources import RawData, Row
from tangora.training.models import Kind

Example: TypeAlias = dict[str, Any]
"""``text`` and ``label`` (a number), or ``prompt``, ``completion`` and sometimes ``answer``."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns, as far as the user gave them."""

    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None


def infer_kind(columns: Columns, present: Iterable[str]) -> Kind:
    """Guess the kind of a task from the columns that were asked for and those that are there.

    Args:
        columns: What the user gave.
        present: Columns of the first row.

    Returns:
        ``classification`` where there is a label and no prompt was asked for, else ``causal``.
    """
    if columns.prompt or columns.completion:
        return "causal"
    return "classification" if columns.label or "label" in present else "causal"


def to_examples(
    data: RawData, kind: Kind, columns: Columns
) -> tuple[dict[str, list[Example]], tuple[str, ...]]:
    """Turn rows into examples.

    Args:
        data: The rows.
        kind: What the examples are for.
        columns: What the user gave; the rest has the usual names.

    Returns:
        Examples by split, and the names of the labels.

    Raises:
        InputError: If a column is missing or holds something else, with the place.
    """
    if kind == "classification":
        if columns.prompt or columns.completion:
            raise InputError("prompt_column and completion_column are for kind='causal'; use text_column")
        return _labelled(data, columns.text or "text", columns.label or "label")
    if columns.label:
        raise InputError("label_column is for kind='classification'; leave it out for 'causal'")
    if columns.text and (columns.prompt or columns.completion):
        raise InputError("give either text_column, or prompt_column and completion_column; not both")
    return {split: [_causal(row, columns) for row in rows] for split, rows in data.splits.items()}, ()


def _labelled(data: RawData, text: str, label: str) -> tuple[dict[str, list[Example]], tuple[str, ...]]:
    """Return classification examples with numbered labels, and the names of the labels."""
    pairs = {
        split: [(_text(row, text, "text_column"), _label(row, label)) for row in rows]
        for split, rows in data.splits.items()
    }
    found = {name for split in pairs.values() for _, name in split}
    names = data.labels if found <= set(data.labels) else sorted_labels(found)
    if len(names) < 2:
        raise InputError(
            f"label_column {label!r} must hold at least 2 different labels; got {', '.join(names)}"
        )
    numbers = {name: number for number, name in enumerate(names)}
    examples = {
        split: [{"text": content, "label": numbers[name]} for content, name in rows]
        for split, rows in pairs.items()
    }
    return examples, names


def _causal(row: Row, columns: Columns) -> Example:
    """Return a causal example: a prompt with its completion, or plain text."""
    asked = columns.prompt or columns.completion
    plain = columns.text or (not asked and "completion" not in row.values and "text" in row.values)
    if plain:
        return {"prompt": "", "completion": _text(row, columns.text or "text", "text_column")}
    example = {
        "prompt": _text(row, columns.prompt or "prompt", "prompt_column"),
        "completion": _text(row, columns.completion or "completion", "completion_column"),
    }
    answer = row.values.get("answer")
    return example | {"answer": answer} if isinstance(answer, str) else example


def _text(row: Row, column: str, argument: str) -> str:
    """Return the text in a column."""
    value = _value(row, column, argument)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{row.where}: column {column!r} must hold text; got {value!r}")
    return value


def _label(row: Row, column: str) -> str:
    """Return the label in a column; whole numbers are names too."""
    value = _value(row, column, "label_column")
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise InputError(f"{row.where}: column {column!r} must hold text or a whole number; got {value!r}")
    return str(value).strip()


def _value(row: Row, column: str, argument: str) -> object:
    """Return what a column holds, or say which columns there are."""
    check_choice(f"{row.where}: {argument}", column, list(row.values))
    return row.values[column]


def sorted_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Return labels in order: by value if all are whole numbers, else by the alphabet."""
    unsorted = list(names)
    try:
        return tuple(sorted(unsorted, key=int))
    except ValueError:
        return tuple(sorted(unsorted))


def content_key(example: Mapping[str, Any]) -> str:
    """Return what makes two examples the same for a split: their question or text, whatever its spacing.

    Args:
        example: Of either kind.

    Returns:
        The text; two examples that ask the same are the same, whatever they answer.
    """
    text = example.get("text") or example.get("prompt") or example["completion"]
    return " ".join(text.split())
