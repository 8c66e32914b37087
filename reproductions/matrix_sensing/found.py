"""Results of matrix sensing, as sentences, tables and figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reproductions.matrix_sensing.methods import METHODS
from reproductions.matrix_sensing.solve import Trace
from reproductions.result import Table
from tangora.report.drawing.panels import Figure, Panel, Series

_IN_CURVES = ("Euler", "RK4", "projected RK4", "KSL", "BUG", "SVD retraction", "ScaledGD")
_SLOW = ("plain descent", "Adam on factors", "full descent")
_SHOWN_ITERATIONS = 150
# the first iterations are left out of a contraction rate, the last is far above rounding
RATE_FROM, RATE_TO = 2, 12


class Run(NamedTuple):
    """A method with one step size on a stack of problems."""

    step: float
    trace: Trace


def median(counts: Tensor) -> Tensor:
    """Return the median over seeds; infinite where half of them or more are."""
    return counts.sort(0).values[(len(counts) - 1) // 2]


@dataclass(frozen=True)
class Found:
    """Runs of all methods, by part of the experiment and method, one for each step size."""

    conditions: Sequence[float]
    step: float
    limit: int
    """Most iterations in the first part."""
    limit_elsewhere: int
    """Most iterations in the others."""
    runs: Mapping[str, Mapping[str, Sequence[Run]]]

    @cached_property
    def main(self) -> Mapping[str, Run]:
        """Runs from the spectral start at all condition numbers."""
        return {name: found[0] for name, found in self.runs["conditions"].items()}

    @cached_property
    def medians(self) -> Mapping[str, Tensor]:
        """Their iterations, median over seeds."""
        return {name: median(run.trace.iterations) for name, run in self.main.items()}

    @cached_property
    def steps(self) -> Mapping[str, Sequence[Run]]:
        """Runs at condition number 10 by step size, the usual one first, of methods that have one."""
        column = self.conditions.index(10)
        return {
            name: [Run(self.main[name].step, self.main[name].trace.column(column)), *found]
            for name, found in self.runs.get("steps", {}).items()
            if not METHODS[name].own_rates
        }

    @cached_property
    def elsewhere(self) -> Mapping[str, Mapping[str, Run]]:
        """Runs at condition number 10 for other ranks and starts."""
        return {
            key: {name: found[0] for name, found in part.items()}
            for key, part in self.runs.items()
            if key.startswith(("rank", "random"))
        }

    @cached_property
    def contractions(self) -> Mapping[str, Sequence[float]]:
        """Contraction on the exact quadratic for each condition number, the worst of all seeds."""
        rates = {}
        for name, (run, *_) in self.runs["quadratic"].items():
            errors = run.trace.errors
            if not METHODS[name].own_rates and len(errors) > RATE_TO:
                ratio = (errors[RATE_TO] / errors[RATE_FROM]) ** (1 / (RATE_TO - RATE_FROM))
                rates[name] = ratio.nan_to_num(nan=torch.inf).amax(0).tolist()
        return rates


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


def _cells(traces: Sequence[Trace], limit: int) -> list[str]:
    return [_cell(trace.iterations, trace.diverged, limit) for trace in traces]


def _best(found: Sequence[Run]) -> Run:
    # by gradients
    return min(
        found, key=lambda one: (int(one.trace.evaluations.isinf().sum()), float(one.trace.evaluations.sum()))
    )


def _gradients_per_iteration(trace: Trace) -> float | None:
    each = (trace.evaluations / trace.iterations).flatten()
    known = each[each.isfinite()]
    return round(float(known.mean()), 1) if len(known) else None


def tables_of(found: Found) -> list[Table]:
    """Tabulate iterations by condition number, by step size and elsewhere, and contraction per iteration."""
    main, conditions = found.main, [f"condition {value:g}" for value in found.conditions]
    by_condition = Table(
        "Iterations to the tolerance from a spectral start",
        ("method", "kind", "step", "gradients each", *conditions),
        [
            (
                name,
                METHODS[name].kind,
                step,
                _gradients_per_iteration(trace),
                *_cells([trace.column(index) for index in range(len(conditions))], found.limit),
            )
            for name, (step, trace) in main.items()
        ],
        "Median over seeds, and the smallest and largest. Factor schemes in the Lyapunov gauge; Adam with the best of "
        "its rates.",
    )
    contraction = Table(
        f"Contraction of the error per iteration on half the squared distance, step {found.step:g}",
        ("method", "expected", *conditions),
        [
            (name, expected(found.step) if (expected := METHODS[name].contraction) else None, *values)
            for name, values in found.contractions.items()
        ],
        "From a tenth of the smallest singular value away; worst seed. Expected is the scheme's stability polynomial, "
        "which for one-stage methods is |1 - step|.",
    )
    return [by_condition, *_step_table(found), *_rank_table(found), contraction]


def _step_table(found: Found) -> list[Table]:
    rows, limit = [], found.limit_elsewhere
    for name, runs in found.steps.items():
        best = _best(runs)
        spent = best.trace.evaluations
        step = best.step if spent.isfinite().all() else None
        texts = _cells([one.trace for one in runs], limit)
        rows.append((name, *texts, step, _cell(spent, best.trace.diverged, limit)))
    if not rows:
        return []
    sizes = [f"step {one.step:g}" for one in next(iter(found.steps.values()))]
    return [
        Table(
            "Iterations at condition number 10 by step size, and gradients at the best one",
            ("method", *sizes, "best step", "gradients"),
            rows,
            "A scheme of higher order follows the flow more closely and takes longer steps; whether that pays for its "
            "stages is the last column.",
        )
    ]


def _rank_table(found: Found) -> list[Table]:
    parts = found.elsewhere.values()
    if not parts:
        return []
    return [
        Table(
            "Iterations at condition number 10 for other ranks and from a small random start",
            ("method", *found.elsewhere),
            [
                (name, *_cells([part[name].trace for part in parts], found.limit_elsewhere))
                for name in METHODS
            ],
            "Where a larger rank is searched than the matrix has, the factors' Gram matrices become singular at the "
            "solution; from a small random start they are so at the beginning.",
        )
    ]


def figures_of(found: Found) -> list[Figure]:
    """Draw errors against iterations, and iterations and gradients against the condition number."""
    panels = []
    for column, condition in enumerate(found.conditions):
        series = []
        for name in (*_IN_CURVES, *_SLOW):
            errors = found.main[name].trace.errors[: _SHOWN_ITERATIONS + 1, :, column]
            style = "dashed" if name in _SLOW else "line"
            middle, low, high = errors.median(1).values, errors.amin(1), errors.amax(1)
            series.append(Series(name, range(len(errors)), middle, low, high, style=style))
        title = f"condition number {condition:g}"
        panels.append(Panel(title, "iteration", "relative error", series, yscale="log"))
    curves = Figure(
        "sensing-errors",
        "Error curves of matrix sensing",
        f"The first {_SHOWN_ITERATIONS} iterations. Median over seeds, band from the smallest to the largest. Curves "
        "end when all problems of a method are solved.",
        panels,
    )
    return [curves, _counts_figure(found, "iterations"), _counts_figure(found, "evaluations")]


def _counts_figure(found: Found, count: Literal["iterations", "evaluations"]) -> Figure:
    word = "iterations" if count == "iterations" else "gradients"
    panels = []
    for kind, title in (("scheme", "integration schemes"), ("baseline", "baselines")):
        by_name = {
            name: getattr(run.trace, count) for name, run in found.main.items() if METHODS[name].kind == kind
        }
        series = [
            Series(name, found.conditions, median(counts), low=counts.amin(0), high=counts.amax(0))
            for name, counts in by_name.items()
            if counts.isfinite().any()
        ]
        panels.append(Panel(title, "condition number", word, series, xscale="log", yscale="log"))
    return Figure(
        f"sensing-{word}",
        f"{word.capitalize()} to the tolerance against the condition number",
        "Median over seeds, band from the smallest to the largest. Where most problems were not solved there is no "
        "point.",
        panels,
    )


def findings_of(found: Found) -> list[str]:
    """Say what the numbers say."""
    conditions, medians = found.conditions, found.medians
    level = {name: counts for name, counts in medians.items() if counts.isfinite().all()}
    sentences = []
    if level:
        low, high = map(float, torch.stack([*level.values()]).aminmax())
        sentences.append(
            f"{len(level)} of {len(medians)} methods solve the problem at every condition number from "
            f"{min(conditions):g} to {max(conditions):g}, in {low:.0f} to {high:.0f} iterations."
        )
    missed = [
        f"{name} ({int(counts.isfinite().sum())} of {len(conditions)} condition numbers)"
        for name, counts in medians.items()
        if name not in level
    ]
    if missed:
        sentences.append(f"Not everywhere within the iterations allowed: {', '.join(missed)}.")
    best = {name: _best(runs) for name, runs in found.steps.items()}
    spent = sorted(
        (float(median(one.trace.evaluations)), name, one.step)
        for name, one in best.items()
        if one.trace.evaluations.isfinite().all()
    )
    if spent:
        listed = ", ".join(f"{name} {count:.0f} (step {step:g})" for count, name, step in spent[:4])
        sentences.append(f"Fewest gradients at condition number 10, each with the best step tried: {listed}.")
    for key, part in found.elsewhere.items():
        lost = [name for name, one in part.items() if one.trace.diverged.any()]
        done = sum(bool(one.trace.iterations.isfinite().all()) for one in part.values())
        sentences.append(
            f"{key[0].upper()}{key[1:]}: {done} of {len(part)} methods solve all problems"
            + (f"; diverged: {', '.join(lost)}." if lost else ".")
        )
    return sentences
