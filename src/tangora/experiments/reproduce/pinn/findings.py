"""What the sweeps say: ranges of rates, sentences, checks and tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from tangora.experiments.reproduce.pinn.runs import DIVERGED_AT, Problem, Run, Sweep
from tangora.report.reproduction.records import Cell, Check, Table

SOURCE = "ODELoRA, arXiv:2602.07479, abstract: superiority over existing baselines, especially in training stability"
WITHIN = 2.0


@dataclass(frozen=True)
class Ranges:
    """How freely a method's learning rate may be chosen, in decades of the rates tried.

    Attributes:
        stable: Of the rates around the best one that end below the starting error.
        censored: Whether that reaches an end of the rates tried, so that it is a lower bound.
        headroom: From the best rate up to the largest of them.
        near_best: Of the rates around the one of the smallest error that end within twice that error. A method that
            hardly moves at any rate has a wide one.
        useful: Of those that end within twice the target's error; ``None`` if no rate does.
    """

    stable: float
    censored: bool
    headroom: float
    near_best: float
    useful: float | None


def ranges(sweep: Sweep, target: float) -> Ranges:
    """Measure the ranges of a sweep.

    Args:
        sweep: Of a method.
        target: An error that all methods are held against.

    Returns:
        Zeros where the best rate itself is not stable.
    """
    runs = sweep.runs
    chosen = next(index for index, run in enumerate(runs) if run.rate == sweep.best[0].rate)
    first, last = _around(chosen, [run.status == "better" for run in runs])
    smallest = min(range(len(runs)), key=lambda index: runs[index].error)
    near = _around(smallest, _within(runs, runs[smallest].error))
    reached = _within(runs, target)
    return Ranges(
        stable=_decades(runs, first, last),
        censored=runs[chosen].status == "better" and (first == 0 or last == len(runs) - 1),
        headroom=_decades(runs, chosen, last) if runs[chosen].status == "better" else 0.0,
        near_best=_decades(runs, *near),
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
    """Return the mean error over seeds at the best rate.

    Args:
        sweep: Of a method.

    Returns:
        The mean; infinite if any of the seeds diverged.
    """
    return fmean(run.error for run in sweep.best)


def best_adapter_error(sweeps: Sequence[Sweep]) -> float:
    """Return the smallest error of any adapter in its sweep, the target of the useful range.

    Args:
        sweeps: One per method.

    Returns:
        The error; infinite if all adapters diverged or none ran.
    """
    adapters = (sweep for sweep in sweeps if sweep.method.family != "full")
    return min((run.error for sweep in adapters for run in sweep.runs), default=math.inf)


def start_error(sweep: Sweep) -> float:
    """Return the error that every run begins with.

    Args:
        sweep: Any of the problem.

    Returns:
        Relative L2 error of the pretrained network for the new coefficient.
    """
    return sweep.runs[0].errors[0][1]


def label(problem: Problem) -> str:
    """Name a problem with its coefficients.

    Args:
        problem: Which.

    Returns:
        For example "convection, β 2 → 4".
    """
    return f"{problem.equation.name}, {problem.equation.symbol} {problem.source:g} → {problem.target:g}"


def table(problem: Problem, sweeps: Sequence[Sweep]) -> Table:
    """Make the table of a problem.

    Args:
        problem: Which.
        sweeps: One per method.

    Returns:
        One row per method, the smallest mean error first.
    """
    target = best_adapter_error(sweeps)
    rows = [_row(sweep, target) for sweep in sorted(sweeps, key=mean_error)]
    return Table(
        f"{label(problem)}: error at the best rate, and the width of the range of rates",
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
        tuple(rows),
        f"Relative L2 error against the reference solution, {len(sweeps[0].best)} seeds; it begins at "
        f"{start_error(sweeps[0]):.3g}, and the pretrained network has {problem.pretrained_error:.2g} at its own "
        "coefficient. The best rate has the smallest held-out residual with the first seed. Stable: not diverged (loss "
        f"not finite or beyond {DIVERGED_AT:g} times the first one) and ended below the starting error; ≥ where the "
        "rates tried end first. A method that hardly moves at any rate is wide within 2x of its own best. Diverged: "
        "runs of the sweep. Time: of the processor, all included.",
    )


def _row(sweep: Sweep, target: float) -> tuple[Cell, ...]:
    errors = [run.error for run in sweep.best]
    width = ranges(sweep, target)
    diverged = sum(run.status == "diverged" for run in sweep.runs)
    times = [1e3 * run.seconds / run.evaluations for run in sweep.best if run.evaluations]
    return (
        sweep.method.name,
        f"{sweep.best[0].rate:.3g}",
        _finite(fmean(errors)),
        _finite(min(errors)),
        _finite(max(errors)),
        _finite(fmean(run.held_out for run in sweep.best)),
        f"{'≥ ' if width.censored else ''}{width.stable:.1f}",
        f"{width.headroom:.1f}",
        f"{width.near_best:.1f}",
        "none" if width.useful is None else f"{width.useful:.1f}",
        f"{diverged} of {len(sweep.runs)}",
        fmean(times) if times else None,
    )


def _finite(value: float) -> Cell:
    return value if math.isfinite(value) else "diverged"


def findings(problem: Problem, sweeps: Sequence[Sweep]) -> list[str]:
    """Say what the numbers of a problem show.

    Args:
        problem: Which.
        sweeps: One per method.

    Returns:
        Sentences.
    """
    ordered = sorted(sweeps, key=mean_error)
    adapters = [sweep for sweep in ordered if sweep.method.family != "full"]
    sentences = [
        f"{label(problem)}: of the adapters {adapters[0].method.name} ends with the smallest error, "
        f"{_spread(adapters[0])}" + _runner_up(adapters)
    ]
    target = best_adapter_error(sweeps)
    full = [sweep for sweep in ordered if sweep.method.family == "full"]
    if full:
        sentences.append(f"{label(problem)}: {full[0].method.name} ends at {_spread(full[0])}.")
    for family, name in (("ode", "ODELoRA"), ("baseline", "baseline")):
        members = [sweep for sweep in adapters if sweep.method.family == family]
        if members:
            near = sum(ranges(sweep, target).useful is not None for sweep in members)
            sentences.append(
                f"{label(problem)}: the best {name} is {members[0].method.name} with {_spread(members[0])}; {near} of "
                f"{len(members)} come within twice the best adapter's error ({target:.3g}) at any rate."
            )
    plain = [f"{sweep.method.name} {mean_error(sweep):.3g}" for sweep in ordered if not sweep.method.moments]
    if plain:
        sentences.append(f"{label(problem)}: without moments: {', '.join(plain)}.")
    lost = [f"{sweep.method.name} ({_lost(sweep)})" for sweep in ordered if _lost(sweep)]
    if lost:
        sentences.append(
            f"{label(problem)}: seeds that diverged or ended above the starting error at the best rate: "
            f"{', '.join(lost)}."
        )
    return sentences


def _runner_up(adapters: Sequence[Sweep]) -> str:
    return f", then {adapters[1].method.name} with {_spread(adapters[1])}." if adapters[1:] else "."


def _spread(sweep: Sweep) -> str:
    errors = [run.error for run in sweep.best]
    return f"{mean_error(sweep):.3g} ({min(errors):.3g} to {max(errors):.3g} over {len(errors)} seeds)"


def _lost(sweep: Sweep) -> int:
    return sum(run.status != "better" for run in sweep.best)


def checks(problem: Problem, sweeps: Sequence[Sweep]) -> list[Check]:
    """Hold the source's claim against the numbers of a problem.

    Args:
        problem: Which.
        sweeps: One per method.

    Returns:
        Checks of the network; of error and stability where both ODELoRA and baselines ran.
    """
    found = [
        Check(
            f"{problem.equation.name}: the pretrained network solves its own equation (relative L2 error)",
            problem.pretrained_error,
            None,
            0.01,
            "set-up of this experiment",
        )
    ]
    ode, baseline = (
        [sweep for sweep in sweeps if sweep.method.family == family] for family in ("ode", "baseline")
    )
    if not ode or not baseline:
        return found
    ratio = min(map(mean_error, ode)) / min(map(mean_error, baseline))
    target, name = best_adapter_error(sweeps), label(problem)
    ode_ranges, baseline_ranges = ([ranges(sweep, target) for sweep in group] for group in (ode, baseline))
    width = max(_reach(found) for found in ode_ranges) - max(_reach(found) for found in baseline_ranges)
    room = max(found.headroom for found in ode_ranges) - max(found.headroom for found in baseline_ranges)
    return [
        *found,
        Check(
            f"{name}: error of the best ODELoRA over that of the best LoRA baseline", ratio, None, 1.0, SOURCE
        ),
        Check(
            f"{name}: decades of rates within 2x of the best adapter, ODELoRA less baselines",
            width,
            0.0,
            None,
            SOURCE,
        ),
        Check(f"{name}: decades above the best rate before it fails, likewise", room, 0.0, None, SOURCE),
    ]


def _reach(found: Ranges) -> float:
    # one rate has no width; a method that has none at all is half a decade, the spacing of rates, below that
    return -0.5 if found.useful is None else found.useful
