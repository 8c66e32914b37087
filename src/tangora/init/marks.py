"""Which initialization an adapter has, remembered on its model, so that none is made twice or erases training."""

import math

from peft import PeftModel
from torch import Tensor, nn

from tangora.adapters import active_adapter, discover, unwrapped
from tangora.adapters.sharded import whole

_MARK = "_tangora_starts"


def mark_started(model: PeftModel, adapter: str, method: str) -> None:
    """Remember the initialization that an adapter has just been given, and what its factors were."""
    vars(model).setdefault(_MARK, {})[adapter] = method, _size(model, adapter)


def started_by(model: nn.Module, adapter_name: str | None = None) -> str | None:
    """Return the initialization that `initialize`, or a checkpoint of a training that began with it, gave an adapter.

    Returns:
        Name of the method; ``None`` for PEFT's own initialization, and for adapters that were loaded. The default
        adapter is the active one.
    """
    model = unwrapped(model)
    found = vars(model).get(_MARK, {}).get(adapter_name or active_adapter(model))
    return None if found is None else found[0]


def is_trained(model: nn.Module, adapter_name: str | None = None) -> bool:
    """Say whether an adapter (default the active one) was trained, or initialized in another way than by `initialize`.

    Returns:
        Whether its product is neither zero nor, judged by a norm, what it was after `initialize`.
    """
    model = unwrapped(model)
    adapter = adapter_name or active_adapter(model)
    _, known = vars(model).get(_MARK, {}).get(adapter, (None, 0.0))
    size = _size(model, adapter)
    # a move to another device rounds the sum differently
    return size != 0 and not math.isclose(size, known, rel_tol=1e-6)


def _size(model: nn.Module, adapter: str) -> float:
    # zero where one factor of every pair is, B of linear layers and A of embeddings, so that the adapter computes zero
    pairs = [pair for pair in discover(model, adapter).pairs if not pair.B.is_meta]
    return math.fsum(_squares(pair.A) * _squares(pair.B) for pair in pairs)


def _squares(factor: Tensor) -> float:
    (factor,) = whole([factor])
    return float(factor.detach().double().square().sum())
