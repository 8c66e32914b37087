"""What a comparison says beyond its result, in sentences: speed, learning rates, several tasks."""

import math
from collections.abc import Callable, Mapping, Sequence

from tangora.report import formats
from tangora.report.statistics.intervals import ALPHA
from tangora.report.statistics.robustness import Robustness
from tangora.report.statistics.speed import Speed
from tangora.report.statistics.summary import BASELINE, CEILING
from tangora.report.statistics.tasks import MIN_TASKS, Outcome, TaskMatrix

_FEW_STEPS = 5  # a mean over fewer training losses is as noisy as a batch

_VERBS: dict[Outcome, str] = {"win": "wins", "loss": "loses"}


def speed_verdict(speeds: Mapping[str, Speed]) -> list[str]:
    """Say which recipes reach LoRA's final loss first, by the numbers that the table shows."""
    lora = speeds.get(BASELINE)
    if lora is None or len(speeds) < 2:
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
    arrived = [item for item in speeds.values() if item.all_reached]
    if not arrived:
        return [f"No recipe reaches {goal}, with every seed, {BASELINE} included."]
    names = [item.recipe for item in arrived]
    who = "All recipes" if len(arrived) == len(speeds) else f"Only {formats.listing(names)}"
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


def rate_verdict(found: Mapping[str, Robustness]) -> list[str]:
    """Say how much the recipes depend on their learning rates."""
    return [*_widths(found), *_carried(found), *_tripled(found)]


def _widths(found: Mapping[str, Robustness]) -> list[str]:
    # A range that ends with the grid may go on: it is a lower bound, and said to be one.
    swept = [item for item in found.values() if not item.single]
    if not swept:
        return []
    widest = max(swept, key=lambda item: item.width)
    if widest.width == 1:
        return ["No recipe is within 2 % of its best result at any other learning rate that was tried."]
    lora = found.get(BASELINE)
    beside = "" if lora is None or lora is widest or lora.single else f"; {BASELINE}: {_width(lora)}"
    what = f"{widest.recipe} has the widest range of learning rates within 2 % of its best result"
    return [f"{what}: {_width(widest)}{beside}."]


def _width(item: Robustness) -> str:
    if item.width == 1:
        return "the best one only"
    bound = "at least " if item.open_low or item.open_high else ""
    return f"{bound}a factor of {item.width:.3g}"


def _carried(found: Mapping[str, Robustness]) -> list[str]:
    parts = [
        f"{formats.listing(names)} {'is' if len(names) == 1 else 'are'} {how}"
        for how, wanted in (("within 2 % of the best result", True), ("worse than that", False))
        if (names := [item.recipe for item in found.values() if item.full_carries_over is wanted])
    ]
    return [f"At the best learning rate of {CEILING}, {' and '.join(parts)}."] if parts else []


def _tripled(found: Mapping[str, Robustness]) -> list[str]:
    diverged = [item.recipe for item in found.values() if item.tripled == "diverged"]
    tried = sum(item.tripled != "not tried" for item in found.values())
    if not tried:
        return []
    names = formats.listing(diverged) if diverged else "none"
    verb = "diverge" if len(diverged) > 1 else "diverges"
    return [
        f"At about 3 times the best learning rate, {names} of {formats.plural(tried, 'recipe')} tried {verb}."
    ]


def tasks_verdict(matrix: TaskMatrix) -> list[str]:
    """Say what several tasks say together."""
    return [*_against_lora(matrix), *_pairs(matrix), *_ranks(matrix)]


def _against_lora(matrix: TaskMatrix) -> list[str]:
    tested = [duel for duel in matrix.against_lora if duel.p_value is not None]
    if not tested:
        return [f"No recipe can be compared with {BASELINE}: that takes at least two seeds of both."]
    counts = {name: matrix.count_against_lora(name) for name in matrix.recipes if name != BASELINE}
    parts = [
        f"{name} {' and '.join(said)}"
        for name, count in counts.items()
        if (said := [f"{verb} {_on(count[kind])}" for kind, verb in _VERBS.items() if count[kind]])
    ]
    ties = sum(count["tie"] for count in counts.values())
    result = "; ".join(parts) if parts else "no recipe wins or loses"
    correction = f"corrected for {formats.plural(len(tested), 'comparison')} (Holm)"
    return [f"Against {BASELINE}, {correction}: {result}; {formats.plural(ties, 'tie')}."]


def _on(number: int) -> str:
    return f"on {formats.plural(number, 'task')}"


def _pairs(matrix: TaskMatrix) -> list[str]:
    tested = [duel for duel in matrix.pairs if duel.p_value is not None]
    if not tested:
        return []
    apart = sum(duel.outcome != "tie" for duel in tested)
    number = formats.plural(len(tested), "pair")
    differ = "differs" if apart == 1 else "differ"
    return [
        f"Of {number} of recipes on a task, {apart} {differ} significantly after correction for all of them."
    ]


def _ranks(matrix: TaskMatrix) -> list[str]:
    if not matrix.mean_ranks:
        return []
    listed = formats.listing(f"{name} {rank:.1f}" for name, rank in matrix.mean_ranks.items())
    return [f"Mean ranks over {formats.plural(len(matrix.tasks), 'task')}: {listed}; {_chance(matrix)}."]


def _chance(matrix: TaskMatrix) -> str:
    p = matrix.rank_p_value
    if p is None:
        few: Sequence[str] = [
            *([f"fewer than {MIN_TASKS} tasks"] if len(matrix.tasks) < MIN_TASKS else []),
            *(["fewer than 3 recipes"] if len(matrix.mean_ranks) < 3 else []),
        ]
        return f"{formats.listing(few)} cannot tell such ranks from chance"
    how = "more than chance explains" if p < ALPHA else "no more than chance explains"
    return f"they differ by {how} (Friedman, {formats.p_value(p)})"
