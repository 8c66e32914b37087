"""E5: physics-informed networks, adapted from one coefficient of a differential equation to another."""

from typing import Any

import torch
from pydantic import Field, field_validator

from tangora._checks import check_choice
from tangora.experiments.reproduce.experiment import Parts, Progress
from tangora.experiments.reproduce.pinn.equations import EQUATIONS, collocation
from tangora.experiments.reproduce.pinn.figures import rate_figure, solution_figure, training_figure
from tangora.experiments.reproduce.pinn.findings import checks, findings, table
from tangora.experiments.reproduce.pinn.methods import METHODS
from tangora.experiments.reproduce.pinn.network import PeriodicMLP, field_on, pretrain
from tangora.experiments.reproduce.pinn.reference import solve
from tangora.experiments.reproduce.pinn.runs import Budget, Problem, Run, Sweep, sweep
from tangora.experiments.settings import Settings
from tangora.report.reproduction.records import Result

_SEED_OF_PRETRAINING = 2602


class PinnSettings(Settings):
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


def run(settings: PinnSettings, progress: Progress) -> Result:
    """Pretrain one network per problem and adapt it with every method.

    Args:
        settings: Sizes.
        progress: Hears of runs done; their total grows when rates are added.

    Returns:
        Tables, figures, and all runs.
    """
    heard = _Counter(settings, progress)
    problems, sweeps = [], []
    for name, (source, target) in settings.problems.items():
        problem = pretrained(settings, name, source, target)
        problems.append(problem)
        of_problem = []
        for method in settings.methods:
            done = _sweep(settings, problem, method, heard)
            heard.finish(done)
            of_problem.append(done)
        sweeps.append(of_problem)
    pairs = list(zip(problems, sweeps, strict=True))
    return Result(
        findings=[sentence for pair in pairs for sentence in findings(*pair)],
        tables=[table(*pair) for pair in pairs],
        figures=[
            rate_figure(problems, sweeps),
            training_figure(problems, sweeps),
            *(solution_figure(*pair) for pair in pairs),
        ],
        checks=[check for pair in pairs for check in checks(*pair)],
        data={problem.equation.name: _data(problem, of_problem) for problem, of_problem in pairs},
    )


def pretrained(settings: PinnSettings, name: str, source: float, target: float) -> Problem:
    """Train a network for one coefficient.

    Args:
        settings: Sizes.
        name: Of the equation.
        source: Its coefficient.
        target: What it is to be adapted to.

    Returns:
        The network, its error, and the solution for the new coefficient.
    """
    equation = EQUATIONS[name]
    # float32, as networks are trained: the errors reached, 1e-3 and more, are far above its rounding, and it takes
    # about half the time of float64
    model = PeriodicMLP(
        equation, settings.width, settings.depth, seed=_SEED_OF_PRETRAINING, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(_SEED_OF_PRETRAINING)
    points = collocation(settings.num_points, generator, torch.float32)
    pretrain(
        model,
        equation,
        source,
        points,
        adam_steps=settings.pretrain_steps,
        lbfgs_steps=settings.pretrain_polish,
    )
    before = solve(equation, source)
    error = before.error_of(field_on(model, before))
    return Problem(equation, source, target, model, error, solve(equation, target))


class _Counter:
    """Counts runs; methods that add rates make the total grow."""

    def __init__(self, settings: PinnSettings, progress: Progress):
        self._progress = progress
        self._of_method = settings.num_rates + len(settings.seeds) - 1
        self._total = len(settings.problems) * len(settings.methods) * self._of_method
        self._done = 0

    def __call__(self) -> None:
        self._done += 1
        self._total = max(self._total, self._done)
        self._progress(self._done, self._total)

    def finish(self, done: Sweep) -> None:
        self._total += len(done.runs) + len(done.best) - 1 - self._of_method


def _sweep(settings: PinnSettings, problem: Problem, method: str, heard: _Counter) -> Sweep:
    return sweep(
        problem,
        METHODS[method],
        Budget(settings.evaluations, settings.num_points, settings.rank),
        settings.seeds,
        num_rates=settings.num_rates,
        max_rates=settings.max_rates,
        heard=heard,
    )


def _data(problem: Problem, sweeps: list[Sweep]) -> dict[str, Any]:
    return {
        "from": problem.source,
        "to": problem.target,
        "pretrained_error": problem.pretrained_error,
        "methods": {
            sweep.method.name: {
                "start": sweep.method.start or "lora",
                "sweep": [_run_data(run) for run in sweep.runs],
                "best": [_run_data(run) | {"losses": run.losses, "errors": run.errors} for run in sweep.best],
            }
            for sweep in sweeps
        },
    }


def _run_data(run: Run) -> dict[str, Any]:
    keys = ("rate", "seed", "status", "reason", "evaluations", "held_out", "error")
    return {key: getattr(run, key) for key in keys}


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
    run=run,
)
