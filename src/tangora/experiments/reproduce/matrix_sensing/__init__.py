r"""E4: matrix sensing, where ODELoRA's linear rate can be seen.

All methods minimise $\frac12 \sum_i \langle M_i, W - W_\star \rangle^2$ over matrices of rank r with exact gradients.
Integration schemes of the projected flow and optimizers alike are iterated until the relative error is 1e-6, and both
iterations and gradients are counted.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from tangora._checks import InputError
from tangora.experiments.reproduce.experiment import Progress
from tangora.experiments.reproduce.matrix_sensing.methods import METHODS
from tangora.experiments.reproduce.matrix_sensing.problem import (
    Problems,
    draw_problems,
    nearby_start,
    random_start,
    spectral_start,
)
from tangora.experiments.reproduce.matrix_sensing.solve import Trace, solve
from tangora.experiments.reproduce.matrix_sensing.tables import (
    Run,
    checks,
    condition_table,
    contraction_table,
    counts_figure,
    error_figure,
    findings,
    rank_table,
    step_table,
)
from tangora.experiments.reproduce.parts.matrix_sensing import MatrixSensingSettings
from tangora.geometry.retraction import Factors
from tangora.report.reproduction import Result

# the first iterations are left out of a contraction rate, the last is far above rounding
_RATE_FROM, _RATE_TO = 2, 12
_NEARBY = 0.1


class _Task(NamedTuple):
    """Problems that all methods are set to, and where the outcome belongs."""

    key: str
    problems: Problems
    start: Factors
    steps: tuple[float, ...]
    max_iterations: int


def run(settings: MatrixSensingSettings, progress: Progress) -> Result:
    """Set all methods to all problems.

    Args:
        settings: Sizes.
        progress: Hears of finished methods.

    Returns:
        Iterations, gradients and error curves.
    """
    tasks = list(_tasks(settings))
    total, done = len(tasks) * len(METHODS), 0
    runs: dict[str, dict[str, list[Run]]] = {}
    best_rate = settings.adam_rates[0]
    for task in tasks:
        found = runs.setdefault(task.key, {})
        for name, method in METHODS.items():
            steps = task.steps
            if method.own_rates:
                steps = tuple(settings.adam_rates) if task.key == "conditions" else (best_rate,)
            found[name] = [
                Run(
                    step,
                    solve(
                        method,
                        task.problems,
                        task.start,
                        step,
                        tolerance=settings.tolerance if task.key != "quadratic" else 0.0,
                        max_iterations=task.max_iterations,
                    ),
                )
                for step in steps
            ]
            if method.own_rates and task.key == "conditions":
                found[name] = [min(found[name], key=_distance_from_solved)]
                best_rate = found[name][0].step
            done += 1
            progress(done, total)
    return _result(settings, runs)


def _tasks(settings: MatrixSensingSettings) -> Iterator[_Task]:
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
        yield _Task(
            f"rank {rank}, searched {searched}", stack, spectral_start(stack, searched), step, elsewhere
        )
    if settings.random_size is not None:
        yield _Task(
            "random start",
            ten,
            random_start(ten, settings.rank, settings.random_size, settings.seed),
            step,
            elsewhere,
        )
    exact = draw_problems(n, n, settings.rank, settings.conditions, None, seeds)
    yield _Task(
        "quadratic", exact, nearby_start(exact, settings.rank, _NEARBY, settings.seed), step, _RATE_TO
    )


def _distance_from_solved(found: Run) -> float:
    # problems left unsolved count by how far they got
    reached = found.trace.errors.nan_to_num(nan=torch.inf).amin(0).log()
    return float((reached + 1e3 * found.trace.iterations.isinf()).sum())


def _contractions(runs: Mapping[str, list[Run]]) -> dict[str, list[float]]:
    # one per condition number, the worst of all seeds
    rates = {}
    for name, found in runs.items():
        errors = found[0].trace.errors
        if not METHODS[name].own_rates and len(errors) > _RATE_TO:
            ratio = (errors[_RATE_TO] / errors[_RATE_FROM]) ** (1 / (_RATE_TO - _RATE_FROM))
            rates[name] = ratio.nan_to_num(nan=torch.inf).amax(0).tolist()
    return rates


def _result(settings: MatrixSensingSettings, runs: dict[str, dict[str, list[Run]]]) -> Result:
    main = {name: found[0] for name, found in runs["conditions"].items()}
    rates = _contractions(runs["quadratic"])
    elsewhere = {
        key: {name: found[0] for name, found in part.items()}
        for key, part in runs.items()
        if key.startswith(("rank", "random"))
    }
    column = settings.conditions.index(10)
    steps = {name: [_column(main[name], column), *found] for name, found in runs.get("steps", {}).items()}
    limits = (settings.max_iterations, settings.max_iterations_elsewhere)
    tables = [condition_table(settings.conditions, main, limits[0])]
    tables += [step_table(steps, limits[1])] if steps else []
    tables += [rank_table(elsewhere, limits[1])] if elsewhere else []
    return Result(
        findings=findings(settings.conditions, main, steps, elsewhere),
        tables=(*tables, contraction_table(settings.conditions, settings.step, rates)),
        figures=(
            error_figure(settings.conditions, main),
            counts_figure(settings.conditions, main, "iterations"),
            counts_figure(settings.conditions, main, "evaluations"),
        ),
        checks=checks(settings.conditions, settings.step, settings.max_iterations, main, rates),
        data={
            key: {
                name: [
                    {
                        "step": one.step,
                        "iterations": one.trace.iterations,
                        "gradients": one.trace.evaluations,
                        "diverged": one.trace.diverged,
                    }
                    for one in found
                ]
                for name, found in part.items()
            }
            for key, part in runs.items()
            if key != "quadratic"
        }
        | {
            "contraction": rates,
            "axes": "one row per seed, one column per condition number; null: not solved",
        },
    )


def _column(found: Run, index: int) -> Run:
    trace = found.trace
    parts = (trace.errors, trace.iterations, trace.evaluations, trace.diverged)
    return Run(found.step, Trace(*(part[..., index : index + 1] for part in parts)))
