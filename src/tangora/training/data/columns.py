"""Turns rows into examples: which column is the text, which the label, and what number a label has."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy

from tangora._checks import InputError, check_choice
from tangora.training.data.sources import RawData, Row
from tangora.training.models import Kind

Example: TypeAlias = dict[str, Any]
"""``text`` (``text_pair``) or ``pixels`` with ``label``, a number; or ``prompt``, ``completion`` (``answer``)."""

PIXELS = "pixels"
"""Column of images: channels, rows and columns of numbers in [0, 1]."""

_SHOWN = 80


@dataclass(frozen=True)
class Columns:
    """Names of the columns, as far as the user gave them.

    ``a|b`` is the first of these that a row has, for data sets from different places; ``a,b`` as ``text`` is a pair of
    texts to be classified.
    """

    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None


def infer_kind(columns: Columns, present: Collection[str]) -> Kind:
    """Guess the kind of a task from the columns that were asked for and those that are there.

    Args:
        columns: What the user gave.
        present: Columns of the training rows.

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
    present = data.columns
    images = PIXELS in present and columns.text is None
    if kind == "classification":
        if columns.prompt or columns.completion:
            raise InputError("prompt_column and completion_column are for kind='causal'; use text_column")
        read = _pixels if images else partial(_texts, column=columns.text or "text")
        return _labelled(data, read, columns.label or "label")
    if columns.label:
        raise InputError("label_column is for kind='classification'; leave it out for 'causal'")
    if columns.text and (columns.prompt or columns.completion):
        raise InputError("give either text_column, or prompt_column and completion_column; not both")
    asked = columns.prompt or columns.completion
    if images and not asked and "prompt" not in present:
        raise InputError("images can only be classified; kind must be 'classification', got 'causal'")
    plain = bool(columns.text or (not asked and "completion" not in present and "text" in present))
    return {split: [_causal(row, columns, plain) for row in rows] for split, rows in data.splits.items()}, ()


def _labelled(
    data: RawData, read: Callable[[Row], Example], label: str
) -> tuple[dict[str, list[Example]], tuple[str, ...]]:
    """Return classification examples with numbered labels, and the names of the labels."""
    read_rows = {
        split: [(row, read(row), _label(row, label)) for row in rows] for split, rows in data.splits.items()
    }
    known = {name for _, _, name in read_rows["train"]}
    names = data.labels if known <= set(data.labels) else sorted_labels(known)
    for row, _, name in (each for rows in read_rows.values() for each in rows):
        if name not in names:
            raise InputError(
                f"{row.where}: column {label!r} must hold a label of the training rows, {', '.join(names)}; "
                f"got {name!r}"
            )
    if len(names) < 2:
        raise InputError(
            f"label_column {label!r} must hold at least 2 different labels; got {', '.join(names)}"
        )
    numbers = {name: number for number, name in enumerate(names)}
    examples = {
        split: [content | {"label": numbers[name]} for _, content, name in rows]
        for split, rows in read_rows.items()
    }
    return examples, names


def _causal(row: Row, columns: Columns, plain: bool) -> Example:
    """Return a causal example: a prompt with its completion, or plain text."""
    if plain:
        return {"prompt": "", "completion": _text(row, columns.text or "text", "text_column")}
    example = {
        "prompt": _text(row, columns.prompt or "prompt", "prompt_column"),
        "completion": _text(row, columns.completion or "completion", "completion_column"),
    }
    answer = row.values.get("answer")
    # other data sets keep other things under this name: dictionaries, lists, truth values
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    return example | {"answer": answer} if isinstance(answer, str) and answer.strip() else example


def _text(row: Row, column: str, argument: str) -> str:
    """Return the text in a column."""
    value = _value(row, column, argument)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{row.where}: column {column!r} must hold text; got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a pair of surrogates, which JSON can write
        raise InputError(f"{row.where}: column {column!r} must hold Unicode text; {error.reason}") from error
    return value


def _texts(row: Row, column: str) -> Example:
    """Return a text, or a pair where two columns are named."""
    if column in row.values or column.count(",") != 1:
        return {"text": _text(row, column, "text_column")}
    first, second = (_text(row, name.strip(), "text_column") for name in column.split(","))
    return {"text": first, "text_pair": second}


def _pixels(row: Row) -> Example:
    """Return an image: channels, rows and columns."""
    value = _value(row, PIXELS, "an image's column")
    try:
        image = numpy.asarray(value, dtype=numpy.float64)
    except (ValueError, TypeError):
        image = numpy.empty(0)
    if image.ndim != 3 or not image.size or not (image.min() >= 0 and image.max() <= 1):
        raise InputError(
            f"{row.where}: column {PIXELS!r} must hold channels of rows of numbers in [0, 1]; got {shown(value)}"
        )
    return {PIXELS: image.tolist()}


def _label(row: Row, column: str) -> str:
    """Return the label in a column; whole numbers are names too."""
    value = _value(row, column, "label_column")
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise InputError(
            f"{row.where}: column {column!r} must hold text or a whole number; got {shown(value)}"
        )
    return str(value).strip()


def _value(row: Row, column: str, argument: str) -> object:
    """Return what a column holds, or say which columns there are."""
    found = next((name for name in column.split("|") if name in row.values), column)
    check_choice(f"{row.where}: {argument}", found, list(row.values))
    return row.values[found]


def shown(value: object) -> str:
    """Return a value as a message may show it: on one line, and not all of a long one."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def sorted_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Return labels in order: by value if all are whole numbers, else by the alphabet."""
    unsorted = list(names)
    try:
        return tuple(sorted(unsorted, key=int))
    except ValueError:
        return tuple(sorted(unsorted))


def content_key(example: Mapping[str, Any]) -> str:
    """Return what makes two examples the same for a split: their question, image, or text, whatever its spacing.

    Args:
        example: Of either kind.

    Returns:
        The text; two examples that ask the same are the same, whatever they answer.
    """
    if PIXELS in example:
        return repr(example[PIXELS])
    text = example.get("text") or example.get("prompt") or example["completion"]
    return " ".join(f"{text} {example.get('text_pair', '')}".split())
