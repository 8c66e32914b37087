r"""Products with the generalised Gauss-Newton matrix, the curvature of a loss without that of the model.

With outputs $z(\theta)$ and a loss $\ell(z)$ the Hessian is $J^\top (\nabla^2_z \ell) J + \sum_k \partial_{z_k} \ell\,
\nabla^2_\theta z_k$; the first term is the Gauss-Newton matrix. Where $\ell$ is convex it is positive semi-definite.

Source: Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.
"""

from collections.abc import Callable, Iterable
from typing import Any, Unpack

from torch import Tensor, nn

from tangora.curvature.displaced_loss import DisplacedLoss
from tangora.curvature.operators import Coordinates
from tangora.curvature.sandwich import (
    Recorder,
    Sandwich,
    SandwichOperator,
    loss_curvature_product,
    loss_with_parts,
)


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

    Example:
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
        **options: Unpack[Coordinates],
    ):
        recorder = None if loss_fn is None else Recorder(loss_fn, "outputs")
        super().__init__(DisplacedLoss.of(model, batches, loss_fn=recorder, **options))

    def _sandwich(self, batch: Any) -> Sandwich:
        weight, loss, outputs = loss_with_parts(self.evaluation, batch)
        return Sandwich(weight, outputs, lambda u: loss_curvature_product(loss, outputs, u))
