"""The loss of a batch and its weight in the mean over batches, so that small batches add up to the big one.

What a model's loss is a mean over is guessed from its class and labels, and the guess is tried out where it matters:
when batches differ, some rows together must have the weighted mean of their losses apart. A loss that adds up in no way
(contrastive ones, matchings, sums of several means) needs batches of equal size, which all weigh 1.
"""

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from tangora._checks import InputError, check_callable
from tangora._types import LossFn
from tangora.adapters import unwrapped
from tangora.probes.collective import several_ranks
from tangora.probes.stillness import preserved_randomness

IGNORED = -100  # label of a token that counts for no loss, in torch and transformers
_TOLERANCE = {
    torch.float64: 3e-6,
    torch.float32: 3e-5,
}  # relative, of a loss on the CPU; some compute it in float32
_ROUGH, _EQUAL = 2e-2, 1e-6


class WeightedLoss:
    """Evaluates losses and weighs them: by the number of labels for a model's own loss, alike for one of the user's."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None = None):
        if loss_fn is not None:
            check_callable("loss_fn", loss_fn, "a function of model and batch")
        self.model, self.loss_fn = model, loss_fn
        self._first: tuple[Any, tuple[float, ...]] | None = None
        self._rule: int | None = None  # which of the counts has proved right; -1: none

    def __call__(self, batch: Any) -> tuple[float, Tensor]:
        """Evaluate the loss of a batch."""
        if self.loss_fn is not None:
            loss = self.loss_fn(self.model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise InputError(f"loss_fn must return a tensor with one number; got {_described(loss)}")
            return 1.0, loss
        loss = _model_loss(self.model, batch := _on_device(batch, self.model))
        return self.weight(batch), loss

    def weight(self, batch: Any) -> float:
        """Weigh a batch; the model runs only where the guess has to be tried out."""
        if self.loss_fn is not None or not isinstance(batch, Mapping):
            return 1.0
        counts = _counts(self.model, batch)
        if not counts[0]:
            return 0.0
        if self._first is None:
            self._first = batch, counts
        first_batch, first = self._first
        if counts == first and not several_ranks():
            return counts[0]
        same_size = num_rows(self.model, batch) == num_rows(self.model, first_batch)
        if self._rule is None:
            self._rule = _right_count(
                self.model, *(_on_device(each, self.model) for each in (first_batch, batch))
            )
            if self._rule < 0 and same_size:
                warnings.warn(f"{self._odd()}: those of equal size weigh alike here", stacklevel=2)
        if self._rule >= 0 and len(counts) == len(first) and first[self._rule]:
            return first[0] * counts[self._rule] / first[self._rule]  # this far all counts were alike
        if not same_size:
            raise InputError(f"{self._odd()}: make batches of equal size, or give loss_fn")
        return (
            1.0 if several_ranks() else first[0]
        )  # the weight of those before; other ranks may count otherwise

    def _odd(self) -> str:
        name = _class(self.model).__name__
        return f"the loss of {name} on a large batch is no weighted mean of its losses on small batches"


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a Hugging Face model gives for a batch with labels."""
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


def _on_device(batch: Any, model: nn.Module) -> Any:
    """Move the tensors of a batch to the device of the model's first parameter."""
    if not isinstance(batch, Mapping):
        return batch
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def predicts_next_token(model: nn.Module) -> bool:
    """Say whether the model's own loss compares the logits of each token with the label of the next."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False  # the decoder's inputs are shifted instead
    # transformers takes this loss too where a class name (GPT2LMHeadModel) tells it nothing
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss)  # pyright: ignore
    return loss is ForCausalLMLoss and _takes_loss_from_transformers(model)


def num_rows(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Count the examples of a batch."""
    main = batch.get(getattr(model, "main_input_name", "input_ids"))
    tensors = [value for value in (main, *batch.values()) if isinstance(value, Tensor) and value.dim()]
    return len(tensors[0]) if tensors else 1


def _counts(model: nn.Module, batch: Mapping[str, Any]) -> tuple[float, ...]:
    # what the loss may be a mean over, the likeliest first
    rows, labels = float(num_rows(model, batch)), batch.get("labels")
    starts, ends = batch.get("start_positions"), batch.get("end_positions")
    if isinstance(starts, Tensor) and isinstance(ends, Tensor):
        inside = {float((each < _length(batch)).sum()) for each in (starts, ends)}
        return (*inside, rows) if len(inside) == 1 else (rows,)
    if isinstance(labels, (list, tuple)):
        return (rows,)  # objects or masks, matched with predictions
    if not isinstance(labels, Tensor):
        mask = batch.get("bool_masked_pos")
        return (float(mask.sum()), rows) if isinstance(mask, Tensor) else (rows,)
    counted = float((labels != _ignored(model)).sum())
    if labels.is_floating_point() or _loss_name(model) in _PER_SEQUENCE:
        return rows, counted
    if labels.dim() < 2:
        return counted, rows
    shifted = float((labels[..., 1:] != IGNORED).sum())
    if predicts_next_token(model):
        return shifted, counted, rows
    return counted, shifted, rows


_PER_SEQUENCE = ("ForCTC", "ParakeetForRNNT", "ParakeetForTDT")


def _length(batch: Mapping[str, Any]) -> int:
    texts = (batch.get("input_ids"), batch.get("inputs_embeds"))
    return next((text.shape[1] for text in texts if isinstance(text, Tensor)), 2**62)


def _ignored(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    if _loss_name(model) != "ForSemanticSegmentation":
        return IGNORED
    return getattr(config, "semantic_loss_ignore_index", getattr(config, "loss_ignore_index", 255))


def _loss_name(model: nn.Module) -> str | None:
    return getattr(model, "loss_type", None)


def _class(model: nn.Module) -> type:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    return type(unwrapped(inner))


def _takes_loss_from_transformers(model: nn.Module) -> bool:
    return "loss_function" in inspect.unwrap(_class(model).forward).__code__.co_names  # pyright: ignore


_Batches = tuple[Mapping[str, Any], Mapping[str, Any]]
"""Two batches, whose loss together is compared with their losses apart."""


@torch.no_grad()
def _right_count(model: nn.Module, first: Mapping[str, Any], batch: Mapping[str, Any]) -> int:
    # the count by which the loss of two batches together is the mean of their losses; -1 if there is none
    larger = max(first, batch, key=lambda each: num_rows(model, each))
    trusted = _takes_loss_from_transformers(model) and _loss_name(model) not in _PER_SEQUENCE
    # where the guess is hardly wrong, two rows tell, and cost little next to the reading itself
    candidates = _parts(model, larger, 1)[-1:] if trusted else [(first, batch), *_parts(model, larger, None)]
    found = [errors for candidate in candidates if (errors := _errors(model, *candidate))]
    if not found:  # batches that can be neither joined nor split
        return 0 if trusted else -1
    worst = [max(errors) for errors in zip(*found, strict=True)]
    if min(worst) > _tolerance(model):
        return -1
    return next(index for index, error in enumerate(worst) if error <= max(10 * min(worst), _EQUAL))


def _parts(model: nn.Module, batch: Mapping[str, Any], most: int | None) -> list[_Batches]:
    # the row with the most labels and (at most so many) others; with half of its labels left out, wrong counts show
    rows, labels = num_rows(model, batch), batch.get("labels")
    singles = [_rows(batch, [row], rows) for row in range(rows)]
    counts = [0.0 if single is None else _counts(model, single)[0] for single in singles]
    fullest = counts.index(max(counts))
    rest = [r for r in range(rows) if r != fullest][:most] or [fullest]
    row, others = singles[fullest], _rows(batch, rest, rows)
    if row is None or others is None:
        return []
    candidates: list[_Batches] = [(row, others)]
    if isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point():
        if not (labels.is_cpu or _takes_loss_from_transformers(model)):
            return candidates  # a loss that knows no such label would end the process on a GPU
        masked = row["labels"].clone()
        masked[0, : masked.shape[1] // 2] = _ignored(model)
        candidates.append(({**row, "labels": masked}, others))
    return candidates


def _rows(batch: Mapping[str, Any], chosen: Sequence[int], rows: int) -> dict[str, Any] | None:
    part: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.dim() and len(value) == rows:
            part[key] = value[list(chosen)]
        elif isinstance(value, (list, tuple)) and len(value) == rows:
            part[key] = [value[row] for row in chosen]
        elif isinstance(value, Tensor) and value.dim() and len(value) != 1:
            return None
        else:
            part[key] = value
    return part


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    def both(left: Any, right: Any) -> Any:
        if isinstance(left, Tensor) and left.dim():
            return torch.cat([left, right])
        return [*left, *right] if isinstance(left, (list, tuple)) else left

    return {key: both(value, other[key]) for key, value in one.items()}


def _errors(model: nn.Module, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[float]:
    # relative, of the mean of two losses weighted by each of the counts; empty if the batches do not go together
    with preserved_randomness():
        try:
            together, first, second = (
                _model_loss(model, batch) for batch in (_joined(one, other), one, other)
            )
        except Exception:  # rows of other lengths, or a label that must not be left out
            return []
    whole, weights = float(together), [_counts(model, batch) for batch in (one, other)]
    if len(weights[0]) != len(weights[1]):
        return []
    means = [_mean((a, float(first)), (b, float(second))) for a, b in zip(*weights, strict=True)]
    errors = [abs(mean - whole) / max(abs(whole), 1e-12) for mean in means]
    return [math.inf if math.isnan(error) else error for error in errors]


def _mean(*weighted: tuple[float, float]) -> float:
    total = sum(weight for weight, _ in weighted)
    return sum(weight * value for weight, value in weighted if weight) / total if total else math.nan


def _tolerance(model: nn.Module) -> float:
    parameters = list(model.parameters())
    if not all(parameter.is_cpu for parameter in parameters):
        return _ROUGH
    return max((_TOLERANCE.get(parameter.dtype, _ROUGH) for parameter in parameters), default=_ROUGH)


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
