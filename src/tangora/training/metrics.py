"""Measures a model: loss, accuracy, perplexity and forgetting. Leaves mode, gradients and random state as found."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from tangora._checks import InputError, check_choice, check_whole
from tangora.probes.losses import IGNORED
from tangora.training.data import Encoding, collator, encode, load_task
from tangora.training.data.encoding import Collator, encodings_at, lengths_of
from tangora.training.models import KINDS, Kind
from tangora.training.ranks import dealt_alike, gathered

_NEWS = "bbc-news"
_PROBLEMS = "reasoning-gym:gsm_symbolic"


def evaluate(
    model: nn.Module,
    dataset: Sequence[Encoding],
    collate: Collator,
    *,
    kind: Kind,
    batch_size: int,
) -> dict[str, float]:
    """Measure loss and accuracy on a data set."""
    return metrics_of(predictions(model, dataset, collate, kind=kind, batch_size=batch_size))


def metrics_of(per_example: Mapping[str, Float[Tensor, " n"]]) -> dict[str, float]:
    """Reduce `predictions`, or a resample of them, to metrics of the data set."""
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
    dataset: Sequence[Encoding],
    collate: Collator,
    *,
    kind: Kind,
    batch_size: int,
) -> dict[str, Float[Tensor, " n"]]:
    """Measure each example, for intervals and paired comparisons; processes share the batches, and all get all."""
    check_choice("kind", kind, KINDS)
    if not len(dataset):
        raise InputError("dataset must hold at least one example; it is empty")
    measure = _measure_labels if kind == "classification" else _measure_tokens
    device = device_of(model)
    measured: list[tuple[list[int], dict[str, Tensor]]] = []
    with observed(model):
        for indices, counts in dealt_alike(list(length_batches(lengths_of(dataset), batch_size))):
            encodings = encodings_at(dataset, indices)
            batch = {name: value.to(device) for name, value in collate(encodings).items()}
            labels = batch.pop("labels")
            values = measure(model(**batch).logits, labels)
            if counts:
                measured.append((indices, {name: value.double().cpu() for name, value in values.items()}))
    found: dict[str, Tensor] = {}
    for indices, values in itertools.chain.from_iterable(gathered(measured)):
        for name, value in values.items():
            found.setdefault(name, torch.zeros(len(dataset), dtype=torch.float64))[indices] = value
    return found


def _measure_labels(logits: Float[Tensor, "b c"], labels: Int[Tensor, " b"]) -> dict[str, Tensor]:
    predicted = logits.argmax(-1)
    loss = cross_entropy(logits.float(), labels, reduction="none")
    return {"loss": loss, "correct": predicted == labels, "predicted": predicted}


def _measure_tokens(logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"]) -> dict[str, Tensor]:
    """Measure texts one by one: float32 logits of all may not fit into memory."""
    rows = []
    for row, target in zip(logits[:, :-1], labels[:, 1:], strict=True):
        counted = target != IGNORED
        scores, wanted = row[counted], target[counted]
        loss = cross_entropy(scores.float(), wanted, reduction="sum")
        correct = (scores.argmax(-1) == wanted).sum()
        rows.append(torch.stack([loss.double(), correct.double(), counted.sum().double()]))
    return dict(zip(("loss", "correct", "tokens"), torch.stack(rows, dim=1), strict=True))


@contextlib.contextmanager
def observed(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients; restore each module's mode and the random state."""
    # each module has its own mode: a frozen backbone may be in evaluation mode while its head trains
    modes = {module: module.training for module in model.modules()}
    device = device_of(model)
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Return where a model takes its inputs."""
    return next(model.parameters()).device


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of each batch, longest first: little padding, and what does not fit fails at once."""
    check_whole("batch_size", batch_size, low=1)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def unrelated_texts(task_name: str, count: int) -> list[str]:
    """Return texts to measure forgetting with, always the same ones.

    Articles of BBC News; where these are the task themselves, word problems of ``gsm_symbolic`` with their solutions.
    Both are what `load_task` gives as test examples with its default seed.
    """
    check_whole("count", count, low=1)
    source = _PROBLEMS if task_name == _NEWS else _NEWS
    task = load_task(source, kind="causal", num_train=1, num_validation=0, num_test=count)
    return [f"{example['prompt']}\n{example['completion']}".strip() for example in task.test]


def forgetting_loss(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | Any,
    texts: Sequence[str],
    *,
    max_length: int = 64,
    batch_size: int = 16,
) -> float | None:
    """Measure how well a model predicts texts; measured before and after training, the rise is what it forgot."""
    if not texts:
        raise InputError("texts must hold at least one text; got none")
    if model.get_output_embeddings() is None:
        return None
    data = encode(
        [{"prompt": "", "completion": text} for text in texts],
        tokenizer,
        kind="causal",
        max_length=max_length,
    )
    collate = collator(tokenizer, "causal")
    return evaluate(model, data, collate, kind="causal", batch_size=batch_size)["loss"]
