"""How soon a recipe trains as far as LoRA does in all its steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tangora.report.run_records import Comparison, Record
from tangora.report.statistics.judgement import BASELINE, Row, runs_behind
from tangora.report.statistics.selection import num_steps

Quality = Literal["validation loss", "training loss"]

_WINDOW_SHARE = 0.05

_Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # steps, losses


@dataclass(frozen=True)
class Speed:
    """How soon a recipe reaches LoRA's final loss, at its own best learning rate."""

    recipe: str
    quality: Quality
    target: float
    """LoRA's loss at the end, mean over its seeds."""
    steps: float | None
    """Optimizer steps until the loss is no larger, mean over the seeds that get there; None if none does."""
    seconds: float | None
    """Median over these seeds: the initialization, and training steps at the speed of the whole run."""
    num_reached: int
    """Seeds that get there."""
    num_seeds: int
    window: int | None = None
    """Steps over which training losses are averaged; None for validation loss."""

    @property
    def all_reached(self) -> bool:
        """Whether every seed gets there."""
        return self.num_reached == self.num_seeds


def speeds(comparison: Comparison, rows: Sequence[Row]) -> dict[str, Speed]:
    """Measure how soon each recipe reaches LoRA's final loss.

    It is the validation loss if every judged run was evaluated at least twice, and the loss reached is that of an
    evaluation. Else it is the training loss, as a mean over the last 5 % of LoRA's recorded steps; every other run is
    smoothed by a trailing mean over as many, which must be full before it counts.
    """
    judged = runs_behind(comparison, rows)
    if BASELINE not in judged:
        return {}
    quality, window, curve = _measure(judged)
    ends = [losses[-1] for losses in (curve(run)[1] for run in judged[BASELINE]) if losses.size]
    if not ends or not np.isfinite(ends).all():
        return {}
    target = fmean(ends)
    return {recipe: _speed(recipe, runs, quality, window, target, curve) for recipe, runs in judged.items()}


def _measure(judged: dict[str, list[Record]]) -> tuple[Quality, int | None, Callable[[Record], _Curve]]:
    everyone = [run for runs in judged.values() for run in runs]
    if all(_validation(run)[0].size > 1 for run in everyone):
        return "validation loss", None, _validation
    longest = max(len(run.history) for run in judged[BASELINE])
    window = max(1, round(_WINDOW_SHARE * longest))
    return "training loss", window, lambda run: _training(run, window)


def _validation(run: Record) -> _Curve:
    entries = {entry.step: entry.metrics["loss"] for entry in run.evaluations if "loss" in entry.metrics}
    return np.array(list(entries), dtype=np.float64), np.array(list(entries.values()), dtype=np.float64)


def _training(run: Record, window: int) -> _Curve:
    steps = np.array([entry.step for entry in run.history], dtype=np.float64)
    losses = np.array([entry.loss for entry in run.history], dtype=np.float64)
    if losses.size < window:
        return steps[:0], losses[:0]
    # A window at a time, so that a loss that is not finite stays within its own.
    return steps[window - 1 :], np.lib.stride_tricks.sliding_window_view(losses, window).mean(axis=1)


def _speed(
    recipe: str,
    runs: Sequence[Record],
    quality: Quality,
    window: int | None,
    target: float,
    curve: Callable[[Record], _Curve],
) -> Speed:
    reached = [(run, step) for run in runs if (step := _first(*curve(run), target)) is not None]
    return Speed(
        recipe=recipe,
        quality=quality,
        target=target,
        steps=fmean(step for _, step in reached) if reached else None,
        seconds=median(_seconds(run, step) for run, step in reached) if reached else None,
        num_reached=len(reached),
        num_seeds=len(runs),
        window=window,
    )


def _first(steps: NDArray[np.float64], losses: NDArray[np.float64], target: float) -> float | None:
    # A mean over seeds may miss the only seed's own end by rounding.
    low_enough = steps[losses <= target + 1e-12 * abs(target)]
    return float(low_enough[0]) if low_enough.size else None


def _seconds(run: Record, step: float) -> float:
    per_step = (run.time.forward_backward + run.time.optimizer) / max(num_steps(run), 1)
    return run.time.start + step * per_step if math.isfinite(step) else math.inf
