"""One LoRA pair: the two factors of one update, whatever kind of layer they adapt."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tangora._types import FactorA, FactorB, Weight


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
    def scaling(self) -> float:
        """The factor $s$, as it is now: PEFT's ``set_scale`` and merging tools change it at run time."""
        return float(self.layer.scaling[self.adapter])  # pyright: ignore[reportIndexIssue, reportArgumentType]

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """``(m, n, r)``: rows and columns of the update, and its rank."""
        return self.B.shape[0], self.A[0].numel(), self.A.shape[0]

    @property
    def trainable(self) -> bool:
        """Whether both factors are trained; one alone has no tangent space to move in."""
        return self.A.requires_grad and self.B.requires_grad

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every parameter that belongs to the pair, tied ones included."""
        return [self.A, self.B, *(parameter for pair in self.tied for parameter in pair)]

    @property
    def active(self) -> bool:
        """Whether the layer computes with this adapter: switched on, and not merged into the weight."""
        layer: Any = self.layer
        used = self.adapter in layer.active_adapters and self.adapter not in layer.merged_adapters
        return used and not layer.disable_adapters

    @property
    def looks_up(self) -> bool:
        """Whether the layer is an embedding, whose inputs are indices: $A$ has one column for each of them."""
        return self.adapter in getattr(self.layer, "lora_embedding_A", ())

    @property
    def attached(self) -> bool:
        """Whether the layer still holds these very parameters: sharding and loading may replace them."""
        held = (getattr(holder, "weight", holder) for holder in self._holders())
        return all(parameter is own for parameter, own in zip(held, (self.A, self.B), strict=True))

    @property
    def sharded(self) -> bool:
        """Whether a factor is a DTensor, of which this process holds a part."""
        return any(hasattr(factor, "placements") for factor in (self.A, self.B))

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters with the names that they have in the model.

        Returns:
            Both factors first; parameters that are tied to them are numbered.
        """
        embedding, suffix = ("embedding_", "") if self._is_embedding else ("", ".weight")
        factors = [f"{self.name}.lora_{embedding}{letter}.{self.adapter}{suffix}" for letter in "AB"]
        tied = [f"{self.name}.tied.{number}" for number in range(2 * len(self.tied))]
        return list(zip([*factors, *tied], self.parameters, strict=True))

    @property
    def _is_embedding(self) -> bool:
        return self.adapter in self.layer.lora_embedding_A  # pyright: ignore[reportOperatorIssue]

    def _holders(self) -> list[Any]:
        layer: Any = self.layer
        containers = (
            (layer.lora_embedding_A, layer.lora_embedding_B)
            if self._is_embedding
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
            The change of the weight, for inspection; training never forms it. An offset (`offset_factors`) is not
            subtracted.
        """
        A, B = self.factors()
        return self.scaling * (B @ A)


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
