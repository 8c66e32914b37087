"""Results of the sweeps of a problem: ranges of learning rates, sentences, tables and figures."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch

from reproductions.pinn.network import Problem
from reproductions.pinn.runs import DIVERGED_AT, Run, Sweep
from reproductions.result import Cell, Table
from tangora.report.drawing.panels import Figure, Heatmap, Panel, Series

WITHIN = 2.0
_CHARTED = ("full", "baseline", "other", "ode")


class Ranges(NamedTuple):
    """Width of a method's range of good learning rates, in decades of the rates tried."""

    stable: float
    """Learning rates around the best one that end below the starting error."""
    censored: bool
    """Whether that reaches an end of the learning rates tried, so that it is a lower bound."""
    headroom: float
    """From the best one up to the largest of them."""
    near_best: float
    """Those around the one of the smallest error that end within twice that error; wide where nothing moves."""
    useful: float | None
    """Those that end within twice the target's error; ``None`` if none does."""


def ranges(sweep: Sweep, target: float) -> Ranges:
    """Measure the ranges of a sweep against a target error, with zeros where the best learning rate is not stable."""
    runs = sweep.runs
    chosen = next(index for index, run in enumerate(runs) if run.rate == sweep.best[0].rate)
    first, last = _around(chosen, [run.status == "better" for run in runs])
    smallest = min(range(len(runs)), key=lambda index: runs[index].error)
    reached = _within(runs, target)
    return Ranges(
        stable=_decades(runs, first, last),
        censored=runs[chosen].status == "better" and (first == 0 or last == len(runs) - 1),
        headroom=_decades(runs, chosen, last) if runs[chosen].status == "better" else 0.0,
        near_best=_decades(runs, *_around(smallest, _within(runs, runs[smallest].error))),
        useful=_decades(runs, *_around(smallest, reached)) if reached[smallest] else None,
    )


def _within(runs: Sequence[Run], error: float) -> list[bool]:
    return [run.status == "better" and run.error <= WITHIN * error for run in runs]


def _around(index: int, good: Sequence[bool]) -> tuple[int, int]:
    first = last = index
    while good[index] and first > 0 and good[first - 1]:
        first -= 1
    while good[index] and last < len(good) - 1 and good[last + 1]:
        last += 1
    return first, last


def _decades(runs: Sequence[Run], first: int, last: int) -> float:
    return round(math.log10(runs[last].rate / runs[first].rate), 1)


def mean_error(sweep: Sweep) -> float:
    """Return the mean error over seeds at the best learning rate; infinite if any of the seeds diverged."""
    return fmean(run.error for run in sweep.best)


class Found(NamedTuple):
    """A problem, and the sweeps of all methods on it."""

    problem: Problem
    sweeps: Sequence[Sweep]

    @property
    def target(self) -> float:
        """The smallest error of any adapter in its sweep; infinite if all adapters diverged or none ran."""
        adapters = (sweep for sweep in self.sweeps if sweep.method.family != "full")
        return min((run.error for sweep in adapters for run in sweep.runs), default=math.inf)

    @property
    def start_error(self) -> float:
        """The error that every run begins with."""
        return self.sweeps[0].runs[0].errors[0][1]

    def of(self, family: str) -> list[Sweep]:
        """Return the sweeps of a family of methods, the smallest mean error first."""
        return sorted((sweep for sweep in self.sweeps if sweep.method.family == family), key=mean_error)

    def error_ratio(self) -> float:
        """Return the error of the best ODELoRA over that of the best baseline."""
        return mean_error(self.of("ode")[0]) / mean_error(self.of("baseline")[0])

    def useful_gain(self) -> float:
        """Return how many decades more of learning rates are useful with ODELoRA than with baselines.

        One learning rate has no width; a method that has none at all is half a decade, their spacing, below that.
        """
        target = self.target
        ode, baseline = (
            max(
                -0.5 if (useful := ranges(sweep, target).useful) is None else useful
                for sweep in self.of(family)
            )
            for family in ("ode", "baseline")
        )
        return ode - baseline

    def headroom_gain(self) -> float:
        """Return how many decades more there are above the best learning rate with ODELoRA than with baselines."""
        ode, baseline = (
            max(ranges(sweep, self.target).headroom for sweep in self.of(family))
            for family in ("ode", "baseline")
        )
        return ode - baseline


def table_of(found: Found) -> Table:
    """Tabulate the methods, the smallest mean error first."""
    problem, columns = (
        found.problem,
        (
            "method",
            "best rate",
            "error, mean",
            "smallest",
            "largest",
            "held-out residual",
            "stable decades",
            "decades above the best",
            "decades within 2x of its best",
            "decades within 2x of the best adapter",
            "diverged",
            "ms per gradient",
        ),
    )
    return Table(
        f"{problem.label}: error at the best rate, and the width of the range of rates",
        columns,
        [_row(sweep, found.target) for sweep in sorted(found.sweeps, key=mean_error)],
        f"Relative L2 error against the reference solution, {len(found.sweeps[0].best)} seeds; it begins at "
        f"{found.start_error:.3g}, and the pretrained network has {problem.pretrained_error:.2g} at its own "
        "coefficient. The best rate has the smallest held-out residual with the first seed. Stable: not diverged (loss "
        f"not finite or beyond {DIVERGED_AT:g} times the first one) and ended below the starting error; ≥ where the "
        "rates tried end first. A method that hardly moves at any rate is wide within 2x of its own best. Diverged: "
        "runs of the sweep. Time: of the processor, all included.",
    )


def _row(sweep: Sweep, target: float) -> tuple[Cell, ...]:
    errors, width = [run.error for run in sweep.best], ranges(sweep, target)
    diverged = sum(run.status == "diverged" for run in sweep.runs)
    times = [1e3 * run.seconds / run.evaluations for run in sweep.best if run.evaluations]
    numbers = (fmean(errors), min(errors), max(errors), fmean(run.held_out for run in sweep.best))
    return (
        sweep.method.name,
        f"{sweep.best[0].rate:.3g}",
        *(value if math.isfinite(value) else "diverged" for value in numbers),
        f"{'≥ ' if width.censored else ''}{width.stable:.1f}",
        f"{width.headroom:.1f}",
        f"{width.near_best:.1f}",
        "none" if width.useful is None else f"{width.useful:.1f}",
        f"{diverged} of {len(sweep.runs)}",
        fmean(times) if times else None,
    )


def findings_of(found: Found) -> list[str]:
    """Say what the numbers of a problem show."""
    label, target = found.problem.label, found.target
    ordered = sorted(found.sweeps, key=mean_error)
    adapters = [sweep for sweep in ordered if sweep.method.family != "full"]
    runner_up = f", then {adapters[1].method.name} with {_spread(adapters[1])}." if adapters[1:] else "."
    sentences = [
        f"of the adapters {adapters[0].method.name} ends with the smallest error, {_spread(adapters[0])}{runner_up}"
    ]
    if full := found.of("full"):
        sentences.append(f"{full[0].method.name} ends at {_spread(full[0])}.")
    for family, name in (("ode", "ODELoRA"), ("baseline", "baseline")):
        if members := found.of(family):
            near = sum(ranges(sweep, target).useful is not None for sweep in members)
            sentences.append(
                f"the best {name} is {members[0].method.name} with {_spread(members[0])}; {near} of {len(members)} "
                f"come within twice the best adapter's error ({target:.3g}) at any rate."
            )
    plain = [f"{sweep.method.name} {mean_error(sweep):.3g}" for sweep in ordered if not sweep.method.moments]
    if plain:
        sentences.append(f"without moments: {', '.join(plain)}.")
    lost = [
        f"{sweep.method.name} ({number})"
        for sweep in ordered
        if (number := sum(run.status != "better" for run in sweep.best))
    ]
    if lost:
        sentences.append(
            f"seeds that diverged or ended above the starting error at the best rate: {', '.join(lost)}."
        )
    return [f"{label}: {sentence}" for sentence in sentences]


def _spread(sweep: Sweep) -> str:
    errors = [run.error for run in sweep.best]
    return f"{mean_error(sweep):.3g} ({min(errors):.3g} to {max(errors):.3g} over {len(errors)} seeds)"


def figures_of(problems: Sequence[Found]) -> list[Figure]:
    """Draw the error over the learning rate and along the way, and solutions and errors of each problem."""
    rates = [
        Panel(
            found.problem.label,
            "peak learning rate",
            "relative L2 error at the end",
            [*map(_over_rates, found.sweeps), _starting_line(found)],
            xscale="log",
            yscale="log",
        )
        for found in problems
    ]
    training = [
        Panel(
            found.problem.label,
            "gradient evaluations",
            "relative L2 error",
            [*map(_over_time, found.sweeps)],
            yscale="log",
        )
        for found in problems
    ]
    return [
        Figure(
            "pinn-rates",
            "Error over the learning rate",
            "First seed, equal gradient evaluations. Diverged runs have no point; the curve ends before them.",
            rates,
        ),
        Figure(
            "pinn-training",
            "Training at the best rate",
            "Mean over seeds; bands from the smallest to the largest. A seed that diverged ends the mean.",
            training,
        ),
        *map(_solution_figure, problems),
    ]


def _over_rates(sweep: Sweep) -> Series:
    return Series(sweep.method.name, [run.rate for run in sweep.runs], [run.error for run in sweep.runs])


def _starting_line(found: Found) -> Series:
    rates = [run.rate for sweep in found.sweeps for run in sweep.runs]
    return Series("pretrained", (min(rates), max(rates)), [found.start_error] * 2, style="dashed")


def _over_time(sweep: Sweep) -> Series:
    # a seed that diverged has fewer checkpoints than the others
    shortest = min((run.errors for run in sweep.best), key=len)
    values = torch.tensor([[error for _, error in run.errors[: len(shortest)]] for run in sweep.best])
    low, high = values.amin(0), values.amax(0)
    return Series(sweep.method.name, [at for at, _ in shortest], values.mean(0), low, high)


def _solution_figure(found: Found) -> Figure:
    problem, solution = found.problem, found.problem.solution
    heatmap = Heatmap(solution.t, solution.x, solution.u.T, "u")
    panels = [Panel(f"reference, {problem.equation.symbol} = {problem.target:g}", "t", "x", heatmap=heatmap)]
    for family in _CHARTED:
        shown = [(sweep, sweep.best[0].field) for sweep in found.of(family)]
        for sweep, field in [(sweep, field) for sweep, field in shown if field is not None][:1]:
            heatmap = Heatmap(solution.t, solution.x, (field - solution.u).abs().T, "absolute error")
            panels.append(Panel(sweep.method.name, "t", "x", heatmap=heatmap))
    largest = max(float(solution.u.abs().max()), math.ulp(1.0))
    return Figure(
        f"pinn-{problem.equation.name}",
        f"{problem.label}: solution and errors",
        "The best of full fine-tuning, LoRA baselines, other optimizers and ODELoRA, first seed; each panel has "
        f"its own scale. The solution's largest value is {largest:.2g}.",
        panels,
    )
