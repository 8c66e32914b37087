"""The layers of a diagnosis, a PEFT model's pairs or linear layers that PEFT would adapt, and their initializations."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from tangora._checks import InputError, check_whole
from tangora._names import DIAGNOSED_STARTS
from tangora.adapters import LoraPair, check_unmerged, discover, linear_layers, module_weight, mutates_base
from tangora.geometry.sketch import LowRankSVD
from tangora.init import start_method
from tangora.init.start_method import LayerToStart, StartFactors
from tangora.probes import ProbedLayer, probed_layers, why_unread
from tangora.probes.layers import unreadable_layers

DEFAULT_RANK = 8
GRADIENT_STARTS = tuple(start for start in DIAGNOSED_STARTS if start_method(start).reads_gradients)
"""Initializations that are made from the gradient, and fit the examples it was read on."""

# above this smaller side initializations are made by their approximations
_EXACT_SIDE = 256


@dataclass(frozen=True)
class Subject:
    """The layers of a diagnosis."""

    layers: list[ProbedLayer]
    ranks: dict[str, int]
    """Rank of the initializations, by the layers' names."""
    skipped: dict[str, str]
    plain_start: bool
    """Whether the adapter, if any, leaves the model as the base is."""

    @property
    def common_rank(self) -> int:
        """The commonest rank, as far as every layer allows it."""
        commonest = Counter(self.ranks[layer.name] for layer in self.layers).most_common(1)[0][0]
        return min(commonest, *(min(layer.m, layer.n) for layer in self.layers))

    def with_read(self, read: Collection[str]) -> "Subject":
        """Move the layers whose gradient could not be read to the skipped ones."""
        unread = {layer.name: why_unread(layer.module) for layer in self.layers if layer.name not in read}
        if len(unread) == len(self.layers):
            name, reason = next(iter(unread.items()))
            raise InputError(f"no layer's gradient could be read; {name}: {reason}")
        layers = [layer for layer in self.layers if layer.name in read]
        return replace(self, layers=layers, skipped=self.skipped | unread)

    def is_lora_start(self, layer: ProbedLayer) -> bool:
        """Tell whether a layer's adapter is the initialization that LoRA would make."""
        pair = layer.pair
        return self.plain_start and pair is not None and self.ranks[layer.name] == pair.shape[2]


def find_subject(
    model: nn.Module, adapter_name: str | None, names: Sequence[str] | None, rank: int | None
) -> Subject:
    """Find the layers of a diagnosis."""
    if rank is not None:
        check_whole("rank", rank, low=1)
    found = discover(model, adapter_name)
    if not found.pairs and found.skipped:
        name, reason = next(iter(found.skipped.items()))
        raise InputError(f"model has no plain LoRA pair to diagnose; {name} is {reason}")
    if not found.pairs:
        layers = _linear_layers(model, names)
        skipped = {} if names is None else unreadable_layers(model, names)
        plain_start = True
    else:
        if names is not None:
            raise InputError("target_modules is for models without an adapter; this one's layers are known")
        adapter = _active_adapter(model, found.pairs, adapter_name)
        pairs = [pair for pair in found.pairs if pair.adapter == adapter]
        layers = probed_layers(model, adapter_name=adapter)
        read = {layer.name for layer in layers}
        skipped = found.skipped | {p.name: why_unread(p.layer) for p in pairs if p.name not in read}
        plain_start = all(_unmoved(pair) for pair in pairs)
    ranks = {layer.name: rank or _own_rank(layer) for layer in layers}
    for layer in layers:
        smaller = min(layer.m, layer.n)
        if ranks[layer.name] > smaller:
            raise InputError(
                f"rank must be at most {smaller}, the smaller side of layer {layer.path} "
                f"({layer.m} x {layer.n}); got {ranks[layer.name]}"
            )
    return Subject(layers, ranks, skipped, plain_start)


def start_factors(
    start: str, layer: ProbedLayer, rank: int, gradient: LowRankSVD, seed: int
) -> StartFactors | None:
    """Make the factors of an initialization, up to their size, which does not matter to what they capture."""
    method = start_method(start)
    if method.reads_gradients and not gradient.S[0] > 0:
        return None
    generator = torch.Generator().manual_seed(seed)
    to_start = LayerToStart(
        shape=(layer.m, layer.n, rank),
        scaling=1.0,
        gradient=gradient,
        weight=partial(module_weight, layer.base),
        drawn=lambda: _drawn(layer, rank, generator),
        generator=generator,
    )
    options = method.approximation if min(layer.m, layer.n) > _EXACT_SIDE else {}
    return method.factors(to_start, **options)


def _drawn(layer: ProbedLayer, rank: int, generator: torch.Generator) -> StartFactors:
    A, B = torch.zeros(rank, layer.n), torch.zeros(layer.m, rank)
    if isinstance(layer.base, nn.Embedding):  # PEFT initializes embeddings the other way round
        return A, torch.randn(B.shape, generator=generator)
    return nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator), B


def _own_rank(layer: ProbedLayer) -> int:
    # an adapter may have more than full rank, an initialization may not
    return DEFAULT_RANK if layer.pair is None else min(layer.pair.shape)


def _linear_layers(model: nn.Module, names: Sequence[str] | None) -> list[ProbedLayer]:
    layers = probed_layers(model, names=names)
    if names is not None:
        return layers
    linear = linear_layers(model)
    chosen = [layer for layer in layers if layer.name in linear]
    if not chosen:
        raise InputError("model has no linear layer but its head: name layers by target_modules")
    return chosen


def _active_adapter(model: nn.Module, pairs: list[LoraPair], adapter_name: str | None) -> str:
    check_unmerged(model)
    active = {name for pair in pairs for name in pair.layer.active_adapters}  # pyright: ignore[reportGeneralTypeIssues]
    if adapter_name is None and len(active) != 1:
        raise InputError(f"adapter_name must be given: {len(active)} adapters are active")
    adapter = adapter_name or next(iter(active))
    if adapter not in active:
        raise InputError(f"adapter {adapter!r} must be active to be diagnosed: call set_adapter first")
    if any(pair.layer.disable_adapters for pair in pairs):
        raise InputError("the model's adapters are disabled: enable them first")
    if mutates_base(getattr(model, "peft_config", {}).get(adapter)):
        raise InputError(
            f"PEFT's initialization has changed the base weights of adapter {adapter!r}, so that the base model's "
            "gradient is lost: save_adapter it, and load_adapter it on the untouched base"
        )
    return adapter


def _unmoved(pair: LoraPair) -> bool:
    A, B = pair.factors()
    if (A.any() and B.any()) or pair.offset() is not None:
        return False
    scale = pair.row_scale()
    # magnitudes are rounded to the adapter's dtype
    tolerance = 10 * max(_eps(pair.A), _eps(scale)) if scale is not None else 0.0
    return scale is None or bool(((scale - 1).abs() < tolerance).all())


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps
