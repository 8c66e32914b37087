"""What a record is about: model, data and settings in words."""

from collections.abc import Mapping
from typing import Any

from tangora._names import MODELS


def model_name(settings: Mapping[str, Any], described: str | None = None) -> str:
    """Name a model, and say what it is where its short name does not."""
    name = str(settings.get("model") or "")
    what = described or MODELS.get(name)
    return f"{name} ({what})" if name and what else name


def subject_facts(settings: Mapping[str, Any], described: str | None = None) -> list[tuple[str, str]]:
    """List what a measurement was made on."""
    facts = {
        "model": model_name(settings, described),
        "adapter": settings.get("adapter"),
        "run": settings.get("source") if not settings.get("model") else None,
        "data": settings.get("data"),
        "examples": settings.get("num_examples"),
        "batch size": settings.get("batch_size"),
        "rank": settings.get("rank"),
    }
    return [(name, str(value)) for name, value in facts.items() if value]
