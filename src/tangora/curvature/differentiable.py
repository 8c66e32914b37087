"""Make a model twice differentiable for a while, and say clearly why where that cannot be."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangora._checks import InputError
from tangora.probes.stillness import preserved_randomness, still

_FUSED_ATTENTION = ("flash", "flex")
_CURE = 'differentiation="finite_difference" avoids it, or replace the operation'
_NO_DERIVATIVE = re.compile(r"derivative for (\S+) is not implemented")


@contextlib.contextmanager
def readable(model: nn.Module, batches: Any = None, *, twice: bool = True) -> Iterator[None]:
    """Hold a model so that its loss is one fixed function, and restore everything afterwards.

    Weights are frozen, dropout and caches are off, the random state is preserved. For second derivatives
    ``scaled_dot_product_attention`` runs in its mathematical form, whose kernel alone has them; the choice stays on
    during the backward passes too, where checkpointed layers run forward again. Raises `InputError` if they are wanted
    (``twice``) and the model is set to an attention kernel without.
    """
    with contextlib.ExitStack() as stack:
        if twice:
            _refuse_fused_attention(model)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(still(model))
        stack.enter_context(preserved_randomness(batches))
        stack.enter_context(torch.enable_grad())
        yield


@contextlib.contextmanager
def explained(cure: str = _CURE) -> Iterator[None]:
    """Turn what torch says about a missing second derivative into an `InputError` with a cure."""
    try:
        yield
    except RuntimeError as error:
        if found := _NO_DERIVATIVE.search(str(error)):
            raise InputError(f"{found[1]} has no second derivative: {cure}") from error
        raise


def custom_functions(loss: Tensor) -> set[str]:
    """Name the autograd functions in a loss's graph that are not torch's own: their backward passes may hide anything.

    Reentrant checkpointing, which hides the model's tensors altogether, raises `InputError`.
    """
    waiting = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(waiting)
    while waiting:
        nodes = {node for node, _ in waiting.pop().next_functions if node is not None} - seen
        seen |= nodes
        waiting.extend(nodes)
    names = {node.name().removesuffix("Backward") for node in seen if isinstance(node, BackwardCFunction)}
    if "CheckpointFunction" in names:
        raise InputError(
            "reentrant checkpointing cannot be differentiated with respect to tensors that replace the model's: "
            'enable it with gradient_checkpointing_kwargs={"use_reentrant": False}, or disable it'
        )
    return names


def refuse_functions(names: Iterable[str], discrepancy: float) -> NoReturn:
    """Raise `InputError`: products differ so much from finite differences that one of these hides a derivative."""
    raise InputError(
        f"{', '.join(sorted(names))}: a function with a custom backward pass has no second derivative, "
        f"and autograd does not detect this (the product differs by {discrepancy:.0%} from finite "
        f"differences): {_CURE}"
    )


def _refuse_fused_attention(model: nn.Module) -> None:
    for module in model.modules():
        kind = str(getattr(getattr(module, "config", None), "_attn_implementation", None) or "")
        if any(word in kind for word in _FUSED_ATTENTION):
            raise InputError(
                f"attention {kind!r} has no second derivative: model.set_attn_implementation('sdpa') or 'eager', "
                'or differentiation="finite_difference"'
            )
