r"""E6: how the effect of a step on a layer's output grows with the width, at one learning rate.

Stable feature learning means that the effect neither vanishes nor explodes as the layer grows: slope 0 in log-log.
With inputs $h$ of order one per coordinate, $\|h\|^2 \propto n$, and (``standard`` readout) a gradient
$g = \delta h^\top$ with $\delta \propto n^{-1/2}$ per coordinate, the first step of plain descent changes $W h$ by

- $g h = \delta \|h\|^2 \propto n^{1/2}$ in full fine-tuning, and wherever $P_T(g) = g$;
- $g P_A h \propto n^{-1/2}$ from a random $A$ and $B = 0$, because $h^\top P_A h \propto r$ instead of $n$;
- $P_B g h \propto n^0$ more from a random $B$, because $\|P_B \delta\|^2 \approx (r/n) \|\delta\|^2$.

Adam's first step of the weight is $\mathrm{sign}(g)$, so that $\Delta W h \propto n$; LoRA's from $B = 0$ is
$\mathrm{sign}(g_B) A h \propto n^0$.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from tangora._checks import check_choice as check_choice
from tangora.experiments.reproduce.experiment import Progress
from tangora.experiments.reproduce.parts.width import WidthSettings
from tangora.experiments.reproduce.width.layer import TRAINERS, HiddenLayer
from tangora.report.reproduction import Check, Figure, Panel, Result, Series, Table

_NO_START = "none"


class Slope(NamedTuple):
    """A slope in log-log, its mean over seeds and a 95 % interval (``None`` with one seed)."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return (
            f"{self.mean:.2f}" if self.low is None else f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"
        )


class _Row(NamedTuple):
    """A method from one start; sizes are seeds x widths x steps, in units of the learning rate."""

    method: str
    start: str
    sizes: np.ndarray


def loglog_slope(widths: Sequence[int], sizes: np.ndarray) -> Slope | None:
    """Fit a power law to each seed by least squares in the logarithms.

    Args:
        widths: Abscissae.
        sizes: Seeds by widths.

    Returns:
        The mean of the seeds' exponents and Student's 95 % interval for it; ``None`` unless all sizes are positive
        and finite.
    """
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        return None
    x = np.log(widths)
    slopes = np.polyfit(x, np.log(sizes).T, 1)[0]
    mean = float(slopes.mean())
    if len(slopes) < 2:
        return Slope(mean, None, None)
    half = float(stats.t.ppf(0.975, len(slopes) - 1) * stats.sem(slopes))
    return Slope(mean, mean - half, mean + half)


def run(settings: WidthSettings, progress: Progress) -> Result:
    """Measure all methods at all widths.

    Args:
        settings: Sizes.
        progress: Hears of finished runs.

    Returns:
        Sizes of steps and their slopes.
    """
    rows = _measure(settings, progress)
    first, last = (
        {(row.method, row.start): loglog_slope(settings.widths, row.sizes[:, :, step]) for row in rows}
        for step in (0, -1)
    )
    return Result(
        findings=_findings(settings, first, last),
        tables=(_table(settings, rows, first, last),),
        figures=tuple(_figure(settings, rows, start) for start in settings.starts),
        checks=_checks(settings, first),
        data={
            "widths": settings.widths,
            "sizes": {f"{row.method}, {row.start}": row.sizes for row in rows},
            "axes": "seed, width, step; change of the output divided by the learning rate",
        },
    )


def _measure(settings: WidthSettings, progress: Progress) -> list[_Row]:
    keys = [
        (method, start)
        for method, trainer in TRAINERS.items()
        for start in (settings.starts if trainer.adapts else [_NO_START])
    ]
    sizes = np.full((len(keys), settings.num_seeds, len(settings.widths), settings.steps), np.nan)
    total, done = sizes[..., 0].size, 0
    for column, width in enumerate(settings.widths):
        for seed in range(settings.num_seeds):
            layer = HiddenLayer(
                width,
                inputs=settings.inputs,
                outputs=settings.outputs,
                num_examples=settings.num_examples,
                readout=settings.readout,
                rank=settings.rank,
                alpha=settings.alpha,
                seed=settings.seed + seed,
            )
            for index, (method, start) in enumerate(keys):
                rate = settings.rate(TRAINERS[method].rate)
                moved = layer.changes(TRAINERS[method], start, rate, settings.steps)
                sizes[index, seed, column] = np.array(moved) / rate
                done += 1
                progress(done, total)
    return [_Row(method, start, sizes[index]) for index, (method, start) in enumerate(keys)]


_Slopes = Mapping[tuple[str, str], Slope | None]


def _table(settings: WidthSettings, rows: list[_Row], first: _Slopes, last: _Slopes) -> Table:
    narrow, wide = settings.widths[0], settings.widths[-1]
    cells = [
        (
            row.method,
            row.start,
            str(first[row.method, row.start] or "diverged"),
            str(last[row.method, row.start] or "diverged"),
            float(np.median(row.sizes[:, 0, -1])),
            float(np.median(row.sizes[:, -1, -1])),
        )
        for row in rows
    ]
    steps = f"{settings.steps} steps"
    columns = (
        "method",
        "start",
        "slope, step 1",
        f"slope, {steps}",
        f"{steps}, n = {narrow}",
        f"{steps}, n = {wide}",
    )
    return Table(
        "Exponent of the width in the change of the layer's output",
        columns,
        cells,
        "Zero is stable feature learning. Mean over seeds and 95 % interval of the fitted exponent; the last two "
        "columns are the change itself in units of the learning rate, median over seeds.",
    )


def _figure(settings: WidthSettings, rows: list[_Row], start: str) -> Figure:
    shown = [row for row in rows if row.start in (start, _NO_START)]
    panels = [
        Panel(
            "after 1 step" if step == 0 else f"after {settings.steps} steps",
            "width n",
            "RMS change of the output / learning rate",
            [_series(settings, row, step) for row in shown],
            xscale="log",
            yscale="log",
        )
        for step in dict.fromkeys((0, settings.steps - 1))
    ]
    return Figure(
        f"width-{start}",
        f"Change of the layer's output, {start} start",
        "A level curve is stable feature learning. Median over seeds, band from the smallest to the largest seed.",
        panels,
    )


def _series(settings: WidthSettings, row: _Row, step: int) -> Series:
    sizes = row.sizes[:, :, step]
    style = "line" if TRAINERS[row.method].adapts else "dashed"
    return Series(
        row.method, settings.widths, np.median(sizes, 0), low=sizes.min(0), high=sizes.max(0), style=style
    )


def _findings(settings: WidthSettings, first: _Slopes, last: _Slopes) -> tuple[str, ...]:
    sentences = []
    for method, trainer in TRAINERS.items():
        by_start = [(start, slope) for start in settings.starts if (slope := first.get((method, start)))]
        spread = [slope.mean for _, slope in by_start]
        if trainer.adapts and len(spread) > 1 and max(spread) - min(spread) > 0.3:
            listed = ", ".join(f"{slope.mean:.2f} from {start}" for start, slope in by_start)
            sentences.append(f"First step of {method}: the exponent depends on the start, {listed}.")
    for start in settings.starts:
        named = [(method, slope) for (method, where), slope in last.items() if where == start and slope]
        level = [f"{method} ({slope.mean:.2f})" for method, slope in named if abs(slope.mean) < 0.1]
        sentences.append(
            f"From the {start} start the exponent after {settings.steps} steps is within 0.1 of zero for "
            f"{', '.join(level) if level else 'no method'}."
        )
        parted = [
            f"{method} ({before.mean:.2f} to {slope.mean:.2f})"
            for method, slope in named
            if (before := first[method, start]) and abs(slope.mean - before.mean) > 0.3
        ]
        if parted:
            sentences.append(
                f"From the {start} start the exponent moves by more than 0.3 between step 1 and step {settings.steps} "
                f"for {', '.join(parted)}."
            )
    return tuple(sentences)


def _checks(settings: WidthSettings, first: _Slopes) -> tuple[Check, ...]:
    # exponents of the module's docstring; a gradient smaller by n^-1/2 lowers those without moments by 1/2
    shift = -0.5 if settings.readout == "mean-field" else 0.0
    expected = {
        ("full (SGD)", _NO_START): 0.5 + shift,
        ("full (Adam)", _NO_START): 1.0,
        ("LoRA (SGD)", "plain"): -0.5 + shift,
        ("LoRA (Adam)", "plain"): 0.0,
        ("LoRA-Pro (SGD)", "plain"): -0.5 + shift,
        ("ODELoRA (Euler)", "plain"): -0.5 + shift,
        ("LoRA-Pro (SGD)", "orthogonal"): shift,
        ("ODELoRA (Euler)", "orthogonal"): shift,
    }
    return tuple(
        Check(
            f"{method}{_from(start)}: exponent {exponent:g} at the first step",
            slope.mean if slope else None,
            exponent - 0.25,
            exponent + 0.25,
            "this project's estimate; ODELoRA's own theorem could not be read",
        )
        for (method, start), exponent in expected.items()
        if (method, start) in first
        for slope in (first[method, start],)
    )


def _from(start: str) -> str:
    return "" if start == _NO_START else f" from the {start} start"
