"""What a record is about: model, data and settings in words."""

from collections.abc import Mapping
from typing import Any

from tangora._names import MODELS


def model_name(settings: Mapping[str, Any], described: str | None = None) -> str:
    """Name a model, and say what it is where its short name does not.

    Args:
        settings: With the key ``model``.
        described: What a record says it is; default: what is known of packaged models.

    Returns:
        For example "smollm2-135m (SmolLM2-135M-Instruct, dequantized from Q4_1)".
    """
    name = str(settings.get("model") or "")
    what = described or MODELS.get(name)
    return f"{name} ({what})" if name and what else name


def subject_facts(settings: Mapping[str, Any], described: str | None = None) -> list[tuple[str, str]]:
    """List what a measurement was made on.

    Args:
        settings: Of the measurement.
        described: What the record says the model is.

    Returns:
        Names and values, as text; what is not set is left out.
    """
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
