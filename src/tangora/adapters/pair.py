"""One LoRA pair: the two factors of one update, and the weight that they change, whatever kind of layer that is."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tangora._types import FactorA, FactorB, Weight
from tangora.adapters.offset_layer import get_offset, with_both_pairs
from tangora.adapters.sharded import is_sharded
from tangora.adapters.stored_weight import module_weight

_BASE = "base_model.model."


class MovingFactors(NamedTuple):
    """The factors that change a layer's weight."""

    A: FactorA
    B: FactorB
    r"""$D B$ for a DoRA layer."""
    row_scale: Tensor | None
    r"""The diagonal of $D$; ``None`` for a layer without magnitudes."""


@dataclass(frozen=True, eq=False, repr=False)
class LoraPair:
    r"""Two parameters that change a weight by $s B A$.

    As matrices $A$ is $r \times n$ and $B$ is $m \times r$; convolution kernels are flattened to that shape.
    """

    name: str
    """Path of the adapted layer in the model."""
    layer: nn.Module
    """The PEFT layer, asked for its scaling at every step."""
    adapter: str
    """Name of the adapter."""
    A: nn.Parameter
    """``lora_A`` (or ``lora_embedding_A``)."""
    B: nn.Parameter
    """``lora_B`` (or ``lora_embedding_B``)."""
    transposed: bool = False
    """Whether the layer stores its weight ``in x out``, so that it changes by the transpose of ``s B A``."""
    tied: tuple[tuple[nn.Parameter, nn.Parameter], ...] = field(default=())
    """Other parameters in the same memory (tied layers): each holds the transposes of (B, A) and its own gradient."""

    def __repr__(self) -> str:
        m, n, r = self.shape
        tied = f", tied={len(self.tied)}" if self.tied else ""
        return f"LoraPair({self.name!r}, adapter={self.adapter!r}, r={r}, {m}x{n}{tied})"

    @property
    def path(self) -> str:
        """Path of the layer in the base model."""
        return self.name.removeprefix(_BASE)

    @property
    def scaling(self) -> float:
        """The factor $s$, as it is now: PEFT's ``set_scale`` and merging tools change it at run time."""
        return float(self.layer.scaling[self.adapter])  # pyright: ignore[reportIndexIssue, reportArgumentType]

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """``(m, n, r)``: rows and columns of the update, and its rank."""
        return self.B.shape[0], self.A.shape[1:].numel(), self.A.shape[0]

    @property
    def trainable(self) -> bool:
        """Whether both factors are trained; one factor alone has no tangent space."""
        return self.A.requires_grad and self.B.requires_grad

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every parameter that belongs to the pair, tied ones included."""
        return [self.A, self.B, *(parameter for pair in self.tied for parameter in pair)]

    @property
    def base(self) -> nn.Module:
        """The frozen layer under the adapters."""
        return self.layer.get_base_layer()  # pyright: ignore[reportCallIssue, reportReturnType]

    @property
    def active(self) -> bool:
        """Whether the layer computes with this adapter: switched on, and not merged into the weight."""
        layer: Any = self.layer
        used = self.adapter in layer.active_adapters and self.adapter not in layer.merged_adapters
        return used and not layer.disable_adapters

    @property
    def use_rslora(self) -> bool:
        r"""Whether the scaling is alpha over the root of the rank."""
        return bool(self.layer.use_rslora[self.adapter])  # pyright: ignore[reportArgumentType, reportIndexIssue]

    @property
    def looks_up(self) -> bool:
        """Whether the layer is an embedding, whose inputs are indices: $A$ has one column for each of them."""
        return self.adapter in getattr(self.layer, "lora_embedding_A", ())

    @property
    def has_magnitudes(self) -> bool:
        """Whether the layer is DoRA's, which scales every row of its weight to a trained norm."""
        return self._magnitude_holder() is not None

    @property
    def attached(self) -> bool:
        """Whether the layer still holds these very parameters: sharding and loading may replace them."""
        held = (getattr(holder, "weight", holder) for holder in self._holders())
        return all(parameter is own for parameter, own in zip(held, (self.A, self.B), strict=True))

    @property
    def sharded(self) -> bool:
        """Whether a factor is a DTensor, of which this process holds a part."""
        return any(is_sharded(factor) for factor in (self.A, self.B))

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters with the names that they have in the model.

        Returns:
            Both factors first; parameters that are tied to them are numbered.
        """
        embedding, suffix = ("embedding_", "") if self.looks_up else ("", ".weight")
        factors = [f"{self.name}.lora_{embedding}{letter}.{self.adapter}{suffix}" for letter in "AB"]
        tied = [f"{self.name}.tied.{number}" for number in range(2 * len(self.tied))]
        return list(zip([*factors, *tied], self.parameters, strict=True))

    def _holders(self) -> list[Any]:
        layer: Any = self.layer
        containers = (
            (layer.lora_embedding_A, layer.lora_embedding_B)
            if self.looks_up
            else (layer.lora_A, layer.lora_B)
        )
        return [container[self.adapter] if self.adapter in container else None for container in containers]  # noqa: SIM401 (a ModuleDict has no get)

    def factors(self) -> tuple[FactorA, FactorB]:
        r"""Return the factors as matrices.

        Returns:
            $A$ ($r \times n$) and $B$ ($m \times r$), detached, sharing memory with the parameters where their layout
            allows it.
        """
        return as_matrix(self.A.detach()), as_matrix(self.B.detach())

    def gradients(self) -> tuple[FactorA, FactorB] | None:
        """Return the gradients of both factors as matrices.

        Sparse gradients are made dense; tied parameters' gradients are added.

        Returns:
            ``(g_A, g_B)``, or ``None`` if one of the factors has no gradient.
        """
        totals = _dense(self.A.grad), _dense(self.B.grad)
        for other_A, other_B in self.tied:  # B^T and A^T: their gradients are transposed too
            totals = (
                _add(totals[0], _dense(other_B.grad), self.A),
                _add(totals[1], _dense(other_A.grad), self.B),
            )
        if totals[0] is None or totals[1] is None:
            return None
        return as_matrix(totals[0]), as_matrix(totals[1])

    def delta_weight(self) -> Weight:
        r"""Return $s B A$ as a matrix, $m \times n$, in the factors' dtype.

        Returns:
            The change of the weight, for inspection; training never forms it. An offset (`offset`) is not subtracted.
        """
        A, B = self.factors()
        return self.scaling * (B @ A)

    def offset(self) -> tuple[FactorB, FactorA] | None:
        r"""Return the frozen pair that is subtracted, as matrices.

        Returns:
            $(B_0, A_0)$, m × r and r × n, sharing memory with the model; ``None`` without an offset.
        """
        held = get_offset(self.layer, self.adapter)
        return None if held is None else (as_matrix(held.B0), as_matrix(held.A0))

    def base_weight(self) -> Weight:
        r"""Return $W_0$ in the orientation of $s B A$, dequantized where need be.

        Returns:
            A new or shared ``m x n`` tensor in float32 (float64 for a float64 layer), on the layer's device; not to be
            written to.
        """
        return module_weight(self.base, transposed=self.transposed)

    @torch.no_grad()
    def weight(self, base: Weight | None = None) -> Weight:
        r"""Return $W_0 + s (B A - B_0 A_0)$, the weight of the layer without DoRA's magnitudes.

        Args:
            base: Weight to add the update to; default `base_weight`.
        """
        base = self.base_weight() if base is None else base
        whole = base + self.delta_weight().to(base)
        if (offset := self.offset()) is not None:
            whole = whole - self.scaling * (offset[0] @ offset[1]).to(whole)
        return whole

    @torch.no_grad()
    def row_scale(self) -> Tensor | None:
        r"""Return DoRA's factor for each row of $W_0 + s B A$, magnitude over norm.

        PEFT takes the norm as a constant in the backward pass, so that the factors move the layer's weight by
        $D\,(s B A)$ with the diagonal $D$ returned here.

        Returns:
            ``m`` numbers in the dtype of `base_weight`; ``None`` for a layer without magnitudes.
        """
        if (holder := self._magnitude_holder()) is None:
            return None
        weight = self.weight()
        return holder.weight.detach().flatten().to(weight) / weight.norm(dim=1)

    def moving_factors(self) -> MovingFactors:
        """Return the factors along which the layer's weight moves: those of `factors`, but for DoRA's row scale."""
        (A, B), scale = self.factors(), self.row_scale()
        return MovingFactors(A, B if scale is None else scale[:, None] * B.to(scale), scale)

    def refresh_magnitude(self) -> None:
        """Set a DoRA layer's magnitudes to the norms of the weight it has now, so that DoRA starts from that weight.

        Nothing happens to other layers.
        """
        if (holder := self._magnitude_holder()) is None:
            return
        layer: Any = self.layer
        magnitude = holder.weight
        view = layer if self.offset() is None else with_both_pairs(layer, self.adapter)
        if self.looks_up:
            A, B = (held[self.adapter].detach() for held in (view.lora_embedding_A, view.lora_embedding_B))
        else:
            A, B = (held[self.adapter].weight for held in (view.lora_A, view.lora_B))
        holder.update_layer(base_layer=self.base, lora_A=A, lora_B=B, scaling=self.scaling)
        # PEFT makes a new parameter; an optimizer may know the old one
        magnitude.data.copy_(holder.weight.detach())
        holder.weight = magnitude

    def _magnitude_holder(self) -> Any:
        magnitudes: Any = getattr(self.layer, "lora_magnitude_vector", None) or {}
        return magnitudes[self.adapter] if self.adapter in magnitudes else None  # noqa: SIM401 (a ModuleDict has no get)


def pattern_key(name: str) -> str:
    """Return a key for PEFT's rank and alpha patterns, regular expressions for ends of names, that fits one layer."""
    return f"^{re.escape(name.removeprefix(_BASE))}"


def as_matrix(factor: Tensor) -> Tensor:
    """Flatten a convolution's factor to a matrix; others are returned as they are."""
    return factor if factor.dim() == 2 else factor.flatten(1)


def _dense(gradient: Tensor | None) -> Tensor | None:
    if gradient is not None and gradient.layout != torch.strided:
        return gradient.to_dense()
    return gradient


def _add(total: Tensor | None, transposed: Tensor | None, like: nn.Parameter) -> Tensor | None:
    if transposed is None:
        return total
    addend = transposed.t().reshape(like.shape)
    return addend if total is None else total + addend
