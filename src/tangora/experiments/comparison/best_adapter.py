"""The run whose adapter a comparison hands on: of the recommended recipe, where there is one."""

import math

from tangora.report import Recommendation, Record
from tangora.report.statistics.judgement import Judgement
from tangora.report.statistics.selection import metric_value


def by_preference(judged: Judgement, advice: Recommendation | None) -> list[Record]:
    """List the runs at the chosen learning rates, the one whose adapter to use first.

    The recommended recipe comes first, or with one seed that with the best validation metric. Those that are not
    significantly worse than the best follow, the cheapest first, then all others by test result. Of one recipe, the
    seed with the best validation metric comes first.
    """
    advised = () if advice is None else (advice.recipe, *advice.candidates)
    recipes = dict.fromkeys([*advised, *(row.recipe for row in judged.rows)])
    comparison = judged.comparison
    sign = -1 if comparison.higher_is_better else 1

    def rank(run: Record) -> float:
        value = metric_value(run, "validation", comparison.metric)
        return math.inf if value is None else sign * value

    return [run for recipe in recipes for run in sorted(judged.runs.get(recipe, []), key=rank)]
