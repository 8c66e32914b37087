"""How soon each recipe trains as far as LoRA."""

import math
from collections.abc import Callable, Mapping, Sequence

from tangora.report import formats
from tangora.report.layout import Section
from tangora.report.report_table import Table, cell, number
from tangora.report.run_records import Comparison
from tangora.report.statistics.judgement import BASELINE, Row
from tangora.report.statistics.speed import Speed, speeds

_FEW_STEPS = 5  # a mean over fewer training losses is as noisy as a batch


def speed_section(comparison: Comparison, rows: Sequence[Row]) -> Section | None:
    """Show how soon each recipe trains as far as LoRA."""
    found = speeds(comparison, rows)
    if not found:
        return None
    lora = found[BASELINE]
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
        f"Differences in this table have not been tested for significance. {_averaged(lora)}".strip(),
    ]
    return Section("speed", f"Speed to {BASELINE}'s quality", speed_verdict(found), table, notes)


def _averaged(lora: Speed) -> str:
    if lora.window is None:
        return ""
    return f"Training losses are means over {formats.plural(lora.window, 'step')}."


def speed_verdict(found: Mapping[str, Speed]) -> list[str]:
    """Say which recipes reach LoRA's final loss first, by the numbers that the table shows."""
    lora = found.get(BASELINE)
    if lora is None or len(found) < 2:
        return []
    goal = f"{BASELINE}'s final {lora.quality}, {formats.metric(lora.target)}"
    if lora.window is not None and lora.window < _FEW_STEPS:
        return [
            (
                f"Which recipe first reaches {goal}, cannot be told: with so few steps the training loss is a mean "
                f"over only {formats.plural(lora.window, 'step')}, about as noisy as a single batch. Evaluate on "
                "validation data during training (`evaluate_every`) to compare speed."
            )
        ]
    arrived = [item for item in found.values() if item.all_reached]
    if not arrived:
        return [f"No recipe reaches {goal}, with every seed, {BASELINE} included."]
    names = [item.recipe for item in arrived]
    who = "All recipes" if len(arrived) == len(found) else f"Only {formats.listing(names)}"
    with_every = f"{who} {'reaches' if len(names) == 1 else 'reach'} {goal}, with every seed"
    if len(arrived) == 1:
        (item,) = arrived
        return [f"{with_every}: {_pace(item)}{'' if item is lora else _own(lora)}."]
    fewest, shortest = _smallest(arrived, _steps_text), _smallest(arrived, _time_text)
    steps = f"{_needs(fewest)} the fewest optimizer steps, {_steps_text(fewest[0])} on average"
    seconds = f"{_needs(shortest)} the least time, {_time_text(shortest[0])}"
    # LoRA's own pace, where neither half of the sentence has said both of its numbers
    own = "" if lora in fewest and lora in shortest else _own(lora)
    return [f"{with_every}. Of these, {steps}, and {seconds}{own}."]


def _smallest(found: Sequence[Speed], write: Callable[[Speed], str]) -> list[Speed]:
    # what reads the same in the table is a tie
    value = _steps if write is _steps_text else _time
    least = write(min(found, key=value))
    return [item for item in found if write(item) == least]


def _steps(item: Speed) -> float:
    return math.inf if item.steps is None else item.steps


def _time(item: Speed) -> float:
    return math.inf if item.seconds is None else item.seconds


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
