"""`initialize`: give the adapter of a PEFT model an initialization, never changing a base weight."""

import contextlib
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn

from tangora._checks import InputError, check_seed
from tangora._types import LossFn, Progress
from tangora.adapters import (
    LoraPair,
    active_adapter,
    attach_offset,
    check_not_sharded,
    check_unfused,
    check_unmerged,
    detach_offset,
    discover,
    mutates_base,
    unwrapped,
)
from tangora.init.marks import is_trained, mark_started
from tangora.init.start_method import LayerToStart, StartMethod
from tangora.init.starts import PROBE_OPTIONS, check_options
from tangora.probes import (
    GradientSVD,
    as_batches,
    gradient_svds,
    mean_loss,
    probed_layers,
    why_unread,
)
from tangora.probes.collective import collective, several_ranks
from tangora.probes.stillness import seeded

_Layer = tuple[LoraPair, LayerToStart]


@dataclass(frozen=True, repr=False)
class Start:
    """The result of `initialize`."""

    method: str
    names: tuple[str, ...]
    """Layers that got the initialization."""
    skipped: Mapping[str, str]
    """Layers that kept the plain LoRA initialization, with the reason."""
    seconds: float
    passes: int = 0
    """Number of passes over the batches for gradients."""
    step: float | None = None
    """Step size of ``one-step``."""
    line_search: Mapping[float, float] = field(default_factory=dict)
    """Held-out loss by step size, where ``one-step`` searched."""

    def __repr__(self) -> str:
        kept = f", {len(self.skipped)} kept PEFT's initialization" if self.skipped else ""
        step = f", step {self.step:g}" if self.step is not None else ""
        return f"Start({self.method!r}: {len(self.names)} layers{kept}{step}, {self.seconds:.1f} s)"


@collective
def initialize(
    model: nn.Module,
    method: str,
    batches: Iterable[Any] | None = None,
    *,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    adapter_name: str | None = None,
    progress: Progress | bool = True,
    **options: Any,
) -> Start:
    r"""Give an adapter one of the published initializations.

    Base weights are never changed, so quantized models work and `save_adapter` (as PEFT's own ``save_pretrained``)
    writes an adapter for the original base. Gradients are read through probes in the memory of LoRA training. Call it
    before making the optimizer.

    | method | initialization | options (default) |
    |---|---|---|
    | ``lora`` | PEFT's: A random, B = 0 | |
    | ``orthogonal`` | random orthogonal A and B | ``size`` (0.577) |
    | ``pissa`` | principal directions of the weight | ``niter`` (None: exact) |
    | ``lora-ga`` | singular directions of the gradient | ``direction`` (ArB2r), ``scale``, ``stable_gamma`` (16) |
    | ``lora-one`` | rank-r step of gradient descent | ``gamma`` (128) |
    | ``lora-one-v1`` | its directions, the model starts at the base | ``gamma`` (128) |
    | ``one-step`` | the step itself, not to be trained further | ``step``, or ``held_out`` batches to search it on |

    LoRA-GA and ``lora-one-v1`` need directions of the gradient and read the batches once, or three times where spectra
    fall slowly. ``lora-one`` and ``one-step`` need singular values, too, and read them four times. All take
    ``oversampling``, ``power_iterations`` (None, and 1) and ``one_pass`` (False) of `gradient_svds`.

    With ``torch.distributed`` running, every rank calls it with its own batches, and all get the initialization that
    belongs to the mean gradient.

    Args:
        model: PEFT model with LoRA, also compiled or inside DistributedDataParallel; the adapter's earlier
            initialization or training is lost, the latter with a warning.
        batches: Model inputs with labels, iterated several times; 8 to 64 examples are enough.
        loss_fn: ``loss_fn(model, batch)``; default the model's own loss.
        seed: Seed of everything random; the global random state is untouched.
        adapter_name: Which adapter; default the active one.
        progress: Whether to draw a progress bar on a terminal, or a function called after each batch instead.
        **options: As in the table.

    Returns:
        Which layers got the initialization.

    Raises:
        InputError: If method, options or batches cannot be used. The model is then as it was.

    Examples:
        >>> tangora.initialize(model, "lora-ga", batches)  # doctest: +SKIP
    """
    began = time.perf_counter()
    chosen = check_options(method, options, has_batches=batches is not None)
    check_seed(seed)
    inner: PeftModel = unwrapped(model)
    adapter, pairs, odd = _adapter(inner, adapter_name)
    _check_whole(method, chosen, options, pairs)
    if chosen.reads_gradients:
        check_unfused(inner)
    if is_trained(inner, adapter):
        warnings.warn(
            f"adapter {adapter!r} has been trained or initialized (B A is not zero): initialization "
            f"{method!r} would overwrite it",
            stacklevel=3,
        )
    with _restored_on_error(inner, adapter, pairs), _active(inner, adapter):
        _reset(inner, adapter, pairs, seed)
        if chosen.offset:  # layers that cannot carry one are named before any work is done
            attach_offset(inner, adapter, {})
            detach_offset(inner, adapter)
        spectra: Mapping[str, GradientSVD] = {}
        if chosen.reads_gradients:
            probing = {"power_iterations": 1 if chosen.values else None}
            probing |= {key: options.pop(key) for key in PROBE_OPTIONS if key in options}
            spectra = _spectra(
                inner,
                batches,
                chosen,
                adapter,
                pairs,
                seed=seed,
                loss_fn=loss_fn,
                progress=progress,
                **probing,
            )
        layers, skipped = _layers(pairs, spectra, chosen, seed)
        skipped |= odd
        losses: Mapping[float, float] = {}
        if chosen.searches_step and (held_out := options.pop("held_out", None)) is not None:
            losses = _line_search(inner, adapter, chosen, layers, held_out, loss_fn)
            options["step"] = min(losses, key=losses.__getitem__)
        _write(inner, adapter, chosen, layers, options)
    mark_started(inner, adapter, method)
    if skipped:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        warnings.warn(f"{len(skipped)} layers keep the plain LoRA initialization ({reasons})", stacklevel=3)
    names = tuple(pair.name for pair, _ in layers)
    passes = max((spectrum.passes for spectrum in spectra.values()), default=0)
    return Start(method, names, skipped, time.perf_counter() - began, passes, options.get("step"), losses)


def _adapter(model: PeftModel, adapter_name: str | None) -> tuple[str, list[LoraPair], dict[str, str]]:
    adapter = active_adapter(model) if adapter_name is None else adapter_name
    found = discover(model, adapter)
    if not found.pairs:
        raise InputError(f"adapter {adapter!r} has no plain LoRA layers to initialize")
    if mutates_base(model.peft_config[adapter]):
        raise InputError(
            f"PEFT's initialization has changed the base weights of adapter {adapter!r}: create the "
            "adapter with init_lora_weights=True"
        )
    check_unmerged(model)
    return adapter, found.pairs, found.skipped


def _check_whole(method: str, chosen: StartMethod, options: Mapping[str, Any], pairs: list[LoraPair]) -> None:
    reads_weight = chosen.reads_weight(options)
    for pair in () if chosen.any_sharding else pairs:
        own = pair.layer.named_parameters(prefix=pair.name) if reads_weight else pair.named_parameters()
        check_not_sharded(own, f"initialization {method!r}")


@contextlib.contextmanager
def _restored_on_error(model: PeftModel, adapter: str, pairs: list[LoraPair]) -> Iterator[None]:
    before = [
        (holder, key, parameter, parameter.detach().clone())
        for pair in pairs
        for holder, key, parameter in _own_parameters(pair.layer)
    ]
    offset = {pair.name: factors for pair in pairs if (factors := pair.offset()) is not None}
    try:
        yield
    except BaseException:
        for holder, key, parameter, value in before:
            parameter.data.copy_(value)
            holder.register_parameter(key, parameter)  # PEFT makes new ones for magnitudes
        detach_offset(model, adapter)
        if offset:
            attach_offset(model, adapter, offset)
        raise


def _own_parameters(layer: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    # factors, and what else an adapter may train in these layers: biases, magnitudes
    for name, holder in layer.named_modules():
        for key, parameter in holder.named_parameters(recurse=False):
            if f"{name}.{key}".startswith("lora_"):
                yield holder, key, parameter


@contextlib.contextmanager
def _active(model: PeftModel, adapter: str) -> Iterator[None]:
    # the gradient is that of the model in which the adapter will be trained
    if adapter in model.active_adapters:
        yield
        return
    outer, inner = model.active_adapter, model.base_model.active_adapter
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.set_adapter(adapter)
    try:
        yield
    finally:
        model.base_model.set_adapter(inner)  # pyright: ignore
        model.active_adapter = outer
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _reset(model: PeftModel, adapter: str, pairs: list[LoraPair], seed: int) -> None:
    detach_offset(model, adapter)
    with seeded(seed):
        for pair in pairs:
            pair.layer.reset_lora_parameters(adapter, True)  # pyright: ignore[reportCallIssue]
            pair.refresh_magnitude()


def _spectra(
    model: PeftModel,
    batches: Iterable[Any] | None,
    chosen: StartMethod,
    adapter: str,
    pairs: list[LoraPair],
    **options: Any,
) -> dict[str, GradientSVD]:
    assert batches is not None
    ranks = {pair.name: chosen.directions * pair.shape[2] for pair in pairs}
    layers = probed_layers(model, adapter_name=adapter)
    return gradient_svds(model, batches, ranks, layers=layers, **options)


def _layers(
    pairs: list[LoraPair], spectra: Mapping[str, GradientSVD], chosen: StartMethod, seed: int
) -> tuple[list[_Layer], dict[str, str]]:
    # those that can get the initialization, and why the others cannot
    layers, skipped = [], {}
    for index, pair in enumerate(pairs):
        m, n, r = pair.shape
        spectrum = spectra.get(pair.name)
        if r > min(m, n) and not chosen.any_rank:
            skipped[pair.name] = f"rank {r} is above its smaller side {min(m, n)}"
        elif chosen.reads_gradients and spectrum is None:
            skipped[pair.name] = why_unread(pair.layer)
        elif spectrum is not None and not spectrum.svd.S[0] > 0:
            skipped[pair.name] = "its gradient is zero on these batches"
        else:
            generator = torch.Generator().manual_seed((seed << 20) + index)
            gradient = None if spectrum is None else spectrum.svd
            layer = LayerToStart(
                pair.shape, pair.scaling, gradient, pair.base_weight, pair.factors, generator
            )
            layers.append((pair, layer))
    return layers, skipped


@torch.no_grad()
def _write(
    model: PeftModel, adapter: str, chosen: StartMethod, layers: list[_Layer], options: Mapping[str, Any]
) -> None:
    offset = {}
    for pair, layer in layers:
        for parameter, factor in zip((pair.A, pair.B), chosen.factors(layer, **options), strict=True):
            parameter.copy_(factor.reshape(parameter.shape))
            if chosen.reads_gradients and several_ranks():
                dist.broadcast(parameter.data, src=0)  # to the last bit the same on all ranks
        if chosen.offset:
            A, B = pair.factors()  # as rounded to the adapter's dtype, so that they cancel exactly
            offset[pair.name] = (B.clone(), A.clone())
        else:
            pair.refresh_magnitude()
    if chosen.offset:
        attach_offset(model, adapter, offset)


def _line_search(
    model: PeftModel,
    adapter: str,
    chosen: StartMethod,
    layers: list[_Layer],
    held_out: Iterable[Any],
    loss_fn: LossFn | None,
) -> dict[float, float]:
    losses = {}
    held_out = as_batches(held_out, "held_out")
    for step in chosen.step_sizes:
        _write(model, adapter, chosen, layers, {"step": step})
        losses[step] = mean_loss(model, held_out, loss_fn=loss_fn)
    if not any(math.isfinite(loss) for loss in losses.values()):
        raise InputError("held_out has no finite loss at any step size")
    return losses
