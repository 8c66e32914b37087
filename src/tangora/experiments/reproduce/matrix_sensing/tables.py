"""What matrix sensing found, as sentences, tables, figures and checks."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tangora.experiments.reproduce.matrix_sensing.methods import METHODS
from tangora.experiments.reproduce.matrix_sensing.solve import Trace
from tangora.report.reproduction import Check, Figure, Panel, Series, Table

_SOURCE = "derived and measured by this project (ODELoRA's abstract: linear convergence)"
_FAST = ("LoRA-Pro SGD", "SVD retraction", "ScaledGD")
_IN_CURVES = ("Euler", "RK4", "projected RK4", "KSL", "BUG", "SVD retraction", "ScaledGD")
_SLOW = ("plain descent", "Adam on factors", "full descent")
_SHOWN_ITERATIONS = 150


class Run(NamedTuple):
    """A method with one step size on a stack of problems."""

    step: float
    trace: Trace


Count = Literal["iterations", "evaluations"]


def _cell(counts: Tensor, diverged: Tensor, limit: int) -> str:
    # of one condition number, over seeds
    values = sorted(counts.flatten().tolist())
    solved = [value for value in values if value < float("inf")]
    if len(solved) == len(values):
        middle = f"{torch.tensor(values).quantile(0.5):.0f}"
        return middle if solved[0] == solved[-1] else f"{middle} ({solved[0]:.0f} to {solved[-1]:.0f})"
    if diverged.all():
        return "diverged"
    if not solved:
        return f"> {limit}" if not diverged.any() else f"{int(diverged.sum())} of {len(values)} diverged"
    return f"{len(solved)} of {len(values)} solved"


def _median(counts: Tensor) -> Tensor:
    # over seeds; infinite where half of them or more are
    return counts.sort(0).values[(len(counts) - 1) // 2]


def condition_table(conditions: Sequence[float], main: Mapping[str, Run], limit: int) -> Table:
    """Tabulate iterations against the condition number.

    Args:
        conditions: Condition numbers.
        main: Method to run.
        limit: Iterations that were allowed.

    Returns:
        One row per method.
    """
    rows = []
    for name, (step, trace) in main.items():
        cells = [
            _cell(trace.iterations[:, column], trace.diverged[:, column], limit)
            for column in range(len(conditions))
        ]
        rows.append((name, METHODS[name].kind, step, _gradients_per_iteration(trace), *cells))
    return Table(
        "Iterations to the tolerance from a spectral start",
        ("method", "kind", "step", "gradients each", *(f"condition {value:g}" for value in conditions)),
        rows,
        "Median over seeds, and the smallest and largest. Factor schemes in the Lyapunov gauge; Adam with the best of "
        "its rates.",
    )


def _gradients_per_iteration(trace: Trace) -> float | None:
    each = (trace.evaluations / trace.iterations).flatten()
    known = each[each.isfinite()]
    return round(float(known.mean()), 1) if len(known) else None


def step_table(steps: Mapping[str, Sequence[Run]], limit: int) -> Table:
    """Tabulate what other step sizes do at condition number 10.

    Args:
        steps: Method to its runs, one per step size.
        limit: Iterations that were allowed.

    Returns:
        One row per method, with its best step size by gradients.
    """
    rows = []
    for name, found in steps.items():
        if METHODS[name].own_rates:
            continue
        best = _best(found)
        texts = [_cell(one.trace.iterations, one.trace.diverged, limit) for one in found]
        spent = best.trace.evaluations
        solved = bool(spent.isfinite().all())
        rows.append((name, *texts, best.step if solved else None, _cell(spent, best.trace.diverged, limit)))
    sizes = [f"step {one.step:g}" for one in next(iter(steps.values()))]
    return Table(
        "Iterations at condition number 10 by step size, and gradients at the best one",
        ("method", *sizes, "best step", "gradients"),
        rows,
        "A scheme of higher order follows the flow more closely and takes longer steps; whether that pays for its "
        "stages is the last column.",
    )


def _best(found: Sequence[Run]) -> Run:
    return min(
        found, key=lambda one: (int(one.trace.evaluations.isinf().sum()), float(one.trace.evaluations.sum()))
    )


def rank_table(elsewhere: Mapping[str, Mapping[str, Run]], limit: int) -> Table:
    """Tabulate iterations for other ranks and starts at condition number 10.

    Args:
        elsewhere: Column to method to run.
        limit: Iterations that were allowed.

    Returns:
        One row per method.
    """
    rows = [
        (
            name,
            *(
                _cell(part[name].trace.iterations, part[name].trace.diverged, limit)
                for part in elsewhere.values()
            ),
        )
        for name in METHODS
    ]
    return Table(
        "Iterations at condition number 10 for other ranks and from a small random start",
        ("method", *elsewhere),
        rows,
        "Where a larger rank is searched than the matrix has, the factors' Gram matrices become singular at the "
        "solution; from a small random start they are so at the beginning.",
    )


def contraction_table(
    conditions: Sequence[float], step: float, rates: Mapping[str, Sequence[float]]
) -> Table:
    """Tabulate contraction per iteration on the exact quadratic.

    Args:
        conditions: Condition numbers.
        step: Step size.
        rates: Method to the largest rate over seeds, for each condition number.

    Returns:
        One row per method.
    """
    rows = []
    for name, values in rates.items():
        expected = METHODS[name].contraction
        rows.append((name, None if expected is None else expected(step), *values))
    return Table(
        f"Contraction of the error per iteration on half the squared distance, step {step:g}",
        ("method", "expected", *(f"condition {value:g}" for value in conditions)),
        rows,
        "From a tenth of the smallest singular value away; worst seed. Expected is the scheme's stability polynomial, "
        "which for one-stage methods is |1 - step|.",
    )


def error_figure(conditions: Sequence[float], main: Mapping[str, Run]) -> Figure:
    """Draw errors against iterations, one panel for each condition number.

    Args:
        conditions: Condition numbers.
        main: Method to run.

    Returns:
        The figure.
    """
    panels = []
    for column, condition in enumerate(conditions):
        series = []
        for name in (*_IN_CURVES, *_SLOW):
            errors = main[name].trace.errors[: _SHOWN_ITERATIONS + 1, :, column]
            series.append(
                Series(
                    name,
                    range(len(errors)),
                    errors.median(1).values,
                    low=errors.amin(1),
                    high=errors.amax(1),
                    style="dashed" if name in _SLOW else "line",
                )
            )
        panels.append(
            Panel(f"condition number {condition:g}", "iteration", "relative error", series, yscale="log")
        )
    return Figure(
        "sensing-errors",
        "Error curves of matrix sensing",
        f"The first {_SHOWN_ITERATIONS} iterations. Median over seeds, band from the smallest to the largest. Curves "
        "end when all problems of a method are solved.",
        panels,
    )


def counts_figure(conditions: Sequence[float], main: Mapping[str, Run], count: Count) -> Figure:
    """Draw iterations or gradients against the condition number.

    Args:
        conditions: Condition numbers.
        main: Method to run.
        count: Which.

    Returns:
        The figure; methods that did not arrive have no point.
    """
    word = "iterations" if count == "iterations" else "gradients"
    panels = []
    for kind, title in (("scheme", "integration schemes"), ("baseline", "baselines")):
        series = []
        for name, (_, trace) in main.items():
            counts = getattr(trace, count)
            if METHODS[name].kind == kind and counts.isfinite().any():
                series.append(
                    Series(name, conditions, _median(counts), low=counts.amin(0), high=counts.amax(0))
                )
        panels.append(Panel(title, "condition number", word, series, xscale="log", yscale="log"))
    return Figure(
        f"sensing-{word}",
        f"{word.capitalize()} to the tolerance against the condition number",
        "Median over seeds, band from the smallest to the largest. Where most problems were not solved there is no "
        "point.",
        panels,
    )


def checks(
    conditions: Sequence[float],
    step: float,
    limit: int,
    main: Mapping[str, Run],
    rates: Mapping[str, Sequence[float]],
) -> tuple[Check, ...]:
    """Hold the numbers against what was derived.

    Args:
        conditions: Condition numbers.
        step: Step size.
        limit: Iterations that were allowed.
        main: Method to run.
        rates: Contractions.

    Returns:
        The checks.
    """
    found = []
    for name in _FAST:
        worst = float(_median(main[name].trace.iterations).max())
        claim = f"{name} takes at most 70 iterations at every condition number up to {max(conditions):g}"
        found.append(Check(claim, worst, None, 70, _SOURCE))
    plain = _median(main["plain descent"].trace.iterations).clamp(max=limit).tolist()
    for condition, count in zip(conditions, plain, strict=True):
        if condition in (10, 100):
            claim = f"Plain descent on the factors takes more than 200 iterations at condition number {condition:g}"
            found.append(Check(claim, count, 201, None, _SOURCE))
    for name in _FAST:
        expected = abs(1 - step)
        worst = max(rates[name], key=lambda rate: abs(rate - expected))
        claim = (
            f"{name} multiplies the error of the exact quadratic by |1 - step| = {expected:g} per iteration"
        )
        found.append(Check(claim, worst, expected - 0.02, expected + 0.02, _SOURCE))
    by_bug, by_svd = (main[name].trace.iterations for name in ("parallel BUG", "SVD retraction"))
    gap = (by_bug - by_svd).abs().nan_to_num(nan=0.0).max()
    claim = "Parallel BUG at fixed rank is descent with the SVD retraction: iterations differ by"
    found.append(Check(claim, float(gap), 0, 1, "identity 1 of docs/theory/ode_lora.md"))
    return tuple(found)


def findings(
    conditions: Sequence[float],
    main: Mapping[str, Run],
    steps: Mapping[str, Sequence[Run]],
    elsewhere: Mapping[str, Mapping[str, Run]],
) -> tuple[str, ...]:
    """Say what the numbers say.

    Args:
        conditions: Condition numbers.
        main: Method to run.
        steps: Method to its runs at condition number 10, by step size.
        elsewhere: Column to method to run.

    Returns:
        Sentences.
    """
    medians = {name: _median(one.trace.iterations) for name, one in main.items()}
    level = {name: counts for name, counts in medians.items() if counts.isfinite().all()}
    sentences = []
    if level:
        low, high = (float(torch.stack([*level.values()]).aminmax()[i]) for i in (0, 1))
        sentences.append(
            f"{len(level)} of {len(main)} methods solve the problem at every condition number from "
            f"{min(conditions):g} to {max(conditions):g}, in {low:.0f} to {high:.0f} iterations."
        )
    missed = [
        f"{name} ({int(counts.isfinite().sum())} of {len(conditions)} condition numbers)"
        for name, counts in medians.items()
        if name not in level
    ]
    if missed:
        sentences.append(f"Not everywhere within the iterations allowed: {', '.join(missed)}.")
    solved = {
        name: best
        for name, found in steps.items()
        if bool((best := _best(found)).trace.evaluations.isfinite().all()) and not METHODS[name].own_rates
    }
    if solved:
        spent = sorted(
            (float(_median(best.trace.evaluations)), name, best.step) for name, best in solved.items()
        )
        listed = ", ".join(f"{name} {count:.0f} (step {step:g})" for count, name, step in spent[:4])
        sentences.append(f"Fewest gradients at condition number 10, each with the best step tried: {listed}.")
    for key, part in elsewhere.items():
        lost = [name for name, one in part.items() if one.trace.diverged.any()]
        done = sum(bool(one.trace.iterations.isfinite().all()) for one in part.values())
        sentences.append(
            f"{key[0].upper()}{key[1:]}: {done} of {len(part)} methods solve all problems"
            + (f"; diverged: {', '.join(lost)}." if lost else ".")
        )
    return tuple(sentences)
