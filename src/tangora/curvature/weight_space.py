"""Full weight matrices as coordinates: the curvature that full fine-tuning would meet."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tangora._checks import InputError
from tangora.curvature.adapted import AdaptedLayer, chosen, tensor_paths
from tangora.curvature.evaluation import Evaluation
from tangora.curvature.spaces import Leaves, Space


@dataclass(frozen=True, eq=False)
class _Stored:
    """A weight that is held in floating point: it is displaced itself."""

    name: str
    weight: Tensor
    paths: Sequence[str]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def overrides(self, displacement: Tensor, evaluation: Evaluation) -> dict[str, Tensor]:
        held = evaluation.converted(self.weight)
        return dict.fromkeys(self.paths, (held + displacement).to(held.dtype))


@dataclass(frozen=True, eq=False)
class _Packed:
    """A quantized weight: it is displaced through the adapter's factors, one of them an identity."""

    layer: AdaptedLayer

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer.shape[:2]

    def overrides(self, displacement: Tensor, evaluation: Evaluation) -> dict[str, Tensor]:
        m, n = self.shape
        kind = {"dtype": displacement.dtype, "device": displacement.device}
        nothing = torch.empty(m, 0, **kind), torch.empty(0, n, **kind)
        if m <= n:
            return self.layer.displaced((torch.eye(m, **kind), displacement), nothing, evaluation)
        return self.layer.displaced(nothing, (displacement, torch.eye(n, **kind)), evaluation)


class WeightSpace(Space):
    """Whole weight matrices; of a PEFT model those under the adapters, since dL/dW0 = dL/dW.

    Coordinates have the shape of the weight as the model stores it (``m x n`` where it is quantized).
    """

    kind = "weights"

    def __init__(self, evaluation: Evaluation, layers: Sequence[Any]):
        super().__init__(evaluation, layers)
        self._arrange((weight.name, weight.name, weight.shape) for weight in self.layers)

    def overrides(self, leaves: Leaves) -> dict[str, Tensor]:
        """Displace the weights."""
        overrides: dict[str, Tensor] = {}
        for weight in self.layers:
            overrides |= weight.overrides(leaves[weight.name], self.evaluation)
        return overrides


def adapted_weights(layers: Iterable[AdaptedLayer]) -> list[Any]:
    """List the weights under adapters, for a `WeightSpace`."""
    weights: list[Any] = []
    for layer in layers:
        held = getattr(layer.pair.base, "weight", None)
        if isinstance(held, Tensor) and held.is_floating_point():
            # its own, also where the weight is tied: an adapter belongs to one layer
            own = [path for path in layer.paths[id(held)] if f".{path}".startswith(f".{layer.name}.")]
            tied = [path for _ in layer.pair.tied for path in layer.paths[id(held)]]
            weights.append(_Stored(layer.name, held, own + [path for path in tied if path not in own]))
        else:
            weights.append(_Packed(layer))
    return weights


def plain_weights(evaluation: Evaluation, layers: Iterable[str] | None = None) -> list[Any]:
    """List matrices of a model without adapters, by names of parameters or of modules that hold them, or patterns.

    Default are all trainable floating-point parameters with at least two dimensions; `InputError` if there are none.
    """
    paths = tensor_paths(evaluation.model)
    named = {name: p for name, p in evaluation.model.named_parameters() if p.is_floating_point()}
    if layers is None:
        named = {name: p for name, p in named.items() if p.requires_grad and p.dim() >= 2}
    else:
        modules = {name.rpartition(".")[0] or name: name for name, p in named.items() if p.dim() >= 2}
        names = chosen([*named, *modules], layers)
        wanted = {modules.get(name, name) for name in names}
        named = {name: p for name, p in named.items() if name in wanted}
    if not named:
        raise InputError(
            "model has no trainable weight matrices: unfreeze some, or name layers with `layers`"
        )
    return [_Stored(name, p, paths[id(p)]) for name, p in named.items()]
