"""Write a task that asks for much to be remembered, and has as much data as one likes.

    python benchmarks/when_alignment_pays/prototypes.py --number 200 --output results/prototypes-200.parquet

Some images of digits are prototypes, and each has a class drawn by lot, whatever digit it shows. The examples are noisy
copies: to sort new copies a model must have learnt every prototype by itself, so their number says how much the task
wants of the adapter, and more training data cannot say it in another way. Full fine-tuning has room for it; how much
room an adapter has is a question of its rank.
"""

import argparse
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch

from tangora.training.models.digits import read_digits

CLASSES = 10
NOISE = 0.1


def prototypes(number: int, examples: int, seed: int = 0) -> pyarrow.Table:
    """Draw noisy copies of prototypes.

    Args:
        number: Of prototypes, in [10, 1797].
        examples: How many copies.
        seed: Of everything that is drawn.

    Returns:
        ``pixels`` in [0, 1] and ``label``.
    """
    generator = torch.Generator().manual_seed(seed)
    images, _ = read_digits("prototypes", range(10))
    chosen = images[torch.randperm(len(images), generator=generator)[:number]]
    classes = torch.arange(number) % CLASSES
    which = torch.randint(number, (examples,), generator=generator)
    noise = NOISE * torch.randn(examples, *images.shape[1:], generator=generator)
    pixels = (chosen[which] + noise).clamp(0, 1).double().round(decimals=3)
    return pyarrow.table({"pixels": pixels.tolist(), "label": [str(int(c)) for c in classes[which]]})


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=200, help="of prototypes")
    parser.add_argument("--examples", type=int, default=14000)
    parser.add_argument("--output", type=Path, required=True)
    chosen = parser.parse_args()
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(prototypes(chosen.number, chosen.examples), chosen.output)


if __name__ == "__main__":
    main()
