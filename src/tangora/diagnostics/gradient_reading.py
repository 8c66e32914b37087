r"""Read one model's gradients once for everything: spectra, norms, and the parts that any number of adapters capture.

The orthonormal bases of all adapters of a layer are stacked into one request, so that one pass over the batches shows
$U^\top G$ and $G V^\top$ for all of them; the exact norm comes from the same pass where it is wanted.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangora._types import LossFn, Progress
from tangora.diagnostics.alignment import bases, captured
from tangora.diagnostics.rank_plan import LayerGradient
from tangora.geometry.sketch import LowRankSVD, outside_energy
from tangora.geometry.tangent import Coordinates, Frame
from tangora.init.start_method import StartFactors
from tangora.probes import (
    GradientProbe,
    GradientSVD,
    ProbedLayer,
    Reading,
    Request,
    gradient_svds,
)
from tangora.probes.singular_values import within_memory

ADAPTER = "adapter"
"""Label of a model's own adapter."""

MEMORY = 512 * 2**20  # bytes of dense gradients held at once
# float32 gradients up to this many bytes in all are formed for their norms, in two or three passes
_EXACT_LIMIT = 2**30
_TAIL_PROBES = 8
_OTHER_STREAM = 1 << 50  # so that no random vectors are used twice

Propose = Callable[[ProbedLayer, LowRankSVD], dict[str, StartFactors]]
"""``(layer, leading part of its gradient)`` -> adapters by label."""


@dataclass(frozen=True)
class How:
    """Options of reading gradients."""

    num_values: int
    """Singular values wanted of each layer."""
    exact_norms: bool
    """Whether dense gradients are formed, a few layers at a time."""
    power_iterations: int
    seed: int
    loss_fn: LossFn | None = None

    def passes(self, layers: Sequence[ProbedLayer]) -> int:
        """Return how often the batches are read for one point."""
        return 2 * (self.power_iterations + 1) + len(self.groups(layers))

    def groups(self, layers: Sequence[ProbedLayer]) -> list[Sequence[ProbedLayer]]:
        """Return the layers that are read together in the last passes."""
        return [*within_memory(layers, MEMORY)] if self.exact_norms else [layers]


def fit_into_memory(layers: Sequence[ProbedLayer]) -> bool:
    """Say whether gradients should be formed for their exact norms if the user has not decided."""
    return sum(4 * layer.m * layer.n for layer in layers) <= _EXACT_LIMIT


class _View(NamedTuple):
    """The products of a layer's gradient with the bases of one adapter."""

    at: Frame
    seen: Coordinates

    @property
    def captured(self) -> float:
        r"""$\|P_T(G)\|_F^2$."""
        return captured(self.at, self.seen)


@dataclass
class ReadLayer:
    """All that was read of one layer's gradient."""

    spectrum: LayerGradient
    captured: dict[str, float] = field(default_factory=dict)
    """Energy by label."""
    own: _View | None = None
    """Through the model's own adapter, if it has one."""
    held_out: "HeldOutEnergy | None" = None


class HeldOutEnergy(NamedTuple):
    """The energy of the gradient on other examples, and the parts of it that the same adapters capture."""

    energy: float
    energy_error: float
    captured: dict[str, float]


def read_gradients(
    model: nn.Module,
    layers: Sequence[ProbedLayer],
    batches: Iterable[Any],
    propose: Propose,
    how: How,
    *,
    progress: Progress | None = None,
    held_out: Iterable[Any] | None = None,
) -> tuple[dict[str, ReadLayer], float]:
    """Read the gradients of a model as it is."""
    spectra = gradient_svds(
        model,
        batches,
        how.num_values,
        layers=layers,
        power_iterations=how.power_iterations,
        seed=how.seed,
        loss_fn=how.loss_fn,
        progress=progress or False,
    )
    layers = [layer for layer in layers if layer.name in spectra]  # those that the model calls
    if not layers:
        return {}, math.nan
    stacks = {
        layer.name: _stack(propose(layer, spectra[layer.name].svd), spectra[layer.name].svd, how)
        for layer in layers
    }
    found: dict[str, ReadLayer] = {}
    with GradientProbe(model, layers, loss_fn=how.loss_fn, progress=progress) as probe:
        for group in how.groups(layers):
            readings = probe.read(batches, {layer.name: stacks[layer.name].request for layer in group})
            for layer in group:
                reading = readings.pop(layer.name)
                views = stacks[layer.name].views(reading)
                found[layer.name] = ReadLayer(
                    _spectrum(layer, spectra[layer.name], reading, how),
                    {label: view.captured for label, view in views.items()},
                    views.get(ADAPTER),
                )
        loss = probe.loss
        assert loss is not None
        for group in how.groups(layers) if held_out is not None else ():
            wider = {
                layer.name: _Wider(layer, stacks[layer.name], spectra[layer.name].svd, how) for layer in group
            }
            readings = probe.read(held_out or (), {name: each.request for name, each in wider.items()})
            for name, each in wider.items():
                found[name].held_out = each.energies(readings.pop(name))
    return found, loss


@dataclass(frozen=True)
class _Stack:
    """The bases of several adapters side by side."""

    request: Request
    widths: Mapping[str, tuple[int, int]]
    """Columns of $U$ and rows of $V$ by label."""

    def views(self, reading: Reading) -> dict[str, _View]:
        views, left, right = {}, 0, 0
        for label, (columns, rows) in self.widths.items():
            on_left, on_right = slice(left, left + columns), slice(right, right + rows)
            assert self.request.left is not None
            assert self.request.right is not None
            U, V = self.request.left[:, on_left].double(), self.request.right[:, on_right].mT.double()
            by_U, by_V = reading.left[on_left].to(U), reading.right[:, on_right].to(U)
            # bases of different widths (B = 0 has none) are filled up with zeros, as in every frame
            more_U, more_V = (max(columns, rows) - width for width in (columns, rows))
            none = U.new_zeros(0, 0)
            at = Frame(F.pad(U, (0, more_U)), F.pad(V, (0, 0, 0, more_V)), none, none)
            seen = Coordinates(F.pad(by_U, (0, 0, 0, more_U)), F.pad(by_V, (0, more_V)))
            views[label] = _View(at, seen)
            left, right = left + columns, right + rows
        return views


class _Wider:
    """A stack, and what tells the energy of a gradient whose spectrum has not been read."""

    def __init__(self, layer: ProbedLayer, stack: _Stack, svd: LowRankSVD, how: How):
        self._stack = stack
        self._leading = leading = svd.U
        self.request = stack.request
        if not how.exact_norms:
            # most of the energy lies along the leading directions on the first examples, and the rest is sampled
            generator = torch.Generator().manual_seed(how.seed ^ _OTHER_STREAM)
            probes = torch.randn(layer.n, _TAIL_PROBES, generator=generator, dtype=leading.dtype)
            self.request = Request(_beside(stack.request.right, probes), _beside(stack.request.left, leading))

    def energies(self, reading: Reading) -> HeldOutEnergy:
        captured = {label: view.captured for label, view in self._stack.views(reading).items()}
        if self.request.dense:
            return HeldOutEnergy(_energy(reading.dense), 0.0, captured)
        along = reading.left[-self._leading.shape[1] :]
        tail, error = outside_energy(self._leading, reading.right[:, -_TAIL_PROBES:])
        return HeldOutEnergy(_energy(along) + float(tail), float(error), captured)


def _beside(stacked: Tensor | None, more: Tensor) -> Tensor:
    return more if stacked is None else torch.cat([stacked, more.to(stacked)], dim=1)


def _energy(matrix: Tensor) -> float:
    return float(matrix.double().square().sum())


def _stack(proposed: Mapping[str, StartFactors], svd: LowRankSVD, how: How) -> _Stack:
    frames = {label: _narrow(bases(A.cpu(), B.cpu()), svd.S.dtype) for label, (A, B) in proposed.items()}
    widths = {label: (U.shape[1], V.shape[0]) for label, (U, V) in frames.items()}
    left = torch.cat([U for U, _ in frames.values()], dim=1) if frames else None
    right = torch.cat([V for _, V in frames.values()]).mT if frames else None
    return _Stack(Request(right, left, dense=how.exact_norms), widths)


def _narrow(at: Frame, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # directions that a factor lacks are zero in its basis, and need not be read
    return at.U[:, at.U.any(0)].to(dtype), at.V[at.V.any(1)].to(dtype)


def _spectrum(layer: ProbedLayer, read: GradientSVD, reading: Reading, how: How) -> LayerGradient:
    values = read.svd.S.tolist()
    if len(values) < min(layer.m, layer.n):
        values = values[: how.num_values]  # the rest is oversampling, and rough
    found = LayerGradient(layer.m, layer.n, tuple(values), read.energy, read.energy_error)
    if not how.exact_norms:
        return found
    return replace(found, energy=_energy(reading.dense), energy_error=0.0)
