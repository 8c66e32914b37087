"""Scales images for a model, as a tokenizer prepares texts; written by hand, as this needs no torchvision."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from tangora._checks import InputError


@dataclass(frozen=True)
class ImageScaler:
    """Scales pixels channel by channel."""

    mean: tuple[float, ...]  # of each channel, of pixels in [0, 1]
    std: tuple[float, ...]
    height: int  # of the images that the model takes
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns."""
        return len(self.mean), self.height, self.width

    def __call__(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Scale images."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (images - mean[:, None, None]) / std[:, None, None]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``preprocessor_config.json``, as transformers' image processors do."""
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
    channels, size = getattr(config, "num_channels", None), getattr(config, "image_size", None)
    if not isinstance(channels, int) or not isinstance(size, (int, list, tuple)):
        raise InputError(f"model {name!r} must have num_channels and image_size in its config.json")
    height, width = (size, size) if isinstance(size, int) else size
    if found.get("do_normalize") is False:
        return ImageScaler((0.0,) * channels, (1.0,) * channels, height, width)
    mean, std = (_per_channel(found.get(key), channels) for key in ("image_mean", "image_std"))
    return ImageScaler(mean, std, height, width)


def _per_channel(value: Any, channels: int) -> tuple[float, ...]:
    values = value if isinstance(value, (list, tuple)) else [0.5 if value is None else value]
    return tuple(map(float, values)) if len(values) == channels else (float(values[0]),) * channels
