"""Settings of the experiment, and what it leaves open."""

from typing import Literal, TypeAlias

from pydantic import Field, field_validator

from tangora._checks import check_choice
from tangora.experiments.reproduce.experiment import Parts
from tangora.experiments.values import Settings
from tangora.recipes.later import Later

Readout: TypeAlias = Literal["standard", "mean-field"]
Rate: TypeAlias = Literal["full", "lora", "sgd"]
START_NAMES = ("plain", "orthogonal", "lora-ga")


class WidthSettings(Settings):
    """Network, methods and steps."""

    widths: list[int] = Field(
        default=[128, 256, 512, 1024, 2048, 4096], description="Widths of the hidden layers."
    )
    num_seeds: int = Field(default=3, ge=1, description="Networks per width.")
    seed: int = Field(default=0, ge=0, description="Seed of the first network; the others follow.")
    steps: int = Field(default=5, ge=1, description="Optimizer steps on one batch.")
    starts: list[str] = Field(
        default=list(START_NAMES), description="LoRA starts: plain, orthogonal, lora-ga."
    )
    rank: int = Field(default=8, ge=1, description="LoRA's r.")
    alpha: float = Field(default=16.0, gt=0, description="LoRA's alpha.")
    inputs: int = Field(default=32, ge=1, description="Input features.")
    outputs: int = Field(default=16, ge=1, description="Outputs.")
    num_examples: int = Field(default=32, ge=1, description="Examples in the batch.")
    readout: Readout = Field(
        default="standard",
        description="Last layer's weights of size width^-1/2 (standard) or 1/width (mean-field).",
    )
    full_rate: float = Field(
        default=3e-5, gt=0, description="Rate of Adam-like methods in full fine-tuning's units."
    )
    lora_rate: float = Field(default=3e-4, gt=0, description="Rate of Adam-like methods in LoRA's units.")
    sgd_rate: float = Field(default=3e-3, gt=0, description="Rate of methods without moments.")

    @field_validator("widths")
    @classmethod
    def _several(cls, widths: list[int]) -> list[int]:
        if len(set(widths)) < 2 or min(widths) < 1:
            raise ValueError(f"widths must be at least two different positive numbers; got {widths}")
        return sorted(set(widths))

    @field_validator("starts")
    @classmethod
    def _known(cls, starts: list[str]) -> list[str]:
        for start in starts:
            check_choice("starts", start, START_NAMES)
        return starts

    def rate(self, kind: Rate) -> float:
        """Return a method's learning rate, the same at all widths.

        Args:
            kind: The units it is in: full fine-tuning's, LoRA's, or those of descent without moments.

        Returns:
            The rate.
        """
        return {"full": self.full_rate, "lora": self.lora_rate, "sgd": self.sgd_rate}[kind]


PARTS = Parts(
    stand_ins=(
        (
            "Only ODELoRA's abstract could be read: which quantity its claim is about and at which scaling is not "
            "known, so no claim of the paper is asserted and the exponents are reported as measured."
        ),
        "A three-layer tanh network with LoRA on its square layer, one fixed batch, random targets.",
    ),
    settings=WidthSettings,
    quick={"widths": [64, 512], "num_seeds": 3, "steps": 2, "starts": ["plain"]},
    run=Later("tangora.experiments.reproduce.width:run"),
)
