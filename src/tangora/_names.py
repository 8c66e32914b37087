"""Names that settings accept. They stand here so that the command line can check them without torch."""

from typing import Literal, TypeAlias, get_args

Kind: TypeAlias = Literal["classification", "causal"]
"""What a model is trained for: one label per text or image, or the next token."""

KINDS: tuple[Kind, ...] = get_args(Kind)

Tracker: TypeAlias = Literal["tensorboard", "trackio", "wandb"]
"""Where live curves can be sent."""

Space: TypeAlias = Literal["tangent", "weights", "factors"]
"""Directions over which curvature is measured."""

SPACES: tuple[Space, ...] = get_args(Space)

STARTS = ("lora", "orthogonal", "pissa", "lora-ga", "lora-one")
"""Initializations that a diagnosis can compare."""
