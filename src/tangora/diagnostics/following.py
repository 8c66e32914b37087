r"""What trained adapters see of the gradient where they stand: $\kappa$, $\varepsilon$, and angles to its subspaces."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair, magnitude_scale
from tangora.diagnostics.alignment import captured_share
from tangora.diagnostics.measure import How, fit_into_memory, measure
from tangora.diagnostics.motion import Angles, principal_angles
from tangora.geometry.sketch import LowRankSVD
from tangora.probes import ProbedLayer, as_batches, probed_layers

_ADAPTER = "adapter"
_POWER_ITERATIONS = 2  # the leading subspace itself is wanted, and not only its energy


@dataclass(frozen=True)
class GradientView:
    r"""One adapter and the gradient $G$ of its layer.

    Attributes:
        energy: $\|G\|_F^2$.
        captured: $\|P_T(G)\|_F^2$.
        left: Between the columns of $B$ and the $r$ leading left singular vectors of $G$; ``None`` at $B = 0$.
        right: Between the rows of $A$ and the $r$ leading right singular vectors.
    """

    energy: float
    captured: float
    left: Angles | None
    right: Angles | None

    @property
    def captured_energy(self) -> float:
        r"""$\kappa = \|P_T(G)\|_F^2 / \|G\|_F^2$."""
        return captured_share(self.captured, self.energy)

    @property
    def alignment_error(self) -> float:
        r"""$\varepsilon = \|G - P_T(G)\|_F$."""
        return math.sqrt(max(self.energy - self.captured, 0.0))


def gradient_views(
    model: nn.Module, pairs: Sequence[LoraPair], batches: Iterable[Any], *, seed: int = 0
) -> tuple[dict[str, GradientView], float]:
    """Read the gradient of the adapted model as it is, and look at it through its adapters.

    Takes seven passes over the batches; the model, its gradients and all random states are left as they were. The
    energy is exact where all gradients together take at most 1 GiB, else estimated from random probes.
    """
    by_name = {pair.name: pair for pair in pairs}
    layers = probed_layers(model, adapter_name=pairs[0].adapter)
    angles: dict[str, tuple[Angles | None, Angles | None]] = {}

    def propose(layer: ProbedLayer, gradient: LowRankSVD) -> dict[str, tuple[FactorA, FactorB]]:
        pair = by_name[layer.name]
        A, B = moving_factors(pair)
        leading = gradient.truncate(pair.shape[2])
        angles[layer.name] = principal_angles(leading.U, B), principal_angles(leading.Vh.mT, A.mT)
        return {_ADAPTER: (A, B)}

    how = How(
        num_values=max(pair.shape[2] for pair in pairs),
        exact_norms=fit_into_memory(layers),
        power_iterations=_POWER_ITERATIONS,
        seed=seed,
        loss_fn=None,
    )
    found, loss = measure(
        model, layers, as_batches(batches), propose, how, keep=_ADAPTER, heard=lambda _: None
    )
    views = {
        name: GradientView(measured.spectrum.energy, measured.captured[_ADAPTER], *angles[name])
        for name, measured in found.items()
    }
    return views, loss


def moving_factors(pair: LoraPair) -> tuple[FactorA, FactorB]:
    r"""Return the factors along which a layer's weight moves, $D B$ and $A$ for a DoRA layer."""
    A, B = pair.factors()
    scale = magnitude_scale(pair)
    return A, B if scale is None else scale[:, None] * B.to(scale)
