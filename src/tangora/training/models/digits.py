"""Handwritten digits, 8 x 8 in grey, and `vit-digits`: a small vision transformer pretrained here on half of them."""

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from transformers import ViTConfig, ViTForImageClassification

from tangora.training.models.cached import cached_model
from tangora.training.models.image_scaler import ImageScaler
from tangora.training.paths import PackagedFiles, locate

# 1797 images, about 180 of each digit
DIGITS = PackagedFiles("scikit-learn", "1.9.1", "sklearn", "datasets/data/digits.csv.gz", extra="tasks")
PRETRAINING_DIGITS = (0, 1, 2, 3, 4)
TASK_DIGITS = (5, 6, 7, 8, 9)  # the data set ``digits``

VIT_DIGITS = "vit-digits"
SCALER = ImageScaler((0.5,), (0.5,), 8, 8)  # from [0, 1] to [-1, 1], as ViT's own

_SIDE = 8
_BRIGHTEST = 16
_KEY = f"{VIT_DIGITS}-v1"  # name in the cache; another one whenever the pretraining changes
_ARCHITECTURE = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_attention_heads": 4}
_EPOCHS = 20
_BATCH_SIZE = 64
_LEARNING_RATE = 1e-3

_log = logging.getLogger(__name__)


def read_digits(name: str, classes: Collection[int]) -> tuple[Float[Tensor, "n 1 8 8"], Int[Tensor, " n"]]:
    """Read the images of some classes.

    Source:
        Alpaydin & Kaynak (1998), Optical Recognition of Handwritten Digits, UCI; scikit-learn's ``load_digits``.
    """
    table = torch.from_numpy(numpy.loadtxt(locate(name, DIGITS), delimiter=","))
    chosen = table[torch.isin(table[:, -1].long(), torch.tensor(sorted(classes)))]
    images = chosen[:, :-1].reshape(-1, 1, _SIDE, _SIDE).float() / _BRIGHTEST
    return images, chosen[:, -1].long()


def pretrained_vit() -> Path:
    """Return a folder that holds ``vit-digits``, pretrained at the first call."""
    return cached_model(_KEY, _make)


def _make(folder: Path) -> None:
    images, digits = read_digits(VIT_DIGITS, PRETRAINING_DIGITS)
    _log.info("pretraining %s once, into the cache", VIT_DIGITS)
    model = pretrain(SCALER(images), digits, epochs=_EPOCHS)
    # without its head, which knows none of the other digits and would fit them, as there are five of them too
    model.vit.save_pretrained(folder)
    SCALER.save_pretrained(folder)


def vit_config(num_labels: int, width: int = 64, depth: int = 4) -> ViTConfig:
    """Return the configuration of ``vit-digits``, or of a model of another size."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth}
    return ViTConfig.from_dict(_ARCHITECTURE | sizes | {"num_labels": num_labels})


def _adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=_LEARNING_RATE)


def pretrain(
    images: Float[Tensor, "n 1 8 8"],
    labels: Int[Tensor, " n"],
    *,
    epochs: int,
    width: int = 64,
    depth: int = 4,
    make_optimizer: Callable[[nn.Module], Optimizer] = _adamw,
) -> ViTForImageClassification:
    """Train a small vision transformer from nothing.

    Patches of 2 x 2 pixels and 4 heads, 136 thousand weights at width 64 and depth 4; one cycle of the learning rate.
    On one thread, so that the same processor finds the same weights.
    """
    config = vit_config(int(labels.max()) + 1, width, depth)
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = ViTForImageClassification(config).train()
        optimizer = make_optimizer(model)
        rates = [group["lr"] for group in optimizer.param_groups]
        steps = -(-len(images) // _BATCH_SIZE) * epochs
        cycles_betas = isinstance(optimizer, AdamW)
        schedule = OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1, cycle_momentum=cycles_betas)
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(_BATCH_SIZE):
                optimizer.zero_grad()
                model(pixel_values=images[batch], labels=labels[batch]).loss.backward()
                clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
    return model.eval()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
