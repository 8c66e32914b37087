r"""The Hessian in LoRA's factors taken apart, $H_{(A,B)} = J^\top H_W J + \Gamma$, and the Riemannian Hessian.

$J(dA, dB) = s (B\, dA + dB\, A)$ is what a change of the factors does to the weight to first order, $G = \partial
L/\partial W$. $\Gamma$ is the form $2 s \langle G, dB\, dA\rangle$: it comes from the gradient, not from the loss's
curvature, and goes where the gradient goes. Both parts, like their sum, depend on the gauge $(B, A) \to (B R, R^{-1}
A)$; the Riemannian Hessian does not.

Everything in $G$ comes from a chart: with $W + P K + J Q$ the gradients in $K$ and $J$ at zero are $P^\top G$ and $G
Q^\top$, from one backward pass and without a matrix of the weight's size.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from tangora._checks import InputError
from tangora._types import LossFn
from tangora.curvature.adapted import AdaptedLayer
from tangora.curvature.displaced_loss import DisplacedLoss, joined
from tangora.curvature.hessian import Differentiation, Hessian
from tangora.curvature.operators import AdapterArguments, CurvatureOperator
from tangora.curvature.spaces import Bases, LowRankSpace, PulledBackSpace, TangentSpace, factor_changes


class _HessianOptions(AdapterArguments, total=False):
    """What all of these take; see `Hessian`."""

    loss_fn: LossFn | None
    differentiation: Differentiation
    cache_graph: bool | None


class WeightPart(Hessian):
    r"""$J^\top H_W J$: what the factors' Hessian takes from the curvature of the loss in the weights.

    Coordinates are those of ``Hessian(over="factors")``; `loss_at` and `gradient_at` move the weight by $J$ times the
    displacement. Arguments are those of `Hessian`, but for ``over``.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], **options: Unpack[_HessianOptions]):
        super().__init__(model, batches, over=PulledBackSpace, **options)


class CouplingPart(CurvatureOperator):
    r"""$\Gamma$: what the factors' Hessian takes from the gradient, not from curvature.

    $(dA, dB) \mapsto (s\, dB^\top G,\; s\, G\, dA^\top)$. Its eigenvalues come in pairs $\pm s\, \sigma_i(G)$, each $r$
    times for a layer's gradient $G$, whatever the factors are. At $B = 0$ it is all there is beside the block of $B$.
    A product takes one gradient. Arguments are those of `Hessian`, but for ``over`` and how it differentiates.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        loss_fn: LossFn | None = None,
        **options: Unpack[AdapterArguments],
    ):
        super().__init__(DisplacedLoss.of(model, batches, loss_fn=loss_fn, twice=False, **options))

    def _apply(self, flat: Tensor) -> Tensor:
        directions = self.space.to_leaves(flat)
        bases = {}
        for layer in self.space.layers:
            s, (A, B) = layer.pair.scaling, layer.factors(self.evaluation)
            dA, dB = factor_changes(layer, directions)
            bases[layer.name] = (
                B[:, :0] if dB is None or dA is None else s * dB,
                A[:0] if dA is None or dB is None else s * dA,
            )
        seen = _seen_of_gradient(self._displaced, self.space.layers, bases)
        parts = {}
        for layer in self.space.layers:
            for letter, slot in (("A", "K"), ("B", "J")):
                if (name := f"{layer.name}.lora_{letter}") in directions:
                    part = seen[f"{layer.name}.{slot}"]
                    shape = directions[name].shape
                    # one factor alone is not coupled to anything
                    parts[name] = part.reshape(shape) if part.numel() else torch.zeros_like(directions[name])
        return self.space.to_flat(parts)


class RiemannianHessian(Hessian):
    r"""The Hessian of the loss on the manifold of the rank-r matrices, in the coordinates of the tangent space.

    $\langle \xi, \operatorname{Hess} \xi \rangle = \langle \xi, H_W \xi \rangle + 2 \langle G, U_p S^{-1} V_p^\top
    \rangle$ for $s B A = U S V$ with orthonormal columns of $U$ and rows of $V$, $U_p = (I - U U^\top)\, \xi V^\top$
    and $V_p^\top = U^\top \xi\, (I - V^\top V)$. It is the second derivative of the loss along the metric projection $t
    \mapsto [W_0 + \operatorname{proj}_r(s B A + t \xi)]$ and along geodesics, and is the same in every gauge. At a
    minimum among all weights $G = 0$ and it is the plain restriction, ``Hessian(over="tangent")``; near small singular
    values of $B A$ the second term, in which the manifold bends by $1/\sigma_r$, dominates.

    Where the rank $r$ (at most that of a full matrix) makes every weight reachable nothing bends and the term is zero.
    A product takes one gradient more than a Hessian's. `loss_at` and `gradient_at` move straight ahead in the tangent
    space.

    Arguments are those of `Hessian`, but for ``over``; the second term is exact with ``finite_difference`` too.

    Raises:
        InputError: If a factor has not full rank, as at LoRA's initialization, $B = 0$: there is no manifold there.

    Source:
        Absil, Mahony, Trumpf (2013), An extrinsic look at the Riemannian Hessian; Vandereycken (2013),
        arXiv:1209.3834, section 2.3 (for one quadratic loss).
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], **options: Unpack[_HessianOptions]):
        super().__init__(model, batches, over="tangent", **options)
        self._check_ranks()

    def _follow_changes(self) -> None:
        super()._follow_changes()
        self._check_ranks()

    def _check_ranks(self) -> None:
        space = cast("TangentSpace", self.space)
        for layer in space.layers:
            (m, n, r), (U, V) = layer.shape, space.bases[layer.name]
            for letter, rank, full in (("B", U.shape[1], min(r, m)), ("A", V.shape[0], min(r, n))):
                if rank < full:
                    raise InputError(
                        f"the Riemannian Hessian needs factors of full rank, and lora_{letter} of {layer.name} has "
                        f'rank {rank} of {full} (B = 0 at LoRA\'s initialization): take Hessian(over="tangent") there'
                    )

    def _apply(self, flat: Tensor) -> Tensor:
        return super()._apply(flat) + self._bending(flat)

    def _bending(self, flat: Tensor) -> Tensor:
        # the form's gradient is (S^-T U_p^T G) (I - V^T V) for K and (I - U U^T) (G V_p S^-T) for J
        space = cast("TangentSpace", self.space)
        leaves, bases, bent = space.to_leaves(flat), {}, []
        for layer in space.layers:
            if layer.shape[2] >= min(layer.shape[:2]):
                continue
            (A, B), (U, V) = layer.factors(self.evaluation), space.bases[layer.name]
            S = layer.pair.scaling * (U.T @ B) @ (A @ V.T)
            K, U_p = leaves[f"{layer.name}.K"], leaves[f"{layer.name}.J"]
            V_p = K - (K @ V.T) @ V
            bases[layer.name] = torch.linalg.solve(S, U_p, left=False), torch.linalg.solve(S, V_p)
            bent.append(layer)
        seen = _seen_of_gradient(self._displaced, bent, bases) if bent else {}
        for layer in bent:
            V, K = space.bases[layer.name][1], seen[f"{layer.name}.K"]
            seen[f"{layer.name}.K"] = K - (K @ V.T) @ V
        # the isometry's adjoint takes the part of J along U away
        return space.from_leaves(joined(seen.get(name, 0 * leaf) for name, leaf in leaves.items()))


def _seen_of_gradient(
    displaced: DisplacedLoss, layers: Sequence[AdaptedLayer], bases: Bases
) -> dict[str, Tensor]:
    # P^T G under the name of each layer's K, G Q^T under that of its J
    bases = {layer.name: (bases[layer.name][0], _unpadded(layer, bases[layer.name][1])) for layer in layers}
    chart = displaced.on(LowRankSpace(displaced.evaluation, layers, bases))
    return chart.space.to_dict(chart.gradient_at(chart.zero()))


def _unpadded(layer: AdaptedLayer, Q: Tensor) -> Tensor:
    # an embedding's padding token gets no gradient, as if G had zeros in its column
    if (padding := getattr(layer.pair.base, "padding_idx", None)) is None:
        return Q
    Q = Q.clone()
    Q[:, padding] = 0
    return Q
