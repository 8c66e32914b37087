"""Prepares images for a model, as a tokenizer prepares texts.

Arrays of the right size are scaled here; pictures go through the model's own image processor of transformers, on
Pillow, which needs no torchvision and gives the same pixels everywhere.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.image_processing_base import ImageProcessingMixin

from tangora._checks import InputError

_MODES = {1: "L", 3: "RGB"}
"""Pillow's names of grey and coloured images, by their number of channels."""


@dataclass(frozen=True)
class ImageScaler:
    """Scales pixels channel by channel, and prepares pictures of any size."""

    mean: tuple[float, ...]  # of each channel, of pixels in [0, 1]
    std: tuple[float, ...]
    height: int  # of the images that the model takes
    width: int
    processor: Any = field(default=None, repr=False, compare=False)  # transformers', for pictures in colour

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns."""
        return len(self.mean), self.height, self.width

    def __call__(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Scale images."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (images - mean[:, None, None]) / std[:, None, None]

    def prepared(self, picture: Image.Image) -> Float[Tensor, "c h w"]:
        """Make a picture the model's input: resized, cropped and scaled as its image processor says.

        A model without one gets the whole picture, resized to its size. What cannot be resized keeps its shape.
        """
        mode = _MODES.get(len(self.mean))
        if mode is None:
            raise InputError(
                f"pictures have 1 or 3 channels, and the model takes {len(self.mean)}: give its data as pixels"
            )
        picture = picture.convert(mode)
        if self.processor is not None and mode == "RGB":
            # saved scalers, whose arrays lie in [0, 1], say that nothing is to be rescaled; a picture's bytes are
            return self.processor(picture, do_rescale=True, return_tensors="pt")["pixel_values"][0]
        picture = picture.resize((self.width, self.height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(numpy.array(picture, dtype=numpy.float32) / 255)
        return self(pixels.view(1, self.height, self.width, len(self.mean)).permute(0, 3, 1, 2))[0]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``preprocessor_config.json``, as transformers' image processors do."""
        if self.processor is not None:
            self.processor.save_pretrained(folder)
            return
        values = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": False,
            "do_rescale": False,  # pixels come in [0, 1]
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "size": {"height": self.height, "width": self.width},
        }
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps(values, indent=1) + "\n"
        (target / "preprocessor_config.json").write_text(text, encoding="utf-8")


def load_scaler(source: str, config: Any, name: str, *, local: bool) -> ImageScaler:
    """Read how a model wants its images."""
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=local)
    except (OSError, ValueError):
        found = {}
    processor = _processor(source, local=local) if found else None
    config = getattr(config, "vision_config", config)
    channels, size = getattr(config, "num_channels", None), getattr(config, "image_size", None)
    if not isinstance(channels, int) or not isinstance(size, (int, list, tuple)):
        raise InputError(f"model {name!r} must have num_channels and image_size in its config.json")
    height, width = (size, size) if isinstance(size, int) else size
    if found.get("do_normalize") is False:
        return ImageScaler((0.0,) * channels, (1.0,) * channels, height, width, processor)
    mean, std = (_per_channel(found.get(key), channels) for key in ("image_mean", "image_std"))
    return ImageScaler(mean, std, height, width, processor)


def _processor(source: str, *, local: bool) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(source, local_files_only=local, backend="pil")
    except (
        OSError,
        ValueError,
        ImportError,
    ):  # of a kind that this version does not know, or has for torchvision only
        return None


def _per_channel(value: Any, channels: int) -> tuple[float, ...]:
    values = value if isinstance(value, (list, tuple)) else [0.5 if value is None else value]
    return tuple(map(float, values)) if len(values) == channels else (float(values[0]),) * channels
