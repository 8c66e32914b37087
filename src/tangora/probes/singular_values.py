r"""Singular values and vectors of the full gradient, by randomized subspace iteration through probes.

$Y = G\,\Omega \to Q = \mathrm{qr}(Y) \to C = Q^\top G$, optionally with power iterations in between. The same
$\Omega$ serves all batches, so that the products are those of the mean gradient; every pass replays the batches.
"""

import contextlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tangora._checks import InputError, check_kind, check_seed, check_whole
from tangora._types import LossFn, Progress
from tangora.geometry.sketch import (
    LowRankSVD,
    orthonormalize,
    outside_energy,
    svd_from_one_pass,
    svd_from_range,
)
from tangora.probes.batches import as_batches, num_batches
from tangora.probes.collective import collective, sum_over_ranks
from tangora.probes.gradient import GradientProbe, Request
from tangora.probes.layers import ProbedLayer, probed_layers

_OVERSAMPLING = 8
_TAIL_PROBES = 8  # random vectors that estimate the energy outside the triplets
# Of an adaptive reading: where the wanted triplets hold more than this share of the energy, the directions of one pass
# capture at least 95 % of what those of four passes do (benchmarks/start_time.json)
_ENOUGH = 0.7
_LEFT_SHARE = 7  # quarters: the left sketch is wider than the right one, for the least squares between them


@dataclass(frozen=True)
class GradientSVD:
    """The leading part of one layer's gradient."""

    svd: LowRankSVD
    """Leading singular triplets; the last few of them (the oversampling) are rough."""
    energy: float
    """Estimate of the squared Frobenius norm of the whole gradient."""
    energy_error: float
    """Its standard error; 0 where nothing lies outside the triplets."""
    passes: int = 1
    """Number of passes over the batches."""


@collective
def gradient_svds(
    model: nn.Module,
    batches: Iterable[Any],
    rank: int | Mapping[str, int],
    *,
    layers: Sequence[ProbedLayer] | None = None,
    oversampling: int | None = None,
    power_iterations: int | None = 1,
    one_pass: bool = False,
    seed: int = 0,
    loss_fn: LossFn | None = None,
    progress: Progress | bool = True,
) -> dict[str, GradientSVD]:
    r"""Estimate the leading singular triplets of the mean gradient of many layers at once.

    Takes ``2 (power_iterations + 1)`` passes over the batches, or one, or one to three. No gradient of a weight's size
    is formed.

    Args:
        model: PEFT or plain model, also quantized; left as it was found.
        batches: List, DataLoader or iterator of model inputs; 8 to 64 examples do.
        rank: Number of triplets wanted, for all layers or by name; at most ``min(m, n)`` are returned.
        layers: Which; default all adapted layers of a PEFT model, all linear layers of a plain one.
        oversampling: Additional directions, which make the wanted ones accurate. Default 8; with
            ``power_iterations=None`` five times the rank, but at most 80.
        power_iterations: Each takes two more passes and squares the decay of the spectrum. ``None``: one pass with wide
            sketches, and two more only if the wanted triplets seem to hold less than 70 % of the gradients' energy.
            That is for their directions; singular values of slowly falling spectra want power iterations.
        one_pass: Read the gradient once only (no replay of batches), at a larger error; no power iterations.
        seed: Seed of the random vectors; the global random state is neither used nor changed.
        loss_fn: ``loss_fn(model, batch)``; default the model's own loss.

    Returns:
        By name of the layer, on the model's device, in float32 (float64 for a float64 model); without layers that the
        model does not call with gradients on these batches.

    Raises:
        InputError: If there are no batches, or a number is out of range.
    """
    for name, value, low in (
        ("oversampling", oversampling, 0),
        ("power_iterations", power_iterations, 0),
    ):
        if value is not None:
            check_whole(name, value, low=low)
    check_kind("one_pass", one_pass, bool, "True or False")
    check_seed(seed)
    batches = as_batches(batches)
    layers = probed_layers(model) if layers is None else layers
    ranks = _ranks(layers, rank)
    adaptive = power_iterations is None and not one_pass
    passes = 2 * ((power_iterations or 0) + 1)
    with (
        reporting(progress, batches, None if adaptive else 1 if one_pass else passes) as counted,
        GradientProbe(model, layers, loss_fn=loss_fn, progress=counted) as probe,
    ):
        draw = _Gaussian(probe, seed)
        wanted = {name: r + _oversampling(r, oversampling, adaptive) for name, r in ranks.items()}
        if one_pass:
            spectra = _one_pass(probe, batches, draw, wanted)
        elif adaptive:
            spectra = _as_few_passes(probe, batches, draw, wanted, ranks)
        else:
            spectra = _several_passes(probe, batches, draw, wanted, passes)
        return {name: spectrum for name, spectrum in spectra.items() if name in probe.reached}


@collective
def gradient_norms(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[ProbedLayer] | None = None,
    memory: int = 256 * 2**20,
    loss_fn: LossFn | None = None,
    progress: Progress | bool = True,
) -> dict[str, float]:
    r"""Compute $\|G\|_F$ of the mean gradient exactly, a few layers at a time.

    Args:
        memory: Bytes of gradients held at once; a layer that needs more is read alone. One pass for each group.

    Returns:
        Frobenius norms by name of the layer; which layers, and the other arguments, are those of `gradient_svds`.
    """
    batches = as_batches(batches)
    layers = probed_layers(model) if layers is None else layers
    groups = list(within_memory(layers, memory))
    norms: dict[str, float] = {}
    with (
        reporting(progress, batches, len(groups)) as counted,
        GradientProbe(model, layers, loss_fn=loss_fn, progress=counted) as probe,
    ):
        for group in groups:
            readings = probe.read(batches, {layer.name: Request(dense=True) for layer in group})
            for name, reading in readings.items():
                if name in probe.reached:
                    norms[name] = float(torch.linalg.matrix_norm(reading.dense))
    return norms


def _several_passes(
    probe: GradientProbe,
    batches: Iterable[Any],
    draw: "_Gaussian",
    wanted: dict[str, int],
    passes: int,
) -> dict[str, GradientSVD]:
    right = {name: draw.right(name, width) for name, width in wanted.items()}
    for _ in range(passes // 2 - 1):
        basis = _bases(probe, batches, right)
        readings = probe.read(batches, {name: Request(left=Q) for name, Q in basis.items()})
        right = {name: orthonormalize(reading.left.T) for name, reading in readings.items()}
    basis = _bases(probe, batches, right)
    requests = {
        name: Request(right=draw.tail(name, _TAIL_PROBES), left=Q)  # fresh vectors, independent of Q
        for name, Q in basis.items()
    }
    readings = probe.read(batches, requests)
    return {
        name: _from_basis(basis[name], reading.left, reading.right, passes)
        for name, reading in readings.items()
    }


def _bases(probe: GradientProbe, batches: Iterable[Any], right: dict[str, Tensor]) -> dict[str, Tensor]:
    readings = probe.read(batches, {name: Request(right=omega) for name, omega in right.items()})
    return {name: orthonormalize(reading.right) for name, reading in readings.items()}


def _from_basis(basis: Tensor, seen: Tensor, tail: Tensor, passes: int) -> GradientSVD:
    svd = svd_from_range(basis, seen)
    outside, error = outside_energy(basis, tail)
    return GradientSVD(svd, float(svd.S.square().sum() + outside), float(error), passes)


def _one_pass(
    probe: GradientProbe, batches: Iterable[Any], draw: "_Gaussian", wanted: dict[str, int]
) -> dict[str, GradientSVD]:
    requests = {
        name: Request(
            right=torch.cat([draw.right(name, width), draw.tail(name, _TAIL_PROBES)], dim=1),
            left=draw.left(name, 2 * width),
        )
        for name, width in wanted.items()
    }
    spectra = {}
    for name, reading in probe.read(batches, requests).items():
        probes = requests[name].left
        assert probes is not None
        svd = svd_from_one_pass(reading.right[:, :-_TAIL_PROBES], reading.left, probes.T)
        energies = reading.right[:, -_TAIL_PROBES:].square().sum(0)  # unbiased, each of them
        error = energies.std() / _TAIL_PROBES**0.5
        spectra[name] = GradientSVD(svd, float(energies.mean()), float(error))
    return spectra


def _as_few_passes(
    probe: GradientProbe,
    batches: Iterable[Any],
    draw: "_Gaussian",
    wanted: dict[str, int],
    ranks: Mapping[str, int],
) -> dict[str, GradientSVD]:
    """Read products from both sides in one pass, or dense gradients where these are smaller; iterate in two more."""
    requests = {name: _both_sides(probe.layers[name], draw, width) for name, width in wanted.items()}
    spectra, tails = {}, {}
    for name, reading in probe.read(batches, requests).items():
        if requests[name].dense:
            svd = LowRankSVD(*torch.linalg.svd(reading.dense, full_matrices=False))
            spectra[name] = GradientSVD(svd, float(svd.S.square().sum()), 0.0)
            continue
        probes = requests[name].left
        assert probes is not None
        sketch, tails[name] = reading.right[:, :-_TAIL_PROBES], reading.right[:, -_TAIL_PROBES:]
        svd = svd_from_one_pass(sketch, reading.left, probes.T)
        outside, error = outside_energy(orthonormalize(sketch), tails[name])
        spectra[name] = GradientSVD(svd, float(svd.S.square().sum() + outside), float(error))
    if not tails or _share(spectra, ranks) >= _ENOUGH:
        return spectra
    basis = _bases(probe, batches, {name: spectra[name].svd.Vh.T for name in tails})
    readings = probe.read(batches, {name: Request(left=Q) for name, Q in basis.items()})
    return spectra | {
        name: _from_basis(basis[name], reading.left, tails[name], 3) for name, reading in readings.items()
    }


def _both_sides(layer: ProbedLayer, draw: "_Gaussian", width: int) -> Request:
    width = min(width, layer.m, layer.n)
    left = min(_LEFT_SHARE * width // 4, layer.m)
    if (width + _TAIL_PROBES) * layer.m + left * layer.n >= layer.m * layer.n:
        return Request(dense=True)
    return Request(right=draw.shared(0, layer.n, width + _TAIL_PROBES), left=draw.shared(1, layer.m, left))


def _share(spectra: Mapping[str, GradientSVD], ranks: Mapping[str, int]) -> float:
    # the mean over layers of the share of the energy that the wanted triplets hold, the same on every rank
    shares = [
        min(1.0, float(spectrum.svd.truncate(ranks[name]).S.square().sum()) / spectrum.energy)
        for name, spectrum in spectra.items()
        if spectrum.energy > 0
    ]
    total = torch.tensor([sum(shares), float(len(shares))], dtype=torch.float64)
    sum_over_ranks(total)
    return float(total[0] / total[1]) if total[1] else 1.0


def _oversampling(rank: int, given: int | None, adaptive: bool) -> int:
    if given is not None:
        return given
    return max(_OVERSAMPLING, min(5 * rank, 80)) if adaptive else _OVERSAMPLING


def _ranks(layers: Sequence[ProbedLayer], rank: int | Mapping[str, int]) -> dict[str, int]:
    ranks = {layer.name: rank if isinstance(rank, int) else rank.get(layer.name, 0) for layer in layers}
    if low := next((name for name, r in ranks.items() if r < 1), None):
        raise InputError(f"rank must be at least 1 for every layer; got {ranks[low]} for {low}")
    return ranks


class _Gaussian:
    """Standard normal vectors, the same ones on every device and rank."""

    def __init__(self, probe: GradientProbe, seed: int):
        self._probe, self._seed = probe, seed
        self._shared: dict[tuple[int, int, int], Tensor] = {}
        self._generators = {
            name: torch.Generator().manual_seed((seed << 20) + index)
            for index, name in enumerate(probe.layers)
        }

    def right(self, name: str, width: int) -> Tensor:
        layer = self._probe.layers[name]
        return self._draw(name, layer.n, min(width, layer.m, layer.n))

    def left(self, name: str, width: int) -> Tensor:
        layer = self._probe.layers[name]
        return self._draw(name, layer.m, min(width, layer.m))

    def tail(self, name: str, count: int) -> Tensor:
        return self._draw(name, self._probe.layers[name].n, count)

    def shared(self, side: int, rows: int, columns: int) -> Tensor:
        key = side, rows, columns
        if key not in self._shared:
            # torch's generator on the CPU takes 32 bits of a seed
            generator = torch.Generator().manual_seed(zlib.crc32(repr((self._seed, *key)).encode()))
            drawn = torch.randn(rows, columns, generator=generator, dtype=self._probe.dtype)
            self._shared[key] = drawn.to(self._probe.device)
        return self._shared[key]

    def _draw(self, name: str, rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=self._generators[name], dtype=self._probe.dtype)
        return drawn.to(self._probe.device)


def within_memory(layers: Sequence[ProbedLayer], memory: int) -> Iterator[list[ProbedLayer]]:
    """Split layers into groups whose dense gradients fit into memory together."""
    group: list[ProbedLayer] = []
    held = 0
    for layer in layers:
        size = 4 * layer.m * layer.n
        if group and held + size > memory:
            yield group
            group, held = [], 0
        group.append(layer)
        held += size
    yield group


@contextlib.contextmanager
def reporting(progress: Progress | bool, batches: Iterable[Any], passes: int | None) -> Iterator[Progress]:
    """Count batches over several passes, on a bar (drawn on terminals only) or for the caller's function."""
    count_of_all = num_batches(batches)
    total = 0 if count_of_all is None or passes is None else passes * count_of_all
    done = 0

    def count(what: str, *_: int) -> None:
        nonlocal done
        done += 1
        if callable(progress):
            progress(what, done, total)
        else:
            bar.update()

    disable = None if progress is True else True
    with tqdm(total=total or None, desc="gradient", unit="batch", leave=False, disable=disable) as bar:
        yield count
