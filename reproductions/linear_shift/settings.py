"""Sizes, starts and steps of the linear model."""

from pydantic import Field

from reproductions.shift import Inputs
from tangora.experiments.values import Settings as BaseSettings

STAND_INS = (
    (
        "The source's sizes, ranks, numbers of examples and step sizes (its appendix G.1) were not available: those in "
        "the settings are ours."
    ),
    (
        "The constants of the theorems are not given; checks compare exponents and, where the linearised dynamics "
        "predict them, constants."
    ),
    "LoRA-One's weights act from the right: its right singular subspace of B is our left one.",
)
QUICK = {
    "num_seeds": 2,
    "m": 24,
    "n": 30,
    "rank_star": 2,
    "rank": 6,
    "start_sizes": (0.1, 1e-3, 1e-5),
    "steps": 300,
    "dimensions": (16, 48, 144),
    "dimension_outputs": 16,
    "dimension_seeds": 8,
    "doublings": 6,
    "rate_steps": 300,
}


class Settings(BaseSettings):
    """Sizes, starts and steps."""

    seed: int = Field(default=0, ge=0, description="First seed.")
    num_seeds: int = Field(default=5, ge=1, description="Seeds of everything but the sweep over dimensions.")
    m: int = Field(default=80, ge=2, description="Outputs.")
    n: int = Field(default=100, ge=2, description="Inputs.")
    rank_star: int = Field(default=4, ge=2, description="Rank of the shift.")
    rank: int = Field(default=8, ge=2, description="LoRA's rank; the theorem on A wants twice the shift's.")
    condition: float = Field(default=2.0, ge=1, description="Condition number of the shift.")
    inputs: Inputs = Field(default="gaussian", description="Distribution of the examples' entries.")
    examples_per_dimension: int = Field(default=16, ge=1, description="Examples, in units of n.")
    learning_rate: float = Field(default=0.1, gt=0, lt=0.5, description="Learning rate of gradient descent.")
    ratio: float = Field(default=16.0, gt=1, description="LoRA+'s ratio of B's to A's learning rate.")
    steps: int = Field(default=600, ge=1, description="Steps of the dynamics.")
    start_sizes: tuple[float, ...] = Field(
        default=(1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5),
        min_length=3,
        description="Sizes of A at the start, descending: standard deviation of its entries times the root of n.",
    )
    aligned: float = Field(default=0.1, gt=0, lt=1, description="Sine of the angle that counts as aligned.")
    dimensions: tuple[int, ...] = Field(
        default=(32, 64, 128, 256, 512), min_length=3, description="n of the sweep over dimensions."
    )
    dimension_outputs: int = Field(default=32, ge=2, description="m of that sweep.")
    dimension_size: float = Field(default=1e-6, gt=0, description="Size of A at the start of that sweep.")
    dimension_seeds: int = Field(default=10, ge=1, description="Seeds of that sweep.")
    doublings: int = Field(
        default=8, ge=2, description="Examples of the spectral start: n times 2, 4, ... 2^doublings."
    )
    conditions: tuple[float, ...] = Field(
        default=(1.0, 10.0, 100.0, 1000.0), min_length=2, description="Condition numbers of the rates."
    )
    rate_examples_per_dimension: int = Field(
        default=64, ge=1, description="Examples of the rates, in units of n."
    )
    rate_learning_rate: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Learning rate of descent from the spectral start, plain and preconditioned.",
    )
    rate_steps: int = Field(default=2000, ge=1, description="Most steps from the spectral start.")
    damping: float = Field(default=1e-6, gt=0, description="Damping of the preconditioner; LoRA-One's.")
