"""The losses of the single labels or sequences that a Hugging Face model's mean loss is taken over."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tangora._checks import InputError
from tangora.probes.losses import predicts_next_token

_IGNORED = -100


def label_losses(
    model: nn.Module, batch: Mapping[str, Any], logits: Tensor
) -> Float[Tensor, "sequences labels"]:
    """Return the loss of every label of a batch, computed from the logits as ``transformers`` does.

    Cross-entropy for whole-number labels; squared error or binary cross-entropy, averaged over a sample's outputs, for
    others.

    Args:
        model: Its config says what kind of loss it has.
        batch: With ``labels``.
        logits: What the model gave for it.

    Returns:
        One row for each sequence, NaN where no label counts (-100). A classifier has one column.

    Raises:
        InputError: If the batch has no labels.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        raise InputError("batches must have labels, or give loss_fn that returns (loss, losses)")
    labels = labels.to(logits.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.is_floating_point():
        several = (
            getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"
        )
        errors = F.binary_cross_entropy_with_logits if several else F.mse_loss
        return (
            errors(logits.view_as(labels), labels, reduction="none")
            .reshape(len(labels), -1)
            .mean(1, keepdim=True)
        )
    if labels.dim() > 1 and predicts_next_token(model):
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    losses = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=_IGNORED, reduction="none"
    )
    return losses.where(labels.reshape(-1) != _IGNORED, torch.nan).reshape(len(labels), -1)


def per_label(losses: Float[Tensor, "sequences labels"]) -> Float[Tensor, " count"]:
    """Leave out what does not count.

    Args:
        losses: From `label_losses`.

    Returns:
        The losses of all labels.
    """
    return losses[~losses.isnan()]


def per_sequence(losses: Float[Tensor, "sequences labels"]) -> Float[Tensor, " count"]:
    """Average over each sequence.

    Args:
        losses: From `label_losses`.

    Returns:
        The mean loss of every sequence with at least one label.
    """
    counted = ~losses.isnan()
    rows = counted.any(1)
    return losses.where(counted, 0.0).sum(1)[rows] / counted.sum(1)[rows]


def num_sequences(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Count the sequences of a batch that have at least one label.

    Args:
        batch: With ``labels``.
    """
    labels = batch["labels"]
    if labels.is_floating_point():
        return float(len(labels))
    if labels.dim() > 1 and predicts_next_token(model):
        labels = labels[..., 1:]
    return float((labels.reshape(len(labels), -1) != _IGNORED).any(1).sum())
