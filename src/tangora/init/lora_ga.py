r"""LoRA-GA: start where the first step of LoRA is closest to that of full fine-tuning.

Any split of the top $2r$ singular directions of the gradient, $r$ to each factor, minimises
$\|s^2 (B_0 B_0^\top G + G A_0^\top A_0) - \zeta G\|$. The base weight must be $W_0 - s B_0 A_0$ then, so that the model
starts where it was.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tangora._checks import InputError, check_choice, check_number
from tangora._types import FactorA, FactorB
from tangora.geometry.sketch import LowRankSVD
from tangora.init.start_method import LayerToStart, StartFactors, StartMethod, option_types

Direction = Literal["ArBr", "A2rBr", "ArB2r", "random"]
Scale = Literal["stable", "gd", "unit", "weight_svd"]
DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "gd", "unit", "weight_svd")


def lora_ga(
    gradient: LowRankSVD,
    r: int,
    scaling: float,
    *,
    direction: Direction = "ArB2r",
    scale: Scale = "stable",
    stable_gamma: float = 16.0,
    weight_singular_values: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[FactorA, FactorB]:
    r"""Build LoRA-GA's initialization.

    Args:
        gradient: Leading singular triplets of $G$ ($m \times n$), $2r$ of them where $\min(m, n) \ge 2r$.
        r: Rank, at most $\min(m, n)$.
        direction: Which of the $2r$ directions go to $A$ and to $B$: ``ArB2r`` the first $r$ to $A$ and the next to
            $B$, ``A2rBr`` the other way round, ``ArBr`` odd ones to $A$ and even ones to $B$, ``random`` disjoint ones.
        scale: Norm of the directions: ``stable`` $m^{1/4}/\sqrt\gamma$, ``gd`` $1/s$, ``unit`` 1, ``weight_svd`` the
            mean of $\sqrt{\sigma_i(W_0)/s}$ over the first $r$. None depends on the gradient's size.
        stable_gamma: $\gamma$ of ``stable``; the paper's 16.
        weight_singular_values: $\sigma_i(W_0)$, descending, for ``weight_svd``.

    Returns:
        $A_0$ and $B_0$, with orthogonal rows and columns of equal norm.

    Raises:
        InputError: If an option is unknown or not positive.

    Source:
        arXiv:2407.05000, theorems 3.1 and 3.2, and the authors' code. PEFT's ``lora_ga`` differs: it multiplies $B$ by
        the gradient's singular values and does not scale $A$.
    """
    check_choice("direction", direction, DIRECTIONS)
    check_choice("scale", scale, SCALES)
    check_number("stable_gamma", stable_gamma, low=0, open_low=True)
    order = _order(min(2 * r, gradient.S.shape[0]), direction, generator)
    first, last = order[:r], order[-r:]  # they overlap where there are fewer than 2 r directions
    to_A, to_B = (last, first) if direction == "A2rBr" else (first, last)
    size = _size(gradient.U.shape[0], r, scaling, scale, stable_gamma, weight_singular_values)
    return size * gradient.Vh[to_A], size * gradient.U[:, to_B]


def _order(available: int, direction: Direction, generator: torch.Generator | None) -> Tensor:
    if direction == "random":
        return torch.randperm(available, generator=generator)
    directions = torch.arange(available)
    return torch.cat([directions[1::2], directions[0::2]]) if direction == "ArBr" else directions


def _size(m: int, r: int, s: float, scale: Scale, gamma: float, weight_values: Tensor | None) -> float:
    match scale:
        case "stable":
            return m**0.25 / gamma**0.5
        case "gd":
            return 1 / s
        case "unit":
            return 1.0
        case "weight_svd":
            if weight_values is None:
                raise InputError("scale='weight_svd' needs weight_singular_values")
            return float((weight_values[:r] / s).sqrt().mean())


def _reads_weight(options: Mapping[str, Any]) -> bool:
    return options.get("scale") == "weight_svd"


def _start(layer: LayerToStart, **options: Any) -> StartFactors:
    return lora_ga(
        layer.known_gradient,
        layer.shape[2],
        layer.scaling,
        weight_singular_values=torch.linalg.svdvals(layer.weight()) if _reads_weight(options) else None,
        generator=layer.generator,
        **options,
    )


LORA_GA = StartMethod(
    _start,
    option_types(lora_ga, "direction", "scale", "stable_gamma"),
    directions=2,
    offset=True,
    reads_weight=_reads_weight,
)
