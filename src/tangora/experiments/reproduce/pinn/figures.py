"""Figures of the sweeps, as data."""

import math
from collections.abc import Sequence

import torch

from tangora.experiments.reproduce.pinn.findings import label, mean_error, start_error
from tangora.experiments.reproduce.pinn.runs import Problem, Sweep
from tangora.report.drawing.panels import Figure, Heatmap, Panel, Series

_CHARTED = ("full", "baseline", "other", "ode")


def rate_figure(problems: Sequence[Problem], sweeps: Sequence[Sequence[Sweep]]) -> Figure:
    """Chart the error at the end over the learning rate.

    Args:
        problems: One per panel.
        sweeps: Of each problem, one per method.

    Returns:
        The figure.
    """
    panels = [
        Panel(
            label(problem),
            "peak learning rate",
            "relative L2 error at the end",
            (*(_over_rates(sweep) for sweep in of_problem), _starting_line(of_problem)),
            xscale="log",
            yscale="log",
        )
        for problem, of_problem in zip(problems, sweeps, strict=True)
    ]
    return Figure(
        "pinn-rates",
        "Error over the learning rate",
        "First seed, equal gradient evaluations. Diverged runs have no point; the curve ends before them.",
        tuple(panels),
    )


def _over_rates(sweep: Sweep) -> Series:
    return Series(sweep.method.name, [run.rate for run in sweep.runs], [run.error for run in sweep.runs])


def _starting_line(sweeps: Sequence[Sweep]) -> Series:
    rates = [run.rate for sweep in sweeps for run in sweep.runs]
    return Series("pretrained", (min(rates), max(rates)), [start_error(sweeps[0])] * 2, style="dashed")


def training_figure(problems: Sequence[Problem], sweeps: Sequence[Sequence[Sweep]]) -> Figure:
    """Chart the error along the way at the best rate.

    Args:
        problems: One per panel.
        sweeps: Of each problem, one per method.

    Returns:
        The figure.
    """
    panels = [
        Panel(
            label(problem),
            "gradient evaluations",
            "relative L2 error",
            tuple(_over_time(sweep) for sweep in of_problem),
            yscale="log",
        )
        for problem, of_problem in zip(problems, sweeps, strict=True)
    ]
    return Figure(
        "pinn-training",
        "Training at the best rate",
        "Mean over seeds; bands from the smallest to the largest. A seed that diverged ends the mean.",
        tuple(panels),
    )


def _over_time(sweep: Sweep) -> Series:
    # a seed that diverged has fewer checkpoints than the others
    shortest = min((run.errors for run in sweep.best), key=len)
    values = torch.tensor([[error for _, error in run.errors[: len(shortest)]] for run in sweep.best])
    low, high = values.amin(0), values.amax(0)
    return Series(sweep.method.name, [at for at, _ in shortest], values.mean(0), low, high)


def solution_figure(problem: Problem, sweeps: Sequence[Sweep]) -> Figure:
    """Map the reference solution, and the errors of the best method of each family.

    Args:
        problem: Which.
        sweeps: One per method.

    Returns:
        The figure.
    """
    solution = problem.solution
    panels = [
        Panel(
            f"reference, {problem.equation.symbol} = {problem.target:g}",
            "t",
            "x",
            heatmap=Heatmap(solution.t, solution.x, solution.u.T, "u"),
        )
    ]
    for family in _CHARTED:
        members = [
            sweep for sweep in sweeps if sweep.method.family == family and sweep.best[0].field is not None
        ]
        if members:
            chosen = min(members, key=mean_error)
            error = (chosen.best[0].field - solution.u).abs().T  # pyright: ignore[reportOptionalOperand]
            heatmap = Heatmap(solution.t, solution.x, error, "absolute error")
            panels.append(Panel(chosen.method.name, "t", "x", heatmap=heatmap))
    largest = max(float(solution.u.abs().max()), math.ulp(1.0))
    return Figure(
        f"pinn-{problem.equation.name}",
        f"{label(problem)}: solution and errors",
        "The best of full fine-tuning, LoRA baselines, other optimizers and ODELoRA, first seed; each panel has "
        f"its own scale. The solution's largest value is {largest:.2g}.",
        tuple(panels),
    )
