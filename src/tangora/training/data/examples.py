"""Turns rows into examples: the contents of their columns, and the number of a label, if labels are classes."""

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy

from tangora._checks import InputError, near_hint
from tangora.training.data.images import IMAGE, PIXELS, StoredImage
from tangora.training.data.readers import RawData, RawRow, excerpt, listed
from tangora.training.data.recognise import Layout

Example: TypeAlias = dict[str, Any]
"""``text`` (``text_pair``), ``pixels`` or ``image`` with ``label``, a number; or ``prompt``, ``completion``, which also
has the final ``answer``, the generated ``problem`` or the ``messages`` where there are any; plain text has an empty
prompt.
"""

# names of roles in ShareGPT's format, and those of transformers
_SPEAKERS = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")}

_MOST_NUMBERS = 20  # different numbers with fractions that may still be classes, such as half stars


def to_examples(
    data: RawData, layout: Layout, labels: tuple[str, ...] = ()
) -> tuple[dict[str, list[Example]], tuple[str, ...]]:
    """Turn rows into examples, and return the names of their classes; ``labels`` are those of other data."""
    if layout.kind == "classification":
        return _labelled(data, layout, labels)
    return {split: [_causal(row, layout) for row in rows] for split, rows in data.splits.items()}, ()


def _labelled(
    data: RawData, layout: Layout, names: tuple[str, ...]
) -> tuple[dict[str, list[Example]], tuple[str, ...]]:
    """Return classification examples with numbered labels, and the names of the labels."""
    assert layout.label is not None
    column = layout.label
    read_rows = {
        split: [(row, _content(row, layout), _label(row, column)) for row in rows]
        for split, rows in data.splits.items()
    }
    found = [name for _, _, name in read_rows["train"]]
    if not names:
        known = set(found)
        names = data.labels if known <= set(data.labels) else _sorted_labels(known)
        _check_classes(found, names, f"{data.name}: column {column!r}")
    for row, _, name in (each for rows in read_rows.values() for each in rows):
        if name not in names:
            where = f"{row.where}: column {column!r}"
            raise _misfit(where, f"a label of the training rows, {listed(names)}", name)
    numbers = {name: number for number, name in enumerate(names)}
    examples = {
        split: [content | {"label": numbers[name]} for _, content, name in rows]
        for split, rows in read_rows.items()
    }
    return examples, names


def _content(row: RawRow, layout: Layout) -> Example:
    if layout.image is not None:
        return _pixels(row) if layout.image == PIXELS else {IMAGE: _image(row, layout.image)}
    return {
        role: _text(row, column) for role, column in zip(("text", "text_pair"), layout.text, strict=False)
    }


def _causal(row: RawRow, layout: Layout) -> Example:
    if layout.text:
        return {"prompt": "", "completion": _text(row, layout.text[0])}
    if layout.chat is not None:
        return _conversation(row, layout.chat)
    assert layout.prompt is not None
    assert layout.completion is not None
    prompt = _text(row, layout.prompt)
    if layout.context is not None and str(row.values.get(layout.context) or "").strip():
        prompt = f"{prompt}\n{_text(row, layout.context)}"
    example = {"prompt": prompt, "completion": _text(row, layout.completion)}
    answer = row.values.get("answer")
    # other data sets keep other things under this name: dictionaries, lists, truth values
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    return example | {"answer": answer} if isinstance(answer, str) and answer.strip() else example


def _conversation(row: RawRow, column: str) -> Example:
    """Return a conversation, and its plain form: all turns but the last, and the last."""
    turns, where = _value(row, column)
    if not isinstance(turns, list) or not turns:
        raise _misfit(where, "a list of messages", turns)
    messages = [_message(turn, where) for turn in turns]
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise InputError(
            f"{where} must end with a message of the assistant that follows another message; its roles "
            f"are {listed([message['role'] for message in messages])}"
        )
    prompt = "\n".join(message["content"] for message in messages[:-1])
    return {"prompt": prompt, "completion": messages[-1]["content"], "messages": messages}


def _message(turn: object, where: str) -> dict[str, str]:
    """Return a message as ``role`` and ``content``, from this form or from ShareGPT's ``from`` and ``value``."""
    if not isinstance(turn, Mapping):
        raise _misfit(where, "messages with role and content", turn)
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
        raise _misfit(where, "messages with text as role and content", dict(turn))
    return {"role": _SPEAKERS.get(role, role), "content": _unicode(content, where)}


def _text(row: RawRow, column: str) -> str:
    value, where = _value(row, column)
    if not isinstance(value, str) or not value.strip():
        raise _misfit(where, "text", value)
    return _unicode(value, where)


def _pixels(row: RawRow) -> Example:
    value, where = _value(row, PIXELS)
    try:
        image = numpy.asarray(value, dtype=numpy.float64)
    except (ValueError, TypeError):
        image = numpy.empty(0)
    if image.ndim != 3 or not image.size or not (image.min() >= 0 and image.max() <= 1):
        raise _misfit(where, "channels of rows of numbers in [0, 1]", value)
    return {PIXELS: image.tolist()}


def _image(row: RawRow, column: str) -> StoredImage:
    value, where = _value(row, column)
    if not isinstance(value, StoredImage):
        raise _misfit(where, "an image", value)
    _ = value.digest  # read once, so that a file that is no image is found before training
    return value


def _label(row: RawRow, column: str) -> str:
    """Return the label in a column; whole numbers are names too."""
    value, where = _value(row, column)
    if isinstance(value, float) and math.isfinite(value):
        if not value.is_integer():
            raise _misfit(where, "text or a whole number (regression is not supported)", value)
        value = int(value)  # pandas makes 1.0 of 1 where another row has none
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise _misfit(where, "text or a whole number", value)
    name = _unicode(str(value).strip(), where)
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise _misfit(where, "a label without control characters", name)
    return name


def _value(row: RawRow, column: str) -> tuple[object, str]:
    """Return the value in a column, and the place to name in a message about it."""
    if column not in row.values:
        raise InputError(
            f"{row.where}: this example has no column {column!r}; it has {listed(list(row.values)) or 'none'}"
        )
    return row.values[column], f"{row.where}: column {column!r}"


def _misfit(where: str, allowed: str, value: object) -> InputError:
    return InputError(f"{where} must hold {allowed}; got {excerpt(value)}")


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a pair of surrogates, which JSON can write
        raise InputError(f"{where} must hold Unicode text; {error.reason}") from error
    return text


def _sorted_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Return labels in order: by value if all are whole numbers, else by the alphabet."""
    unsorted = list(names)
    try:
        return tuple(sorted(unsorted, key=int))
    except ValueError:
        return tuple(sorted(unsorted))


def _check_classes(found: Sequence[str], names: Sequence[str], where: str) -> None:
    known = set(found)
    if len(names) < 2:
        raise InputError(
            f"{where} must hold at least 2 different labels; got only {listed(list(map(repr, names)))}"
        )
    numbers = {name: number for name in known if (number := _number(name)) is not None}
    fractions = [name for name, number in numbers.items() if not number.is_integer()]
    if len(numbers) == len(known) > _MOST_NUMBERS and fractions:
        raise InputError(
            f"{where} must hold classes; it holds {len(known)} different numbers, such as {sorted(fractions)[0]}, and "
            "regression is not supported"
        )
    if len(known) > max(2, len(found) / 2):
        raise InputError(
            f"{where} must hold classes with several examples each; it holds {len(known)} different labels in "
            f"{len(found)} examples, such as {', '.join(map(repr, sorted(known)[:3]))}"
        )
    same: dict[float, str] = {}
    for name in sorted(numbers):
        if (other := same.setdefault(numbers[name], name)) != name:
            raise InputError(
                f"{where} must write each class in one way; {other!r} and {name!r} are the same number"
            )


def _number(name: str) -> float | None:
    try:
        number = float(name)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def class_notes(found: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return notes on the classes: their sizes, and what is suspicious about them."""
    counts = Counter(found)
    notes = [f"{len(names)} classes: {listed([f'{name} ({counts[name]})' for name in names])}"]
    if alone := [name for name in names if counts[name] == 1]:
        guessed = [f"{name}{near_hint(name, [each for each in names if each != name])}" for name in alone]
        notes.append(
            f"classes with a single example, which cannot be both trained and tested: {listed(guessed)}"
        )
    if absent := [name for name in names if not counts[name]]:
        notes.append(f"classes without an example: {listed(absent)}")
    folded = Counter(name.casefold() for name in names)
    if alike := [name for name in names if folded[name.casefold()] > 1]:
        notes.append(f"classes that differ only in capital letters: {listed(alike)}")
    return notes


def content_key(example: Mapping[str, Any]) -> str:
    """Return what makes two examples the same for a split: their question, image, or text, whatever its spacing."""
    if PIXELS in example:
        return repr(example[PIXELS])
    if IMAGE in example:
        return example[IMAGE].digest
    text = example.get("text") or example.get("prompt") or example["completion"]
    return " ".join(f"{text} {example.get('text_pair', '')}".split())


def repeats(examples: Iterable[Example]) -> tuple[int, int]:
    """Count examples that say again what an earlier one said, and contents with different labels."""
    seen: dict[str, set[int | None]] = {}
    total = 0
    for example in examples:
        total += 1
        seen.setdefault(content_key(example), set()).add(example.get("label"))
    return total - len(seen), sum(len(labels) > 1 for labels in seen.values())
