r"""Products with $J^\top M J$ for the Jacobian $J$ of a model's outputs: Gauss-Newton and Fisher matrices.

With outputs $z(\theta)$ and a loss $\ell(z)$ the Hessian is $J^\top (\nabla^2_z \ell) J + \sum_k \partial_{z_k} \ell\,
\nabla^2_\theta z_k$; the first term is the Gauss-Newton matrix. Where $\ell$ is convex it is positive semi-definite.

$J v$ comes from two backward passes, since $w \mapsto J^\top w$ is linear and $J$ is the transpose of its Jacobian.
Forward-mode differentiation costs more and is missing for some operations.

Source: Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.
"""

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from tangora._checks import InputError
from tangora.curvature.differentiable import custom_functions, explained
from tangora.curvature.displaced_loss import DisplacedLoss, joined
from tangora.curvature.evaluation import Evaluation
from tangora.curvature.operators import CurvatureOperator, HessianArguments

_CURE = "replace it with torch's own operations"
_HALF = (torch.bfloat16, torch.float16)

Middle = Callable[[Tensor], Tensor]
"""A symmetric map on tensors of the outputs' shape."""


def sandwich_product(
    outputs: Tensor,
    leaves: Sequence[Tensor],
    direction: Sequence[Tensor],
    middle: Middle,
    *,
    tolerance: float = 0.05,
) -> list[Tensor]:
    r"""Return $J^\top M J v$ for the Jacobian $J$ of outputs with respect to leaves.

    The outputs are on a graph with the leaves that is twice differentiable, and is used up; leaves that they do not
    depend on get zeros. Raises `InputError` if $\langle w, J v \rangle$ and $\langle J^\top w, v \rangle$ differ for a
    random $w$ by more than ``tolerance`` of the larger one: some function's own backward pass is not differentiable.
    """
    if not outputs.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    # J^T is linear, so any dual would do; a random one lets <w, J v> = <J^T w, v> be checked for nothing
    dual = _random_like(outputs).requires_grad_()
    pulled = torch.autograd.grad(outputs, leaves, dual, create_graph=True, materialize_grads=True)
    directions = [v.to(slot) for slot, v in zip(pulled, direction, strict=True)]
    used = [(slot, v) for slot, v in zip(pulled, directions, strict=True) if slot.requires_grad]
    pushed = torch.zeros_like(outputs)
    if used:
        (pushed,) = torch.autograd.grad(
            [slot for slot, _ in used], dual, [v for _, v in used], materialize_grads=True
        )
    if tolerance < math.inf:
        _check_adjoint(dual, pushed, pulled, directions, tolerance, custom_functions(outputs))
    return list(torch.autograd.grad(outputs, leaves, middle(pushed), materialize_grads=True))


def _random_like(tensor: Tensor) -> Tensor:
    generator = torch.Generator(tensor.device).manual_seed(0)
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=tensor.device)


def _check_adjoint(
    dual: Tensor,
    pushed: Tensor,
    pulled: Sequence[Tensor],
    direction: Sequence[Tensor],
    tolerance: float,
    names: Iterable[str],
) -> None:
    forward = _inner([dual], [pushed])
    backward = _inner(pulled, direction)
    # where both are small against what they are made of they are known to rounding only
    sizes = (_inner(pulled, pulled) * _inner(direction, direction)) ** 0.5
    rounding = 100 * torch.finfo(dual.dtype).eps * sizes
    if abs(forward - backward) > tolerance * max(abs(forward), abs(backward)) + rounding:
        raise InputError(
            f"{', '.join(sorted(names)) or 'a function'} in the computation of the outputs has a "
            "backward pass that autograd "
            f"cannot differentiate (<w, J v> = {forward:.3g} but <J^T w, v> = {backward:.3g}): {_CURE}"
        )


def _inner(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    pairs = zip(ones, others, strict=True)
    return sum(float((one.detach() * other.detach()).sum(dtype=torch.float64)) for one, other in pairs)


def loss_curvature_product(loss: Tensor, outputs: Tensor, direction: Tensor) -> Tensor:
    r"""Return $\nabla^2_z \ell\; u$, the Hessian of a loss in the outputs it is made of, by double backward.

    Cross-entropy over $N$ labels gives $(p \circ u - p\, p^\top u)/N$ for each label, mean squared error $2u/N$. Raises
    `InputError` if the loss was not computed from that very tensor, or by a function whose own backward pass hides its
    curvature.
    """
    slope = None
    if loss.requires_grad and outputs.requires_grad:
        (slope,) = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)
    if slope is None:
        raise InputError(
            "the loss does not depend on the outputs: loss_fn must return the tensor from which the "
            "loss is computed"
        )
    if hidden := custom_functions(loss) - custom_functions(outputs):
        raise InputError(
            f"the loss uses {', '.join(sorted(hidden))}, whose backward pass has no second derivative: "
            "use torch's own loss"
        )
    if not slope.requires_grad:  # linear in the outputs
        return torch.zeros_like(direction)
    (product,) = torch.autograd.grad(slope, outputs, direction, retain_graph=True, materialize_grads=True)
    return product


@dataclass(frozen=True)
class Sandwich:
    r"""Contribution of one batch, $J^\top M J$ with the Jacobian $J$ of its outputs, and its weight."""

    weight: float
    outputs: Tensor
    middle: Middle


class SandwichOperator(CurvatureOperator):
    r"""A weighted mean over batches of $J^\top M J$."""

    @abstractmethod
    def _sandwich(self, batch: Any) -> Sandwich:
        """Run the model on a batch; the model is held still and displaced."""

    def _tolerance(self) -> float:
        # torch's own operations need no check, and in half precision would hardly pass one
        if not self.evaluation.custom_functions:
            return math.inf
        half = any(parameter.dtype in _HALF for parameter in self.model.parameters())
        return 0.5 if half and self.evaluation.cast_to is None else 0.05

    def _apply(self, flat: Tensor) -> Tensor:
        directions = list(self.space.to_leaves(flat).values())
        size = sum(direction.numel() for direction in directions)

        def product_of(batch: Any) -> tuple[float, Tensor]:
            leaves = self.space.leaves()

            def multiplied() -> tuple[float, Tensor]:
                it = self._sandwich(batch)
                if not it.weight:
                    return 0.0, flat.new_zeros(size)
                with explained(_CURE):
                    return it.weight, joined(
                        sandwich_product(
                            it.outputs,
                            list(leaves.values()),
                            directions,
                            it.middle,
                            tolerance=self._tolerance(),
                        )
                    )

            return self._displaced.within(leaves, multiplied)

        return self.space.from_leaves(self._displaced.average(product_of, size))


class Recorder:
    """A ``loss_fn(model, batch)`` -> (loss, what it is made of) as a plain loss that remembers the second."""

    def __init__(self, loss_fn: Callable[[Any, Any], Any], what: str):
        self.loss_fn, self.what = loss_fn, what
        self.seen: list[Tensor] | None = None  # kept only while someone asks: it holds a graph

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """Evaluate the loss and remember what it is made of, or raise `InputError` if there is no second tensor."""
        returned = self.loss_fn(model, batch)
        fits = isinstance(returned, tuple) and len(returned) == 2
        if not (fits and all(isinstance(part, Tensor) for part in returned)):
            raise InputError(
                f"loss_fn must return (loss, {self.what}), both tensors; got {type(returned).__name__}"
            )
        if self.seen is not None:
            self.seen.append(returned[1])
        return returned[0]


def loss_with_parts(evaluation: Evaluation, batch: Any) -> tuple[float, Tensor, Tensor]:
    """Return weight and loss of a batch, and what a `Recorder` says it is made of, or else the model's logits."""
    recorder = evaluation.loss_fn
    if recorder is not None and not isinstance(recorder, Recorder):
        raise InputError(
            "the loss_fn of a space made for another operator returns only the loss: pass over=... by name"
        )
    seen: list[Any] = []
    with contextlib.ExitStack() as stack:
        if recorder is None:
            hook = evaluation.model.register_forward_hook(lambda _, __, output: seen.append(output))
            stack.callback(hook.remove)
        else:
            recorder.seen = seen
            stack.callback(setattr, recorder, "seen", None)
        weight, loss = evaluation.loss(batch)
    first = seen[0]  # a check of the first batch may have run it twice
    parts = first if recorder is not None else getattr(first, "logits", None)
    if not isinstance(parts, Tensor):
        raise InputError("the model returns no logits: pass a loss_fn that returns (loss, outputs)")
    return weight, loss, parts


class GaussNewton(SandwichOperator):
    r"""The Gauss-Newton matrix $J^\top (\nabla^2_z \ell)\, J$ of the mean loss, $J = \partial z/\partial\theta$.

    $z$ are the logits of a Hugging Face model, and the loss is its own: cross-entropy, squared error and binary
    cross-entropy are convex in the logits, so that no eigenvalue is negative. For cross-entropy it is the Fisher matrix
    of the model's predictions, $\sum_c p_c\, \partial \log p_c\, \partial \log p_c^\top$ averaged over the labels'
    places; the labels themselves do not matter. What the loss adds beside the logits (a router's, a penalty on weights)
    has no part in it.

    In factors it is $J_{BA}^\top\, \mathrm{GN}_W\, J_{BA}$ with $J_{BA}(dA, dB) = s (dB\, A + B\, dA)$: unlike the
    Hessian's it has no coupling term, and at $B = 0$ its $A$ block vanishes.

    A product takes one forward and three backward passes. It holds a few tensors as large as a batch's logits at a
    time, and only one batch's: with a large vocabulary pass batches of few sequences.

    Args:
        model: See `tangora.curvature.Hessian`, as for everything not listed here.
        batches: As there.
        loss_fn: ``loss_fn(model, batch)`` -> (loss, outputs), where the loss is computed from that very tensor;
            batches weigh alike. Default the model's own loss and logits.

    Raises:
        InputError: If the model or the batches allow no curvature, or there are no outputs that the loss is made of.

    Examples:
        >>> import torch
        >>> def loss_fn(model, batch):
        ...     outputs = model(batch)
        ...     return outputs.square().mean(), outputs
        >>> model = torch.nn.Linear(4, 3, bias=False)
        >>> matrix = GaussNewton(model, [torch.randn(5, 4)], over="weights", loss_fn=loss_fn)
        >>> product = matrix.matvec(torch.ones(12))
        >>> bool(product @ torch.ones(12) >= 0)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        loss_fn: Callable[[Any, Any], tuple[Tensor, Tensor]] | None = None,
        **options: Unpack[HessianArguments],
    ):
        recorder = None if loss_fn is None else Recorder(loss_fn, "outputs")
        super().__init__(DisplacedLoss.of(model, batches, loss_fn=recorder, **options))

    def _sandwich(self, batch: Any) -> Sandwich:
        weight, loss, outputs = loss_with_parts(self.evaluation, batch)
        return Sandwich(weight, outputs, lambda u: loss_curvature_product(loss, outputs, u))
