"""Batches as users give them: what they are checked for, their loss and their weight in a mean."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

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
    if labels.is_floating_point():
        return float(len(labels))
    if labels.dim() > 1 and predicts_next_token(model):  # the first token has nothing to be predicted from
        labels = labels[..., 1:]
    return float((labels != -100).sum())


def predicts_next_token(model: nn.Module) -> bool:
    """Say whether the model's own loss compares the logits of each token with the label of the next.

    Args:
        model: The model.

    Returns:
        True for causal language models.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False  # the decoder's inputs are shifted instead
    # transformers takes this loss too where a class name (GPT2LMHeadModel) tells it nothing
    return LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss) is ForCausalLMLoss  # pyright: ignore


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


def weighted_loss(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> tuple[float, Tensor]:
    """Return the loss of a batch and its weight in the mean over batches.

    Args:
        model: The model.
        batch: What ``loss_fn`` takes, or keyword arguments of the model.
        loss_fn: The user's loss, weighted 1; default the model's own, weighted by the number of labels.

    Returns:
        Weight and scalar loss.
    """
    if loss_fn is not None:
        loss = loss_fn(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise InputError(f"loss_fn must return a tensor with one number; got {_described(loss)}")
        return 1.0, loss
    batch = on_device(batch, model)
    return num_labels(model, batch), model_loss(model, batch)


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def sum_over_ranks(*tensors: Tensor) -> None:
    """Add up tensors over all ranks in place, where ``torch.distributed`` runs.

    Args:
        *tensors: As many, of the same shapes, on every rank.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


@contextlib.contextmanager
def failing_together(device: torch.device | None = None) -> Iterator[None]:
    """Raise on all ranks what one of them raises, so that none waits for it in the next sum.

    Args:
        device: Where tensors can travel from; default the CPU.

    Raises:
        InputError: On the other ranks.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = torch.tensor(float(failure is not None), device=device)
    sum_over_ranks(failures)
    if failure is not None:
        raise failure
    if failures:
        raise InputError("another rank could not read its batches; its own message says why")


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Any], *, loss_fn: LossFn | None = None) -> float:
    """Return the mean loss over batches (of all ranks), weighted as gradients are, in evaluation mode.

    Args:
        model: The model; left as it was.
        batches: Model inputs with labels.
        loss_fn: ``loss_fn(model, batch)``; default the model's own loss.

    Returns:
        The mean; infinite if it is not a number.

    Raises:
        InputError: If there is no batch with a label.
    """
    batches = as_batches(batches)
    device = next((parameter.device for parameter in model.parameters()), None)
    with failing_together(device), still(model), preserved_randomness(batches):
        weighted = [weighted_loss(model, batch, loss_fn) for batch in batches]
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for weight, loss in weighted:
        if weight:  # where no label counts the loss is not a number
            totals += totals.new_tensor([weight, weight * float(loss)])
    sum_over_ranks(totals)
    weights, total = totals.tolist()
    if weights == 0:
        raise InputError("batches must hold at least one batch with at least one label; got none")
    return math.inf if math.isnan(total) else total / weights
