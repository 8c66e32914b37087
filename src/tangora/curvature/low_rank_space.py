r"""Displacements of adapted weights of low rank: any $P K + J Q$, and the tangent space of the rank-r matrices."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tangora.curvature.adapted import AdaptedLayer
from tangora.curvature.evaluation import Evaluation
from tangora.curvature.spaces import Leaves, Shape, Space, count
from tangora.geometry.tangent import frame


class LowRankSpace(Space):
    r"""Displacements $\Delta = P K + J Q$ of adapted weights with fixed $P$ and $Q$; the leaves are $K$ and $J$.

    With $P = s B$ and $Q = s A$ these are LoRA's own first-order displacements, and the Hessian is $J^\top H_W J$.

    Args:
        bases: By layer, $P$ ($m \times p$) and $Q$ ($q \times n$).
    """

    def __init__(
        self,
        evaluation: Evaluation,
        layers: Sequence[AdaptedLayer],
        bases: Mapping[str, tuple[Tensor, Tensor]],
    ):
        super().__init__(evaluation)
        self.layers = list(layers)
        self.bases = {layer.name: bases[layer.name] for layer in self.layers}
        self._arrange(_low_rank_parts(self.layers, self.bases))

    def overrides(self, leaves: Leaves) -> dict[str, Tensor]:
        """Lengthen the factors."""
        overrides: dict[str, Tensor] = {}
        for layer in self.layers:
            P, Q = self.bases[layer.name]
            left, right = (P, leaves[f"{layer.name}.K"]), (leaves[f"{layer.name}.J"], Q)
            overrides |= layer.displaced(left, right, self.evaluation)
        return overrides

    def restricted(self, layers: Sequence[str]) -> "LowRankSpace":
        """Return the space of some layers."""
        return LowRankSpace(self.evaluation, [x for x in self.layers if x.name in layers], self.bases)


class TangentSpace(LowRankSpace):
    r"""The tangent space of the rank-r matrices at $W$ in orthonormal coordinates, the same in every gauge.

    $\xi = U K + Q_\perp J' V$ with orthonormal bases $U$ of B's columns, $V$ of A's rows and $Q_\perp$ of what is
    orthogonal to $U$, held as Householder reflectors. Dimension $r_B n + (m - r_B) r_A$ for factors of these ranks:
    $r (m + n - r)$ at full rank, $r m$ at $B = 0$.
    """

    def __init__(self, evaluation: Evaluation, layers: Sequence[AdaptedLayer]):
        Space.__init__(self, evaluation)
        self.layers = list(layers)
        self.refresh()

    def refresh(self) -> None:
        """Build the bases at the factors as they are now; the dimension may change with their ranks."""
        self._reflectors: dict[str, tuple[Tensor, Tensor]] = {}
        self.bases: dict[str, tuple[Tensor, Tensor]] = {}
        parts = []
        for layer in self.layers:
            (m, n, _), name = layer.shape, layer.name
            U, V = _supports(*layer.factors(self.evaluation))
            p, q = U.shape[1], V.shape[0]
            self._reflectors[name] = reflectors = torch.geqrf(U)
            identity = torch.eye(m, p, dtype=U.dtype, device=U.device)
            # the reflectors' own first columns, so that U and the complement fit to the last bit
            self.bases[name] = torch.ormqr(*reflectors, identity) if p else U, V
            parts += [(name, f"{name}.K", (p, n)), (name, f"{name}.J", (m - p, q))]
        self._arrange(parts)

    def leaf_shapes(self) -> dict[str, Shape]:
        """Return the shapes of K and of the whole J."""
        return {name: shape for _, name, shape in _low_rank_parts(self.layers, self.bases)}

    def to_leaves(self, flat: Tensor) -> dict[str, Tensor]:
        r"""Expand $J = Q_\perp J'$.

        Returns:
            K and J by name.
        """
        leaves = self.to_dict(flat)
        for layer in self.layers:
            name = f"{layer.name}.J"
            if p := self.bases[layer.name][0].shape[1]:
                padded = torch.nn.functional.pad(leaves[name], (0, 0, p, 0))
                leaves[name] = torch.ormqr(*self._reflectors[layer.name], padded)
        return leaves

    def from_leaves(self, leaves: Tensor) -> Tensor:
        r"""Project: $J' = Q_\perp^\top J$.

        Args:
            leaves: K and J of all layers, flattened.
        """
        shapes = self.leaf_shapes()
        pieces = dict(zip(shapes, leaves.split([count(s) for s in shapes.values()]), strict=True))
        for layer in self.layers:
            name = f"{layer.name}.J"
            if p := self.bases[layer.name][0].shape[1]:
                J = torch.ormqr(
                    *self._reflectors[layer.name], pieces[name].view(shapes[name]), transpose=True
                )
                pieces[name] = J[p:].reshape(-1)
        return torch.cat(list(pieces.values()))

    def restricted(self, layers: Sequence[str]) -> "TangentSpace":
        """Return the tangent space of some layers."""
        return TangentSpace(self.evaluation, [x for x in self.layers if x.name in layers])


def _low_rank_parts(
    layers: Iterable[AdaptedLayer], bases: Mapping[str, tuple[Tensor, Tensor]]
) -> list[tuple[str, str, Shape]]:
    parts: list[tuple[str, str, Shape]] = []
    for layer in layers:
        (m, n, _), (P, Q) = layer.shape, bases[layer.name]
        parts += [
            (layer.name, f"{layer.name}.K", (P.shape[1], n)),
            (layer.name, f"{layer.name}.J", (m, Q.shape[0])),
        ]
    return parts


def _supports(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    # orthonormal bases without the columns of directions in which a factor vanishes
    at = frame(A, B)
    U = at.U[:, at.U.square().sum(0) > 0.5]
    V = at.V[at.V.square().sum(1) > 0.5]
    return U.contiguous(), torch.linalg.qr(V.T)[0].T.contiguous()
