r"""The rank that a layer needs, and the distribution of a parameter budget over layers.

A rank-r adapter moves its weight within a space of directions $U K + J V$, with r columns in $U$ and r rows in $V$. Of
a gradient with singular values $\sigma_i$ it can capture at most $\sum_{i \le 2r} \sigma_i^2$, and does so when the
leading singular directions are dealt out to both sides, as LoRA-GA's initialization does. Everything here counts by
that bound: it holds at the point where the gradient was read, and says nothing about later steps.
"""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tangora._checks import InputError, check_number, check_whole, shown
from tangora.adapters.pair import pattern_key


@dataclass(frozen=True)
class LayerGradient:
    r"""Size and leading singular values of one layer's gradient $G$, ``m x n``."""

    m: int
    n: int
    singular_values: tuple[float, ...]
    """Descending; complete if there are ``min(m, n)`` of them."""
    energy: float
    r"""$\|G\|_F^2$."""
    energy_error: float = 0.0
    """Standard error of the energy; 0 where it is exact."""

    @property
    def complete(self) -> bool:
        """Whether all singular values are known."""
        return len(self.singular_values) >= min(self.m, self.n)

    @property
    def norm(self) -> float:
        r"""$\|G\|_F$."""
        return math.sqrt(self.energy)

    @property
    def tail(self) -> float:
        """Energy outside of the known singular values."""
        return max(self.energy - math.fsum(value**2 for value in self.singular_values), 0.0)

    @property
    def largest_rank(self) -> int:
        """Largest rank of which it is known what it could capture."""
        return min(self.m, self.n) if self.complete else len(self.singular_values) // 2

    def reachable(self, rank: int) -> float:
        """Return the energy that an adapter of some rank can capture at most."""
        return min(math.fsum(value**2 for value in self.singular_values[: 2 * rank]), self.energy)


def required_rank(gradient: LayerGradient, share: float) -> int | None:
    """Find the smallest rank that could capture a share of a layer's gradient.

    Returns:
        The rank; ``None`` if it lies beyond what is known of its singular values, or the gradient is zero.
    """
    check_number("share", share, low=0, high=1, open_low=True)
    energies = accumulate(value**2 for value in gradient.singular_values)
    # a complete spectrum and a norm computed another way differ by rounding
    target = share * gradient.energy * (1 - 1e-6)
    position = next((index for index, energy in enumerate(energies, 1) if energy >= target > 0), None)
    rank = None if position is None else (position + 1) // 2
    return rank if rank is None or rank <= gradient.largest_rank else None


@dataclass(frozen=True)
class RankPlan:
    """Ranks for all layers, at the price of one rank for all."""

    r: int
    """The uniform rank that the plan competes with, and the rank of layers that `rank_pattern` leaves out."""
    lora_alpha: float | int
    """Alpha at that rank; alpha over the rank (rsLoRA: over its root) is the same in every layer."""
    use_rslora: bool
    rank_pattern: dict[str, int]
    """Ranks that differ from `r`, by a pattern that matches one layer only."""
    alpha_pattern: dict[str, float | int]
    ranks: dict[str, int]
    """Rank of every layer by its name."""
    budget: int
    """Adapter parameters at the uniform rank."""
    parameters: int
    """Adapter parameters of the plan; at most `budget`."""
    captured_energy: float
    """Share of the gradient's energy, over all layers, that the plan could capture at most."""
    uniform_captured_energy: float
    at_limit: tuple[str, ...]
    """Layers that got the largest rank that was allowed or known, and might have earned more."""

    @property
    def gain(self) -> float:
        """Additional energy compared with the uniform rank, as a share of the gradient's energy."""
        return self.captured_energy - self.uniform_captured_energy

    def config(self) -> dict[str, Any]:
        """Return the options of the plan for ``LoraConfig(**config)``, to be given together with the target modules."""
        keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
        return {key: getattr(self, key) for key in keys}


def plan_ranks(
    spectra: Mapping[str, LayerGradient],
    budget_rank: int,
    *,
    min_rank: int = 1,
    max_rank: int | None = None,
    alpha: float | int | None = None,
    use_rslora: bool = False,
) -> RankPlan:
    r"""Distribute the adapter parameters of a uniform rank so that they capture the most gradient energy.

    One more rank in a layer costs $m + n$ parameters and can capture $\sigma_{2r+1}^2 + \sigma_{2r+2}^2$ more. These
    gains only shrink, so that taking the best gain per parameter again and again is optimal, but for the parameters
    that remain in the end and buy no whole rank. Should these make it worse than the uniform rank, that is returned.

    Args:
        spectra: Gradient spectra by the layers' names in the base model, as PEFT knows them.
        budget_rank: The uniform rank whose parameters may be spent.
        min_rank: Rank that every layer gets.
        max_rank: Largest rank of a layer; default: as far as its spectrum is known.
        alpha: LoRA's alpha at ``budget_rank``; default twice that.
        use_rslora: Whether the scaling is alpha over the root of the rank.

    Raises:
        InputError: If a rank is out of range, or needs more singular values than are known.

    Examples:
        >>> flat = LayerGradient(8, 8, (1.0,) * 8, energy=8.0)
        >>> strong = LayerGradient(8, 8, (2.0,) * 8, energy=32.0)
        >>> plan_ranks({"a": strong, "b": flat}, 2).ranks
        {'a': 3, 'b': 1}
    """
    known = isinstance(spectra, Mapping) and all(isinstance(each, LayerGradient) for each in spectra.values())
    if not known:
        raise InputError(
            "spectra must be a dict from layer names to spectra, such as {layer.name: layer.gradient "
            "for layer in "
            f"diagnosis.layers}}; got {shown(spectra)}"
        )
    limits = _limits(spectra, budget_rank, min_rank, max_rank)
    uniform = dict.fromkeys(spectra, budget_rank)
    budget = _parameters(spectra, uniform)
    ranks = _greedy(spectra, budget, limits, min_rank)
    if _captured(spectra, ranks) <= _captured(spectra, uniform):
        ranks = uniform
    power = 0.5 if use_rslora else 1.0
    if alpha is None:
        alpha = 2 * budget_rank
    check_number("alpha", alpha, low=0, open_low=True)
    others = {name: rank for name, rank in ranks.items() if rank != budget_rank}
    return RankPlan(
        r=budget_rank,
        lora_alpha=_whole(alpha),
        use_rslora=use_rslora,
        rank_pattern={pattern_key(name): rank for name, rank in others.items()},
        alpha_pattern={
            pattern_key(name): _whole(alpha * (rank / budget_rank) ** power) for name, rank in others.items()
        },
        ranks=ranks,
        budget=budget,
        parameters=_parameters(spectra, ranks),
        captured_energy=_captured(spectra, ranks),
        uniform_captured_energy=_captured(spectra, uniform),
        at_limit=tuple(
            name for name, rank in ranks.items() if rank == limits[name] and _gain(spectra[name], rank) != 0
        ),
    )


def _limits(
    spectra: Mapping[str, LayerGradient], budget_rank: int, min_rank: int, max_rank: int | None
) -> dict[str, int]:
    if not spectra:
        raise InputError("spectra must hold at least one layer; got none")
    check_whole("budget_rank", budget_rank, low=1)
    check_whole("min_rank", min_rank, low=1)
    if min_rank > budget_rank:
        raise InputError(f"min_rank must be at most budget_rank, {budget_rank}; got {min_rank}")
    if max_rank is not None:
        check_whole("max_rank", max_rank, low=budget_rank)
    limits = {}
    for name, spectrum in spectra.items():
        smaller = min(spectrum.m, spectrum.n)
        if budget_rank > smaller:
            raise InputError(
                f"budget_rank must be at most {smaller}, the smaller side of layer {name}; got {budget_rank}"
            )
        wanted = min(max_rank or budget_rank, smaller)
        if wanted > spectrum.largest_rank:
            raise InputError(
                f"{len(spectrum.singular_values)} singular values of layer {name} are known, enough for rank "
                f"{spectrum.largest_rank}; rank {wanted} needs {2 * wanted}"
            )
        limits[name] = wanted if max_rank else spectrum.largest_rank
    return limits


def _greedy(
    spectra: Mapping[str, LayerGradient], budget: int, limits: Mapping[str, int], min_rank: int
) -> dict[str, int]:
    ranks = dict.fromkeys(spectra, min_rank)
    left = budget - _parameters(spectra, ranks)
    queue: list[tuple[float, int, str]] = []

    def offer(order: int, name: str) -> None:
        spectrum, rank = spectra[name], ranks[name]
        if rank < limits[name] and (gain := _gain(spectrum, rank)) > 0:
            heapq.heappush(queue, (-gain / (spectrum.m + spectrum.n), order, name))

    for order, name in enumerate(spectra):
        offer(order, name)
    while queue:
        _, order, name = heapq.heappop(queue)
        if (
            cost := spectra[name].m + spectra[name].n
        ) <= left:  # else not later either: less and less is left
            ranks[name] += 1
            left -= cost
            offer(order, name)
    return ranks


def _gain(spectrum: LayerGradient, rank: int) -> float:
    known = spectrum.singular_values[2 * rank : 2 * rank + 2]
    return math.fsum(value**2 for value in known) if known or spectrum.complete else math.nan


def _captured(spectra: Mapping[str, LayerGradient], ranks: Mapping[str, int]) -> float:
    total = sum(spectrum.energy for spectrum in spectra.values())
    captured = sum(spectrum.reachable(ranks[name]) for name, spectrum in spectra.items())
    return captured / total if total > 0 else 0.0


def _parameters(spectra: Mapping[str, LayerGradient], ranks: Mapping[str, int]) -> int:
    return sum(ranks[name] * (spectrum.m + spectrum.n) for name, spectrum in spectra.items())


def _whole(alpha: float | int) -> float | int:
    # PEFT's alphas are whole numbers by convention, and the config shows them
    return int(alpha) if float(alpha).is_integer() else float(alpha)
