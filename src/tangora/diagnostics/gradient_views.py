r"""The gradient of every adapted layer where a model stands: how large, of which rank, and what an adapter sees of it.

$G = \partial L/\partial W$ is the gradient of the weight that acts, adapter included, so that it is the same quantity
for every method, and for a model without adapters.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tangora.adapters import LoraPair
from tangora.diagnostics.alignment import entropy_rank, factor_gradient_norms
from tangora.diagnostics.gradient_reading import ADAPTER, How, fit_into_memory, read_gradients
from tangora.diagnostics.motion import Angles, Track, principal_angles
from tangora.diagnostics.rank_plan import LayerGradient
from tangora.geometry.sketch import LowRankSVD
from tangora.init.start_method import Factors
from tangora.probes import ProbedLayer, as_batches, probed_layers
from tangora.probes.layers import unreadable_layers

_ITERATIONS = 2  # the leading subspace itself is wanted, and not only its energy


@dataclass(frozen=True)
class GradientView:
    r"""The gradient $G$ of one layer, and the adapter on it if there is one."""

    spectrum: LayerGradient
    rank: int
    """Of the adapter, or of the one that the layer could have."""
    captured: float | None = None
    r"""$\|P_T(G)\|_F^2$; ``None``, as all that follows, without an adapter."""
    left: Angles | None = None
    r"""Between the columns of $B$ and the $r$ leading left singular vectors of $G$; ``None`` at $B = 0$."""
    right: Angles | None = None
    r"""Between the rows of $A$ and the $r$ leading right singular vectors."""
    norm_A: float | None = None
    r"""$\|\partial L/\partial A\|_F$."""
    norm_B: float | None = None
    r"""$\|\partial L/\partial B\|_F$."""

    @property
    def energy(self) -> float:
        r"""$\|G\|_F^2$."""
        return self.spectrum.energy

    @property
    def alignment_error(self) -> float | None:
        r"""$\varepsilon = \|G - P_T(G)\|_F$."""
        return None if self.captured is None else math.sqrt(max(self.energy - self.captured, 0.0))

    @property
    def reachable(self) -> float | None:
        r"""$\sum_{i \le 2r} \sigma_i^2$, the most that any adapter of the rank captures; ``None`` where not known."""
        known = self.spectrum.complete or self.rank <= self.spectrum.largest_rank
        return self.spectrum.reachable(self.rank) if known else None

    @property
    def stable_rank(self) -> float:
        r"""$\|G\|_F^2 / \|G\|_2^2$; 0 for a zero gradient."""
        largest = self.spectrum.singular_values[0]
        return self.energy / largest**2 if largest > 0 else 0.0

    @property
    def effective_rank(self) -> float | None:
        """Exponential of the entropy of the singular values; ``None`` where not all are known."""
        values = torch.tensor(self.spectrum.singular_values, dtype=torch.float64)
        return entropy_rank(values) if self.spectrum.complete else None


def gradient_views(
    model: nn.Module, pairs: Sequence[LoraPair], batches: Iterable[Any], *, seed: int = 0
) -> tuple[dict[str, GradientView], float]:
    r"""Read the gradient of the adapted model as it is, and look at it through its adapters.

    Takes seven passes over the batches; the model, its gradients and all random states are left as they were. Energies
    and spectra are exact where all gradients together take at most 1 GiB, else estimated from random probes.
    """
    layers = probed_layers(model, adapter_name=pairs[0].adapter)
    angles: dict[str, tuple[Angles | None, Angles | None]] = {}

    def propose(layer: ProbedLayer, gradient: LowRankSVD) -> dict[str, Factors]:
        assert layer.pair is not None
        A, B, _ = layer.pair.moving_factors()
        leading = gradient.truncate(layer.pair.shape[2])
        angles[layer.name] = principal_angles(leading.U, B), principal_angles(leading.Vh.mT, A.mT)
        return {ADAPTER: (A, B)}

    ranks = {pair.name: pair.shape[2] for pair in pairs}
    found, loss = read_gradients(
        model, layers, as_batches(batches), propose, _how(layers, ranks, _ITERATIONS, seed)
    )
    views = {}
    for layer in (layer for layer in layers if layer.name in found):
        assert layer.pair is not None
        read, (A, B, row_scale) = found[layer.name], layer.pair.moving_factors()
        assert read.own is not None
        # a DoRA layer's B moves the weight by D B, and has the gradient s D G A'
        norms = factor_gradient_norms(
            A.cpu(),
            B.cpu(),
            *read.own,
            scaling=layer.pair.scaling,
            row_scale=None if row_scale is None else row_scale.cpu(),
        )
        views[layer.name] = GradientView(
            read.spectrum, ranks[layer.name], read.captured[ADAPTER], *angles[layer.name], *norms
        )
    return views, loss


def weight_views(
    model: nn.Module, tracks: Sequence[Track], batches: Iterable[Any], *, rank: int, seed: int = 0
) -> tuple[dict[str, GradientView], float]:
    """Read the gradient of a model without adapters, in the layers that are followed.

    Takes three passes over the batches, or five where the gradients together take more than 1 GiB.

    Args:
        rank: Of the adapters that the model could have.
    """
    modules, unreadable = dict(model.named_modules()), unreadable_layers(model, None)
    layers = [
        ProbedLayer(track.name, modules[track.name], *track.shape)
        for track in tracks
        if track.name not in unreadable
    ]
    ranks = {layer.name: rank for layer in layers}
    # without angles only the estimates of a model that is too large for dense gradients need the iteration
    how = _how(layers, ranks, 0 if fit_into_memory(layers) else 1, seed)
    found, loss = read_gradients(model, layers, as_batches(batches), lambda *_: {}, how)
    return {name: GradientView(read.spectrum, rank) for name, read in found.items()}, loss


def _how(layers: Sequence[ProbedLayer], ranks: Mapping[str, int], iterations: int, seed: int) -> How:
    dense, widest = fit_into_memory(layers), max(ranks.values())
    return How(
        # of a spectrum that is not read whole as much as an adapter could reach
        num_values=widest if dense else 2 * widest,
        exact_norms=dense,
        power_iterations=iterations,
        seed=seed,
        all_values=True,
    )
