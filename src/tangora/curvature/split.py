r"""The Hessian in LoRA's factors taken apart, $H_{(A,B)} = J^\top H_W J + \Gamma$, and the Riemannian Hessian.

$J(dA, dB) = s (B\, dA + dB\, A)$ is what a change of the factors does to the weight to first order, $G = \partial
L/\partial W$. $\Gamma$ is the form $2 s \langle G, dB\, dA\rangle$: it comes from the gradient, not from the loss's
curvature, and goes where the gradient goes. Both parts, like their sum, depend on the gauge $(B, A) \to (B R, R^{-1}
A)$; the Riemannian Hessian does not.

Everything in $G$ comes from a chart: with $W + P K + J Q$ the gradients in $K$ and $J$ at zero are $P^\top G$ and $G
Q^\top$, from one backward pass and without a matrix of the weight's size.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tangora._checks import InputError
from tangora._types import LossFn
from tangora.adapters.pair import as_matrix
from tangora.curvature.adapted import AdaptedLayer, adapted_layers
from tangora.curvature.evaluation import Evaluation
from tangora.curvature.hessian import Differentiation, Hessian
from tangora.curvature.low_rank_space import LowRankSpace, TangentSpace
from tangora.curvature.operators import CurvatureOperator, joined
from tangora.curvature.spaces import FactorSpace, Leaves

Bases = Mapping[str, tuple[Tensor, Tensor]]


class PulledBackSpace(FactorSpace):
    r"""Changes of the factors as the weight takes them to first order: $(dA, dB)$ stands for $s (B\, dA + dB\, A)$.

    Coordinates as in `FactorSpace`. The Hessian over it is $J^\top H_W J$, positive semi-definite where $H_W$ is.
    """

    def overrides(self, leaves: Leaves) -> dict[str, Tensor]:
        """Lengthen the factors."""
        overrides: dict[str, Tensor] = {}
        for layer in self.layers:
            s, (A, B) = layer.pair.scaling, layer.factors(self.evaluation)
            dA, dB = _changes(layer, leaves)
            nothing = B[:, :0], A[:0]
            left = nothing if dA is None else (s * B, dA)
            right = nothing if dB is None else (dB, s * A)
            overrides |= layer.displaced(left, right, self.evaluation)
        return overrides

    def restricted(self, layers: Sequence[str]) -> "PulledBackSpace":
        """Return the space of some layers' factors."""
        return PulledBackSpace(self.evaluation, [x for x in self.layers if x.name in layers], self.factors)


class WeightPart(Hessian):
    r"""$J^\top H_W J$: what the factors' Hessian takes from the curvature of the loss in the weights.

    Coordinates are those of ``Hessian(over="factors")``; `loss_at` and `gradient_at` move the weight by $J$ times the
    displacement.

    Args:
        model: See `Hessian`, as for everything not listed here.
        batches: As for `Hessian`.
        loss_fn: As for `Hessian`.
        layers: As for `Hessian`.
        adapter_name: As for `Hessian`.
        dtype: As for `Hessian`.
        differentiation: As for `Hessian`.
        cache_graph: As for `Hessian`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        loss_fn: LossFn | None = None,
        layers: Iterable[str] | None = None,
        adapter_name: str | None = None,
        dtype: torch.dtype | None = None,
        differentiation: Differentiation = "exact",
        cache_graph: bool | None = None,
    ):
        twice = differentiation == "exact"
        evaluation = Evaluation(model, loss_fn=loss_fn, dtype=dtype, twice=twice)
        found = adapted_layers(evaluation, adapter_name=adapter_name, layers=layers)
        super().__init__(
            model,
            batches,
            over=PulledBackSpace(evaluation, found),
            differentiation=differentiation,
            cache_graph=cache_graph,
        )


class CouplingPart(CurvatureOperator):
    r"""$\Gamma$: what the factors' Hessian takes from the gradient, not from curvature.

    $(dA, dB) \mapsto (s\, dB^\top G,\; s\, G\, dA^\top)$. Its eigenvalues come in pairs $\pm s\, \sigma_i(G)$, each $r$
    times for a layer's gradient $G$, whatever the factors are. At $B = 0$ it is all there is beside the block of $B$.
    A product takes one gradient.

    Args:
        model: See `CurvatureOperator`, as for everything not listed here.
    """

    _twice = False
    space: FactorSpace

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        loss_fn: LossFn | None = None,
        layers: Iterable[str] | None = None,
        adapter_name: str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            model, batches, loss_fn=loss_fn, layers=layers, adapter_name=adapter_name, dtype=dtype
        )

    def _apply(self, flat: Tensor) -> Tensor:
        directions = self.space.to_leaves(flat)
        bases = {}
        for layer in self.space.layers:
            s, (A, B) = layer.pair.scaling, layer.factors(self.evaluation)
            dA, dB = _changes(layer, directions)
            bases[layer.name] = (
                B[:, :0] if dB is None or dA is None else s * dB,
                A[:0] if dA is None or dB is None else s * dA,
            )
        seen = _seen_of_gradient(self, self.space.layers, bases)
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

    Args:
        model: See `Hessian`, as for everything not listed here.
        batches: As for `Hessian`.
        loss_fn: As for `Hessian`.
        layers: As for `Hessian`.
        adapter_name: As for `Hessian`.
        dtype: As for `Hessian`.
        differentiation: As for `Hessian`; the second term is exact in any case.
        cache_graph: As for `Hessian`.

    Raises:
        InputError: If a factor has not full rank, as at LoRA's start, $B = 0$: there is no manifold there.

    Source:
        Absil, Mahony, Trumpf (2013), An extrinsic look at the Riemannian Hessian; Vandereycken (2013),
        arXiv:1209.3834, section 2.3 (for one quadratic loss).
    """

    space: TangentSpace

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        loss_fn: LossFn | None = None,
        layers: Iterable[str] | None = None,
        adapter_name: str | None = None,
        dtype: torch.dtype | None = None,
        differentiation: Differentiation = "exact",
        cache_graph: bool | None = None,
    ):
        super().__init__(
            model,
            batches,
            over="tangent",
            loss_fn=loss_fn,
            layers=layers,
            adapter_name=adapter_name,
            dtype=dtype,
            differentiation=differentiation,
            cache_graph=cache_graph,
        )
        self._check_ranks()

    def _follow_changes(self) -> None:
        super()._follow_changes()
        self._check_ranks()

    def _check_ranks(self) -> None:
        for layer in self.space.layers:
            (m, n, r), (U, V) = layer.shape, self.space.bases[layer.name]
            for letter, rank, full in (("B", U.shape[1], min(r, m)), ("A", V.shape[0], min(r, n))):
                if rank < full:
                    raise InputError(
                        f"the Riemannian Hessian needs factors of full rank, and lora_{letter} of {layer.name} has "
                        f'rank {rank} of {full} (B = 0 at the start of LoRA): take Hessian(over="tangent") there'
                    )

    def _apply(self, flat: Tensor) -> Tensor:
        return super()._apply(flat) + self._bending(flat)

    def _bending(self, flat: Tensor) -> Tensor:
        # the form's gradient is (S^-T U_p^T G) (I - V^T V) for K and (I - U U^T) (G V_p S^-T) for J
        leaves, bases, bent = self.space.to_leaves(flat), {}, []
        for layer in self.space.layers:
            if layer.shape[2] >= min(layer.shape[:2]):
                continue
            (A, B), (U, V) = layer.factors(self.evaluation), self.space.bases[layer.name]
            S = layer.pair.scaling * (U.T @ B) @ (A @ V.T)
            K, U_p = leaves[f"{layer.name}.K"], leaves[f"{layer.name}.J"]
            V_p = K - (K @ V.T) @ V
            bases[layer.name] = torch.linalg.solve(S, U_p, left=False), torch.linalg.solve(S, V_p)
            bent.append(layer)
        seen = _seen_of_gradient(self, bent, bases) if bent else {}
        for layer in bent:
            V, K = self.space.bases[layer.name][1], seen[f"{layer.name}.K"]
            seen[f"{layer.name}.K"] = K - (K @ V.T) @ V
        # the isometry's adjoint takes the part of J along U away
        return self.space.from_leaves(joined(seen.get(name, 0 * leaf) for name, leaf in leaves.items()))


def _changes(layer: AdaptedLayer, parts: Leaves) -> tuple[Tensor | None, Tensor | None]:
    # dA (r x n) and dB (m x r) as matrices; one of them may not be among the coordinates
    found = (parts.get(f"{layer.name}.lora_{letter}") for letter in "AB")
    dA, dB = (None if part is None else as_matrix(part) for part in found)
    return dA, dB


def _seen_of_gradient(
    operator: CurvatureOperator, layers: Sequence[AdaptedLayer], bases: Bases
) -> dict[str, Tensor]:
    # P^T G under the name of each layer's K, G Q^T under that of its J
    chart = operator._twin()
    bases = {layer.name: (bases[layer.name][0], _unpadded(layer, bases[layer.name][1])) for layer in layers}
    chart.space = LowRankSpace(operator.evaluation, layers, bases)
    return chart.space.to_dict(
        chart._gradient(torch.zeros(chart.size, dtype=chart.dtype, device=chart.device))
    )


def _unpadded(layer: AdaptedLayer, Q: Tensor) -> Tensor:
    # an embedding's padding token gets no gradient, as if G had zeros in its column
    base = layer.pair.layer.get_base_layer()  # pyright: ignore[reportCallIssue]
    if (padding := getattr(base, "padding_idx", None)) is None:
        return Q
    Q = Q.clone()
    Q[:, padding] = 0
    return Q
