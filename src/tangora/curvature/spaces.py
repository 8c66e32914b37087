r"""The coordinates in which curvature is read: a flat vector stands for a displacement of the model.

Every space has **leaves**, the tensors that derivatives are taken with respect to, at zero where the model is, and an
isometry $E$ from flat coordinates to leaves, the identity but for the tangent space. The Hessian in coordinates is
$E^\top H E$.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._checks import InputError
from tangora.adapters.pair import as_matrix
from tangora.curvature.adapted import AdaptedLayer
from tangora.curvature.evaluation import Evaluation
from tangora.geometry.tangent import frame

Shape = tuple[int, ...]
Leaves = Mapping[str, Tensor]
Bases = Mapping[str, tuple[Tensor, Tensor]]


class Space(ABC):
    """Coordinates of displacements; vectors are flat and contiguous per layer.

    Args:
        evaluation: The model that is displaced.
        layers: Named layers whose weights move.
    """

    kind: Any
    """Name of the space in results: ``factors``, ``tangent`` or ``weights``."""

    def __init__(self, evaluation: Evaluation, layers: Sequence[Any]):
        self.evaluation, self.layers = evaluation, list(layers)
        self._layer_of: dict[str, str] = {}
        self._shapes: dict[str, Shape] = {}

    def _arrange(self, parts: Iterable[tuple[str, str, Shape]]) -> None:
        # (layer, name of the part, shape of its coordinates)
        self._layer_of, self._shapes = {}, {}
        for layer, name, shape in parts:
            self._layer_of[name], self._shapes[name] = layer, tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of vectors."""
        return self.evaluation.dtype

    @property
    def device(self) -> torch.device:
        """Where vectors are held."""
        return self.evaluation.device

    @property
    def names(self) -> list[str]:
        """Names of the parts, ``layer.part``, in the order of the flat vector."""
        return list(self._shapes)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of the coordinates by name."""
        return dict(self._shapes)

    @property
    def size(self) -> int:
        """Dimension."""
        return sum(_count(shape) for shape in self._shapes.values())

    @property
    def layout(self) -> dict[str, slice]:
        """Slice of a flat vector for each layer."""
        layout: dict[str, slice] = {}
        start = 0
        for name, shape in self._shapes.items():
            layer, stop = self._layer_of[name], start + _count(shape)
            layout[layer] = slice(layout[layer].start if layer in layout else start, stop)
            start = stop
        return layout

    def to_dict(self, flat: Float[Tensor, " size"]) -> dict[str, Tensor]:
        """Split a flat vector into named parts."""
        return _split(flat, self._shapes)

    def to_flat(self, parts: Mapping[str, Tensor]) -> Float[Tensor, " size"]:
        """Join named parts.

        Raises:
            InputError: If names or shapes are others than the space's.
        """
        if parts.keys() != self._shapes.keys():
            odd = sorted(parts.keys() ^ self._shapes.keys())[0]
            raise InputError(
                f"a vector's parts must be named {self.names[0]}, ... ({len(self._shapes)} of them); {odd} is "
                + ("missing" if odd in self._shapes else "not one of them")
            )
        for name, shape in self._shapes.items():
            if tuple(parts[name].shape) != shape:
                raise InputError(f"{name} must have shape {shape}; got {tuple(parts[name].shape)}")
        return torch.cat([parts[name].reshape(-1).to(self.device, self.dtype) for name in self._shapes])

    def leaf_shapes(self) -> dict[str, Shape]:
        """Return the shapes of the leaves; the coordinates' own unless the isometry says otherwise."""
        return self.shapes

    def leaves(self) -> dict[str, Tensor]:
        """Make the tensors to differentiate with respect to: zeros that require gradients."""
        return {
            name: torch.zeros(shape, dtype=self.dtype, device=self.device, requires_grad=True)
            for name, shape in self.leaf_shapes().items()
        }

    def to_leaves(self, flat: Float[Tensor, " size"]) -> dict[str, Tensor]:
        r"""Apply the isometry $E$."""
        return self.to_dict(flat)

    def from_leaves(self, leaves: Float[Tensor, " leaves"]) -> Float[Tensor, " size"]:
        r"""Apply the adjoint $E^\top$ to leaves, or gradients with respect to them, flattened one after the other."""
        return leaves

    @abstractmethod
    def overrides(self, leaves: Leaves) -> dict[str, Tensor]:
        """Displace the model: return what stands in for its tensors, for `Evaluation.within`."""

    def restricted(self, names: Sequence[str]) -> "Space":
        """Return the space of some of the layers."""
        return type(self)(self.evaluation, [layer for layer in self.layers if layer.name in names])

    def refresh(self) -> None:  # noqa: B027 - most spaces read the weights at every displacement
        """Take up changes of the model's weights."""


class FactorSpace(Space):
    """The trainable factors themselves; the Hessian over the factors depends on the gauge."""

    kind = "factors"

    def __init__(self, evaluation: Evaluation, layers: Sequence[AdaptedLayer]):
        super().__init__(evaluation, layers)
        self._chosen = [(layer, letter) for layer in layers for letter in _trainable(layer)]
        self._arrange(
            (layer.name, f"{layer.name}.lora_{letter}", getattr(layer.pair, letter).shape)
            for layer, letter in self._chosen
        )

    def overrides(self, leaves: Leaves) -> dict[str, Tensor]:
        """Displace the factors."""
        overrides: dict[str, Tensor] = {}
        for layer, letter in self._chosen:
            overrides |= layer.displaced_factor(
                letter, leaves[f"{layer.name}.lora_{letter}"], self.evaluation
            )
        return overrides


class PulledBackSpace(FactorSpace):
    r"""Changes of the factors as the weight takes them to first order: $(dA, dB)$ stands for $s (B\, dA + dB\, A)$.

    The Hessian over it is $J^\top H_W J$, positive semi-definite where $H_W$ is.
    """

    def overrides(self, leaves: Leaves) -> dict[str, Tensor]:
        """Lengthen the factors."""
        overrides: dict[str, Tensor] = {}
        for layer in self.layers:
            s, (A, B) = layer.pair.scaling, layer.factors(self.evaluation)
            dA, dB = factor_changes(layer, leaves)
            nothing = B[:, :0], A[:0]
            left = nothing if dA is None else (s * B, dA)
            right = nothing if dB is None else (dB, s * A)
            overrides |= layer.displaced(left, right, self.evaluation)
        return overrides


class LowRankSpace(Space):
    r"""Displacements $\Delta = P K + J Q$ of adapted weights with fixed $P$ and $Q$; the leaves are $K$ and $J$.

    With $P = s B$ and $Q = s A$ these are LoRA's own first-order displacements, and the Hessian is $J^\top H_W J$.

    Args:
        evaluation: The model that is displaced.
        layers: The adapted layers.
        bases: By layer, $P$ ($m \times p$) and $Q$ ($q \times n$).
    """

    kind = "low rank"

    def __init__(self, evaluation: Evaluation, layers: Sequence[AdaptedLayer], bases: Bases):
        super().__init__(evaluation, layers)
        self.bases = {layer.name: bases[layer.name] for layer in self.layers}
        self._arrange(_low_rank_parts(self.layers, self.bases))

    def overrides(self, leaves: Leaves) -> dict[str, Tensor]:
        """Lengthen the factors."""
        return _lengthened(self, self.bases, leaves)

    def restricted(self, names: Sequence[str]) -> "LowRankSpace":
        """Return the space of some of the layers."""
        layers = [layer for layer in self.layers if layer.name in names]
        return LowRankSpace(self.evaluation, layers, self.bases)


class TangentSpace(Space):
    r"""The tangent space of the rank-r matrices at $W$ in orthonormal coordinates, the same in every gauge.

    $\xi = U K + Q_\perp J' V$ with orthonormal bases $U$ of B's columns, $V$ of A's rows and $Q_\perp$ of what is
    orthogonal to $U$, held as Householder reflectors. Dimension $r_B n + (m - r_B) r_A$ for factors of these ranks:
    $r (m + n - r)$ at full rank, $r m$ at $B = 0$.
    """

    kind = "tangent"

    def __init__(self, evaluation: Evaluation, layers: Sequence[AdaptedLayer]):
        super().__init__(evaluation, layers)
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
        r"""Expand $J = Q_\perp J'$."""
        leaves = self.to_dict(flat)
        for layer in self.layers:
            name = f"{layer.name}.J"
            if p := self.bases[layer.name][0].shape[1]:
                padded = torch.nn.functional.pad(leaves[name], (0, 0, p, 0))
                leaves[name] = torch.ormqr(*self._reflectors[layer.name], padded)
        return leaves

    def from_leaves(self, leaves: Tensor) -> Tensor:
        r"""Project: $J' = Q_\perp^\top J$."""
        pieces = _split(leaves, self.leaf_shapes())
        for layer in self.layers:
            name = f"{layer.name}.J"
            if p := self.bases[layer.name][0].shape[1]:
                pieces[name] = torch.ormqr(*self._reflectors[layer.name], pieces[name], transpose=True)[p:]
        return torch.cat([piece.reshape(-1) for piece in pieces.values()])

    def overrides(self, leaves: Leaves) -> dict[str, Tensor]:
        """Lengthen the factors."""
        return _lengthened(self, self.bases, leaves)


def factor_changes(layer: AdaptedLayer, parts: Leaves) -> tuple[Tensor | None, Tensor | None]:
    """Return dA (r x n) and dB (m x r) as matrices; one of them may not be among the coordinates."""
    found = (parts.get(f"{layer.name}.lora_{letter}") for letter in "AB")
    dA, dB = (None if part is None else as_matrix(part) for part in found)
    return dA, dB


def _count(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _split(flat: Tensor, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    pieces = flat.split([_count(shape) for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _trainable(layer: AdaptedLayer) -> list[str]:
    pair = layer.pair
    frozen = not (pair.A.requires_grad or pair.B.requires_grad)  # chosen by the adapter's name
    return [letter for letter in "AB" if frozen or getattr(pair, letter).requires_grad]


def _lengthened(space: Space, bases: Bases, leaves: Leaves) -> dict[str, Tensor]:
    overrides: dict[str, Tensor] = {}
    for layer in space.layers:
        P, Q = bases[layer.name]
        left, right = (P, leaves[f"{layer.name}.K"]), (leaves[f"{layer.name}.J"], Q)
        overrides |= layer.displaced(left, right, space.evaluation)
    return overrides


def _low_rank_parts(layers: Iterable[AdaptedLayer], bases: Bases) -> list[tuple[str, str, Shape]]:
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
