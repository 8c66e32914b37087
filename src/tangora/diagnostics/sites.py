"""The layers to look at: a PEFT model's pairs, or the linear layers that PEFT would adapt."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tangora._checks import InputError, check_whole
from tangora.adapters import LoraPair, check_unmerged, discover, magnitude_scale, mutates_base, offset_factors
from tangora.probes import ProbedLayer, probed_layers, why_unread
from tangora.probes.layers import unreadable_layers

_BASE = "base_model.model."
_CLASSIFIER_HEADS = ("score", "classifier")  # PEFT's list, for models without output embeddings
DEFAULT_RANK = 8


@dataclass(frozen=True, eq=False)
class Site:
    """One layer to look at."""

    name: str
    """Its path in the base model."""
    layer: ProbedLayer
    pair: LoraPair | None
    rank: int
    """Rank of the starts."""


@dataclass(frozen=True)
class Subject:
    """What is diagnosed."""

    sites: list[Site]
    skipped: dict[str, str]
    plain_start: bool
    """Whether the adapter, if any, leaves the model as the base is."""

    @property
    def common_rank(self) -> int:
        """The commonest rank, as far as every layer allows it."""
        commonest = Counter(site.rank for site in self.sites).most_common(1)[0][0]
        return min(commonest, *(min(site.layer.m, site.layer.n) for site in self.sites))

    def with_read(self, read: Collection[str]) -> "Subject":
        """Move the layers whose gradient could not be read to the skipped ones."""
        unread = {
            site.layer.name: why_unread(site.layer.module)
            for site in self.sites
            if site.layer.name not in read
        }
        if len(unread) == len(self.sites):
            name, reason = next(iter(unread.items()))
            raise InputError(f"no layer's gradient could be read; {name}: {reason}")
        sites = [site for site in self.sites if site.layer.name in read]
        return replace(self, sites=sites, skipped=self.skipped | unread)

    def is_lora_start(self, site: Site) -> bool:
        """Tell whether a layer's adapter is the start that LoRA would make."""
        return self.plain_start and site.pair is not None and site.rank == site.pair.shape[2]


def find_subject(
    model: nn.Module, adapter_name: str | None, names: Sequence[str] | None, rank: int | None
) -> Subject:
    """Find the layers to look at."""
    if rank is not None:
        check_whole("rank", rank, low=1)
    found = discover(model, adapter_name)
    if not found.pairs and found.skipped:
        name, reason = next(iter(found.skipped.items()))
        raise InputError(f"model has no plain LoRA pair to diagnose; {name} is {reason}")
    if not found.pairs:
        sites = [
            Site(layer.name, layer, None, rank or DEFAULT_RANK) for layer in _linear_layers(model, names)
        ]
        skipped = {} if names is None else unreadable_layers(model, names)
        plain_start = True
    else:
        if names is not None:
            raise InputError("target_modules is for models without an adapter; this one's layers are known")
        adapter = _active_adapter(model, found.pairs, adapter_name)
        pairs = [pair for pair in found.pairs if pair.adapter == adapter]
        sites = _adapted(model, pairs, adapter, rank)
        read = {site.layer.name for site in sites}
        skipped = found.skipped | {p.name: why_unread(p.layer) for p in pairs if p.name not in read}
        plain_start = all(_unmoved(pair) for pair in pairs)
    for site in sites:
        smaller = min(site.layer.m, site.layer.n)
        if site.rank > smaller:
            raise InputError(
                f"rank must be at most {smaller}, the smaller side of layer {site.name} "
                f"({site.layer.m} x {site.layer.n}); got {site.rank}"
            )
    return Subject(sites, skipped, plain_start)


def _adapted(model: nn.Module, pairs: list[LoraPair], adapter: str, rank: int | None) -> list[Site]:
    layers = {layer.name: layer for layer in probed_layers(model, adapter_name=adapter)}
    return [
        Site(
            pair.name.removeprefix(_BASE),
            layers[pair.name],
            pair,
            rank or min(pair.shape),  # an adapter may have more than full rank, a start may not
        )
        for pair in pairs
        if pair.name in layers
    ]


def _linear_layers(model: nn.Module, names: Sequence[str] | None) -> list[ProbedLayer]:
    layers = probed_layers(model, names=names)
    if names is not None:
        return layers
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = (output,) if output is not None else [getattr(model, name, None) for name in _CLASSIFIER_HEADS]
    chosen = [
        layer
        for layer in layers
        if isinstance(layer.module, (nn.Linear, Conv1D)) and all(layer.module is not head for head in heads)
    ]
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
    config = getattr(model, "peft_config", {}).get(adapter)
    if mutates_base(config):
        raise InputError(
            f"PEFT's start has changed the base weights of adapter {adapter!r}, so that the base model's gradient is "
            "lost: save_adapter it, and load_adapter it on the untouched base"
        )
    return adapter


def _unmoved(pair: LoraPair) -> bool:
    A, B = pair.factors()
    if (A.any() and B.any()) or offset_factors(pair) is not None:
        return False
    scale = magnitude_scale(pair)
    # magnitudes are rounded to the adapter's dtype
    tolerance = 10 * max(_eps(pair.A), _eps(scale)) if scale is not None else 0.0
    return scale is None or bool(((scale - 1).abs() < tolerance).all())


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps
