"""Settings of the experiment, and what it leaves open."""

from pydantic import Field

from tangora.experiments.reproduce.experiment import Parts
from tangora.experiments.values import Settings
from tangora.recipes.later import Later


class ToySettings(Settings):
    """Starts and descent."""

    seed: int = Field(default=0, ge=0, description="Seed of the first random start.")
    num_starts: int = Field(default=8, ge=1, description="Random LoRA starts.")
    learning_rate: float = Field(default=0.05, gt=0, le=0.2, description="Step of gradient descent.")
    steps: int = Field(default=2000, ge=1, description="Steps of gradient descent.")
    start_size: float = Field(default=1.0, gt=0, description="Standard deviation of A's entries.")
    gamma: float = Field(
        default=128.0, gt=0, description="LoRA-One's gamma: the spectral start is 1/gamma long."
    )
    grid: int = Field(default=81, ge=2, description="Points along each axis of the phase portrait.")


PARTS = Parts(
    stand_ins=(
        "Step size, number of steps and random starts are not given in the source.",
        "The figure of the source is in three dimensions; here it is shown in planes.",
    ),
    settings=ToySettings,
    quick={"num_starts": 4, "steps": 1000, "grid": 61},
    run=Later("tangora.experiments.reproduce.toy:run_toy"),
)
