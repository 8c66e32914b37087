"""`diagnose`: the share of the gradient that each adapter captures, the layers that miss most of it, and ranks."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from tangora._checks import InputError, check_choice, check_kind, check_seed, check_whole
from tangora._names import DIAGNOSED_STARTS
from tangora._types import FactorA, FactorB, LossFn, Progress
from tangora.adapters import LoraPair, adapters_off, check_not_sharded, unwrapped
from tangora.diagnostics.alignment import (
    EquivalentGradient,
    captured_share,
    condition_number,
    cosine,
    effective_rank,
    equivalent_gradient,
    imbalance_norms,
)
from tangora.diagnostics.diagnosed_layers import Subject, find_subject, start_factors
from tangora.diagnostics.gradient_reading import (
    ADAPTER,
    How,
    Propose,
    ReadLayer,
    fit_into_memory,
    read_gradients,
)
from tangora.diagnostics.rank_plan import RankPlan, plan_ranks, required_rank
from tangora.diagnostics.records import SHARES, AdapterState, Diagnosis, HeldOut, LayerDiagnosis, totals
from tangora.geometry.sketch import LowRankSVD
from tangora.probes import ProbedLayer, as_batches
from tangora.probes.batches import num_batches
from tangora.probes.collective import collective
from tangora.probes.singular_values import reporting


@collective
def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    rank: int | None = None,
    budget_rank: int | None = None,
    alpha: float | int | None = None,
    starts: Sequence[str] = DIAGNOSED_STARTS,
    target_modules: Sequence[str] | None = None,
    num_values: int | None = None,
    exact_norms: bool | None = None,
    power_iterations: int = 1,
    seed: int = 0,
    adapter_name: str | None = None,
    loss_fn: LossFn | None = None,
    progress: Progress | bool = True,
) -> Diagnosis:
    r"""Measure how much of the full gradient LoRA adapters capture.

    For every adapted layer: the spectrum of the base model's gradient; the share $\kappa$ of its energy that the
    adapter as it stands and each initialization of `initialize` could follow; the ranks that half or most of it would
    take; the state of the adapter's factors. And over all layers, how a budget of adapter parameters is best shared
    out.

    Gradients are read through probes, in the memory of LoRA training at some 6 times the adapter's rank; the model is
    left as it was. An adapter that has been trained is measured on its own gradient too, which doubles the time.

    All figures are of the mean gradient over ``batches``. The initializations that are made from it are flattered by
    that, and so are the best share, the ranks and the plan; ``held_out`` shows by how much.

    Args:
        model: PEFT model, or a plain one, whose linear layers but the head are looked at; also quantized.
        batches: Model inputs with labels, iterated several times.
        held_out: Other examples, for a fair view of the initializations that are made from ``batches``; one more pass
            over them.
        rank: Rank of the initializations that are compared; default that of the adapter, or 8.
        budget_rank: Uniform rank whose parameters the rank plan may spend; default the commonest of these ranks.
        alpha: LoRA's alpha for the rank plan, at ``budget_rank``; default: such that the scaling stays what it is.
        starts: Which initializations to compare: ``lora``, ``orthogonal``, ``pissa``, ``lora-ga``, ``lora-one``.
        target_modules: Layers of a plain model, by the ends of their names; default PEFT's ``all-linear``.
        num_values: Singular values wanted of each gradient, at least twice the largest rank; default 4 times.
        exact_norms: Whether gradients are formed, a few at a time, for their exact norms; otherwise these are estimated
            from random probes. Default: if all gradients together take at most 1 GiB.
        power_iterations: Each takes two more passes over the batches, and makes small singular values more accurate.
        seed: Seed of the random vectors and the random initializations; the global random state is untouched.
        adapter_name: Which adapter; default the active one.
        loss_fn: ``loss_fn(model, batch)``; default the model's own loss.
        progress: Whether to draw a progress bar on a terminal, or a function called after each batch instead.

    Raises:
        InputError: If an argument is out of range, the model has no layer to look at, or its adapter is merged,
            disabled or began by changing the base weights.

    Examples:
        >>> diagnosis = tangora.diagnose(model, batches)  # doctest: +SKIP
        >>> diagnosis.totals.starts  # doctest: +SKIP
        {'lora': 0.014, 'orthogonal': 0.031, 'pissa': 0.052, 'lora-ga': 0.63, 'lora-one': 0.61}
    """
    began = time.perf_counter()
    check_kind("starts", starts, (list, tuple), "a list of names")
    for start in starts:
        check_choice("starts", start, DIAGNOSED_STARTS)
    check_seed(seed)
    model = unwrapped(model)
    check_kind("model", model, nn.Module, "a model")
    check_not_sharded(model.named_parameters(), "diagnose")
    subject = find_subject(model, adapter_name, target_modules, rank)
    layers = subject.layers
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
    read = partial(read_gradients, model, layers, batches, how=how)
    with reporting(progress, _all_batches(subject, batches, held_out, how), 1) as counted:
        # at B = 0 both models have one gradient, everything is seen in the same passes, and the adapter only takes time
        with adapters_off(model, keep_heads=subject.plain_start):
            base, loss = read(propose=_proposal(subject, starts, seed), progress=counted, held_out=held_out)
        adapted, adapter_loss = base, loss
        if not subject.plain_start:
            adapted, adapter_loss = read(propose=_proposal(subject, None, seed), progress=counted)
    subject = subject.with_read(base.keys() & adapted.keys())
    states = {
        layer.name: _state(layer.pair, adapted[layer.name])
        for layer in subject.layers
        if layer.pair is not None
    }
    found = tuple(
        _layer(
            layer,
            subject.ranks[layer.name],
            base[layer.name],
            states[layer.name][0] if states else None,
            starts,
        )
        for layer in subject.layers
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
    for layer in subject.layers:
        if budget_rank > (smaller := min(layer.m, layer.n)):
            raise InputError(
                f"budget_rank must be at most {smaller}, the smaller side of layer {layer.path}; got {budget_rank}"
            )
    largest = max(budget_rank, *subject.ranks.values())
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
    layers, points = subject.layers, 1 if subject.plain_start else 2
    return range(points * how.passes(layers) * counts[0] + len(how.groups(layers)) * counts[1])


def _proposal(subject: Subject, starts: Sequence[str] | None, seed: int) -> Propose:
    # with initializations: the base model's point; without: the adapted one's
    numbers = {layer.name: number for number, layer in enumerate(subject.layers)}

    def propose(layer: ProbedLayer, gradient: LowRankSVD) -> dict[str, tuple[FactorA, FactorB]]:
        proposed = {}
        if layer.pair is not None and (starts is None or subject.plain_start):
            proposed[ADAPTER] = layer.pair.moving_factors()[:2]
        for start in starts or ():
            own_seed = (seed << 20) + numbers[layer.name]
            factors = start_factors(start, layer, subject.ranks[layer.name], gradient, own_seed)
            if factors is not None:
                proposed[start] = factors
        if ADAPTER in proposed and subject.is_lora_start(layer):
            proposed.pop("lora", None)  # the adapter is that initialization
        return proposed

    return propose


def _state(pair: LoraPair, measured: ReadLayer) -> tuple[AdapterState, EquivalentGradient]:
    gradient, view = measured.spectrum, measured.own
    assert view is not None
    energy = view.captured
    A, B = (factor.cpu() for factor in pair.factors())
    moving_A, moving_B, scale = pair.moving_factors()
    step = equivalent_gradient(
        moving_A.cpu(),
        moving_B.cpu(),
        *view,
        scaling=pair.scaling,
        row_scale=None if scale is None else scale.cpu(),
    )
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


def _layer(
    layer: ProbedLayer, rank: int, base: ReadLayer, state: AdapterState | None, starts: Sequence[str]
) -> LayerDiagnosis:
    gradient, other = base.spectrum, base.held_out
    shares = _shares(base.captured, gradient.energy, starts)
    return LayerDiagnosis(
        name=layer.path,
        m=layer.m,
        n=layer.n,
        rank=rank,
        gradient=gradient,
        adapter=state,
        starts=shares,
        # the singular values are estimates from below, and what an initialization captures is measured
        reachable=max(captured_share(gradient.reachable(rank), gradient.energy), *shares.values(), 0.0),
        ranks_needed={str(share): required_rank(gradient, share / 100) for share in SHARES},
        held_out=HeldOut(other.energy, other.energy_error, _shares(other.captured, other.energy, starts))
        if other
        else None,
    )


def _shares(captured: Mapping[str, float], energy: float, starts: Sequence[str]) -> dict[str, float]:
    # an adapter that has not moved was looked through instead of the initialization that it is
    energies = {"lora": captured.get(ADAPTER, 0.0)} | dict(captured)
    return {start: captured_share(energies.get(start, 0.0), energy) for start in starts}


def _whole_cosine(states: Sequence[tuple[AdapterState, EquivalentGradient]]) -> float | None:
    whole = EquivalentGradient(
        math.fsum(step.inner for _, step in states), math.fsum(step.squared_norm for _, step in states)
    )
    return cosine(whole, math.fsum(state.gradient.energy for state, _ in states))


def _plan(
    subject: Subject, layers: Sequence[LayerDiagnosis], budget_rank: int, alpha: float | int | None
) -> RankPlan:
    pair = subject.layers[0].pair
    use_rslora = pair is not None and pair.use_rslora
    if alpha is None and pair is not None:
        alpha = pair.scaling * budget_rank ** (0.5 if use_rslora else 1.0)
    return plan_ranks(
        {layer.name: layer.gradient for layer in layers}, budget_rank, alpha=alpha, use_rslora=use_rslora
    )
