r"""The coordinates in which curvature is read: a flat vector stands for a displacement of the model.

Every space has **leaves**, the tensors that derivatives are taken with respect to, at zero where the model is, and an
isometry $E$ from flat coordinates to leaves, the identity but for the tangent space. The Hessian in coordinates is
$E^\top H E$.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._checks import InputError, check_choice
from tangora.curvature.adapted import AdaptedLayer
from tangora.curvature.evaluation import Evaluation

Shape = tuple[int, ...]
Leaves = Mapping[str, Tensor]


class Space(ABC):
    """Coordinates of displacements; vectors are flat and contiguous per layer.

    Args:
        evaluation: The model that is displaced.
    """

    def __init__(self, evaluation: Evaluation):
        self.evaluation = evaluation
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
        return sum(count(shape) for shape in self._shapes.values())

    @property
    def layout(self) -> dict[str, slice]:
        """Which part of a flat vector belongs to which layer."""
        layout: dict[str, slice] = {}
        start = 0
        for name, shape in self._shapes.items():
            layer, stop = self._layer_of[name], start + count(shape)
            layout[layer] = slice(layout[layer].start if layer in layout else start, stop)
            start = stop
        return layout

    def to_dict(self, flat: Float[Tensor, " size"]) -> dict[str, Tensor]:
        """Split a flat vector into named parts."""
        pieces = flat.split([count(shape) for shape in self._shapes.values()])
        return {
            name: piece.view(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }

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
        """Make the tensors to differentiate with respect to, at zero displacement.

        Returns:
            Zeros that require gradients, by name.
        """
        return {
            name: torch.zeros(shape, dtype=self.dtype, device=self.device, requires_grad=True)
            for name, shape in self.leaf_shapes().items()
        }

    def to_leaves(self, flat: Float[Tensor, " size"]) -> dict[str, Tensor]:
        r"""Apply the isometry $E$."""
        return self.to_dict(flat)

    def from_leaves(self, leaves: Float[Tensor, " leaves"]) -> Float[Tensor, " size"]:
        r"""Apply the adjoint $E^\top$.

        Args:
            leaves: All leaves (or gradients with respect to them), flattened one after the other.
        """
        return leaves

    @abstractmethod
    def overrides(self, leaves: Leaves) -> dict[str, Tensor]:
        """Displace the model.

        Returns:
            What stands in for the model's tensors, for `Evaluation.within`.
        """

    @abstractmethod
    def restricted(self, layers: Sequence[str]) -> "Space":
        """Return the space of some of the layers.

        Args:
            layers: Names from `layout`.
        """

    def refresh(self) -> None:  # noqa: B027 - most spaces read the weights at every displacement
        """Take up changes of the model's weights."""


class FactorSpace(Space):
    """The trainable factors themselves; the Hessian is the one LoRA's optimizer sees, and depends on the gauge.

    Args:
        factors: Which of the two.
    """

    def __init__(self, evaluation: Evaluation, layers: Sequence[AdaptedLayer], factors: str = "AB"):
        check_choice("factors", factors, ("AB", "A", "B"))
        super().__init__(evaluation)
        self.layers, self.factors = list(layers), factors
        self._chosen = [(layer, letter) for layer in layers for letter in self._letters(layer)]
        self._arrange(
            (layer.name, f"{layer.name}.lora_{letter}", getattr(layer.pair, letter).shape)
            for layer, letter in self._chosen
        )

    def _letters(self, layer: AdaptedLayer) -> list[str]:
        frozen = not (
            layer.pair.A.requires_grad or layer.pair.B.requires_grad
        )  # chosen by the adapter's name
        return [f for f in self.factors if frozen or getattr(layer.pair, f).requires_grad]

    def overrides(self, leaves: Leaves) -> dict[str, Tensor]:
        """Displace the factors."""
        overrides: dict[str, Tensor] = {}
        for layer, letter in self._chosen:
            overrides |= layer.displaced_factor(
                letter, leaves[f"{layer.name}.lora_{letter}"], self.evaluation
            )
        return overrides

    def restricted(self, layers: Sequence[str]) -> "FactorSpace":
        """Return the space of some layers' factors."""
        return FactorSpace(self.evaluation, [x for x in self.layers if x.name in layers], self.factors)


def count(shape: Shape) -> int:
    """Return the number of entries.

    Args:
        shape: Of a tensor; empty for a scalar.
    """
    return torch.Size(shape).numel()
