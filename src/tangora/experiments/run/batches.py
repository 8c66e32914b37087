"""Examples of a task as model inputs."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tangora.experiments.settings import TaskSettings
from tangora.training.data import Encoding, collator, encode
from tangora.training.models import LoadedModel


def encoded(
    examples: Sequence[Any], loaded: LoadedModel, settings: TaskSettings
) -> tuple[list[Encoding], Any]:
    """Encode examples."""
    data = encode(
        examples,
        loaded.tokenizer,
        kind=loaded.kind,
        max_length=settings.max_length,
        chat_template=bool(settings.chat_template),
    )
    return data, collator(loaded.tokenizer, loaded.kind)


def encoded_batches(
    examples: Sequence[Any], loaded: LoadedModel, settings: TaskSettings
) -> list[dict[str, Tensor]]:
    """Make padded batches of examples."""
    data, collate = encoded(examples, loaded, settings)
    size = settings.batch_size
    return [
        dict(collate([data[index] for index in range(first, min(first + size, len(data)))]))
        for first in range(0, len(data), size)
    ]
