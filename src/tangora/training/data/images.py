"""Images to model inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tangora._checks import InputError
from tangora.training.models import ImageScaler


def encode_images(examples: Sequence[Mapping[str, Any]], scaler: Any) -> list[dict[str, Any]]:
    """Turn examples of images into what the model takes."""
    if not isinstance(scaler, ImageScaler):
        raise InputError(
            "data of images needs a model that reads images, such as vit-digits; this one reads text"
        )
    wanted = scaler.shape
    images = []
    for number, example in enumerate(examples):
        if "pixels" not in example:
            raise InputError("a model that reads images needs data of images, such as digits; this is text")
        image = torch.tensor(example["pixels"], dtype=torch.float32)
        if image.shape != wanted:
            raise InputError(
                f"image {number} must have the model's {_written(wanted)} pixels; got {_written(image.shape)}"
            )
        images.append(image)
    scaled = scaler(torch.stack(images))
    return [
        {"pixel_values": image, "labels": example["label"]}
        for image, example in zip(scaled, examples, strict=True)
    ]


def collate_images(encodings: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack encoded images and their labels to a batch."""
    return {
        "pixel_values": torch.stack([encoding["pixel_values"] for encoding in encodings]),
        "labels": torch.tensor([encoding["labels"] for encoding in encodings]),
    }


def _written(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
