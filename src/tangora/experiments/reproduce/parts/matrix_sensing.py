"""Settings of the experiment, and what it leaves open."""

from pydantic import Field, field_validator

from tangora.experiments.reproduce.experiment import Parts
from tangora.experiments.values import Settings
from tangora.recipes.later import Later


class MatrixSensingSettings(Settings):
    """Problems, methods' step sizes and when to stop."""

    size: int = Field(default=30, ge=2, description="Rows and columns of the matrix.")
    rank: int = Field(default=3, ge=1, description="Rank of the matrix, and of the search.")
    oversampling: int = Field(
        default=6, ge=1, description="Measurements in units of rank times (rows + columns)."
    )
    conditions: list[float] = Field(
        default=[1.0, 10.0, 100.0, 1000.0], description="Condition numbers, of which 10 must be one."
    )
    num_seeds: int = Field(default=3, ge=1, description="Problems per condition number.")
    seed: int = Field(default=0, ge=0, description="Seed of the first problem; the others follow.")
    step: float = Field(default=0.5, gt=0, lt=2, description="Step size of all methods but Adam.")
    other_steps: list[float] = Field(
        default=[1.0], description="Further step sizes, tried at condition number 10."
    )
    adam_rates: list[float] = Field(
        default=[0.01, 0.03, 0.1], description="Adam's rates; the best is reported."
    )
    tolerance: float = Field(default=1e-6, gt=0, lt=1, description="Relative error that counts as solved.")
    max_iterations: int = Field(default=500, ge=1, description="Iterations at most.")
    max_iterations_elsewhere: int = Field(
        default=200, ge=1, description="The same for other steps, ranks and starts."
    )
    ranks: list[tuple[int, int]] = Field(
        default=[(6, 6), (3, 6)], description="Further pairs (rank of the matrix, rank of the search)."
    )
    random_size: float | None = Field(
        default=0.01, gt=0, description="Norm of the factors' rows in a small random start; null: none."
    )

    @field_validator("conditions")
    @classmethod
    def _with_ten(cls, conditions: list[float]) -> list[float]:
        if 10 not in conditions or min(conditions) < 1:
            raise ValueError(f"conditions must be numbers from 1 on, 10 among them; got {conditions}")
        return sorted(set(conditions))


PARTS = Parts(
    stand_ins=(
        (
            "Only ODELoRA's abstract could be read: sizes, starts, step sizes and which Runge-Kutta methods are this "
            "project's choice, so no figure of the paper is repeated."
        ),
        "Factor schemes run in the Lyapunov gauge; projected Runge-Kutta, KSL and BUG are not the paper's.",
    ),
    settings=MatrixSensingSettings,
    quick={
        "size": 16,
        "rank": 2,
        "conditions": [1.0, 10.0],
        "num_seeds": 1,
        "other_steps": [],
        "adam_rates": [0.1],
        "max_iterations": 250,
        "ranks": [],
        "random_size": None,
    },
    run=Later("tangora.experiments.reproduce.matrix_sensing:run"),
)
