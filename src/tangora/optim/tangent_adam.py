r"""TangentAdam: Adam on the equivalent gradient without any matrix of the weight's size.

A combination of known parts, whose sources are: the projected gradient of LoRA-Pro (arXiv:2407.18242); Adafactor's row
and column second moments (arXiv:1804.04235), here read off the factors; projection in that metric (AdaPreLoRA,
arXiv:2605.08734); momentum kept in the tangent space and transported by projection, and a retraction (Riemannion,
arXiv:2507.12142). Derivation: ``docs/theory/tangent_adam.md``.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._checks import check_choice
from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair
from tangora.geometry.retraction import RETRACTIONS, Factors, Retraction, decayed_step
from tangora.geometry.tangent import (
    Cotangent,
    Metric,
    coordinates,
    frame,
    project_metric,
    second_moments,
    transport,
)
from tangora.optim.base import LayerwiseOptimizer, OnNonfinite
from tangora.optim.groups import Params
from tangora.optim.stack import PairStack, StateShapes

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
    step: int,
    step_size: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
    retraction: Retraction,
    stored: torch.dtype,
) -> tuple[Factors, TangentMoments]:
    r"""Take one TangentAdam step on $Y = B A$."""
    beta1, beta2 = betas
    at = frame(A, B)
    seen = coordinates(at, gradient)
    momentum = Cotangent(*(m.lerp_(g, 1 - beta1) for m, g in zip(moments.momentum, gradient, strict=True)))
    rows, columns = (v.lerp(x, 1 - beta2) for v, x in zip(moments[1:], second_moments(at, seen), strict=True))
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    metric = adafactor_metric(rows / correction2, columns / correction2, eps)
    direction = project_metric(at, coordinates(at, momentum), metric)
    new = decayed_step(A, B, at, direction, step_size / correction1, decay, retraction)
    new = Factors(*(factor.to(stored).to(A.dtype) for factor in new))
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
        params: PEFT model, pairs, or parameter groups.
        lr: Learning rate in units of full fine-tuning's.
        betas: Decay rates of the momentum and of the second moments.
        eps: Added to the root of the second moment, in the gradient's units.
        weight_decay: Decoupled decay of $B A$, per unit of ``lr``.
        retraction: ``"auto"``: orthographic while well-conditioned, else SVD, layer by layer; or one of them always.
        maximize: Whether to climb instead of descend.
        foreach: ``None`` or ``True``: layers of equal shape take their step together as one stack, this library's
            counterpart of torch's ``foreach``; ``False``: one layer at a time.
        on_nonfinite: ``"raise"`` or ``"skip"`` the step when a gradient is not finite.

    Raises:
        InputError: For an option outside its range.

    Example:
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
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        retraction: Retraction = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "retraction": retraction,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults, on_nonfinite)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_choice("retraction", group["retraction"], RETRACTIONS)

    def _state_shapes(self, pair: LoraPair, group: dict[str, Any]) -> StateShapes:  # noqa: ARG002
        m, n, r = pair.shape
        return {
            "A": {"exp_avg": (r, n), "exp_avg_sq_col": (n,)},
            "B": {"exp_avg": (m, r), "exp_avg_sq_row": (m,)},
        }

    def _step_stack(self, stack: PairStack, group: dict[str, Any]) -> tuple[FactorA, FactorB]:
        moments = TangentMoments(
            Cotangent(stack.state("A", "exp_avg"), stack.state("B", "exp_avg")),
            stack.state("B", "exp_avg_sq_row"),
            stack.state("A", "exp_avg_sq_col"),
        )
        factors, moments = tangent_adam_step(
            stack.A,
            stack.B,
            stack.gradient,
            moments,
            step=stack.step,
            step_size=group["lr"] / stack.scaling,
            decay=1 - group["lr"] * group["weight_decay"],
            betas=group["betas"],
            eps=group["eps"],
            retraction=group["retraction"],
            stored=stack.pairs[0].A.dtype,
        )
        stack.keep("A", exp_avg=moments.momentum.A, exp_avg_sq_col=moments.columns)
        stack.keep("B", exp_avg=moments.momentum.B, exp_avg_sq_row=moments.rows)
        return factors
