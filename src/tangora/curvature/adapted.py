r"""Adapted layers seen as weights: a displacement $\Delta = P K + J Q$ of $W$ enters through longer factors.

$W + \Delta$ is what the layer computes with $A' = [A; K; Q]$ and $B' = [B, P/s, J/s]$, so that no matrix of the
weight's size is formed, whatever the layer is (linear, transposed, convolution, embedding) and however its weight is
stored. Evaluating with tensors of another shape is no matter to `torch.func.functional_call`.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tangora._checks import InputError, check_kind
from tangora.adapters import LoraPair, discover
from tangora.adapters.offset_layer import get_offset
from tangora.adapters.pair import as_matrix
from tangora.curvature.evaluation import Evaluation

_ATTENTION = (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)


@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """A pair, and where its tensors stand in the model."""

    pair: LoraPair
    paths: Mapping[int, Sequence[str]]
    """All names of a parameter or buffer in the model, by its ``id``."""

    @property
    def name(self) -> str:
        """Path of the layer."""
        return self.pair.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(m, n, r)``."""
        return self.pair.shape

    def factors(self, evaluation: Evaluation) -> tuple[Tensor, Tensor]:
        """Return A (r x n) and B (m x r) as matrices in the dtype of vectors, detached."""
        A, B = self.pair.factors()
        return A.to(evaluation.dtype), B.to(evaluation.dtype)

    def displaced_factor(
        self, letter: str, displacement: Tensor, evaluation: Evaluation
    ) -> dict[str, Tensor]:
        """Move the factor A or B; returns what stands in for the model's tensors, tied twins included."""
        held = evaluation.converted(getattr(self.pair, letter))
        moved = (held + displacement).to(held.dtype)
        overrides = self._named(getattr(self.pair, letter), moved)
        for other_A, other_B in self.pair.tied:
            overrides |= self._named(other_B if letter == "A" else other_A, moved.t())
        return overrides

    def displaced(
        self,
        left: tuple[Float[Tensor, "m p"], Float[Tensor, "p n"]],
        right: tuple[Float[Tensor, "m q"], Float[Tensor, "q n"]],
        evaluation: Evaluation,
    ) -> dict[str, Tensor]:
        r"""Move the layer's weight by $P K + J Q$; returns what stands in for the model's tensors."""
        (P, K), (J, Q), pair = left, right, self.pair
        A, B = as_matrix(evaluation.converted(pair.A)), as_matrix(evaluation.converted(pair.B))
        columns = torch.cat([P, J], 1) / pair.scaling
        extra = columns.shape[1]
        A, B = torch.cat([A, K.to(A.dtype), Q.to(A.dtype)]), torch.cat([B, columns.to(B.dtype)], 1)
        overrides = self._named(pair.A, A.reshape(-1, *pair.A.shape[1:]))
        overrides |= self._named(pair.B, B.reshape(*B.shape, *pair.B.shape[2:]))
        for other_A, other_B in pair.tied:
            overrides |= self._named(other_A, B.t()) | self._named(other_B, A.t())
        return overrides | self._padded_offset(extra, evaluation)

    def _padded_offset(self, extra: int, evaluation: Evaluation) -> dict[str, Tensor]:
        # the frozen pair is subtracted factor by factor, so it needs the same rank
        if (offset := get_offset(self.pair.layer, self.pair.adapter)) is None:
            return {}
        A0, B0 = evaluation.converted(offset.A0), evaluation.converted(offset.B0)
        A0 = torch.cat([A0, A0.new_zeros(extra, *A0.shape[1:])])
        B0 = torch.cat([B0, B0.new_zeros(B0.shape[0], extra, *B0.shape[2:])], 1)
        return self._named(offset.A0, A0) | self._named(offset.B0, B0)

    def _named(self, tensor: Tensor, value: Tensor) -> dict[str, Tensor]:
        return dict.fromkeys(self.paths[id(tensor)], value)


def adapted_layers(
    evaluation: Evaluation, *, adapter_name: str | None = None, layers: Iterable[str] | None = None
) -> list[AdaptedLayer]:
    """List the pairs whose curvature can be read, in the order of the model: trainable ones, or those of one adapter.

    Raises `InputError` if there is none, one of them uses DoRA, is merged or inactive, or two adapters share a layer.
    """
    found = discover(evaluation.model, adapter_name)
    pairs = found.pairs
    if adapter_name is None:
        pairs = [pair for pair in pairs if pair.A.requires_grad or pair.B.requires_grad]
    if not pairs:
        raise InputError(
            "model has no trainable LoRA factors: load the adapter with is_trainable=True or pass adapter_name; "
            'for a plain model use over="weights"'
        )
    names = [pair.name for pair in pairs]
    if len(set(names)) < len(names):
        adapters = ", ".join(sorted({pair.adapter for pair in pairs}))
        raise InputError(f"adapter_name must choose one of the model's adapters ({adapters}); got None")
    kept = set(chosen(names, layers))
    if layers is None and found.skipped:
        odd = "; ".join(sorted({f"{reason} ({name})" for name, reason in found.skipped.items()})[:5])
        warnings.warn(
            (f"excluded from the curvature, because they are not plain LoRA pairs: {odd}"), stacklevel=5
        )
    pairs = [pair for pair in pairs if pair.name in kept]
    for pair in pairs:
        _check(pair)
    paths = tensor_paths(evaluation.model)
    return [AdaptedLayer(pair, paths) for pair in pairs]


def tensor_paths(model: nn.Module) -> dict[int, list[str]]:
    """Find all names of each parameter and buffer by its ``id``; tied ones have several."""
    paths: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        paths.setdefault(id(tensor), []).append(name)
    return paths


def chosen(names: Sequence[str], layers: Iterable[str] | None) -> list[str]:
    """Pick names in their order: by full names, endings after a dot (as ``target_modules``), or patterns with ``*``.

    Raises `InputError` if an entry matches nothing.
    """
    if layers is None:
        return list(names)
    check_kind("layers", layers, (str, list, tuple), "names or patterns of layers")
    layers = [layers] if isinstance(layers, str) else list(layers)
    for wanted in layers:
        check_kind("layers", wanted, str, "names or patterns of layers")
    for wanted in layers:
        if not any(_matches(name, wanted) for name in names):
            raise InputError(f"layers must name layers of the model, such as {names[0]}; got {wanted!r}")
    return [name for name in names if any(_matches(name, wanted) for wanted in layers)]


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}") or fnmatchcase(name, wanted)


def _check(pair: LoraPair) -> None:
    name, adapter = pair.name, pair.adapter
    if pair.has_magnitudes:
        raise InputError(
            f"{name} uses DoRA, which treats its norm as a constant in the backward pass, so autograd "
            "does not compute the Hessian of the loss: exclude the layer (layers=...) or merge the "
            "adapter into a plain model"
        )
    if not pair.active:
        raise InputError(
            f"adapter {adapter!r} is not active in {name}, or merged into it: call set_adapter or "
            "unmerge_adapter first"
        )
    if isinstance(pair.base, _ATTENTION):
        raise InputError(
            f"{name} is part of an nn.MultiheadAttention, whose weights PEFT replaces in each forward "
            "pass: its curvature cannot be measured, so exclude the layer (layers=...)"
        )
    if pair.scaling == 0:
        raise InputError(
            f"the scaling of {name} must not be zero: with zero the factors have no effect on the weight"
        )
