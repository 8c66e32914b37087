"""Physics-informed networks, adapted from one coefficient of a differential equation to another."""

from typing import Any

from pydantic import Field, field_validator

from reproductions.pinn.equations import EQUATIONS
from reproductions.pinn.found import Found, figures_of, findings_of, table_of
from reproductions.pinn.network import Problem, pretrained
from reproductions.pinn.runs import METHODS, Budget, Run, Sweep, sweep
from reproductions.result import Check, Progress, Result, at_least, at_most, outcomes
from tangora._checks import check_choice
from tangora.experiments.values import Settings as BaseSettings

_ABSTRACT = "ODELoRA, arXiv:2602.07479, abstract: superiority over existing baselines, especially in training stability"

STAND_INS = (
    "Only the source's abstract is known: equations, coefficients, network, rank, rates and budget are ours.",
    "Networks are pretrained on a mild coefficient; the adapter learns a stiffer one from the residual alone.",
    "Boundary and initial conditions are built into the network, so that the residual is the only loss.",
    (
        "ODELoRA, LoRA-Pro and two LoRA baselines start from orthogonal factors: data-free, balanced, and with "
        "invertible Gram matrices, which B = 0 has not."
    ),
    "All have the same number of gradient evaluations and a cosine schedule: RK4 takes a fourth of Euler's steps.",
)
QUICK = {
    "width": 16,
    "num_points": 48,
    "evaluations": 8,
    "num_rates": 2,
    "max_rates": 2,
    "seeds": (0,),
    "pretrain_steps": 100,
    "pretrain_polish": 100,
}


class Settings(BaseSettings):
    """Sizes of the experiment."""

    problems: dict[str, tuple[float, float]] = Field(
        default={"convection": (2.0, 4.0), "allen-cahn": (1.0, 3.0)},
        description="Equation, and its coefficient in pretraining and after.",
    )
    methods: tuple[str, ...] = Field(
        default=tuple(METHODS), min_length=1, description="Names of the methods."
    )
    width: int = Field(default=64, ge=4, description="Units of a hidden layer.")
    depth: int = Field(default=3, ge=2, description="Hidden layers; the weights between them are adapted.")
    rank: int = Field(default=4, ge=1, description="LoRA's r; alpha is the same.")
    num_points: int = Field(default=200, ge=8, description="Collocation points.")
    evaluations: int = Field(default=240, ge=4, description="Gradient evaluations of a run.")
    num_rates: int = Field(default=6, ge=1, description="Learning rates to begin with, half a decade apart.")
    max_rates: int = Field(default=10, ge=1, description="Most learning rates of a method.")
    seeds: tuple[int, ...] = Field(
        default=(0, 1, 2), min_length=1, description="Seeds of starts and points; the first one sweeps."
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


def checks(problem: Problem, methods: tuple[str, ...]) -> list[Check[Found]]:
    """Declare a check of the network, and of error and stability where both ODELoRA and baselines run."""
    families, label = {METHODS[name].family for name in methods}, problem.label
    claims = [
        Check[Found](
            f"{problem.equation.name}: the pretrained network solves its own equation (relative L2 error)",
            at_most(0.01),
            lambda found: found.problem.pretrained_error,
            "set-up of this experiment",
        )
    ]
    if families >= {"ode", "baseline"}:
        claims += [
            Check[Found](
                f"{label}: error of the best ODELoRA over that of the best LoRA baseline",
                at_most(1.0),
                Found.error_ratio,
                _ABSTRACT,
            ),
            Check[Found](
                f"{label}: decades of rates within 2x of the best adapter, ODELoRA less baselines",
                at_least(0.0),
                Found.useful_gain,
                _ABSTRACT,
            ),
            Check[Found](
                f"{label}: decades above the best rate before it fails, likewise",
                at_least(0.0),
                Found.headroom_gain,
                _ABSTRACT,
            ),
        ]
    return claims


def run(settings: Settings, progress: Progress) -> Result:
    """Pretrain one network per problem and adapt it with every method."""
    count = _Counter(settings, progress)
    problems = [_of_problem(settings, name, count) for name in settings.problems]
    return Result(
        findings=[sentence for found in problems for sentence in findings_of(found)],
        tables=[table_of(found) for found in problems],
        figures=figures_of(problems),
        checks=[
            outcome
            for found in problems
            for outcome in outcomes(checks(found.problem, settings.methods), found)
        ],
        data={found.problem.equation.name: _data(found) for found in problems},
    )


def _of_problem(settings: Settings, name: str, count: "_Counter") -> Found:
    problem = pretrained(
        name,
        *settings.problems[name],
        width=settings.width,
        depth=settings.depth,
        num_points=settings.num_points,
        adam_steps=settings.pretrain_steps,
        lbfgs_steps=settings.pretrain_polish,
    )
    budget = Budget(settings.evaluations, settings.num_points, settings.rank)
    rates = {"num_rates": settings.num_rates, "max_rates": settings.max_rates}
    sweeps = []
    for method in settings.methods:
        sweeps.append(
            sweep(problem, METHODS[method], budget, settings.seeds, **rates, after_run=count.after_run)
        )
        count.after_sweep(sweeps[-1])
    return Found(problem, sweeps)


class _Counter:
    """Counts runs for the progress; methods that add learning rates make the total grow."""

    def __init__(self, settings: Settings, progress: Progress):
        self._progress = progress
        self._of_method = settings.num_rates + len(settings.seeds) - 1
        self._total = len(settings.problems) * len(settings.methods) * self._of_method
        self._done = 0

    def after_run(self) -> None:
        self._done += 1
        self._total = max(self._total, self._done)
        self._progress(self._done, self._total)

    def after_sweep(self, done: Sweep) -> None:
        self._total += len(done.runs) + len(done.best) - 1 - self._of_method


def _data(found: Found) -> dict[str, Any]:
    return {
        "from": found.problem.source,
        "to": found.problem.target,
        "pretrained_error": found.problem.pretrained_error,
        "methods": {
            each.method.name: {
                "start": each.method.start or "lora",
                "sweep": [_run_data(run) for run in each.runs],
                "best": [_run_data(run) | {"losses": run.losses, "errors": run.errors} for run in each.best],
            }
            for each in found.sweeps
        },
    }


def _run_data(run: Run) -> dict[str, Any]:
    keys = ("rate", "seed", "status", "reason", "evaluations", "held_out", "error")
    return {key: getattr(run, key) for key in keys}
