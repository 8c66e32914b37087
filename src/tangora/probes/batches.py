"""Batches as users give them: what they are checked for, and their mean loss."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tangora._checks import InputError, shown
from tangora._types import LossFn
from tangora.adapters import unwrapped
from tangora.probes.collective import collective, failing_together, sum_over_ranks
from tangora.probes.losses import WeightedLoss
from tangora.probes.stillness import preserved_randomness, still


def as_batches(batches: Iterable[Any] | None, what: str = "batches") -> Iterable[Any]:
    """Check that batches can be run through several times.

    Args:
        batches: A list, a DataLoader, or an iterator, which is read into a list.
        what: Name of the argument, for the message.

    Returns:
        Something that can be iterated again and again, and raises `InputError` if a later pass is not the first one.

    Raises:
        InputError: If there are none, or a single batch was given instead of a list of them.
    """
    if batches is None:
        raise InputError(f"{what} must be a list of batches or a DataLoader; got None")
    if isinstance(batches, Mapping):
        raise InputError(f"{what} must be a list of batches; got a single batch: pass [batch]")
    if isinstance(batches, (str, bytes, Tensor)) or not isinstance(batches, Iterable):
        raise InputError(f"{what} must be a list of batches or a DataLoader; got {shown(batches)}")
    if isinstance(batches, (list, tuple, _Replayed)):
        return batches
    return list(batches) if isinstance(batches, Iterator) else _Replayed(batches, what)


def num_batches(batches: Any) -> int | None:
    """Count batches without reading them."""
    try:
        return len(batches)
    except (TypeError, NotImplementedError):
        return None


class _Replayed:
    """Batches that are read again and again, and must be the same each time."""

    def __init__(self, batches: Iterable[Any], what: str):
        self.batches, self._what = batches, what
        self._seen: tuple[int, float] | None = None  # number of batches, sum of all they hold

    def __len__(self) -> int:
        return len(self.batches)  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[Any]:
        count, total = 0, 0.0
        for batch in self.batches:
            count, total = count + 1, total + _sum_of(batch)
            yield batch
        seen, self._seen = self._seen, self._seen or (count, total)
        if seen is not None and not (count == seen[0] and math.isclose(total, seen[1], abs_tol=1e-12)):
            held = f"{count} batches after {seen[0]}" if count != seen[0] else "other examples"
            raise InputError(
                f"{self._what} must give the same batches in every pass, but one pass read {held}: pass "
                f"list({self._what})"
            )


def _sum_of(batch: Any) -> float:
    if isinstance(batch, Tensor):
        total = float(batch.detach().double().nan_to_num().sum()) if batch.numel() else 0.0
        return total if math.isfinite(total) else 0.0
    if isinstance(batch, Mapping):
        return math.fsum(map(_sum_of, batch.values()))
    return math.fsum(map(_sum_of, batch)) if isinstance(batch, (list, tuple)) else 0.0


@collective
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
    loss_of = WeightedLoss(unwrapped(model), loss_fn)
    device = next((parameter.device for parameter in model.parameters()), None)
    with failing_together("mean_loss", device), still(model), preserved_randomness(batches):
        weighted = [loss_of(batch) for batch in batches]
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for weight, loss in weighted:
        if weight:  # where no label counts the loss is not a number
            totals += totals.new_tensor([weight, weight * float(loss)])
    sum_over_ranks(totals)
    weights, total = totals.tolist()
    if weights == 0:
        raise InputError("batches must hold at least one batch with at least one label; got none")
    return math.inf if math.isnan(total) else total / weights
