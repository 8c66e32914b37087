r"""Initial adapter products: layers compute with $W_0 - s B_0 A_0$ without a change of the base weights.

An initialization that sets $A = A_0$, $B = B_0$ must not change the model. Subtracting the product from the base
weight is inexact in low precision, impossible in 4 bit, and leaves a base that saved adapters no longer fit. Here every
layer carries the subtracted pair beside its own.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, LoraModel, PeftModel
from torch import Tensor

from tangora._checks import InputError
from tangora.adapters.discover import discover
from tangora.adapters.offset_layer import drop_offset, get_offset, put_offset, why_no_carrier
from tangora.adapters.pair import LoraPair
from tangora.adapters.peft_models import check_unfused, check_unmerged, unwrapped

# initializations for which PEFT overwrites the base weights
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class OffsetConfig(LoraConfig):
    """Config of an adapter with an offset: rank r in memory, and in files the rank 2r that its state has."""

    offset_of: str
    """The adapter whose offset other adapters with this config get; no field of the dataclass, so it is in no file."""

    def __init__(self, config: Any = None, adapter: str = "", **fields: Any):
        if config is None or fields:  # dataclasses.replace gets here
            raise InputError(
                "the config of an adapter with an initial product cannot be used for another adapter: "
                "create a new LoraConfig"
            )
        # What PEFT has found out about the model comes along. Other adapters with this config start at the offset,
        # whatever this one started from; until then a product of zero lets PEFT take the magnitudes of the base.
        vars(self).update(vars(config) | {"offset_of": adapter, "init_lora_weights": True})

    def without_offset(self) -> LoraConfig:
        """Make the config of the adapter without its offset."""
        plain = LoraConfig.__new__(LoraConfig)
        vars(plain).update({key: value for key, value in vars(self).items() if key != "offset_of"})
        return plain

    def to_dict(self) -> dict[str, Any]:
        """Describe the adapter as its files hold it."""
        return doubled_rank(super().to_dict())


def doubled_rank(config: dict[str, Any]) -> dict[str, Any]:
    """Double every rank of a config and keep every scaling."""
    # alpha / r, or alpha / sqrt(r) with rsLoRA. A rank pattern without its own alpha still works, because every rank
    # doubles.
    growth = math.sqrt(2) if config.get("use_rslora") else 2
    return config | {
        "r": 2 * config["r"],
        "lora_alpha": growth * config["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: growth * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
        "init_lora_weights": True,
    }


def mutates_base(config: Any) -> bool:
    """Say whether PEFT's own initialization, which the config of an adapter names, overwrote the base weights."""
    return str(getattr(config, "init_lora_weights", True)).lower().startswith(_MUTATING)


def warn_if_base_changed(model: Any) -> None:
    """Warn before training that saving an adapter will need its initial factors."""
    configs = getattr(unwrapped(model), "peft_config", None)
    for adapter, config in configs.items() if isinstance(configs, dict) else ():
        if mutates_base(config):
            warnings.warn(
                f"PEFT's initialization {config.init_lora_weights!r} of adapter {adapter!r} has changed "
                "the base weights: to save it for the original base, call initial = "
                "tangora.initial_factors(model) before training, and save with "
                "tangora.save_adapter(model, path, initial=initial)",
                stacklevel=3,
            )


def attach_offset(model: PeftModel, adapter_name: str, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    r"""Make every layer of an adapter compute $W_0 x + s (B A x - B_0 A_0 x)$, with $B_0$ and $A_0$ frozen.

    The layer does what PEFT's does on the base weight $W_0 - s B_0 A_0$, dropout and DoRA's norm included, while the
    base weights stay bit for bit what they are: while $A = A_0$ and $B = B_0$, a plain adapter changes no bit of the
    output, and without the adapter the model is the base. Whoever saves the model (PEFT, a Trainer's checkpoints,
    `save_adapter`) writes one plain adapter of rank $2r$ that fits the original base; loading it back into this model
    restores both pairs.

    An adapter that is added with this one's config (``model.add_adapter("ref", model.peft_config["default"])``, as TRL
    does for its reference model) gets the same offset and starts at it. PEFT's tools that read or write the factors
    alone (combining, hotswapping, conversion) are refused.

    Args:
        model: PEFT model, also inside DistributedDataParallel or compiled.
        adapter_name: The adapter, of plain LoRA, rsLoRA or DoRA.
        factors: $(B_0, A_0)$ by the names of `LoraPair`, as matrices of shapes m × r and r × n; they are copied, in the
            factors' dtype. Layers that are missing get zeros, so that the rank doubles everywhere. An offset that is
            there already is replaced.

    Raises:
        InputError: If a layer of the adapter cannot subtract an initial product, a shape or a name does not
        fit, the adapter is
            merged, or its initialization changed the base weights. The model is then as it was.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> x = torch.randn(2, 4)
        >>> before = base(x)
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        >>> attach_offset(
        ...     model, "default", {pair.name: pair.factors()[::-1] for pair in discover(model).pairs}
        ... )
        >>> torch.equal(model(x), before)
        True
    """
    model = unwrapped(model)
    pairs = _pairs(model, adapter_name)
    _check_factors(pairs, factors)
    for pair in pairs:
        B0, A0 = factors.get(pair.name, (None, None))
        put_offset(pair.layer, adapter_name, _like(A0, pair.A), _like(B0, pair.B))
    # copies, since other adapters may have been made from the same config
    model.peft_config[adapter_name] = OffsetConfig(model.peft_config[adapter_name], adapter_name)


def detach_offset(model: PeftModel, adapter_name: str) -> None:
    """Remove the initial product: the model then computes the same as PEFT's with the trained factors.

    Args:
        adapter_name: The adapter; without an offset nothing happens.

    Raises:
        InputError: If the adapter is merged, or not one of the model's.
    """
    model = unwrapped(model)
    found = [pair for pair in discover(model, adapter_name).pairs if get_offset(pair.layer, adapter_name)]
    if found:
        check_unmerged(model, adapter_name)
    for pair in found:
        drop_offset(pair.layer, adapter_name)
    config = model.peft_config[adapter_name]
    if isinstance(config, OffsetConfig):
        model.peft_config[adapter_name] = config.without_offset()


def has_offset(model: PeftModel, adapter_name: str) -> bool:
    """Return whether an adapter subtracts an initial product."""
    return any(get_offset(module, adapter_name) for module in model.modules())


def _pairs(model: PeftModel, adapter_name: str) -> list[LoraPair]:
    if not isinstance(model, PeftModel):
        raise InputError(f"attach_offset needs a PeftModel; got {type(model).__name__}")
    found = discover(model, adapter_name)
    config: Any = model.peft_config[adapter_name]
    if mutates_base(config):
        raise InputError(
            f"the initialization {config.init_lora_weights!r} of adapter {adapter_name!r} changed the "
            "base weights; create the adapter with init_lora_weights=True"
        )
    for name, reason in found.skipped.items():
        _refuse(name, f"its adapter is not a plain pair (A, B): {reason}")
    # X-LoRA's layers read the trained pairs alone
    if type(config) not in (LoraConfig, OffsetConfig) or not isinstance(model.base_model, LoraModel):
        got = type(config).__name__, type(model.base_model).__name__
        raise InputError(f"adapter {adapter_name!r} must be LoRA; got {' in '.join(got)}")
    check_unfused(model)
    for pair in found.pairs:
        if pair.tied:
            _refuse(pair.name, "its factors are tied to those of another layer")
        if reason := why_no_carrier(pair.layer, adapter_name):
            _refuse(pair.name, reason)
    check_unmerged(model, adapter_name)
    return found.pairs


def _refuse(name: str, reason: str) -> None:
    raise InputError(
        f"layer {name} cannot be re-initialized without changing the model: {reason}; exclude it from "
        "target_modules, or use an initialization whose product is not subtracted (lora, lora-one)"
    )


def _check_factors(pairs: list[LoraPair], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    shapes = {pair.name: pair.shape for pair in pairs}
    if unknown := sorted(factors.keys() - shapes.keys()):
        raise InputError(
            f"factors must name layers of the adapter, such as {next(iter(shapes))}; got {unknown[0]}"
        )
    for name, (B0, A0) in factors.items():
        m, n, r = shapes[name]
        if B0.shape != (m, r) or A0.shape != (r, n):
            raise InputError(
                f"factors of {name} must have shapes ({m}, {r}) and ({r}, {n}); "
                f"got {tuple(B0.shape)} and {tuple(A0.shape)}"
            )
        if not (torch.isfinite(B0).all() and torch.isfinite(A0).all()):
            raise InputError(f"factors of {name} must be finite")


def _like(frozen: Tensor | None, live: Tensor) -> Tensor:
    if frozen is None:
        return torch.zeros_like(live, requires_grad=False)
    return frozen.detach().reshape(live.shape).to(live, copy=True)
