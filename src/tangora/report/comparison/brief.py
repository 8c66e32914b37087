"""The first lines of a report: which recipe, at which learning rate, its gain over LoRA, and its cost."""

from tangora.report import formats
from tangora.report.comparison.recommendation import Recommendation
from tangora.report.statistics.judgement import BASELINE, Judgement, Row

_Facts = list[tuple[str, str]]


def brief(judged: Judgement, advice: Recommendation | None) -> _Facts:
    """Answer in four facts what a reader asks first; without any result there is none."""
    if advice is None:
        return []
    rows = {row.recipe: row for row in judged.rows}
    chosen, lora = rows[advice.recipe], rows.get(BASELINE)
    gain = _gain(chosen, judged.rows) if lora is not None and lora.test is not None else None
    facts = {
        "Recipe": f"{chosen.recipe}{_reservation(advice)}",
        "Learning rate": f"{formats.learning_rate(advice.learning_rate)}{_edge(chosen)}",
        f"Gain over {BASELINE}": gain,
        "Cost": _cost(chosen, lora, timed=advice.seconds is not None),
    }
    return [(name, value) for name, value in facts.items() if value]


def _reservation(advice: Recommendation) -> str:
    if not advice.decided:
        return ", on validation data; one seed decides nothing"
    return "" if advice.swept else ", of the few learning rates tried"


def _edge(row: Row) -> str:
    return f", the {row.edge} end of its grid: try a wider one" if row.edge else ""


def _gain(chosen: Row, rows: list[Row]) -> str:
    if chosen.recipe != BASELINE:
        return _against_lora(chosen)
    better = [row for row in rows if row.side > 0]
    if not better:
        return "none: no recipe is significantly better"
    return formats.listing(f"{row.recipe} {_against_lora(row)}" for row in better)


def _against_lora(row: Row) -> str:
    if row.difference is None:
        return ""
    amount = formats.difference(row.difference)
    if row.p_value is None:
        return f"{amount}, which one seed cannot separate from noise"
    return f"{amount}, {'significant' if row.side else 'not significant'}"


def _cost(chosen: Row, lora: Row | None, *, timed: bool) -> str:
    others = lora if chosen.recipe != BASELINE else None
    parts = [
        (chosen.seconds if timed else None, others and others.seconds, formats.seconds, "per run"),
        (chosen.peak_bytes, others and others.peak_bytes, formats.size, "peak memory"),
        (
            chosen.optimizer_state_bytes,
            others and others.optimizer_state_bytes,
            formats.size,
            "optimizer state",
        ),
    ]
    told = []
    for value, baseline, write, what in parts:
        if value is not None:
            ratio = f" ({value / baseline:.2g} × {BASELINE}'s)" if baseline else ""
            told.append(f"{write(value)} {what}{ratio}")
    return ", ".join(told)
