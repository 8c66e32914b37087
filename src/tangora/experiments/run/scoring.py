"""A run's model on the validation and test examples of its task."""

from collections.abc import Sequence

from torch import Tensor, nn

from tangora.experiments.run.preparing import Run
from tangora.training.answers import answers_match, generate_completions, summarize_answers
from tangora.training.data import Example
from tangora.training.metrics import evaluate, forgetting_loss, metrics_of, predictions, unrelated_texts

NUM_UNRELATED = 32
"""Texts that forgetting is measured on."""


def metrics_on(run: Run, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
    """Evaluate on some examples."""
    return evaluate(model, *run.encoded(examples), kind=run.task.kind, batch_size=_batch_size(run))


def validation_metrics(run: Run, model: nn.Module, *, answers: bool = False) -> dict[str, float]:
    """Evaluate on the examples that choose the learning rate."""
    examples = run.task.validation
    metrics = metrics_on(run, model, examples)
    return metrics | (_answers(run, model, examples)[0] if answers else {})


def test_metrics(run: Run, model: nn.Module) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Evaluate on the examples that are reported: the mean metrics, and each example's values."""
    examples = run.task.test
    each = predictions(model, *run.encoded(examples), kind=run.task.kind, batch_size=_batch_size(run))
    if run.task.kind == "classification":
        return metrics_of(each), each | {"right": each["correct"].bool()}
    answered, right = _answers(run, model, examples)
    return metrics_of(each) | answered, each | right


def example_losses(each: dict[str, Tensor]) -> list[float]:
    """Divide a loss among the examples."""
    loss = each["loss"]
    return (loss * len(loss) / each["tokens"].sum() if "tokens" in each else loss).tolist()


def unrelated_loss(run: Run, model: nn.Module) -> float | None:
    """Evaluate on text that has nothing to do with the task."""
    return forgetting_loss(
        model,
        run.loaded.tokenizer,
        unrelated_texts(run.task.name, NUM_UNRELATED),
        max_length=run.settings.max_length,
        batch_size=_batch_size(run),
    )


def _answers(
    run: Run, model: nn.Module, examples: Sequence[Example]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    if not run.settings.exact_match or run.loaded.kind == "classification":
        return {}, {}
    texts = generate_completions(
        model,
        run.loaded.tokenizer,
        examples,
        max_new_tokens=run.settings.max_new_tokens,
        stop=run.settings.stop or (),
        batch_size=_batch_size(run),
        chat_template=bool(run.settings.chat_template),
    )
    right = answers_match(texts, examples)
    return summarize_answers(texts, right), {"right": right}


def _batch_size(run: Run) -> int:
    return 2 * run.settings.batch_size  # no gradients are kept
