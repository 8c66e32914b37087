r"""LoRA-Pro: steps along the projection of the full gradient onto LoRA's tangent space.

Source: Wang, Liang, He, Wang, Tan (ICLR 2025), LoRA-Pro: Are Low-Rank Adapters Properly Optimized?, arXiv:2407.18242.
Differs from the released code in: the true scaling $s$ (there fixed to 2), bias correction from step 1 (there from 2),
pseudo-inverses (there damped by 1e-8), no matrix larger than thin unless ``moments="weight"``, layers in batches.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor

from tangora._checks import InputError, check_choice, check_number, check_whole
from tangora._types import FactorA, FactorB, Weight
from tangora.adapters import LoraPair
from tangora.geometry.blocks import block_velocity
from tangora.geometry.gauge import GAUGES, Gauge, factor_velocity
from tangora.geometry.guess import doubt
from tangora.geometry.retraction import RETRACTIONS, Factors, Retraction, decayed_step
from tangora.geometry.sparse import sparse_velocity
from tangora.geometry.tangent import Cotangent, Frame, Tangent, coordinates, frame, project
from tangora.optim.adamw import adamw_factors, adamw_moments, adamw_update, step_counters
from tangora.optim.base import CommonOptions
from tangora.optim.groups import Params
from tangora.optim.layerwise import LayerwiseOptimizer
from tangora.optim.stack import Loaded, PairStack, StateShapes

Moments = Literal["weight", "factor"] | None
_MOMENTS = ("weight", "factor", None)
_LORA_PRO_RETRACTIONS = ("factors", *get_args(Retraction))

# m x n temporaries are made for a few layers at a time: the memory of a few layers, and little call overhead
_CHUNK_NUMBERS = 2**22


def equivalent_gradient(A: FactorA, B: FactorB, gradient: Cotangent) -> tuple[Frame, Tangent]:
    """Return the projection of the gradient onto the tangent space, and the frame there."""
    at = frame(A, B)
    return at, project(at, coordinates(at, gradient))


def adam_on_weight(
    at: Frame,
    tangent: Tangent,
    exp_avg: Weight,
    exp_avg_sq: Weight,
    factors: Factors,
    group: dict[str, Any],
    step: int,
) -> Cotangent:
    r"""Update Adam's moments of the equivalent gradient and return its direction as a cotangent.

    $U = \hat M / (\sqrt{\hat V} + \epsilon)$ with moments of $\tilde g = P_T(g)$; returns $(B^\top U, U A^\top)$.
    """
    basis = torch.cat([at.U.mT, tangent.J.mT], dim=-2)
    equivalent = basis.mT @ torch.cat([tangent.K, at.V], dim=-2)
    if equivalent.stride() != exp_avg.stride():  # as wide as the rank, moments are laid out as those of B
        equivalent = torch.empty_like(exp_avg).copy_(equivalent)
    # torch's fused AdamW does all of Adam in one pass over the four matrices: a unit step from zero is -U
    direction = torch.zeros_like(equivalent)
    unit_step = {**group, "lr": 1.0, "weight_decay": 0.0, "maximize": False}
    counters = step_counters([direction], step)
    adamw_update([direction], [equivalent], [exp_avg], [exp_avg_sq], counters, unit_step, unless=doubt())
    return Cotangent((factors.B.mT @ direction).neg_(), (direction @ factors.A.mT).neg_())


class LoRAPro(LayerwiseOptimizer):
    r"""LoRA-Pro as an ordinary optimizer, for any PEFT model, rank and scaling.

    The factors move so that $W$ moves by the projection of the full gradient (or of Adam's direction) onto the
    tangent space. The step of $W$ does not depend on alpha, so the learning rate is that of **full fine-tuning**, about
    a tenth of LoRA's.

    Args:
        lr: Learning rate in units of full fine-tuning's.
        moments: ``"weight"``: Adam on the equivalent gradient, two $m \times n$ states per layer (the paper's text and
            code); ``"factor"``: AdamW on the factors' directions, two states per factor (the memory that the paper
            reports), not with a retraction; ``None``: plain descent.
        gauge: How the step is shared between the factors: ``sylvester`` (paper) and ``lyapunov`` keep their balance;
            with ``zero`` and ``symmetric`` it drifts, and so does the gradients' norm, which clipping looks at.
        retraction: ``"factors"``: subtract from the factors (paper; from $B = 0$ the second step is large whatever
            ``lr``); ``"auto"``, ``"orthographic"``, ``"svd"``: move $W$ and come back to rank r, whatever the gauge.
        sparsity: Weight of an $\ell_1$ penalty on the factors' directions, in units of the smallest at which nothing
            moves: 0 is LoRA-Pro, 1 no step. Needs ``retraction="factors"`` and no factor moments. The state ``zeros``
            of a factor is the share of its entries that the last step left alone.
        sparse_iterations: Largest number of proximal-gradient iterations in a step; each costs as much as a projection.
        sparse_tolerance: Relative change of the directions at which it ends before.
        blocks: Into how many blocks the long sides of the factors are cut, each projected on its own: 1 is LoRA-Pro;
            more follow the gradient less well, and save nothing. Needs ``retraction="factors"`` and no sparsity.
        **common: ``betas``, ``eps``, ``weight_decay``, ``maximize``, ``foreach`` and ``on_nonfinite``, see
            `tangora.optim.PairOptimizer`; the decay is that of each factor with ``retraction="factors"``, else that of
            $B A$.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        moments: Moments = "weight",
        gauge: Gauge = "sylvester",
        retraction: Retraction | Literal["factors"] = "factors",
        sparsity: float = 0.0,
        sparse_iterations: int = 300,
        sparse_tolerance: float = 1e-6,
        blocks: int = 1,
        **common: Unpack[CommonOptions],
    ):
        own = {
            "moments": moments,
            "gauge": gauge,
            "retraction": retraction,
            "sparsity": sparsity,
            "sparse_iterations": sparse_iterations,
            "sparse_tolerance": sparse_tolerance,
            "blocks": blocks,
        }
        super().__init__(params, lr, own, **common)

    def _may_guess(self, group: dict[str, Any]) -> bool:
        # moments of the weight are updated in place, where only doubts of the frame, before, can stop that
        retraction = group["retraction"]
        if group["sparsity"] or group["blocks"] > 1:
            return False
        return retraction == "factors" or (retraction != "svd" and group["moments"] != "weight")

    def _may_deal(self, group: Mapping[str, Any]) -> bool:
        # moments of the weight stay where their rows are
        return group["moments"] != "weight"

    def _check_group(self, group: dict[str, Any]) -> None:
        check_choice("moments", group["moments"], _MOMENTS)
        check_choice("gauge", group["gauge"], GAUGES)
        check_choice("retraction", group["retraction"], _LORA_PRO_RETRACTIONS)
        if group["moments"] == "factor" and group["retraction"] in RETRACTIONS:
            raise InputError(
                "moments='factor' needs retraction='factors': a retraction changes the basis in which factor moments "
                f"are kept; got retraction={group['retraction']!r}"
            )
        check_number("sparsity", group["sparsity"], low=0)
        check_whole("sparse_iterations", group["sparse_iterations"], low=1)
        check_number("sparse_tolerance", group["sparse_tolerance"], low=0)
        if group["sparsity"] and (group["moments"] == "factor" or group["retraction"] != "factors"):
            raise InputError(
                "sparsity needs retraction='factors' and moments='weight' or None: a retraction, and moments of "
                f"factors, fill the zeros; got retraction={group['retraction']!r}, moments={group['moments']!r}"
            )
        check_whole("blocks", group["blocks"], low=1)
        if group["blocks"] > 1 and (group["sparsity"] or group["retraction"] != "factors"):
            raise InputError(
                "blocks above 1 need retraction='factors' and no sparsity; got "
                f"retraction={group['retraction']!r}, sparsity={group['sparsity']!r}"
            )

    def _state_shapes(self, pair: LoraPair, group: dict[str, Any]) -> StateShapes:
        m, n, _ = pair.shape
        if group["moments"] == "factor":
            return adamw_moments(pair)
        moments = {"exp_avg": (m, n), "exp_avg_sq": (m, n)} if group["moments"] == "weight" else {}
        zeros = {"zeros": ()} if group["sparsity"] else {}
        return {"A": zeros, "B": {**moments, **zeros}}

    def _step_stack(self, stack: PairStack, here: Loaded, group: dict[str, Any]) -> tuple[FactorA, FactorB]:
        A, B = here.A, here.B
        at, tangent = self._pure(equivalent_gradient)(A, B, here.gradient)
        cotangent = here.gradient
        if group["moments"] == "weight":
            cotangent = _weight_moments(stack, here, at, tangent, group)
            tangent = project(at, coordinates(at, cotangent))
        decay = 1 - group["lr"] * group["weight_decay"]
        if group["retraction"] in RETRACTIONS:
            return decayed_step(A, B, at, tangent, group["lr"] / here.scaling, decay, group["retraction"])
        if group["blocks"] > 1:
            velocity = block_velocity(at, coordinates(at, cotangent), group["blocks"])
        else:
            velocity = self._pure(factor_velocity)(A, B, at, tangent, group["gauge"])
        if group["sparsity"]:
            velocity = _sparse(stack, here, cotangent, Cotangent(*velocity), group)
        H_A, H_B = (H.div_(here.scaling) for H in velocity)
        if group["moments"] == "factor":
            return adamw_factors(stack, here, (H_A, H_B), group)
        _warn_of_a_jump(stack, here, H_A, group)
        return A * decay - group["lr"] * H_A, B * decay - group["lr"] * H_B


def _weight_moments(
    stack: PairStack, here: Loaded, at: Frame, tangent: Tangent, group: dict[str, Any]
) -> Cotangent:
    m, n, _ = stack.pairs[0].shape
    size = max(1, _CHUNK_NUMBERS // (m * n))
    own, directions = stack.rows_kept("exp_avg"), []
    rows = slice(None) if own is None else own.rows
    moments = zip(stack.rows_of("exp_avg", size), stack.rows_of("exp_avg_sq", size), strict=True)
    start = 0
    for exp_avg, exp_avg_sq in moments:
        some = slice(start, start + len(exp_avg))
        start = some.stop
        directions.append(
            adam_on_weight(
                Frame(at.U[some, rows], *(part[some] for part in at[1:])),
                Tangent(tangent.K[some], tangent.J[some, rows]),
                exp_avg,
                exp_avg_sq,
                Factors(here.A[some], here.B[some, rows]),
                group,
                here.step,
            )
        )
    seen = Cotangent(*(torch.cat(part) for part in zip(*directions, strict=True)))
    return seen if own is None else Cotangent(own.summed(seen.A), own.gathered(seen.B))


def _sparse(
    stack: PairStack, here: Loaded, cotangent: Cotangent, start: Cotangent, group: dict[str, Any]
) -> Cotangent:
    velocity = sparse_velocity(
        here.A,
        here.B,
        cotangent,
        start,
        group["sparsity"],
        iterations=group["sparse_iterations"],
        tolerance=group["sparse_tolerance"],
    )
    shares = [(H == 0).to(H.dtype).mean((-2, -1)) for H in velocity]
    stack.keep("A", zeros=shares[0])
    stack.keep("B", zeros=shares[1])
    return velocity


def _warn_of_a_jump(stack: PairStack, here: Loaded, H_A: FactorA, group: dict[str, Any]) -> None:
    # only the first steps after B = 0 can jump whatever the learning rate, so only they pay for the check
    if here.step > 3:
        return
    jump = group["lr"] * torch.linalg.matrix_norm(H_A) / torch.linalg.matrix_norm(here.A)
    if (jump > 1).any():
        worst = stack.own_pairs[int(jump.argmax())].name
        warnings.warn(
            f"step {here.step} changes A of {worst} by {jump.max():.1f} times its own norm: with B = 0 "
            "at initialization and retraction='factors' this happens at any learning rate; use "
            "retraction='auto' or a non-zero "
            "initialization",
            stacklevel=2,
        )
