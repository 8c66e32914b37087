"""Measures a model: loss, accuracy, perplexity, exact answers. Leaves mode, gradients and random state as found."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tangora._checks import InputError, check_choice
from tangora.training.answers import answers_match, exact_match, final_answer, generate_completions
from tangora.training.data.text import IGNORED, Collator, EncodedDataset
from tangora.training.models import KINDS, Kind
from tangora.training.observe import Progress, device_of, length_batches, observed

__all__ = [
    "Progress",
    "answers_match",
    "evaluate",
    "exact_match",
    "final_answer",
    "generate_completions",
    "predictions",
    "summarize",
]


def evaluate(
    model: nn.Module,
    dataset: EncodedDataset,
    collate: Collator,
    *,
    kind: Kind,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Measure loss and accuracy on a data set."""
    return summarize(
        predictions(model, dataset, collate, kind=kind, batch_size=batch_size, progress=progress)
    )


def summarize(per_example: Mapping[str, Float[Tensor, " n"]]) -> dict[str, float]:
    """Condense what `predictions` returns, or a resample of it."""
    loss, correct = per_example["loss"].sum().item(), per_example["correct"].sum().item()
    if "tokens" not in per_example:
        count = len(per_example["loss"])
        return {"loss": loss / count, "accuracy": correct / count}
    tokens = per_example["tokens"].sum().item()
    if tokens == 0:
        raise InputError("dataset must hold at least one token to predict; all labels are masked")
    mean = loss / tokens
    # e^700 is about the largest number that a float holds
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "token_accuracy": correct / tokens}


def predictions(
    model: nn.Module,
    dataset: EncodedDataset,
    collate: Collator,
    *,
    kind: Kind,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, Float[Tensor, " n"]]:
    """Measure each example, for intervals and paired comparisons."""
    check_choice("kind", kind, KINDS)
    if not len(dataset):
        raise InputError("dataset must hold at least one example; it is empty")
    measure = _measure_labels if kind == "classification" else _measure_tokens
    device = device_of(model)
    found: dict[str, Tensor] = {}
    with observed(model):
        for indices in length_batches(dataset.lengths, batch_size, progress):
            batch = {name: value.to(device) for name, value in collate([dataset[i] for i in indices]).items()}
            labels = batch.pop("labels")
            for name, values in measure(model(**batch).logits, labels).items():
                target = found.setdefault(name, torch.zeros(len(dataset), dtype=torch.float64))
                target[indices] = values.double().cpu()
    return found


def _measure_labels(logits: Float[Tensor, "b c"], labels: Int[Tensor, " b"]) -> dict[str, Tensor]:
    """Return what a batch of classified texts measures."""
    predicted = logits.argmax(-1)
    loss = cross_entropy(logits.float(), labels, reduction="none")
    return {"loss": loss, "correct": predicted == labels, "predicted": predicted}


def _measure_tokens(logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"]) -> dict[str, Tensor]:
    """Return what a batch of texts measures, one by one: float32 logits of all may not fit into memory."""
    rows = []
    for row, target in zip(logits[:, :-1], labels[:, 1:], strict=True):
        counted = target != IGNORED
        scores, wanted = row[counted], target[counted]
        loss = cross_entropy(scores.float(), wanted, reduction="sum")
        correct = (scores.argmax(-1) == wanted).sum()
        rows.append(torch.stack([loss.double(), correct.double(), counted.sum().double()]))
    return dict(zip(("loss", "correct", "tokens"), torch.stack(rows, dim=1), strict=True))
