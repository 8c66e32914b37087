"""The result of a comparison in a few sentences that say no more than the data supports."""

from collections.abc import Sequence

from tangora.report import formats
from tangora.report.statistics.intervals import ALPHA
from tangora.report.statistics.summary import BASELINE, CEILING, Row, leads, trails


def verdict(rows: Sequence[Row]) -> list[str]:
    """Say in plain English what a comparison found.

    Args:
        rows: From `summarize`, best first.

    Returns:
        Two to four sentences: who is best and whether by more than noise, who else differs from LoRA, the gap
        between LoRA and full fine-tuning, and what to beware of: narrow grids, diverged and failed runs.
    """
    judged = [row for row in rows if row.test is not None]
    if judged:
        sentences = [_best(judged), _others(judged), _gap(judged), _caution(rows)]
    else:
        sentences = ["No recipe has a test result, so nothing can be compared.", _caution(rows)]
    return [sentence for sentence in sentences if sentence]


def _best(judged: Sequence[Row]) -> str:
    best, *others = judged
    measured = f"{formats.metric(best.test)} ({_certainty(best)})"
    if not others:
        return (
            f"{best.recipe} reaches a test {best.metric} of {measured}; there is no other recipe to compare."
        )
    tied = [row.recipe for row in judged if row.test == best.test]
    if len(tied) > 1:
        return f"{formats.listing(tied)} share the best test {best.metric}, {measured}."
    return f"{best.recipe} has the best test {best.metric}, {measured}{_margin(best, others)}."


def _certainty(row: Row) -> str:
    seeds = formats.plural(row.num_seeds, "seed")
    if row.interval is None:
        return f"{seeds}, no interval"
    return f"95 % interval {formats.interval(row.interval)}, {seeds}"


def _margin(best: Row, others: Sequence[Row]) -> str:
    if best.recipe == BASELINE:
        return _margin_of_baseline(others[0])
    if any(row.recipe == BASELINE for row in others):
        if best.recipe == CEILING:
            return ""  # the sentence on the gap says it
        return _margin_over_baseline(best)
    return _margin_without_baseline(best, others[0])


def _margin_over_baseline(best: Row) -> str:
    amount = formats.difference(best.difference)
    if best.p_value is None:
        return f"; whether its difference from {BASELINE}, {amount}, is more than noise cannot be told"
    noise = formats.interval(best.difference_interval, sign=True)
    if leads(best):
        return f"; its difference from {BASELINE}, {amount}, is more than noise (95 % interval {noise})"
    if best.p_value < ALPHA:
        return (
            f", but its difference from {BASELINE}, {amount} (95 % interval {noise}), is within noise once corrected "
            f"for the number of recipes ({formats.p_value(best.p_corrected)})"
        )
    return f", but its difference from {BASELINE}, {amount}, is within noise (95 % interval {noise})"


def _margin_of_baseline(second: Row) -> str:
    amount = formats.difference(second.difference)
    if second.p_value is None:
        return f"; whether it differs from the next, {second.recipe} ({amount}), by more than noise cannot be told"
    if trails(second):
        return f"; the next, {second.recipe}, is worse by more than noise ({amount})"
    return f", but the next, {second.recipe}, differs from it only within noise ({amount})"


def _margin_without_baseline(best: Row, second: Row) -> str:
    if best.interval is None or second.interval is None:
        return f"; whether it differs from the next, {second.recipe}, by more than noise cannot be told"
    if best.interval[0] <= second.interval[1] and second.interval[0] <= best.interval[1]:
        return f", but its interval overlaps that of the next, {second.recipe}"
    return f"; its interval does not overlap that of the next, {second.recipe}"


def _others(judged: Sequence[Row]) -> str | None:
    others = [row for row in judged[1:] if row.recipe != CEILING]
    better = [row.recipe for row in others if leads(row)]
    worse = [row.recipe for row in others if trails(row)]
    parts = [
        f"{formats.listing(names)} {'is' if len(names) == 1 else 'are'} {how} than {BASELINE} by more than noise"
        for names, how in ((better, "better"), (worse, "worse"))
        if names
    ]
    return f"Of the others, {'; '.join(parts)}." if parts else None


def _gap(judged: Sequence[Row]) -> str | None:
    by_name = {row.recipe: row for row in judged}
    full = by_name.get(CEILING)
    if full is None or BASELINE not in by_name:
        return None
    amount = formats.difference(full.difference)
    if full.p_value is None:
        return f"Full fine-tuning differs from {BASELINE} by {amount}; one seed cannot tell that from noise."
    noise = formats.interval(full.difference_interval, sign=True)
    if leads(full):
        return f"Full fine-tuning is better than {BASELINE} by {amount} ({noise}){_closest(judged)}."
    if trails(full):
        return f"Full fine-tuning is worse than {BASELINE} by {amount} ({noise}): there is no gap to close."
    return (
        f"Full fine-tuning differs from {BASELINE} by {amount}, which is within noise ({noise}): "
        "no share of that gap is given."
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
    concerns = [concern for concern in (_narrow_grids(rows), _trouble(rows)) if concern]
    if concerns:
        return f"Beware: {'; '.join(concerns)}."
    return "Every chosen learning rate lies inside its grid, and no run diverged or failed."


def _narrow_grids(rows: Sequence[Row]) -> str | None:
    at_edge = [f"{row.recipe} ({row.edge} end)" for row in rows if row.edge]
    single = [row.recipe for row in rows if row.num_learning_rates == 1]
    parts = []
    if at_edge:
        names = formats.listing(at_edge)
        parts.append(
            f"a wider grid may change the result of {names}, whose best learning rate lies at its edge"
        )
    if single:
        parts.append(f"only one learning rate was tried for {formats.listing(single)}")
    return "; ".join(parts) or None


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
