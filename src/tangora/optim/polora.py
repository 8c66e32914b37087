r"""PoLoRA: spectral steps of the factors, preconditioned by the other factor and by estimates of curvature.

Source: Ghosh, Parshakova, Gower, arXiv:2607.17620. Differs in: the step is divided by the scaling $s$, so that ``lr``
bounds the change of the weight; norms and roots are exact instead of iterated (the authors take eight iterations).
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair
from tangora.geometry.gram import damped_whiten, gram, times
from tangora.geometry.retraction import Factors
from tangora.geometry.spectral import thin_polar
from tangora.geometry.tangent import Cotangent
from tangora.optim.factor_momentum import FactorMomentumOptimizer
from tangora.optim.stack import Loaded, PairStack, StateShapes

_CURVATURE_DECAY = 0.99
_RIDGE = 1e-4
_TINY = 1e-12


class _Curvature(NamedTuple):
    """Averages of squared gradients over the rank, as the other factor's inverse Gram matrix weighs them."""

    rows: Float[Tensor, "*b m"]
    columns: Float[Tensor, "*b n"]


def polora_step(
    A: FactorA, B: FactorB, gradient: Cotangent, ahead: Cotangent, curvature: _Curvature, step_size: float
) -> tuple[Factors, _Curvature]:
    r"""Take one step on $Y = B A$.

    $D_A = C_B^{-1/2} \mathrm{msign}(C_B^{-1/2} M_A\, \mathrm{diag}\, q)\, \mathrm{diag}\, q$ for
    $C_B = B^\top \mathrm{diag}(p^{-2}) B$, and its mirror image; both of norm $\eta / (\sigma_1(A) + \sigma_1(B))$.
    """
    p, q = (_root(each) for each in curvature)
    Z_A, Z_B = _damped_root(gram(A / q[..., None, :])), _damped_root(gram((B / p[..., :, None]).mT))
    root_A, root_B = Z_A.to(A.dtype), Z_B.to(A.dtype)
    D_A = root_B @ thin_polar(root_B.mT @ (ahead.A * q[..., None, :])) * q[..., None, :]
    D_B = times(thin_polar((times(ahead.B * p[..., :, None], root_A)).mT).mT, root_A.mT) * p[..., :, None]
    rate = step_size / (_norm(A) + _norm(B.mT))
    new = Factors(*(X - rate * D / _norm(S) for X, D, S in ((A, D_A, D_A), (B, D_B, D_B.mT))))
    columns = (root_B.mT @ gradient.A).square().sum(-2)
    rows = times(gradient.B, root_A).square().sum(-1)
    weight = (1 - _CURVATURE_DECAY) / A.shape[-2]
    return new, _Curvature(
        _CURVATURE_DECAY * curvature.rows + weight * rows,
        _CURVATURE_DECAY * curvature.columns + weight * columns,
    )


def _root(curvature: Tensor) -> Tensor:
    largest = curvature.amax(-1, keepdim=True).clamp(min=torch.finfo(curvature.dtype).tiny)
    return (curvature / largest + _RIDGE).rsqrt()


def _damped_root(matrix: Tensor) -> Tensor:
    """Return Z with Z Z' the inverse of the damped matrix."""
    largest = torch.linalg.eigvalsh(matrix)[..., -1, None, None]
    return damped_whiten(matrix, (_RIDGE * largest).clamp(min=_TINY))


def _norm(wide: Tensor) -> Tensor:
    """Return the spectral norm of a matrix with few rows, at least a tiny number."""
    largest = torch.linalg.eigvalsh(gram(wide))[..., -1, None, None]
    return largest.clamp(min=0).sqrt().to(wide.dtype).clamp(min=torch.finfo(wide.dtype).tiny)


class PoLoRA(FactorMomentumOptimizer):
    """PoLoRA, an alternative to `TangentMuon`. Options: `FactorMomentumOptimizer`'s.

    The step looks ahead. Weight decay, which the authors do not have, is that of the factors.
    """

    def _state_shapes(self, pair: LoraPair, group: dict[str, Any]) -> StateShapes:
        m, n, _ = pair.shape
        momentum = super()._state_shapes(pair, group)
        return {"A": {**momentum["A"], "curvature": (n,)}, "B": {**momentum["B"], "curvature": (m,)}}

    def _step_stack(self, stack: PairStack, here: Loaded, group: dict[str, Any]) -> tuple[FactorA, FactorB]:
        beta = group["momentum"]
        gradient = Cotangent(*(g * here.scaling for g in here.gradient))  # autograd's own
        momentum = self._averaged(stack, gradient, beta)
        # the states start at zero, the authors' at a tiny number
        offset = _TINY * _CURVATURE_DECAY ** (here.step - 1)
        curvature = _Curvature(*(stack.state(factor, "curvature") + offset for factor in ("B", "A")))
        keep = 1 - group["lr"] * group["weight_decay"]
        factors, curvature = polora_step(
            here.A * keep,
            here.B * keep,
            gradient,
            Cotangent(*(g.lerp(m, beta) for g, m in zip(gradient, momentum, strict=True))),
            curvature,
            group["lr"] / here.scaling,
        )
        stack.keep("A", curvature=curvature.columns - offset * _CURVATURE_DECAY)
        stack.keep("B", curvature=curvature.rows - offset * _CURVATURE_DECAY)
        return factors
