r"""TangentAdam: Adam on the equivalent gradient without any matrix as large as the weight.

A combination of known parts, whose sources are: the projected gradient of LoRA-Pro (arXiv:2407.18242); Adafactor's row
and column second moments (arXiv:1804.04235), here read off the factors; projection in that metric (AdaPreLoRA,
arXiv:2605.08734); momentum kept in the tangent space and transported by projection, and a retraction (Riemannion,
arXiv:2507.12142). Derivation: ``docs/theory/tangent_adam.md``.
"""

from typing import Any, NamedTuple, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._checks import check_choice
from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair
from tangora.geometry.retraction import RETRACTIONS, Factors, Retraction, decayed_step, rounded
from tangora.geometry.tangent import (
    Cotangent,
    Metric,
    coordinates,
    frame,
    project_metric,
    second_moments,
    transport,
)
from tangora.optim.base import CommonOptions
from tangora.optim.groups import Params
from tangora.optim.layerwise import LayerwiseOptimizer
from tangora.optim.stack import Loaded, PairStack, StateShapes

# A row whose gradient is this much below the average counts as having this share of it: the metric must stay
# invertible, and a row that almost never gets a gradient must not become free to move.
_ROW_FLOOR = 1e-3


class TangentMoments(NamedTuple):
    r"""State of a pair: $r (m + n) + m + n$ numbers.

    The momentum $M$ lives in the tangent space of the current factors; the second moments are averages of the row and
    column means of $\tilde g \circ \tilde g$.
    """

    momentum: Cotangent
    rows: Float[Tensor, "*b m"]
    columns: Float[Tensor, "*b n"]


def adafactor_metric(rows: Float[Tensor, "*b m"], columns: Float[Tensor, "*b n"], eps: float) -> Metric:
    r"""Return the metric $D_r, D_c$ with $\sqrt{V} \approx D_r D_c$ for $V = v_r v_c^\top / \mathrm{mean}(v_r)$."""
    mean = rows.mean(-1, keepdim=True)
    relative = (rows / mean).where(mean > 0, 1.0).sqrt()
    return Metric(relative.clamp(min=_ROW_FLOOR), columns.sqrt() + eps)


def tangent_adam_step(
    A: FactorA,
    B: FactorB,
    gradient: Cotangent,
    moments: TangentMoments,
    *,
    step_size: float | Tensor,
    correction: float | Tensor,
    decay: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    retraction: Retraction,
    stored: torch.dtype,
) -> tuple[Factors, TangentMoments]:
    r"""Take one TangentAdam step on $Y = B A$.

    Args:
        step_size: Learning rate in units of $B A$, divided by the first moment's share of an average so far.
        correction: The second moments' share of an average so far.
    """
    beta1, beta2 = betas
    at = frame(A, B)
    seen = coordinates(at, gradient)
    momentum = Cotangent(*(m.lerp_(g, 1 - beta1) for m, g in zip(moments.momentum, gradient, strict=True)))
    row_means, column_means = second_moments(at, seen)
    rows, columns = moments.rows.lerp(row_means, 1 - beta2), moments.columns.lerp(column_means, 1 - beta2)
    metric = adafactor_metric(rows / correction, columns / correction, eps)
    direction = project_metric(at, coordinates(at, momentum), metric)
    new = decayed_step(A, B, at, direction, step_size, decay, retraction)
    new = rounded(new, stored)
    carried = transport(at, momentum, new.A, new.B)
    return new, TangentMoments(carried, rows, columns)


class TangentAdam(LayerwiseOptimizer):
    r"""Adam along the projected full gradient, with half of the state of AdamW on the adapters.

    Everything it keeps belongs to the weight $W$ and not to the factors, so the sequence of weights is the same for
    $(B, A)$ and $(B R, R^{-1} A)$, to rounding. With rank $\min(m, n)$ it is Adafactor
    with momentum on $W$. The learning rate is that of **full fine-tuning**.

    From $B = 0$ no step is larger than others, but while $B A$ is no larger than a step it turns with every noisy
    gradient: at small ranks, and where much has to change, ``initialize(model, "orthogonal", size=1.0)`` first, as the
    recipe ``orthogonal+tangent`` does, was better (``docs/guides/when.md``).

    Args:
        lr: Learning rate in units of full fine-tuning's.
        retraction: ``"auto"``: orthographic while well-conditioned, else SVD, layer by layer; or one of them always.
        **common: ``betas``, ``eps``, ``weight_decay``, ``maximize``, ``foreach`` and ``on_nonfinite``, see
            `tangora.optim.PairOptimizer`; the decay is that of $B A$.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from tangora import TangentAdam
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = TangentAdam(model, lr=1e-4)
        >>> model(torch.randn(5, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        retraction: Retraction = "auto",
        **common: Unpack[CommonOptions],
    ):
        own = {"retraction": retraction}
        super().__init__(params, lr, own, **common)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_choice("retraction", group["retraction"], RETRACTIONS)

    def _may_guess(self, group: dict[str, Any]) -> bool:
        return group["retraction"] != "svd"

    def _state_shapes(self, pair: LoraPair, group: dict[str, Any]) -> StateShapes:  # noqa: ARG002
        m, n, r = pair.shape
        return {
            "A": {"exp_avg": (r, n), "exp_avg_sq_col": (n,)},
            "B": {"exp_avg": (m, r), "exp_avg_sq_row": (m,)},
        }

    def _step_stack(self, stack: PairStack, here: Loaded, group: dict[str, Any]) -> tuple[FactorA, FactorB]:
        moments = TangentMoments(
            stack.both("exp_avg"),
            stack.state("B", "exp_avg_sq_row"),
            stack.state("A", "exp_avg_sq_col"),
        )
        beta1, beta2 = group["betas"]
        factors, moments = self._pure(tangent_adam_step)(
            here.A,
            here.B,
            here.gradient,
            moments,
            step_size=self._number(group["lr"] / here.scaling / (1 - beta1**here.step), stack),
            correction=self._number(1 - beta2**here.step, stack),
            decay=self._number(1 - group["lr"] * group["weight_decay"], stack),
            betas=group["betas"],
            eps=group["eps"],
            retraction=group["retraction"],
            stored=stack.dtype,
        )
        stack.keep("A", exp_avg=moments.momentum.A, exp_avg_sq_col=moments.columns)
        stack.keep("B", exp_avg=moments.momentum.B, exp_avg_sq_row=moments.rows)
        return factors
