"""Reads rows with their places: JSON Lines, JSON, CSV with any usual separator, Parquet, folders of texts or images.

With Python's own readers of JSON and CSV, as those of `datasets` change what they read: a label "01" becomes 1 and a
date a time, columns that a row lacks are filled, types of CSV are guessed, and the line of a row is forgotten.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from tangora._checks import InputError, reason
from tangora.training.data.images import IMAGE_SUFFIXES, image_cell, image_file
from tangora.training.paths import DATA_SUFFIXES

_SEPARATORS = ",;\t|"
_LONGEST_CELL = 2**31 - 1  # the largest that a C long holds on every system; Python's own limit is 131072
_LONGEST_EXCERPT = 80
_MOST_NAMES = 20


class RawRow(NamedTuple):
    """One record and the place to name in a message about it."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class RawData:
    """Rows before columns are chosen and splits are made; without splits of its own a data set has only ``train``."""

    splits: Mapping[str, list[RawRow]]
    labels: tuple[str, ...] = ()  # names of the classes where the data set declares them, in its order
    name: str = "the data"

    @property
    def columns(self) -> list[str]:
        """All columns that some training row has: one row may lack what the others hold."""
        return list(dict.fromkeys(column for row in self.splits["train"] for column in row.values))


def excerpt(value: object) -> str:
    """Return the beginning of a value's representation, on one line."""
    text = repr(value)
    return text if len(text) <= _LONGEST_EXCERPT else f"{text[:_LONGEST_EXCERPT]}..."


def listed(names: Sequence[str]) -> str:
    """Return names separated by commas, but not all of very many."""
    rest = f", ... ({len(names)} in all)" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + rest


def read_file(path: Path) -> RawData:
    """Read a data file in the format that its suffix names."""
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise InputError(f"data file {path} must end in one of {', '.join(_READERS)}; got {path.suffix!r}")
    try:
        rows = list(_READERS[suffix](path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    if not rows:
        raise InputError(f"{path}:1: the file must hold at least one example; it is empty")
    return RawData({"train": rows}, name=path.name)


def read_folder(path: Path) -> RawData:
    """Read a folder of ``<label>/*.txt``, or of images, into rows of ``text`` or ``image``, and ``label``."""
    found = sorted(path.glob("*/*"))
    texts = [file for file in found if file.suffix == ".txt"]
    images = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES]
    if texts and images:
        raise InputError(
            f"data folder {path} must contain texts or images; it contains both, such as {texts[0]} and {images[0]}"
        )
    if not texts and not images:
        raise InputError(
            f"data folder {path} must contain <label>/*.txt or images, <label>/*.png; it contains none"
        )
    rows = [RawRow(str(file), {"text": _read_article(file), "label": file.parent.name}) for file in texts]
    rows += [RawRow(str(file), {"image": image_file(file), "label": file.parent.name}) for file in images]
    return RawData({"train": rows}, name=path.name)


def _read_article(path: Path) -> str:
    """Return a text in UTF-8, or failing that in Latin-1, as one article of BBC News needs."""
    if not path.is_file():  # a folder, a pipe, a link that leads nowhere
        raise InputError(f"{path} must be a text file; it is not")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _read_text(path: Path) -> str:
    """Return a file's text, its line ends as they are."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise InputError(
            f"{path}:{line}: the file must be UTF-8 text; byte {column} of this line is not"
        ) from error


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    yield from _json_lines(_read_text(path), path)


def _json_lines(text: str, path: Path) -> Iterator[RawRow]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _object_row(_parsed(line, path, "line", number), f"{path}:{number}")


def _parsed(text: str, path: Path, what: str, first: int = 1) -> object:
    """Return the value of a JSON text, or raise with line and column."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{first + error.lineno - 1}: the {what} must be JSON"
        # some of Python's sentences end in "at"
        raise InputError(f"{place}; {error.msg.removesuffix(' at')} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise InputError(
            f"{path}:{first}: the {what} must be JSON that can be read; {reason(error)}"
        ) from error


def _object_row(values: object, where: str) -> RawRow:
    if not isinstance(values, dict):
        raise InputError(f"{where}: an example must be a JSON object; got {type(values).__name__}")
    return RawRow(where, values)


def _read_json(path: Path) -> Iterator[RawRow]:
    """Yield a list's objects, also of a list inside an object; JSON Lines under this name are read as such."""
    text = _read_text(path)
    first, _, further = text.strip().partition("\n")
    if not first:
        return
    if first.startswith("["):
        _parsed(text, path, "file")
        for value, line in _items(text):
            yield _object_row(value, f"{path}:{line}")
    elif further.strip() and _is_json(first):
        yield from _json_lines(text, path)
    else:
        whole = _object_row(_parsed(text, path, "file"), f"{path}:1")
        key = _key_of_examples(whole)
        if key is None:
            yield whole
        else:
            for index, value in enumerate(whole.values[key]):
                yield _object_row(value, f"{path}: {key}[{index}]")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _key_of_examples(whole: RawRow) -> str | None:
    """Return the key of an object under which its examples are listed; ``None`` if it is an example itself."""
    lists = [
        key
        for key, value in whole.values.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]
    if len(lists) > 1:
        raise InputError(
            f"{whole.where}: the file holds several lists of examples, {listed(lists)}; keep one of them in the file"
        )
    if not lists and all(isinstance(value, (list, dict)) for value in whole.values.values()):
        raise InputError(
            f"{whole.where}: the file must hold a list of examples, such as "
            f'[{{"text": ..., "label": ...}}]; got an object with {listed(list(whole.values)) or "nothing"}'
        )
    return lists[0] if lists else None


def _items(text: str) -> Iterator[tuple[object, int]]:
    """Yield the items of a valid JSON list, and the lines on which they begin."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    between = re.compile(r"[\s,]*")
    position = between.match(text, text.index("[") + 1).end()  # pyright: ignore[reportOptionalMemberAccess]
    while text[position] != "]":
        line += text.count("\n", counted, position)
        counted = position
        value, position = decoder.raw_decode(text, position)
        yield value, line
        position = between.match(text, position).end()  # pyright: ignore[reportOptionalMemberAccess]


def _read_csv(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a CSV file with a header, whose separator is detected."""
    csv.field_size_limit(_LONGEST_CELL)
    text = _read_text(path)
    declared = re.match(
        r'"?sep=([^"\s]|\t)"?\r?\n', text
    )  # Excel writes and reads such a line before the header
    text = text[declared.end() :] if declared else text
    before = 1 if declared else 0
    separator = declared[1] if declared else _separator(text, path)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        names = list(reader.fieldnames or ())
        if not names and text.strip():
            raise InputError(f"{path}:{before + 1}: the first line must name the columns; it is empty")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{path}:1: the header must name different columns; {twice!r} occurs twice")
        for values in reader:
            # DictReader files surplus cells under None and fills missing ones with None
            if None in values or None in values.values():
                raise InputError(
                    f"{path}:{reader.line_num + before}: a line must have {len(names)} cells, as the header "
                    f"(separator {separator!r})"
                )
            yield RawRow(f"{path}:{reader.line_num + before}", values)
    except csv.Error as error:
        # the DictReader itself counts only the lines that it could read
        line = reader.reader.line_num + before
        raise InputError(f"{path}:{line}: the line must be CSV; {error}") from error


def _separator(text: str, path: Path) -> str:
    """Return the separator that makes the most columns of the header; a tab in a .tsv file."""
    if path.suffix.lower() == ".tsv":
        return "\t"

    def columns(separator: str) -> int:
        try:
            return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=separator), ()))
        except csv.Error:  # reported when the file is read
            return 0

    return max(_SEPARATORS, key=columns)  # the comma wins a tie


def _read_parquet(path: Path) -> Iterator[RawRow]:
    try:
        table = pyarrow.parquet.read_table(path).combine_chunks()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} must be a Parquet file; {reason(error)}") from error
    for index in range(table.num_rows):
        where = f"{path}: row {index}"
        try:
            values = {
                name: image_cell(table[name][index].as_py(), f"{where}: column {name!r}")
                for name in table.column_names
            }
        except (ValueError, OverflowError) as error:  # bytes that are no UTF-8, a date beyond Python's
            raise InputError(f"{where}: a value cannot be read; {reason(error)}") from error
        yield RawRow(where, values)


_READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = dict(
    zip(DATA_SUFFIXES, (_read_jsonl, _read_json, _read_csv, _read_csv, _read_parquet), strict=True)
)
