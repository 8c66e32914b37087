"""Small vision transformers like ``vit-digits``, of another width or depth or pretrained by another optimizer.

python benchmarks/transfer/models.py --width 128 --output results/vit-128
python benchmarks/transfer/models.py --optimizer muon --output results/vit-muon
"""

import argparse
from pathlib import Path

from tangora.recipes.baselines import full_muon
from tangora.training.models.digits import PRETRAINING_DIGITS, SCALER, VIT_DIGITS, pretrain, read_digits

_MUON_LR = 0.02


def main() -> None:
    """Pretrain one, and write it without its head."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    images, digits = read_digits(VIT_DIGITS, PRETRAINING_DIGITS)
    options = (
        {"make_optimizer": lambda model: full_muon(model, lr=_MUON_LR)}
        if arguments.optimizer == "muon"
        else {}
    )
    scaled = SCALER(images)
    model = pretrain(scaled, digits, epochs=20, width=arguments.width, depth=arguments.depth, **options)
    right = (model(pixel_values=scaled).logits.argmax(-1) == digits).float().mean().item()
    model.vit.save_pretrained(arguments.output)
    SCALER.save_pretrained(arguments.output)
    print(f"{arguments.output}: {right:.4f} of the pretraining images right")


if __name__ == "__main__":
    main()
