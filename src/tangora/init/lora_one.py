r"""LoRA-One: start with one step of gradient descent, as far as rank $r$ allows.

The final version leaves the base weight alone, so that $W_0 + s B_0 A_0$ is that step; the earlier one of the slides
takes the directions only and compensates in the base weight.
"""

from typing import Any

from tangora._checks import check_number
from tangora._types import FactorA, FactorB
from tangora.geometry.sketch import LowRankSVD
from tangora.init.start_method import LayerToStart, StartFactors, StartMethod, option_types


def lora_one(gradient: LowRankSVD, r: int, *, gamma: float = 128.0) -> tuple[FactorA, FactorB]:
    r"""Build LoRA-One's initialization.

    With $R = (S_r / (\sigma_1 \gamma))^{1/2}$ it is $B_0 = -U_r R$ and $A_0 = R\, V_r^\top$: the update $s B_0 A_0$ has
    spectral norm $s/\gamma$ in every layer, whatever the size of the gradient.

    Args:
        gradient: Leading singular triplets of $G$, not of $-G$; $\sigma_1 > 0$.
        r: Rank, at most $\min(m, n)$.
        gamma: $\gamma$; the authors' 128.

    Returns:
        $A_0$ and $B_0$; the base weight stays as it is.

    Source:
        arXiv:2502.01235v3, algorithm 1, lines 1 to 4, and the authors' code (their README forgets the square root).
    """
    check_number("gamma", gamma, low=0, open_low=True)
    U, S, Vh = gradient.truncate(r)
    root = (S / (S[0] * gamma)).sqrt()
    return root[:, None] * Vh, -U * root


def lora_one_v1(gradient: LowRankSVD, r: int, *, gamma: float = 128.0) -> tuple[FactorA, FactorB]:
    r"""Build the initialization of LoRA-One's slides, $B_0 = -U_r/\sqrt\gamma$ and $A_0 = V_r^\top/\sqrt\gamma$.

    Args:
        gradient: Leading singular triplets of $G$, not of $-G$.
        r: Rank, at most $\min(m, n)$.
        gamma: $\gamma$; the authors' 128.

    Returns:
        $A_0$ and $B_0$; the base weight must become $W_0 - s B_0 A_0$.

    Source:
        arXiv:2502.01235v1.
    """
    check_number("gamma", gamma, low=0, open_low=True)
    U, _, Vh = gradient.truncate(r)
    return Vh / gamma**0.5, -U / gamma**0.5


def _start(layer: LayerToStart, **options: Any) -> StartFactors:
    return lora_one(layer.known_gradient, layer.shape[2], **options)


def _start_v1(layer: LayerToStart, **options: Any) -> StartFactors:
    return lora_one_v1(layer.known_gradient, layer.shape[2], **options)


LORA_ONE = StartMethod(_start, option_types(lora_one, "gamma"), directions=1, values=True)
LORA_ONE_V1 = StartMethod(_start_v1, option_types(lora_one_v1, "gamma"), directions=1, offset=True)
