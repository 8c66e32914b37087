r"""Read one model's gradients once for everything: spectra, norms, and what any number of adapters sees of them.

The orthonormal bases of all adapters of a layer are stacked into one request, so that one pass over the batches shows
$U^\top G$ and $G V^\top$ for all of them; the exact norm comes from the same pass where it is wanted.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangora._types import FactorA, FactorB, LossFn
from tangora.diagnostics.alignment import bases, captured
from tangora.diagnostics.ranks import Spectrum
from tangora.geometry.sketch import LowRankSVD
from tangora.geometry.tangent import Coordinates, Frame
from tangora.probes import (
    GradientProbe,
    GradientSpectrum,
    ProbedLayer,
    Reading,
    Request,
    gradient_spectra,
)
from tangora.probes.spectrum import grouped

_MEMORY = 512 * 2**20  # bytes of dense gradients held at once

Factors = tuple[FactorA, FactorB]
Propose = Callable[[ProbedLayer, LowRankSVD], dict[str, Factors]]
"""``(layer, leading part of its gradient)`` -> adapters by label."""


@dataclass(frozen=True)
class How:
    """How gradients are read.

    Attributes:
        num_values: Singular values wanted of each layer.
        exact_norms: Whether dense gradients are formed, a few layers at a time.
        power_iterations: Of the subspace iteration.
        seed: Of its random vectors.
        loss_fn: The user's loss.
    """

    num_values: int
    exact_norms: bool
    power_iterations: int
    seed: int
    loss_fn: LossFn | None

    def passes(self, layers: Sequence[ProbedLayer]) -> int:
        """Return how often the batches are read for one point.

        Args:
            layers: Which layers are read.

        Returns:
            The number of passes.
        """
        return 2 * (self.power_iterations + 1) + len(self.groups(layers))

    def groups(self, layers: Sequence[ProbedLayer]) -> list[Sequence[ProbedLayer]]:
        """Return the layers that are read together in the last passes.

        Args:
            layers: All of them.

        Returns:
            All in one, unless dense gradients have to fit into memory.
        """
        return [*grouped(layers, _MEMORY)] if self.exact_norms else [layers]


class View(NamedTuple):
    """What one adapter sees of a layer's gradient."""

    at: Frame
    seen: Coordinates

    @property
    def captured(self) -> float:
        r"""$\|P_T(G)\|_F^2$."""
        return captured(self.at, self.seen)


@dataclass
class Measured:
    """All that was read of one layer's gradient."""

    spectrum: Spectrum
    captured: dict[str, float] = field(default_factory=dict)
    """Energy by label."""
    views: dict[str, View] = field(default_factory=dict)
    """Of the labels that were to be kept."""


def measure(
    model: nn.Module,
    layers: Sequence[ProbedLayer],
    batches: Iterable[Any],
    propose: Propose,
    how: How,
    *,
    keep: str,
    heard: Callable[[int], None],
) -> tuple[dict[str, Measured], float]:
    """Read the gradients of a model as it is.

    Args:
        model: The model.
        layers: Which layers.
        batches: Model inputs.
        propose: The adapters to look through.
        how: Numbers.
        keep: Label whose view is kept.
        heard: Called after each batch.

    Returns:
        By name of the layer, and the mean loss.
    """
    spectra = gradient_spectra(
        model,
        batches,
        how.num_values,
        layers=layers,
        power_iterations=how.power_iterations,
        seed=how.seed,
        loss_fn=how.loss_fn,
        progress=lambda done, _: heard(done),
    )
    proposed = {layer.name: _stack(propose(layer, spectra[layer.name].svd), how) for layer in layers}
    found: dict[str, Measured] = {}
    with GradientProbe(model, layers, loss_fn=how.loss_fn, progress=heard) as probe:
        for group in how.groups(layers):
            readings = probe.read(batches, {layer.name: proposed[layer.name].request for layer in group})
            for layer in group:
                stack, reading = proposed.pop(layer.name), readings.pop(layer.name)
                spectrum = _spectrum(layer, spectra[layer.name], reading, how)
                views = stack.views(reading)
                found[layer.name] = Measured(
                    spectrum,
                    {label: view.captured for label, view in views.items()},
                    {label: view for label, view in views.items() if label == keep},
                )
        assert probe.loss is not None
        return found, probe.loss


@dataclass(frozen=True)
class _Stack:
    """The bases of several adapters side by side."""

    request: Request
    widths: Mapping[str, tuple[int, int]]
    """Columns of $U$ and rows of $V$ by label."""

    def views(self, reading: Reading) -> dict[str, View]:
        views, left, right = {}, 0, 0
        assert self.request.left is not None
        assert self.request.right is not None
        for label, (columns, rows) in self.widths.items():
            on_left, on_right = slice(left, left + columns), slice(right, right + rows)
            U, V = self.request.left[:, on_left].double(), self.request.right[:, on_right].mT.double()
            by_U, by_V = reading.left[on_left].to(U), reading.right[:, on_right].to(U)
            # bases of different widths (B = 0 has none) are filled up with zeros, as in every frame
            more_U, more_V = (max(columns, rows) - width for width in (columns, rows))
            none = U.new_zeros(0, 0)
            at = Frame(F.pad(U, (0, more_U)), F.pad(V, (0, 0, 0, more_V)), none, none)
            seen = Coordinates(F.pad(by_U, (0, 0, 0, more_U)), F.pad(by_V, (0, more_V)))
            views[label] = View(at, seen)
            left, right = left + columns, right + rows
        return views


def _stack(proposed: Mapping[str, Factors], how: How) -> _Stack:
    frames = {label: _narrow(bases(A.cpu(), B.cpu())) for label, (A, B) in proposed.items()}
    widths = {label: (U.shape[1], V.shape[0]) for label, (U, V) in frames.items()}
    left = torch.cat([U for U, _ in frames.values()], dim=1) if frames else None
    right = torch.cat([V for _, V in frames.values()]).mT if frames else None
    return _Stack(Request(right, left, dense=how.exact_norms), widths)


def _narrow(at: Frame) -> tuple[Tensor, Tensor]:
    # directions that a factor lacks are zero in its basis, and need not be read
    return at.U[:, at.U.any(0)], at.V[at.V.any(1)]


def _spectrum(layer: ProbedLayer, read: GradientSpectrum, reading: Reading, how: How) -> Spectrum:
    values = read.svd.S.tolist()
    if len(values) < min(layer.m, layer.n):
        values = values[: how.num_values]  # the rest is oversampling, and rough
    found = Spectrum(layer.m, layer.n, tuple(values), read.energy, read.energy_error)
    if not how.exact_norms:
        return found
    norm = float(torch.linalg.matrix_norm(reading.dense.double()))
    return replace(found, energy=norm**2, energy_error=0.0)
