"""E5: physics-informed networks, adapted from one coefficient of a differential equation to another."""

from typing import Any

import torch

from tangora._checks import check_choice as check_choice
from tangora.experiments.reproduce.experiment import Progress
from tangora.experiments.reproduce.parts.pinn import PinnSettings
from tangora.experiments.reproduce.pinn.equations import EQUATIONS, collocation
from tangora.experiments.reproduce.pinn.figures import rate_figure, solution_figure, training_figure
from tangora.experiments.reproduce.pinn.findings import checks, findings, table
from tangora.experiments.reproduce.pinn.methods import METHODS
from tangora.experiments.reproduce.pinn.network import PeriodicMLP, field_on, pretrain
from tangora.experiments.reproduce.pinn.reference import solve
from tangora.experiments.reproduce.pinn.runs import Budget, Problem, Run, Sweep, sweep
from tangora.report.reproduction.records import Result

_SEED_OF_PRETRAINING = 2602


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
