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
_CURE = 'differentiation="finite_difference" does without, or replace the operation'
_NO_DERIVATIVE = re.compile(r"derivative for (\S+) is not implemented")


@contextlib.contextmanager
def readable(model: nn.Module, batches: Any = None, *, twice: bool = True) -> Iterator[None]:
    """Hold a model so that its loss is one fixed function, and restore everything afterwards.

    Weights are frozen, dropout and caches are off, the random state is preserved. For second derivatives
    ``scaled_dot_product_attention`` runs in its mathematical form, whose kernel alone has them; the choice stays on
    during the backward passes too, where checkpointed layers run forward again.

    Args:
        batches: A DataLoader, whose own random state is preserved too.
        twice: Whether second derivatives are wanted.

    Raises:
        InputError: If ``twice`` and the model is set to an attention kernel without second derivative.
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
    """Turn what torch says about a missing second derivative into one sentence with a cure.

    Args:
        cure: What the user can do.

    Raises:
        InputError: In place of torch's error; other errors pass unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        if found := _NO_DERIVATIVE.search(str(error)):
            raise InputError(f"{found[1]} has no second derivative: {cure}") from error
        raise


def custom_functions(loss: Tensor) -> set[str]:
    """Find the autograd functions in a graph that are not torch's own: their backward passes may hide anything.

    Args:
        loss: Where the graph starts.

    Returns:
        Names of the classes.

    Raises:
        InputError: If one of them is reentrant checkpointing, which hides the model's tensors altogether.
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
            "reentrant checkpointing cannot be differentiated with respect to tensors that stand in for the model's: "
            'enable it with gradient_checkpointing_kwargs={"use_reentrant": False}, or disable it'
        )
    return names


def refuse_functions(names: Iterable[str], discrepancy: float) -> NoReturn:
    """Say that a backward pass of someone's own is not differentiable.

    Args:
        names: Functions in the graph.
        discrepancy: Relative difference of a product from finite differences.

    Raises:
        InputError: Always.
    """
    raise InputError(
        f"{', '.join(sorted(names))}: a function with a backward pass of its own has no second derivative, and "
        f"autograd does not notice (the product is off by {discrepancy:.0%} from finite differences): {_CURE}"
    )


def _refuse_fused_attention(model: nn.Module) -> None:
    for module in model.modules():
        kind = str(getattr(getattr(module, "config", None), "_attn_implementation", None) or "")
        if any(word in kind for word in _FUSED_ATTENTION):
            raise InputError(
                f"attention {kind!r} has no second derivative: model.set_attn_implementation('sdpa') or 'eager', "
                'or differentiation="finite_difference"'
            )
