"""What was compared, on what, and whether the machine was free: what a reader must know before any number."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from tangora.report import formats
from tangora.report.layout import model_name
from tangora.report.run_records import Comparison, Record
from tangora.report.statistics.judgement import Row, runs_behind

_UNEQUAL = 2.0  # ratio of the longest to the median run that other work on the machine is a likely cause of
_SPLITS = {"train": "training", "validation": "validation", "test": "test"}


def setup_facts(comparison: Comparison) -> list[tuple[str, str]]:
    """List what all runs of a comparison share."""
    settings = _settings(comparison)
    seeds = {record.seed for record in comparison.records}
    facts = {
        "model": model_name(settings, _described(comparison.records)),
        "data": _data(settings),
        "examples": _examples(comparison),
        "steps": _number(settings.get("steps")),
        "batch size": _batch(settings),
        "rank": _number(settings.get("rank")),
        "alpha": _number(settings.get("alpha")),
        "seeds": str(len(seeds)) if seeds else "",
    }
    return [(name, value) for name, value in facts.items() if value]


def setup_line(comparison: Comparison) -> str:
    """Say in one line what all runs share but for model and data, which the title names."""
    facts = dict(setup_facts(comparison))
    write = {
        "examples": "{} examples",
        "steps": "{} steps",
        "batch size": "batch size {}",
        "rank": "rank {}",
        "alpha": "alpha {}",
        "seeds": "seeds: {}",
    }
    return " · ".join(text.format(facts[name]) for name, text in write.items() if name in facts)


def _examples(comparison: Comparison) -> str:
    settings = _settings(comparison)
    counts: dict[str, Any] = {name: settings.get(f"num_{name}") for name in _SPLITS}
    for record in comparison.records:
        if tested := len(record.correct or record.scores or ()):
            counts["test"] = tested
        if record.num_examples:
            counts = {**counts, **record.num_examples}
            break
    return ", ".join(f"{counts[name]} {what}" for name, what in _SPLITS.items() if counts.get(name))


def _settings(comparison: Comparison) -> dict[str, Any]:
    # a run's own settings know what the comparison's left to defaults
    longest = max(comparison.records, key=lambda record: len(record.history), default=None)
    own = longest.settings if longest is not None else {}
    return {**own, **{key: value for key, value in comparison.settings.items() if value is not None}}


def _described(records: Sequence[Record]) -> str | None:
    return next((record.model_description for record in records if record.model_description), None)


def _data(settings: Mapping[str, Any]) -> str:
    test = settings.get("test_data")
    return f"{settings.get('data') or ''}{f', tested on {test}' if test else ''}"


def _batch(settings: Mapping[str, Any]) -> str:
    size, accumulate = settings.get("batch_size"), settings.get("accumulate") or 1
    return f"{size}{f' × {accumulate}' if accumulate != 1 else ''}" if size else ""


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else ""


def busy_sentences(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    """Warn where times may be too long because something else used the machine."""
    judged = runs_behind(comparison, rows)
    return [*_loaded([run for runs in judged.values() for run in runs]), *_unequal(judged)]


def _loaded(runs: Sequence[Record]) -> list[str]:
    busy = [run.load for run in runs if run.load is not None and run.load.busy]
    if not busy:
        return []
    worst = max(busy, key=lambda load: max(load.before, load.after) / load.processors)
    return [
        (
            f"The machine was busy during {len(busy)} of {formats.plural(len(runs), 'run')} behind the results (load "
            f"average up to {max(worst.before, worst.after):.1f} on {formats.plural(worst.processors, 'processor')}): "
            "times are too long, and not comparable between recipes."
        )
    ]


def _unequal(judged: Mapping[str, Sequence[Record]]) -> list[str]:
    # records of older versions do not know the load
    parts = []
    for recipe, runs in judged.items():
        seconds = [run.time.total for run in runs]
        if len(seconds) > 1 and max(seconds) > _UNEQUAL * max(median(seconds), min(seconds)):
            parts.append(f"{recipe} ({formats.seconds(min(seconds))} to {formats.seconds(max(seconds))})")
    if not parts:
        return []
    return [
        (
            f"Equal runs of {formats.listing(parts)} took very different times: the machine was probably busy with "
            "other work, so compare times with care."
        )
    ]
