r"""LoRA-Muon: each factor's momentum is orthogonalised where the other factor has been made orthonormal.

Source: arXiv:2606.12921. Differs in: the step is divided by the scaling $s$, so that ``lr`` bounds the change of the
weight and not that of $B A$; singular Gram matrices (at $B = 0$) have pseudo-inverses.
"""

from typing import Any

from tangora._types import FactorA, FactorB
from tangora.geometry.retraction import Factors
from tangora.geometry.spectral import thin_polar
from tangora.geometry.tangent import Cotangent, coordinates, frame
from tangora.optim.factor_momentum import FactorMomentumOptimizer
from tangora.optim.stack import Loaded, PairStack


def lora_muon_step(A: FactorA, B: FactorB, momentum: Cotangent, *, step_size: float, decay: float) -> Factors:
    r"""Return the factors after one step on $Y = B A$.

    $\Delta A = -\tfrac{\eta}{2} S_B^{-1/2} \mathrm{msign}(S_B^{-1/2} M_A)$ with $S_B = B^\top B$, and its mirror image.
    """
    at = frame(A, B)
    left, right = coordinates(at, momentum)
    keep = decay**0.5
    half = step_size / (2 * keep)
    return Factors(
        keep * A - half * (at.whiten_B @ thin_polar(left)),
        keep * B - half * (at.whiten_A @ thin_polar(right.mT)).mT,
    )


class LoRAMuon(FactorMomentumOptimizer):
    r"""LoRA-Muon, a spectral method like `TangentMuon`; weight decay on $B A$. Options: `FactorMomentumOptimizer`'s."""

    def _step_stack(self, stack: PairStack, here: Loaded, group: dict[str, Any]) -> tuple[FactorA, FactorB]:
        momentum = self._averaged(stack, here.gradient, group["momentum"])
        step_size = group["lr"] / here.scaling
        decay = 1 - group["lr"] * group["weight_decay"]
        return lora_muon_step(here.A, here.B, momentum, step_size=step_size, decay=decay)
