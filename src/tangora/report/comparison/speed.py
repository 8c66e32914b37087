"""Steps that a recipe needs to reach LoRA's final loss."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean, median
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tangora.report import formats
from tangora.report.layout import Section
from tangora.report.report_table import Table, cell, number
from tangora.report.run_records import Record
from tangora.report.statistics.judgement import BASELINE, Judgement
from tangora.report.statistics.selection import num_steps

_WINDOW_SHARE = 0.05
_FEW_STEPS = 5  # a mean over fewer training losses is as noisy as a batch

_Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # steps, losses


@dataclass(frozen=True)
class Speed:
    """Steps that a recipe needs, at its own best learning rate, to reach LoRA's final loss."""

    recipe: str
    quality: Literal["validation loss", "training loss"]
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


def speeds(judged: Judgement) -> dict[str, Speed]:
    """Measure how soon each recipe reaches LoRA's final loss.

    It is the validation loss if every judged run was evaluated at least twice, and the loss reached is that of an
    evaluation. Else it is the training loss, as a mean over the last 5 % of LoRA's recorded steps; every other run is
    smoothed by a trailing mean over as many, which must be full before it counts.
    """
    if BASELINE not in judged.runs:
        return {}
    window = _window(judged)

    def curve(run: Record) -> _Curve:
        return _validation(run) if window is None else _training(run, window)

    ends = [losses[-1] for losses in (curve(run)[1] for run in judged.runs[BASELINE]) if losses.size]
    if not ends or not np.isfinite(ends).all():
        return {}
    target, found = fmean(ends), {}
    for recipe, runs in judged.runs.items():
        reached = [(run, step) for run in runs if (step := _first(*curve(run), target)) is not None]
        found[recipe] = Speed(
            recipe=recipe,
            quality="validation loss" if window is None else "training loss",
            target=target,
            steps=fmean(step for _, step in reached) if reached else None,
            seconds=median(_seconds(run, step) for run, step in reached) if reached else None,
            num_reached=len(reached),
            num_seeds=len(runs),
            window=window,
        )
    return found


def _window(judged: Judgement) -> int | None:
    # None where validation losses can be compared
    if all(_validation(run)[0].size > 1 for runs in judged.runs.values() for run in runs):
        return None
    return max(1, round(_WINDOW_SHARE * max(len(run.history) for run in judged.runs[BASELINE])))


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


def _first(steps: NDArray[np.float64], losses: NDArray[np.float64], target: float) -> float | None:
    # A mean over seeds may miss the only seed's own end by rounding.
    low_enough = steps[losses <= target + 1e-12 * abs(target)]
    return float(low_enough[0]) if low_enough.size else None


def _seconds(run: Record, step: float) -> float:
    per_step = (run.time.forward_backward + run.time.optimizer) / max(num_steps(run), 1)
    return run.time.start + step * per_step if math.isfinite(step) else math.inf


def speed_section(judged: Judgement) -> Section | None:
    """Show how soon each recipe trains as far as LoRA."""
    found = speeds(judged)
    if not found:
        return None
    lora = found[BASELINE]
    averaged = (
        ""
        if lora.window is None
        else f" Training losses are means over {formats.plural(lora.window, 'step')}."
    )
    table = Table.of(
        "speed",
        f"Until {BASELINE}'s final {lora.quality}, {formats.metric(lora.target)}, is reached.",
        found.values(),
        {
            "recipe": lambda item: item.recipe,
            "optimizer steps": lambda item: number(item.steps, "{:.0f}".format),
            "time": lambda item: number(item.seconds, formats.seconds),
            f"time, {BASELINE} = 1": lambda item: number(
                item.seconds / lora.seconds if item.seconds is not None and lora.seconds else None,
                "{:.2f}".format,
            ),
            "seeds that reach it": lambda item: cell(
                f"{item.num_reached} of {item.num_seeds}", value=item.num_reached
            ),
        },
    )
    notes = [
        (
            "Over the seeds that reach it, each recipe at its own best learning rate: mean of the steps, median of the "
            "times. Time: the initialization, and training steps at the run's average speed, without evaluations."
        ),
        (
            "The table is about the loss; a recipe that reaches it soon is not always better by the test metric. "
            f"Differences in this table have not been tested for significance.{averaged}"
        ),
    ]
    return Section("speed", f"Speed to {BASELINE}'s final loss", speed_verdict(found), table, notes)


def speed_verdict(found: Mapping[str, Speed]) -> list[str]:
    """Say which recipes reach LoRA's final loss first, by the numbers that the table shows."""
    lora = found.get(BASELINE)
    if lora is None or len(found) < 2:
        return []
    goal = f"{BASELINE}'s final {lora.quality}, {formats.metric(lora.target)}"
    if lora.window is not None and lora.window < _FEW_STEPS:
        return [
            (
                f"It is not clear which recipe first reaches {goal}: with so few steps the training "
                "loss is a mean "
                f"over only {formats.plural(lora.window, 'step')}, about as noisy as a single batch. Evaluate on "
                "validation data during training (--evaluate-every) to compare speed."
            )
        ]
    arrived = [item for item in found.values() if item.all_reached]
    if not arrived:
        return [f"No recipe, {BASELINE} included, reaches {goal} with every seed."]
    names = [item.recipe for item in arrived]
    who = "All recipes" if len(arrived) == len(found) else f"Only {formats.listing(names)}"
    with_every = f"{who} {'reaches' if len(names) == 1 else 'reach'} {goal}, with every seed"
    if len(arrived) == 1:
        (item,) = arrived
        return [f"{with_every}: {_pace(item)}{'' if item is lora else _own(lora)}."]
    fewest = _smallest(arrived, "steps", _steps_text)
    shortest = _smallest(arrived, "seconds", _time_text)
    steps = f"{_needs(fewest)} the fewest optimizer steps, {_steps_text(fewest[0])} on average"
    seconds = f"{_needs(shortest)} the least time, {_time_text(shortest[0])}"
    # LoRA's own pace, where neither half of the sentence has said both of its numbers
    own = "" if lora in fewest and lora in shortest else _own(lora)
    return [f"{with_every}. Of these, {steps}, and {seconds}{own}."]


def _smallest(found: Sequence[Speed], cost: str, write: Callable[[Speed], str]) -> list[Speed]:
    # what reads the same in the table is a tie
    least = write(min(found, key=attrgetter(cost)))
    return [item for item in found if write(item) == least]


def _steps_text(item: Speed) -> str:
    return f"{item.steps:.0f}"


def _time_text(item: Speed) -> str:
    return formats.seconds(item.seconds)


def _needs(items: Sequence[Speed]) -> str:
    return f"{formats.listing(item.recipe for item in items)} {'needs' if len(items) == 1 else 'need'}"


def _pace(item: Speed) -> str:
    return f"{_steps_text(item)} steps on average and {_time_text(item)}"


def _own(lora: Speed) -> str:
    if lora.steps is None:
        return f"; {BASELINE} itself reaches it with no seed alone"
    reached = "" if lora.all_reached else f" in {lora.num_reached} of {lora.num_seeds} seeds"
    return f"; {BASELINE} itself took {_pace(lora)}{reached}"
