r"""Matrix sensing, where ODELoRA's linear rate can be seen.

All methods minimise $\frac12 \sum_i \langle M_i, W - W_\star \rangle^2$ over matrices of rank r with exact gradients.
Integration schemes of the projected flow and optimizers alike are iterated until the relative error is 1e-6, and both
iterations and gradients are counted.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from pydantic import Field, field_validator

from reproductions.matrix_sensing.found import RATE_TO, Found, Run, figures_of, findings_of, tables_of
from reproductions.matrix_sensing.methods import METHODS
from reproductions.matrix_sensing.problem import (
    Problems,
    draw_problems,
    nearby_start,
    random_start,
    spectral_start,
)
from reproductions.matrix_sensing.solve import solve
from reproductions.result import Check, Interval, Progress, Result, at_least, at_most, near, outcomes
from tangora._checks import InputError
from tangora.experiments.values import Settings as BaseSettings
from tangora.geometry.retraction import Factors

_SOURCE = "derived and measured by this project (ODELoRA's abstract: linear convergence)"
_FAST = ("LoRA-Pro SGD", "SVD retraction", "ScaledGD")
_NEARBY = 0.1

STAND_INS = (
    (
        "Only ODELoRA's abstract could be read: sizes, starts, step sizes and which Runge-Kutta methods are this "
        "project's choice, so no figure of the paper is repeated."
    ),
    "Factor schemes run in the Lyapunov gauge; projected Runge-Kutta, KSL and BUG are not the paper's.",
)
QUICK = {
    "size": 16,
    "rank": 2,
    "conditions": [1.0, 10.0],
    "num_seeds": 1,
    "other_steps": [],
    "adam_rates": [0.1],
    "max_iterations": 250,
    "ranks": [],
    "random_size": None,
}


class Settings(BaseSettings):
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
        default=[0.01, 0.03, 0.1], description="Adam's learning rates; the best is reported."
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


def checks(settings: Settings) -> list[Check[Found]]:
    """Declare what was derived: rates without and with the condition number, and methods that are one."""
    highest, expected = max(settings.conditions), abs(1 - settings.step)

    def plain_count(found: Found, column: int) -> float:
        return float(found.medians["plain descent"].clamp(max=settings.max_iterations)[column])

    def worst_contraction(found: Found, name: str) -> float:
        return max(found.contractions[name], key=lambda rate: abs(rate - expected))

    def gap(found: Found) -> float:
        one, other = (found.main[name].trace.iterations for name in ("parallel BUG", "SVD retraction"))
        return float((one - other).abs().nan_to_num(nan=0.0).max())

    return [
        *(
            Check[Found](
                f"{name} takes at most 70 iterations at every condition number up to {highest:g}",
                at_most(70),
                lambda found, name=name: float(found.medians[name].max()),
                _SOURCE,
            )
            for name in _FAST
        ),
        *(
            Check[Found](
                f"Plain descent on the factors takes more than 200 iterations at condition number {condition:g}",
                at_least(201),
                lambda found, column=column: plain_count(found, column),
                _SOURCE,
            )
            for column, condition in enumerate(settings.conditions)
            if condition in (10, 100)
        ),
        *(
            Check[Found](
                f"{name} multiplies the error of the exact quadratic by |1 - step| = {expected:g} per iteration",
                near(expected, tolerance=0.02),
                lambda found, name=name: worst_contraction(found, name),
                _SOURCE,
            )
            for name in _FAST
        ),
        Check[Found](
            "Parallel BUG at fixed rank is descent with the SVD retraction: iterations differ by",
            Interval(0, 1),
            gap,
            "identity 1 of docs/theory/ode_lora.md",
        ),
    ]


class _Task(NamedTuple):
    """Problems that all methods are set to, and where the outcome belongs."""

    key: str
    problems: Problems
    start: Factors
    steps: tuple[float, ...]
    max_iterations: int


def run(settings: Settings, progress: Progress) -> Result:
    """Set all methods to all problems: iterations, gradients and error curves."""
    tasks = list(_tasks(settings))
    runs: dict[str, dict[str, list[Run]]] = {}
    best_rate, done = settings.adam_rates[0], 0
    for task in tasks:
        runs[task.key] = {}
        for name, method in METHODS.items():
            steps, searched = task.steps, method.own_rates and task.key == "conditions"
            if method.own_rates:
                steps = tuple(settings.adam_rates) if searched else (best_rate,)
            tolerance = settings.tolerance if task.key != "quadratic" else 0.0
            options = {"tolerance": tolerance, "max_iterations": task.max_iterations}
            tried = [Run(step, solve(method, task.problems, task.start, step, **options)) for step in steps]
            if searched:
                tried = [min(tried, key=_distance_from_solved)]
                best_rate = tried[0].step
            runs[task.key][name] = tried
            done += 1
            progress(done, len(tasks) * len(METHODS))
    limits = (settings.max_iterations, settings.max_iterations_elsewhere)
    found = Found(settings.conditions, settings.step, *limits, runs)
    return Result(
        findings=findings_of(found),
        tables=tables_of(found),
        figures=figures_of(found),
        checks=outcomes(checks(settings), found),
        data={
            **{
                key: {name: list(map(_data, tried)) for name, tried in part.items()}
                for key, part in runs.items()
                if key != "quadratic"
            },
            "contraction": found.contractions,
            "axes": "one row per seed, one column per condition number; null: not solved",
        },
    )


def _tasks(settings: Settings) -> Iterator[_Task]:
    # the first task finds Adam's rate for all the others
    n, elsewhere = settings.size, settings.max_iterations_elsewhere
    seeds = range(settings.seed, settings.seed + settings.num_seeds)

    def drawn(rank: int, conditions: list[float]) -> Problems:
        return draw_problems(n, n, rank, conditions, settings.oversampling * rank * 2 * n, seeds)

    problems = drawn(settings.rank, settings.conditions)
    start = spectral_start(problems, settings.rank)
    step = (settings.step,)
    yield _Task("conditions", problems, start, step, settings.max_iterations)
    ten = drawn(settings.rank, [10.0])
    if settings.other_steps:
        yield _Task("steps", ten, spectral_start(ten, settings.rank), tuple(settings.other_steps), elsewhere)
    for rank, searched in settings.ranks:
        if not rank <= searched <= n:
            raise InputError(
                f"ranks must be pairs of the matrix's rank and one at least as large, up to {n}; got {(rank, searched)}"
            )
        stack = drawn(rank, [10.0])
        key = f"rank {rank}, searched {searched}"
        yield _Task(key, stack, spectral_start(stack, searched), step, elsewhere)
    if settings.random_size is not None:
        start = random_start(ten, settings.rank, settings.random_size, settings.seed)
        yield _Task("random start", ten, start, step, elsewhere)
    exact = draw_problems(n, n, settings.rank, settings.conditions, None, seeds)
    start = nearby_start(exact, settings.rank, _NEARBY, settings.seed)
    yield _Task("quadratic", exact, start, step, RATE_TO)


def _distance_from_solved(found: Run) -> float:
    # problems left unsolved count by how far they got
    reached = found.trace.errors.nan_to_num(nan=torch.inf).amin(0).log()
    return float((reached + 1e3 * found.trace.iterations.isinf()).sum())


def _data(run: Run) -> dict[str, object]:
    trace = run.trace
    return {
        "step": run.step,
        "iterations": trace.iterations,
        "gradients": trace.evaluations,
        "diverged": trace.diverged,
    }
