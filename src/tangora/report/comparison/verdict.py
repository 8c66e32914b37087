"""The result of a comparison in a few sentences that say no more than the data supports."""

import math
from collections.abc import Iterator, Sequence

from tangora.report import formats
from tangora.report.statistics.intervals import ALPHA
from tangora.report.statistics.judgement import BASELINE, CEILING, Row


def verdict(rows: Sequence[Row]) -> list[str]:
    """Say in plain English what a comparison found."""
    judged = [row for row in rows if row.test is not None]
    if not judged:
        return ["No recipe has a test result, so nothing can be compared.", _caution(rows)]
    return formats.sentences(_against_lora(judged), _best(judged), _gap(judged), _caution(rows))


def _against_lora(judged: Sequence[Row]) -> str | None:
    others = [row for row in judged if row.recipe not in (BASELINE, CEILING)]
    if not others or all(row.recipe != BASELINE for row in judged):
        return None
    tested = [row for row in others if row.p_value is not None]
    nearest = _amounts(_tied(others))
    if not tested:
        return (
            f"With {_unknown(others[0])} no difference from {BASELINE} can be separated from noise; the "
            "best of the others: "
            f"{nearest}."
        )
    better, worse = [row for row in tested if row.side > 0], [row for row in tested if row.side < 0]
    parts = [
        f"{_amounts(found)} {'is' if len(found) == 1 else 'are'} significantly {how} than {BASELINE}"
        for found, how in ((better, "better"), (worse, "worse"))
        if found
    ]
    # the sentence on the gap says it of full fine-tuning
    apart = any(row.recipe == CEILING and row.side != 0 for row in judged)
    none = "No recipe except full fine-tuning" if apart else "No recipe"
    if not parts and len(others) == 1:
        return f"{others[0].recipe} is not significantly different from {BASELINE} ({_distance(others[0])})."
    if not parts:
        return f"{none} is significantly different from {BASELINE}; the best of the others: {nearest}."
    if not better:
        parts.insert(0, f"{none} is significantly better than {BASELINE}")
    return f"{'; '.join(parts)}."


def _unknown(row: Row) -> str:
    # why a difference has no p-value
    return "one seed per recipe" if row.num_seeds == 1 else "so few different seeds"


def _amounts(rows: Sequence[Row]) -> str:
    return formats.listing(f"{row.recipe} ({_distance(row)})" for row in rows)


def _distance(row: Row) -> str:
    # the difference from LoRA with what is known of its noise
    amount = formats.difference(row.difference)
    if row.p_value is None:
        return amount
    noise = formats.interval(row.difference_interval, sign=True)
    corrected = f"{amount}, 95 % interval {noise}, corrected {formats.p_value(row.p_corrected)}"
    # the interval of one recipe alone may say otherwise
    lost = row.p_value < ALPHA and row.p_corrected is not None and row.p_corrected >= ALPHA
    return f"{corrected}: not significant after correction for the number of recipes" if lost else corrected


def _best(judged: Sequence[Row]) -> str:
    best, *others = judged
    if not others:
        return f"{best.recipe} reaches a test {best.metric} of {_measured(best)}; there is no other recipe to compare."
    tied = _tied(judged)
    if len(tied) > 1:
        known = {_certainty(row) for row in tied}
        each = (
            known.pop() if len(known) == 1 else "; ".join(f"{row.recipe}: {_certainty(row)}" for row in tied)
        )
        names = formats.listing(row.recipe for row in tied)
        return f"{names} share the best test {best.metric}, {formats.metric(best.test)} ({each}){_standing(tied)}."
    return f"{best.recipe} has the best test {best.metric}, {_measured(best)}{_next(best, others)}."


def _tied(rows: Sequence[Row]) -> list[Row]:
    # sums in another order differ by rounding
    best = rows[0].test
    assert best is not None
    tied = [row for row in rows if row.test is not None and math.isclose(row.test, best, abs_tol=1e-12)]
    return sorted(tied, key=lambda row: row.recipe)


def _standing(best: Sequence[Row]) -> str:
    # what the best are against LoRA, where another sentence does not say it
    told = [row for row in best if row.recipe not in (BASELINE, CEILING) and row.p_value is not None]
    if not told or any(row.recipe == BASELINE for row in best):
        return ""
    amount = formats.difference(told[0].difference)
    if all(row.side > 0 for row in told):
        return f", significantly better than {BASELINE} ({amount})"
    if any(row.side > 0 for row in told):
        return ""
    return f", not significantly different from {BASELINE} ({amount})"


def _next(best: Row, others: Sequence[Row]) -> str:
    if any(row.recipe == BASELINE for row in others):
        return _standing([best])
    second = others[0]
    if best.recipe != BASELINE:
        return _overlap(best, second)
    amount = formats.difference(second.difference)
    if second.p_value is None:
        return f"; {_unknown(second)} cannot tell whether the next, {second.recipe} ({amount}), is different"
    if second.side < 0:
        return f"; the next, {second.recipe}, is significantly worse ({amount})"
    return f"; the next, {second.recipe}, is not significantly different ({amount})"


def _overlap(best: Row, second: Row) -> str:
    if best.interval is None or second.interval is None:
        return f"; one seed cannot tell whether the next, {second.recipe}, is different"
    if best.interval[0] <= second.interval[1] and second.interval[0] <= best.interval[1]:
        return f", but its interval overlaps that of the next, {second.recipe}"
    return f"; its interval does not overlap that of the next, {second.recipe}"


def _measured(row: Row) -> str:
    return f"{formats.metric(row.test)} ({_certainty(row)})"


def _certainty(row: Row) -> str:
    seeds = formats.plural(row.num_seeds, "seed")
    if row.interval is None:
        return f"{seeds}, no interval"
    return f"95 % interval {formats.interval(row.interval)}, {seeds}"


def _gap(judged: Sequence[Row]) -> str | None:
    by_name = {row.recipe: row for row in judged}
    full = by_name.get(CEILING)
    if full is None or BASELINE not in by_name:
        return None
    amount = formats.difference(full.difference)
    if full.p_value is None:
        return (
            f"Full fine-tuning differs from {BASELINE} by {amount}; {_unknown(full)} cannot separate this "
            "from noise."
        )
    noise = f"{amount}, 95 % interval {formats.interval(full.difference_interval, sign=True)}"
    if full.side > 0:
        return f"Full fine-tuning is significantly better than {BASELINE} ({noise}){_closest(judged)}."
    if full.side < 0:
        return f"Full fine-tuning is significantly worse than {BASELINE} ({noise}): there is no gap to close."
    return (
        f"Full fine-tuning is not significantly different from {BASELINE} ({noise}), so no share of "
        "that gap is shown."
    )


def _closest(judged: Sequence[Row]) -> str:
    shares = {row: row.gap_closed for row in judged if row.recipe != CEILING and row.gap_closed is not None}
    if not shares:
        return ""
    closest = max(shares, key=lambda row: shares[row])
    if shares[closest] <= 0:
        return "; no other recipe closes any of that gap"
    noise = "" if closest.gap_closed_interval is None else f" ({formats.shares(closest.gap_closed_interval)})"
    return f"; {closest.recipe} closes {formats.share(closest.gap_closed)}{noise} of that gap"


def _caution(rows: Sequence[Row]) -> str:
    if concerns := formats.sentences(*_narrow_grids(rows), _trouble(rows)):
        return f"Note: {'; '.join(concerns)}."
    return "Every chosen learning rate is inside its grid, and no run diverged or failed."


def _narrow_grids(rows: Sequence[Row]) -> Iterator[str]:
    if at_edge := [f"{row.recipe} ({row.edge} end)" for row in rows if row.edge]:
        names = formats.listing(at_edge)
        yield f"a wider grid may change the result of {names}, whose best learning rate is at its end"
    if single := [row.recipe for row in rows if row.num_learning_rates == 1]:
        yield f"only one learning rate was tried for {formats.listing(single)}"


def _trouble(rows: Sequence[Row]) -> str | None:
    counts = {
        "diverged": {row.recipe: row.num_diverged for row in rows},
        "ran out of memory": {row.recipe: row.num_out_of_memory for row in rows},
        "failed": {row.recipe: row.num_failed - row.num_out_of_memory for row in rows},
    }
    parts = [
        f"{sum(by_recipe.values())} {what} ({formats.listing(name for name, count in by_recipe.items() if count)})"
        for what, by_recipe in counts.items()
        if any(by_recipe.values())
    ]
    total = formats.plural(sum(row.num_runs for row in rows), "run")
    return f"of {total}, {formats.listing(parts)}" if parts else None
