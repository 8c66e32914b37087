"""Batches as users give them: what they are checked for, their loss and their weight in a mean."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tangora._checks import InputError
from tangora._types import LossFn
from tangora.probes.stillness import preserved_randomness, still


def as_batches(batches: Iterable[Any] | None, what: str = "batches") -> Iterable[Any]:
    """Check that batches can be run through several times.

    Args:
        batches: A list, a DataLoader, or an iterator, which is read into a list.
        what: Name of the argument, for the message.

    Returns:
        Something that can be iterated again and again.

    Raises:
        InputError: If there are none, or a single batch was given instead of a list of them.
    """
    if batches is None:
        raise InputError(f"{what} must be a list of batches or a DataLoader; got None")
    if isinstance(batches, Mapping):
        raise InputError(f"{what} must be a list of batches; got a single batch: put it into a list")
    return list(batches) if isinstance(batches, Iterator) else batches


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a Hugging Face model gives for a batch with labels.

    Args:
        model: The model.
        batch: Keyword arguments of its forward pass.

    Returns:
        The scalar loss.

    Raises:
        InputError: If the batch is no mapping, or the model returns no loss for it.
    """
    if not isinstance(batch, Mapping):
        raise InputError(
            f"without loss_fn a batch must be a dict of model inputs; got {type(batch).__name__}"
        )
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise InputError(
            f"the model returns no loss for a batch of {', '.join(batch)}: add labels or give loss_fn"
        )
    return loss


def num_labels(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Count the labels that a Hugging Face model's mean loss is taken over.

    Args:
        model: The model.
        batch: With ``labels``; -100 marks what is left out.

    Returns:
        Their number, at least zero; 1 for a batch without ``labels``.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        return 1.0
    if getattr(model, "loss_type", None) == "ForCausalLM":  # the first token has nothing to be predicted from
        labels = labels[..., 1:]
    return float((labels != -100).sum()) if not labels.is_floating_point() else float(len(labels))


def on_device(batch: Any, model: nn.Module) -> Any:
    """Move the tensors of a batch to the device of the model's first parameter.

    Args:
        batch: Keyword arguments; anything else is returned as it is.
        model: The model.

    Returns:
        The batch.
    """
    if not isinstance(batch, Mapping):
        return batch
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Any], *, loss_fn: LossFn | None = None) -> float:
    """Return the mean loss over batches, weighted as gradients are, in evaluation mode.

    Args:
        model: The model; left as it was.
        batches: Model inputs with labels.
        loss_fn: ``loss_fn(model, batch)``; default the model's own loss.

    Returns:
        The mean; infinite if a loss is not finite.

    Raises:
        InputError: If there is no batch.
    """
    total = weights = 0.0
    with still(model), preserved_randomness():
        for batch in batches:
            if loss_fn is not None:
                weight, loss = 1.0, loss_fn(model, batch)
            else:
                batch = on_device(batch, model)
                weight, loss = num_labels(model, batch), model_loss(model, batch)
            total, weights = total + weight * float(loss), weights + weight
    if weights == 0:
        raise InputError("held-out batches must hold at least one label; got none")
    return total / weights if total == total else float("inf")
