"""`diagnose`: how much of the full gradient each adapter can see, which layers starve, and which ranks would do."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from tangora._checks import InputError, check_choice, check_kind, check_seed, check_whole
from tangora._names import STARTS
from tangora._types import FactorA, FactorB, LossFn
from tangora.adapters import LoraPair, adapters_off, check_not_sharded, magnitude_scale, unwrapped
from tangora.diagnostics.alignment import (
    EquivalentGradient,
    captured_share,
    condition_number,
    cosine,
    effective_rank,
    equivalent_gradient,
    imbalance_norms,
)
from tangora.diagnostics.measure import How, Measured, Propose, fit_into_memory, measure
from tangora.diagnostics.ranks import RankPlan, plan_ranks, required_rank
from tangora.diagnostics.records import SHARES, AdapterState, Diagnosis, HeldOut, LayerDiagnosis, totals
from tangora.diagnostics.sites import Site, Subject, find_subject
from tangora.diagnostics.starts import start_factors
from tangora.geometry.sketch import LowRankSVD
from tangora.probes import ProbedLayer, Report, as_batches
from tangora.probes.batches import num_batches
from tangora.probes.ranks import collective
from tangora.probes.spectrum import reporting

_ADAPTER = "adapter"


@collective
def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    rank: int | None = None,
    budget_rank: int | None = None,
    alpha: float | int | None = None,
    starts: Sequence[str] = STARTS,
    target_modules: Sequence[str] | None = None,
    num_values: int | None = None,
    exact_norms: bool | None = None,
    power_iterations: int = 1,
    seed: int = 0,
    adapter_name: str | None = None,
    loss_fn: LossFn | None = None,
    progress: Report = True,
) -> Diagnosis:
    r"""Measure how much of the full gradient LoRA adapters can follow.

    For every adapted layer: the spectrum of the base model's gradient; the share $\kappa$ of its energy that the
    adapter as it stands and each start of `initialize` could follow; the ranks that half or most of it would take; the
    state of the adapter's factors. And over all layers, how a budget of adapter parameters is best shared out.

    Gradients are read through probes, in the memory of LoRA training at some 6 times the adapter's rank; the model is
    left as it was. An adapter that has been trained is measured on its own gradient too, which doubles the time.

    All figures are of the mean gradient over ``batches``. The starts that are made from it are flattered by that, and
    so are the best share, the ranks and the plan; ``held_out`` shows by how much.

    Args:
        model: PEFT model, or a plain one, whose linear layers but the head are looked at; also quantized.
        batches: Model inputs with labels, iterated several times.
        held_out: Other examples, for a fair view of the starts that are made from ``batches``; one more pass over them.
        rank: Rank of the starts that are compared; default that of the adapter, or 8.
        budget_rank: Uniform rank whose parameters the rank plan may spend; default the commonest of these ranks.
        alpha: LoRA's alpha for the rank plan, at ``budget_rank``; default: such that the scaling stays what it is.
        starts: Which starts to compare: ``lora``, ``orthogonal``, ``pissa``, ``lora-ga``, ``lora-one``.
        target_modules: Layers of a plain model, by the ends of their names; default PEFT's ``all-linear``.
        num_values: Singular values wanted of each gradient, at least twice the largest rank; default 4 times.
        exact_norms: Whether gradients are formed, a few at a time, for their exact norms; otherwise these are estimated
            from random probes. Default: if all gradients together take at most 1 GiB.
        power_iterations: Each takes two more passes over the batches, and makes small singular values more accurate.
        seed: Of the random vectors and the random starts; the global random state is untouched.
        adapter_name: Which adapter; default the active one.
        loss_fn: ``loss_fn(model, batch)``; default the model's own loss.
        progress: Whether to draw a progress bar on a terminal, or what hears of it: batches read, and their total.

    Raises:
        InputError: If an argument is out of range, the model has no layer to look at, or its adapter is merged,
            disabled or began by changing the base weights.

    Example:
        >>> diagnosis = tangora.diagnose(model, batches)  # doctest: +SKIP
        >>> diagnosis.totals.starts  # doctest: +SKIP
        {'lora': 0.014, 'orthogonal': 0.031, 'pissa': 0.052, 'lora-ga': 0.63, 'lora-one': 0.61}
    """
    began = time.perf_counter()
    check_kind("starts", starts, (list, tuple), "a list of names")
    for start in starts:
        check_choice("starts", start, STARTS)
    check_seed(seed)
    model = unwrapped(model)
    check_kind("model", model, nn.Module, "a model")
    check_not_sharded(model.named_parameters(), "diagnose")
    subject = find_subject(model, adapter_name, target_modules, rank)
    sites, layers = subject.sites, [site.layer for site in subject.sites]
    budget_rank = subject.common_rank if budget_rank is None else budget_rank
    how = How(
        _num_values(subject, budget_rank, num_values),
        fit_into_memory(layers) if exact_norms is None else exact_norms,
        power_iterations,
        seed,
        loss_fn,
    )
    batches = as_batches(batches)
    held_out = None if held_out is None else as_batches(held_out, "held_out")
    read = partial(measure, model, layers, batches, how=how, keep=_ADAPTER)
    with reporting(progress, _all_batches(subject, batches, held_out, how), 1) as heard:
        # at B = 0 both models have one gradient, everything is seen in the same passes, and the adapter only takes time
        with adapters_off(model, keep_heads=subject.plain_start):
            base, loss = read(propose=_proposal(subject, starts, seed), heard=heard, held_out=held_out)
        adapted, adapter_loss = base, loss
        if not subject.plain_start:
            adapted, adapter_loss = read(propose=_proposal(subject, None, seed), heard=heard)
    subject = subject.with_read(base.keys() & adapted.keys())
    sites = subject.sites
    states = {
        site.name: _state(site.pair, adapted[site.layer.name]) for site in sites if site.pair is not None
    }
    found = tuple(
        _layer(site, base[site.layer.name], states[site.name][0] if states else None, starts)
        for site in sites
    )
    return Diagnosis(
        layers=found,
        totals=totals(found, _whole_cosine(list(states.values()))),
        plan=_plan(subject, found, budget_rank, alpha),
        plain_start=subject.plain_start,
        exact_norms=how.exact_norms,
        num_batches=num_batches(batches),
        loss=loss,
        adapter_loss=adapter_loss if states else None,
        skipped=subject.skipped,
        seconds=time.perf_counter() - began,
    )


def _num_values(subject: Subject, budget_rank: int, num_values: int | None) -> int:
    check_whole("budget_rank", budget_rank, low=1)
    for site in subject.sites:
        if budget_rank > (smaller := min(site.layer.m, site.layer.n)):
            raise InputError(
                f"budget_rank must be at most {smaller}, the smaller side of layer {site.name}; got {budget_rank}"
            )
    largest = max(budget_rank, *(site.rank for site in subject.sites))
    if num_values is None:
        return 4 * largest
    check_whole("num_values", num_values, low=2 * largest)
    return num_values


def _all_batches(
    subject: Subject, batches: Iterable[Any], held_out: Iterable[Any] | None, how: How
) -> Iterable[Any]:
    # something as long as all that will be read, or of unknown length
    counts = num_batches(batches), num_batches(() if held_out is None else held_out)
    if counts[0] is None or counts[1] is None:
        return iter(())
    layers = [site.layer for site in subject.sites]
    points = 1 if subject.plain_start else 2
    return range(points * how.passes(layers) * counts[0] + len(how.groups(layers)) * counts[1])


def _proposal(subject: Subject, starts: Sequence[str] | None, seed: int) -> Propose:
    # with starts: the base model's point; without: the adapted one's
    sites = {site.layer.name: (index, site) for index, site in enumerate(subject.sites)}

    def propose(layer: ProbedLayer, gradient: LowRankSVD) -> dict[str, tuple[FactorA, FactorB]]:
        index, site = sites[layer.name]
        proposed = {}
        if site.pair is not None and (starts is None or subject.plain_start):
            proposed[_ADAPTER] = _moving_factors(site.pair)[:2]
        for start in starts or ():
            factors = start_factors(start, site, gradient, (seed << 20) + index)
            if factors is not None:
                proposed[start] = factors
        if _ADAPTER in proposed and subject.is_lora_start(site):
            proposed.pop("lora", None)  # the adapter is that start
        return proposed

    return propose


def _moving_factors(pair: LoraPair) -> tuple[FactorA, FactorB, Tensor | None]:
    # those by which the layer's weight moves, and DoRA's row scale that is already in B
    A, B = pair.factors()
    scale = magnitude_scale(pair)
    return A, B if scale is None else scale[:, None] * B.to(scale), scale


def _state(pair: LoraPair, measured: Measured) -> tuple[AdapterState, EquivalentGradient]:
    gradient, view = measured.spectrum, measured.views[_ADAPTER]
    energy = view.captured
    A, B = (factor.cpu() for factor in pair.factors())
    moving_A, moving_B, scale = (part if part is None else part.cpu() for part in _moving_factors(pair))
    assert moving_A is not None
    assert moving_B is not None
    step = equivalent_gradient(moving_A, moving_B, *view, scaling=pair.scaling, row_scale=scale)
    imbalance, relative = imbalance_norms(A, B)
    state = AdapterState(
        rank=pair.shape[2],
        scaling=pair.scaling,
        gradient=gradient,
        captured_energy=captured_share(energy, gradient.energy),
        alignment_error=math.sqrt(max(gradient.energy - energy, 0.0)),
        cosine=cosine(step, gradient.energy),
        condition_A=condition_number(A),
        condition_B=condition_number(B.mT),
        imbalance=imbalance,
        relative_imbalance=relative,
        effective_rank=effective_rank(A, B),
    )
    return state, step


def _layer(site: Site, base: Measured, state: AdapterState | None, starts: Sequence[str]) -> LayerDiagnosis:
    gradient, other = base.spectrum, base.held_out
    shares = _shares(base.captured, gradient.energy, starts)
    return LayerDiagnosis(
        name=site.name,
        m=site.layer.m,
        n=site.layer.n,
        rank=site.rank,
        gradient=gradient,
        adapter=state,
        starts=shares,
        # the singular values are estimates from below, and what a start captures is measured
        reachable=max(captured_share(gradient.reachable(site.rank), gradient.energy), *shares.values(), 0.0),
        ranks_needed={str(share): required_rank(gradient, share / 100) for share in SHARES},
        held_out=HeldOut(other.energy, other.energy_error, _shares(other.captured, other.energy, starts))
        if other
        else None,
    )


def _shares(captured: Mapping[str, float], energy: float, starts: Sequence[str]) -> dict[str, float]:
    # an adapter that has not moved was looked through instead of the start that it is
    energies = {"lora": captured.get(_ADAPTER, 0.0)} | dict(captured)
    return {start: captured_share(energies.get(start, 0.0), energy) for start in starts}


def _whole_cosine(states: Sequence[tuple[AdapterState, EquivalentGradient]]) -> float | None:
    whole = EquivalentGradient(
        math.fsum(step.inner for _, step in states), math.fsum(step.squared_norm for _, step in states)
    )
    return cosine(whole, math.fsum(state.gradient.energy for state, _ in states))


def _plan(
    subject: Subject, layers: Sequence[LayerDiagnosis], budget_rank: int, alpha: float | int | None
) -> RankPlan:
    pair = subject.sites[0].pair
    use_rslora = pair is not None and bool(pair.layer.use_rslora[pair.adapter])  # pyright: ignore[reportArgumentType, reportIndexIssue]
    if alpha is None and pair is not None:
        alpha = pair.scaling * budget_rank ** (0.5 if use_rslora else 1.0)
    return plan_ranks(
        {layer.name: layer.gradient for layer in layers}, budget_rank, alpha=alpha, use_rslora=use_rslora
    )
