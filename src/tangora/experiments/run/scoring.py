"""A run's model on the validation and test examples of its task."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tangora.experiments.run.batches import encoded
from tangora.experiments.settings import RunSettings
from tangora.training.answers import answers_match, generate_completions, summarize_answers
from tangora.training.data import Example, Task
from tangora.training.metrics import evaluate, forgetting_loss, metrics_of, predictions, unrelated_texts
from tangora.training.models import LoadedModel

NUM_UNRELATED = 32
"""Texts that forgetting is measured on."""


def validation_metrics(
    loaded: LoadedModel, model: nn.Module, task: Task, settings: RunSettings, *, answers: bool = False
) -> dict[str, float]:
    """Evaluate on the examples that choose the learning rate."""
    metrics = evaluate(model, *encoded(task.validation, loaded, settings), **_how(task, settings))
    return metrics | (_answers(loaded, model, task.validation, settings)[0] if answers else {})


def test_metrics(
    loaded: LoadedModel, model: nn.Module, task: Task, settings: RunSettings
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Evaluate on the examples that are reported."""
    each = predictions(model, *encoded(task.test, loaded, settings), **_how(task, settings))
    if task.kind == "classification":
        return metrics_of(each), each | {"right": each["correct"].bool()}
    answered, right = _answers(loaded, model, task.test, settings)
    return metrics_of(each) | answered, each | right


def shares(each: dict[str, Tensor]) -> list[float]:
    """Divide a loss among the examples."""
    loss = each["loss"]
    return (loss * len(loss) / each["tokens"].sum() if "tokens" in each else loss).tolist()


def unrelated_loss(loaded: LoadedModel, model: nn.Module, task: Task, settings: RunSettings) -> float | None:
    """Evaluate on text that has nothing to do with the task."""
    if task.kind == "classification":
        return None
    return forgetting_loss(
        model,
        loaded.tokenizer,
        unrelated_texts(task.name, NUM_UNRELATED),
        max_length=settings.max_length,
        batch_size=2 * settings.batch_size,
    )


def _answers(
    loaded: LoadedModel, model: nn.Module, examples: Sequence[Example], settings: RunSettings
) -> tuple[dict[str, float], dict[str, Tensor]]:
    if not settings.exact_match or loaded.kind == "classification":
        return {}, {}
    texts = generate_completions(
        model,
        loaded.tokenizer,
        examples,
        batch_size=2 * settings.batch_size,
        chat_template=bool(settings.chat_template),
    )
    right = answers_match(texts, examples)
    return summarize_answers(texts, right), {"right": right}


def _how(task: Task, settings: RunSettings) -> dict[str, Any]:
    return {"kind": task.kind, "batch_size": 2 * settings.batch_size}
