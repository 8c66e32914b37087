"""What a comparison says beyond its result, in sentences: speed, learning rates, several tasks."""

from collections.abc import Mapping, Sequence

from tangora.report import formats
from tangora.report.statistics.intervals import ALPHA
from tangora.report.statistics.robustness import Robustness
from tangora.report.statistics.speed import Speed
from tangora.report.statistics.summary import BASELINE, CEILING
from tangora.report.statistics.tasks import MIN_TASKS, Outcome, TaskMatrix

_VERBS: dict[Outcome, str] = {"win": "wins", "loss": "loses"}


def speed_verdict(speeds: Mapping[str, Speed]) -> list[str]:
    """Say who trains as far as LoRA first.

    Args:
        speeds: From `speed.speeds`.

    Returns:
        One sentence; none where LoRA has no final loss to reach, or there is nothing to compare with it.
    """
    lora = speeds.get(BASELINE)
    others = [speed for speed in speeds.values() if speed.recipe != BASELINE]
    if lora is None or not others:
        return []
    goal = f"{BASELINE}'s final {lora.quality} ({formats.metric(lora.target)})"
    steps = {s.recipe: s.steps for s in others if s.num_reached == s.num_seeds and s.steps is not None}
    seconds = {s.recipe: s.seconds for s in others if s.recipe in steps and s.seconds is not None}
    if not steps:
        return [f"No other recipe reaches {goal} with every seed."]
    by_steps, by_seconds = (
        min(steps, key=lambda name: steps[name]),
        min(seconds, key=lambda name: seconds[name]),
    )
    counted = f"{by_steps} needs the fewest steps to reach {goal}, {steps[by_steps]:.0f} on average"
    timed = f"{by_seconds} the least time, {formats.seconds(seconds[by_seconds])}"
    own = (
        ""
        if lora.steps is None
        else (f"; {BASELINE} itself took {lora.steps:.0f} steps and {formats.seconds(lora.seconds)}")
    )
    return [f"{counted}, and {timed}{own}."]


def rate_verdict(found: Mapping[str, Robustness]) -> list[str]:
    """Say how much the recipes depend on their learning rates.

    Args:
        found: From `robustness.robustness`.

    Returns:
        Up to three sentences: the widest range of good learning rates, where full fine-tuning's carries over, and
        what diverges at 3 times its best.
    """
    return [*_widths(found), *_carried(found), *_tripled(found)]


def _widths(found: Mapping[str, Robustness]) -> list[str]:
    # A range that ends with the grid may go on: it is a lower bound, and said to be one.
    swept = [item for item in found.values() if not (item.open_low and item.open_high and item.width == 1)]
    if not swept:
        return []
    widest = max(swept, key=lambda item: item.width)
    if widest.width == 1:
        return ["No recipe is within 2 % of its best at any other learning rate that was tried."]
    lora = found.get(BASELINE)
    beside = "" if lora is None or lora is widest else f"; {BASELINE}'s spans {_width(lora)}"
    range_of = f"{widest.recipe} has the widest range of learning rates within 2 % of its best"
    return [f"{range_of}: it spans {_width(widest)}{beside}."]


def _width(item: Robustness) -> str:
    bound = "at least " if item.open_low or item.open_high else ""
    return f"{bound}a factor of {item.width:.3g}"


def _carried(found: Mapping[str, Robustness]) -> list[str]:
    parts = [
        f"{how} {formats.listing(names)}"
        for how, wanted in (("carries over to", True), ("does not carry over to", False))
        if (names := [item.recipe for item in found.values() if item.full_carries_over is wanted])
    ]
    return [f"The best learning rate of {CEILING} {' and '.join(parts)}."] if parts else []


def _tripled(found: Mapping[str, Robustness]) -> list[str]:
    diverged = [item.recipe for item in found.values() if item.tripled == "diverged"]
    tried = sum(item.tripled != "not tried" for item in found.values())
    if not tried:
        return []
    names = formats.listing(diverged) if diverged else "none"
    return [
        f"At about 3 times its best learning rate, {names} of {formats.plural(tried, 'recipe')} tried diverges."
    ]


def tasks_verdict(matrix: TaskMatrix) -> list[str]:
    """Say what several tasks say together.

    Args:
        matrix: From `tasks.matrix`.

    Returns:
        Up to three sentences: wins and losses against LoRA, all pairs, mean ranks.
    """
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
    return [
        f"Of {number} of recipes on a task, {apart} differ by more than noise when corrected for all of them."
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
