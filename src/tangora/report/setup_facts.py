"""Facts before any number: the compared methods, model, data and settings."""

from collections.abc import Mapping, Sequence
from typing import Any

from tangora._names import MODELS
from tangora.report.record_files import Measurement
from tangora.report.run_records import Comparison, Record

SPLITS = {"train": "training", "validation": "validation", "test": "test"}


def setup_facts(comparison: Comparison) -> list[tuple[str, str]]:
    """List what all runs of a comparison share."""
    settings, records = _settings(comparison), comparison.records
    described = next((record.model_description for record in records if record.model_description), None)
    tested = f", tested on {settings['test_data']}" if settings.get("test_data") else ""
    size, accumulate = settings.get("batch_size"), settings.get("accumulate") or 1
    seeds = {record.seed for record in records}
    facts = {
        "model": _model_name(settings, described),
        "data": f"{settings.get('data') or ''}{tested}",
        "examples": _examples(settings, records),
        "steps": _number(settings.get("steps")),
        "batch size": f"{size}{f' × {accumulate}' if accumulate != 1 else ''}" if size else "",
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
        "steps": "{} step" if facts.get("steps") == "1" else "{} steps",
        "batch size": "batch size {}",
        "rank": "rank {}",
        "alpha": "alpha {}",
        "seeds": "seeds: {}",
    }
    return " · ".join(text.format(facts[name]) for name, text in write.items() if name in facts)


def _examples(settings: Mapping[str, Any], records: Sequence[Record]) -> str:
    counts: dict[str, Any] = {name: settings.get(f"num_{name}") for name in SPLITS}
    for record in records:
        if tested := len(record.correct or record.scores or ()):
            counts["test"] = tested
        if record.num_examples:
            counts = {**counts, **record.num_examples}
            break
    return ", ".join(f"{counts[name]} {what}" for name, what in SPLITS.items() if counts.get(name))


def _settings(comparison: Comparison) -> dict[str, Any]:
    # a run's own settings know what the comparison's left to defaults
    longest = max(comparison.records, key=lambda record: len(record.history), default=None)
    own = longest.settings if longest is not None else {}
    return {**own, **{key: value for key, value in comparison.settings.items() if value is not None}}


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else ""


def subject_facts(record: Measurement) -> list[tuple[str, str]]:
    """List what a measurement was made on."""
    settings = record.settings
    facts = {
        "model": _model_name(settings, record.model_description),
        "adapter": settings.get("adapter"),
        "run": settings.get("source") if not settings.get("model") else None,
        "data": settings.get("data"),
        "examples": settings.get("num_examples"),
        "batch size": settings.get("batch_size"),
        "rank": settings.get("rank"),
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _model_name(settings: Mapping[str, Any], described: str | None = None) -> str:
    # what it is, too, where its short name does not say it
    name = str(settings.get("model") or "")
    what = described or MODELS.get(name)
    return f"{name} ({what})" if name and what else name
