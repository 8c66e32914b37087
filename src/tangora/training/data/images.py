"""Encoded images (PNG, JPEG, …) that are read and decoded when they are needed, so that large sets need no memory."""

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, ImageOps

from tangora._checks import InputError, reason

PIXELS = "pixels"  # column and key of arrays: channels, rows and columns of numbers in [0, 1]
IMAGE = "image"  # key of encoded images

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class StoredImage:
    """An encoded image, and the place to name in a message about it."""

    where: str
    read: Callable[[], bytes] = field(repr=False, compare=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the encoded bytes; the first call also checks that they begin as an image does."""
        content = self._content()
        try:
            with Image.open(io.BytesIO(content)):  # reads the header only
                pass
        except Exception as error:  # decoders raise what they like
            raise self._unreadable(error) from error
        return hashlib.sha256(content).hexdigest()

    def decoded(self) -> Image.Image:
        """Decode the image, upright where its EXIF data says how it was held."""
        content = self._content()
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                return ImageOps.exif_transpose(image)
        except Exception as error:
            raise self._unreadable(error) from error

    def _content(self) -> bytes:
        try:
            return self.read()
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> InputError:
        said = (error.strerror if isinstance(error, OSError) else None) or reason(error)
        return InputError(f"{self.where} must be an image that can be read; {said}")


def holds_image(example: Mapping[str, Any]) -> bool:
    """Tell whether an example is an image."""
    return PIXELS in example or IMAGE in example


def image_file(path: Path) -> StoredImage:
    """Return the image in a file."""
    return StoredImage(str(path), path.read_bytes)


def image_cell(value: object, where: str) -> object:
    """Return bytes, alone or as `datasets` stores them beside a path, as an image; anything else as it is."""
    if isinstance(value, dict) and {*value} == {"bytes", "path"} and value["bytes"] is not None:
        value = value["bytes"]
    return StoredImage(where, partial(bytes, value)) if isinstance(value, bytes) else value


def hub_image(data: datasets.Dataset, column: str, index: int, where: str) -> StoredImage:
    """Return an image of a data set, whose column must hold the encoded bytes."""
    return StoredImage(f"{where}: column {column!r}", partial(_hub_bytes, data, column, index))


def _hub_bytes(data: datasets.Dataset, column: str, index: int) -> bytes:
    cell: Any = data[index][column]
    if cell is None:
        raise ValueError("it is missing")
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
