"""Images of handwritten digits, 8 x 8 in grey: some classes to pretrain a model on, the others to adapt it to."""

from collections.abc import Collection

import numpy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tangora.training.models.packaged import PackagedFiles, locate

DIGITS = PackagedFiles("scikit-learn", "1.9.1", "sklearn", "datasets/data/digits.csv.gz", extra="tasks")
"""1797 images, about 180 of each digit."""

PRETRAINING_DIGITS = (0, 1, 2, 3, 4)
"""What ``vit-digits`` has seen."""

TASK_DIGITS = (5, 6, 7, 8, 9)
"""What the data set ``digits`` holds."""

_SIDE = 8
_BRIGHTEST = 16


def read_digits(name: str, classes: Collection[int]) -> tuple[Float[Tensor, "n 1 8 8"], Int[Tensor, " n"]]:
    """Read the images of some classes.

    Source:
        Alpaydin & Kaynak (1998), Optical Recognition of Handwritten Digits, UCI; scikit-learn's ``load_digits``.
    """
    table = torch.from_numpy(numpy.loadtxt(locate(name, DIGITS), delimiter=","))
    chosen = table[torch.isin(table[:, -1].long(), torch.tensor(sorted(classes)))]
    images = chosen[:, :-1].reshape(-1, 1, _SIDE, _SIDE).float() / _BRIGHTEST
    return images, chosen[:, -1].long()
