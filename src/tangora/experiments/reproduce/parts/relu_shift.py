"""Settings of the experiment, and what it leaves open."""

from pydantic import Field

from tangora.experiments.reproduce.experiment import Parts
from tangora.experiments.values import Settings
from tangora.recipes.later import Later


class ReluShiftSettings(Settings):
    """Sizes and steps."""

    seed: int = Field(default=0, ge=0, description="First seed.")
    num_seeds: int = Field(default=3, ge=1, description="Seeds of weights, shift and inputs.")
    m: int = Field(default=12, ge=1, description="Outputs.")
    n: int = Field(default=16, ge=2, description="Inputs.")
    rank: int = Field(default=2, ge=1, description="Rank of the shift and of the adapter.")
    shift_size: float = Field(
        default=1.0, gt=0, description="Largest singular value of the shift; the weights' rows have norm one."
    )
    examples: int = Field(default=2**15, ge=64, description="Number of Gaussian inputs.")
    conditions: tuple[float, ...] = Field(
        default=(1.0, 2.0, 4.0), min_length=1, description="Condition numbers of the shift."
    )
    learning_rates: tuple[float, ...] = Field(
        default=(0.25, 0.5, 0.9), min_length=1, description="Steps of preconditioned descent, below 1."
    )
    steps: int = Field(default=200, ge=4, description="Most steps of descent.")
    damping: float = Field(default=1e-6, gt=0, description="Of the preconditioner; LoRA-One's.")
    count_halvings: int = Field(
        default=6, ge=2, description="The start error is measured with examples / 2^0 ... 2^this."
    )


PARTS = Parts(
    stand_ins=(
        "The source's sizes, number of examples and step sizes were not to be had: those in the settings are ours.",
        "The pre-trained weights are random with rows of norm one; the source says nothing of them.",
        "With the true gradient the spectral start is made from it too, since that is what training can read.",
    ),
    settings=ReluShiftSettings,
    quick={
        "num_seeds": 2,
        "m": 6,
        "n": 6,
        "examples": 24_000,
        "conditions": (1.0, 2.0),
        "learning_rates": (0.5, 0.9),
        "count_halvings": 4,
    },
    run=Later("tangora.experiments.reproduce.relu_shift:run_relu_shift"),
)
