"""Settings of the experiment, and what it leaves open."""

from pydantic import Field, field_validator

from tangora._checks import check_choice
from tangora.experiments.reproduce.experiment import Parts
from tangora.experiments.values import Settings
from tangora.recipes.later import Later

EQUATIONS = ("convection", "allen-cahn")
METHODS = (
    "full (Adam)",
    "full (descent)",
    "LoRA",
    "LoRA (orthogonal start)",
    "LoRA (descent)",
    "P-LoRA",
    "LoRA-Pro",
    "TangentAdam",
    "ODELoRA Euler",
    "ODELoRA Heun",
    "ODELoRA RK4",
    "ODELoRA BUG",
)


class PinnSettings(Settings):
    """Sizes of the experiment."""

    problems: dict[str, tuple[float, float]] = Field(
        default={"convection": (2.0, 4.0), "allen-cahn": (1.0, 3.0)},
        description="Equation, and its coefficient in pretraining and after.",
    )
    methods: tuple[str, ...] = Field(default=METHODS, min_length=1, description="Names of the methods.")
    width: int = Field(default=64, ge=4, description="Units of a hidden layer.")
    depth: int = Field(default=3, ge=2, description="Hidden layers; the weights between them are adapted.")
    rank: int = Field(default=4, ge=1, description="LoRA's r; alpha is the same.")
    num_points: int = Field(default=200, ge=8, description="Collocation points.")
    evaluations: int = Field(default=240, ge=4, description="Gradient evaluations of a run.")
    num_rates: int = Field(default=6, ge=1, description="Learning rates to begin with, half a decade apart.")
    max_rates: int = Field(default=10, ge=1, description="Most learning rates of a method.")
    seeds: tuple[int, ...] = Field(
        default=(0, 1, 2), min_length=1, description="Of starts and points; the first one sweeps."
    )
    pretrain_steps: int = Field(default=1500, ge=1, description="Steps of Adam.")
    pretrain_polish: int = Field(default=300, ge=0, description="Iterations of L-BFGS after it.")

    @field_validator("problems")
    @classmethod
    def _known_problems(cls, problems: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for name in problems:
            check_choice("problems", name, EQUATIONS)
        return problems

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for name in methods:
            check_choice("methods", name, METHODS)
        return methods


PARTS = Parts(
    stand_ins=(
        "Only the source's abstract is known: equations, coefficients, network, rank, rates and budget are ours.",
        "Networks are pretrained on a mild coefficient; the adapter learns a stiffer one from the residual alone.",
        "Boundary and initial conditions are built into the network, so that the residual is the only loss.",
        (
            "ODELoRA, LoRA-Pro and two LoRA baselines start from orthogonal factors: data-free, balanced, and with "
            "invertible Gram matrices, which B = 0 has not."
        ),
        "All have the same number of gradient evaluations and a cosine schedule: RK4 takes a fourth of Euler's steps.",
    ),
    settings=PinnSettings,
    quick={
        "width": 16,
        "num_points": 48,
        "evaluations": 8,
        "num_rates": 2,
        "max_rates": 2,
        "seeds": (0,),
        "pretrain_steps": 100,
        "pretrain_polish": 100,
    },
    run=Later("tangora.experiments.reproduce.pinn:run"),
)
