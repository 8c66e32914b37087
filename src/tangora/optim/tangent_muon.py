r"""TangentMuon: Muon in the tangent space, without any matrix as large as the weight.

A combination of known parts, whose sources are: orthogonalised momentum (Muon, Jordan et al. 2024); its projection onto
the tangent space (Riemannion, arXiv:2507.12142; sMuon, arXiv:2608.14492) and alternating projections (LoRA-TSD,
arXiv:2609.02734); momentum kept in the tangent space and transported by projection, and a retraction, as in
`TangentAdam`. Derivation: ``docs/theory/tangent_muon.md``.
"""

import math
from typing import Any, Unpack

import torch
from torch import Tensor

from tangora._checks import check_choice, check_number, check_whole
from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair
from tangora.geometry.retraction import RETRACTIONS, Factors, Retraction, decayed_step, rounded
from tangora.geometry.spectral import spectral_direction
from tangora.geometry.tangent import Cotangent, frame, transport
from tangora.optim.base import CommonOptions
from tangora.optim.groups import Params
from tangora.optim.layerwise import LayerwiseOptimizer
from tangora.optim.stack import Loaded, PairStack, StateShapes, shaped_like_factors

_REFERENCE_RANK = 8


def spectral_step_size(m: int, n: int, r: int, lr: float) -> float:
    r"""Return the size of a step, about its spectral norm: $\mathrm{lr}\,\sqrt{m / n}\,\sqrt{8 / r}$.

    $\sqrt{m/n}$ turns norms into root mean squares: at rank 8 an input changes the layer's output by up to about ``lr``
    times its own root mean square, whatever the layer's size; a row of an embedding changes by up to about ``lr`` in
    root mean square. $\sqrt{8/r}$ keeps the Frobenius norm of the step the same at every rank. The tangent vector has
    at most $2 / \sqrt 3$ times this norm; while $B A$ is no larger than a step, the way back to rank r adds to it.
    """
    return lr * math.sqrt(m / n * _REFERENCE_RANK / r)


def tangent_muon_step(
    A: FactorA,
    B: FactorB,
    gradient: Cotangent,
    momentum: Cotangent,
    *,
    step_size: float | Tensor,
    decay: float | Tensor,
    beta: float,
    nesterov: bool,
    iterations: int,
    retraction: Retraction,
    stored: torch.dtype,
) -> tuple[Factors, Cotangent]:
    r"""Take one TangentMuon step on $Y = B A$."""
    at = frame(A, B)
    pairs = list(zip(momentum, gradient, strict=True))
    average = Cotangent(*(m.lerp_(g, 1 - beta) for m, g in pairs))
    ahead = Cotangent(*(g.lerp(m, beta) for m, g in pairs)) if nesterov else average
    direction = spectral_direction(at, ahead, iterations)
    new = decayed_step(A, B, at, direction, step_size, decay, retraction)
    new = rounded(new, stored)
    return new, transport(at, average, new.A, new.B)


class TangentMuon(LayerwiseOptimizer):
    r"""Muon along the projected momentum, with half of the state of AdamW on the adapters.

    Every step has the same size whatever the gradient's: its singular values are about
    $\mathrm{lr} \sqrt{m / n} \sqrt{8 / r}$ (`spectral_step_size`), so one learning rate serves all layers, ranks,
    alphas and scalings of the gradient. Everything that it keeps belongs to the weight and not to the factors: the
    sequence of weights is the same for $(B, A)$ and $(B R, R^{-1} A)$, to rounding, which grows with the condition
    number of $R$ and is that of every step's factors in bfloat16. With $B$ and $A$ of rank $\min(m, n)$ it is Muon on
    the weight. A layer whose gradient is exactly zero goes on along its momentum; one without gradient stays.

    Args:
        lr: How far a step moves a layer at rank 8: its output by about this share of the root mean square of its
            input, at most. It must decay towards the end of training, since steps do not shrink with the gradient.
            On causal language models begin with 0.005.
        momentum: Decay rate of the momentum.
        nesterov: Whether the step looks ahead along $\beta M + (1 - \beta) g$.
        iterations: Alternating projections between the spectral ball and the tangent space.
        retraction: ``"auto"``: orthographic while well-conditioned, else SVD, layer by layer; or one of them always.
        adamw_lr: Learning rate of AdamW for all parameters outside pairs, such as a new head.
        **common: ``betas``, ``eps``, ``weight_decay``, ``maximize``, ``foreach`` and ``on_nonfinite``, see
            `tangora.optim.PairOptimizer`; the decay is that of $B A$.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.9,
        nesterov: bool = True,
        iterations: int = 1,
        retraction: Retraction = "auto",
        adamw_lr: float | Tensor = 1e-3,
        **common: Unpack[CommonOptions],
    ):
        own = {
            "momentum": momentum,
            "nesterov": nesterov,
            "iterations": iterations,
            "retraction": retraction,
        }
        super().__init__(params, lr, own, adamw_lr, **common)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("momentum", group["momentum"], low=0, high=1, open_high=True)
        check_choice("nesterov", group["nesterov"], (True, False))
        check_whole("iterations", group["iterations"], low=1)
        check_choice("retraction", group["retraction"], RETRACTIONS)

    def _may_guess(self, group: dict[str, Any]) -> bool:
        return group["retraction"] != "svd"

    def _state_shapes(self, pair: LoraPair, group: dict[str, Any]) -> StateShapes:  # noqa: ARG002
        return shaped_like_factors(pair, "momentum_buffer")

    def _step_stack(self, stack: PairStack, here: Loaded, group: dict[str, Any]) -> tuple[FactorA, FactorB]:
        m, n, r = stack.pairs[0].shape
        width = 1 if stack.pairs[0].looks_up else n  # the norm of an embedding's input is one
        factors, momentum = self._pure(tangent_muon_step)(
            here.A,
            here.B,
            here.gradient,
            stack.both("momentum_buffer"),
            step_size=self._number(spectral_step_size(m, width, r, group["lr"]) / here.scaling, stack),
            decay=self._number(1 - group["lr"] * group["weight_decay"], stack),
            beta=group["momentum"],
            nesterov=group["nesterov"],
            iterations=group["iterations"],
            retraction=group["retraction"],
            stored=stack.dtype,
        )
        stack.keep("A", momentum_buffer=momentum.A)
        stack.keep("B", momentum_buffer=momentum.B)
        return factors
