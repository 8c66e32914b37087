r"""The gradient of every adapted layer of a model: its size, its rank, and the part that an adapter captures.

$G = \partial L/\partial W$ is the gradient of the weight that acts, adapter included, so that it is the same quantity
for every method, and for a model without adapters.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tangora._types import Weight
from tangora.adapters import LoraPair
from tangora.diagnostics.alignment import bases, captured, entropy_rank, factor_gradient_norms
from tangora.diagnostics.gradient_reading import ADAPTER, MEMORY, How, fit_into_memory, read_gradients
from tangora.diagnostics.motion import Angles, Track, principal_angles
from tangora.diagnostics.rank_plan import LayerGradient
from tangora.geometry.sketch import LowRankSVD
from tangora.geometry.tangent import Coordinates, Frame
from tangora.init.start_method import StartFactors
from tangora.probes import GradientProbe, ProbedLayer, Request, as_batches, probed_layers
from tangora.probes.layers import unreadable_layers
from tangora.probes.singular_values import within_memory

_ITERATIONS = 2  # the leading subspace itself is wanted, and not only its energy


@dataclass(frozen=True)
class GradientView:
    r"""The gradient $G$ of one layer, and the adapter on it if there is one."""

    spectrum: LayerGradient
    rank: int
    """Rank of the adapter, or of the one that the layer could have."""
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

    Where all gradients together take at most 1 GiB they are formed, in one or two passes over the batches, and all is
    exact; else it is estimated from random probes in seven. The model, its gradients and all random states are left as
    they were.
    """
    layers = probed_layers(model, adapter_name=pairs[0].adapter)
    ranks = {pair.name: pair.shape[2] for pair in pairs}
    return _views(model, layers, ranks, batches, seed)


def weight_views(
    model: nn.Module, tracks: Sequence[Track], batches: Iterable[Any], *, rank: int, seed: int = 0
) -> tuple[dict[str, GradientView], float]:
    """Read the gradient of a model without adapters in the layers that are followed, as `gradient_views` does.

    Args:
        rank: Rank of the adapters that the model could have.
    """
    modules, unreadable = dict(model.named_modules()), unreadable_layers(model, None)
    layers = [
        ProbedLayer(track.name, modules[track.name], *track.shape)
        for track in tracks
        if track.name not in unreadable
    ]
    return _views(model, layers, {layer.name: rank for layer in layers}, batches, seed)


def _views(
    model: nn.Module,
    layers: Sequence[ProbedLayer],
    ranks: Mapping[str, int],
    batches: Iterable[Any],
    seed: int,
) -> tuple[dict[str, GradientView], float]:
    batches = as_batches(batches)
    if fit_into_memory(layers):
        return _exact(model, layers, ranks, batches)
    return _estimated(model, layers, ranks, batches, seed)


def _exact(
    model: nn.Module, layers: Sequence[ProbedLayer], ranks: Mapping[str, int], batches: Iterable[Any]
) -> tuple[dict[str, GradientView], float]:
    views = {}
    with GradientProbe(model, layers) as probe:
        for group in within_memory(layers, MEMORY):
            readings = probe.read(batches, {layer.name: Request(dense=True) for layer in group})
            for layer in (layer for layer in group if layer.name in probe.reached):
                views[layer.name] = _of_dense(layer, ranks[layer.name], readings.pop(layer.name).dense)
        assert probe.loss is not None
        return views, probe.loss


def _of_dense(layer: ProbedLayer, rank: int, G: Weight) -> GradientView:
    if layer.pair is None:
        return GradientView(_spectrum(layer, torch.linalg.svdvals(G), G), rank)
    svd = LowRankSVD(*torch.linalg.svd(G, full_matrices=False))
    at = bases(*layer.pair.moving_factors()[:2])
    seen = Coordinates(at.U.mT @ G.to(at.U), G.to(at.V) @ at.V.mT)
    return _through_adapter(layer, _spectrum(layer, svd.S, G), svd, captured(at, seen), at, seen)


def _spectrum(layer: ProbedLayer, values: Tensor, G: Weight) -> LayerGradient:
    return LayerGradient(layer.m, layer.n, tuple(values.tolist()), float(G.double().square().sum()))


def _estimated(
    model: nn.Module,
    layers: Sequence[ProbedLayer],
    ranks: Mapping[str, int],
    batches: Iterable[Any],
    seed: int,
) -> tuple[dict[str, GradientView], float]:
    leading: dict[str, LowRankSVD] = {}

    def propose(layer: ProbedLayer, gradient: LowRankSVD) -> dict[str, StartFactors]:
        leading[layer.name] = gradient
        return {} if layer.pair is None else {ADAPTER: layer.pair.moving_factors()[:2]}

    # as much of the spectrum as an adapter could reach
    how = How(2 * max(ranks.values()), exact_norms=False, power_iterations=_ITERATIONS, seed=seed)
    found, loss = read_gradients(model, layers, batches, propose, how)
    views = {}
    for layer in (layer for layer in layers if layer.name in found):
        read, svd = found[layer.name], leading[layer.name]
        if read.own is None:
            views[layer.name] = GradientView(read.spectrum, ranks[layer.name])
        else:
            views[layer.name] = _through_adapter(layer, read.spectrum, svd, read.captured[ADAPTER], *read.own)
    return views, loss


def _through_adapter(
    layer: ProbedLayer,
    spectrum: LayerGradient,
    svd: LowRankSVD,
    energy: float,
    at: Frame,
    seen: Coordinates,
) -> GradientView:
    assert layer.pair is not None
    rank, (A, B, row_scale) = layer.pair.shape[2], layer.pair.moving_factors()
    leading = svd.truncate(rank)
    A, B = A.to(at.U), B.to(at.U)
    norms = factor_gradient_norms(
        A,
        B,
        at,
        seen,
        scaling=layer.pair.scaling,
        row_scale=None if row_scale is None else row_scale.to(at.U),
    )
    angles = principal_angles(leading.U, B), principal_angles(leading.Vh.mT, A.mT)
    return GradientView(spectrum, rank, energy, *angles, *norms)
