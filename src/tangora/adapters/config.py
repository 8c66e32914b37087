"""What the config of a saved adapter says of ranks and scalings, when its files hold another rank than the model."""

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from tangora._checks import InputError

_BASE = "base_model.model."


class OffsetConfig(LoraConfig):
    """Config of an adapter with an offset: rank r in memory, and in files the rank 2r that its state has.

    Attributes:
        offset_of: The adapter whose offset other adapters with this config get.
    """

    offset_of: str  # no field of the dataclass, so it is in no file

    @classmethod
    def of(cls, config: Any, adapter: str) -> "OffsetConfig":
        """Make the config of an adapter that has got an offset."""
        made: Any = copy.copy(config)
        # Other adapters with this config start at the offset, whatever this one started from; until then a product of
        # zero lets PEFT take the magnitudes of the base.
        made.__class__, made.offset_of, made.init_lora_weights = cls, adapter, True
        return made

    def without_offset(self) -> LoraConfig:
        """Make the config of the adapter without its offset."""
        made: Any = copy.copy(self)
        made.__class__ = LoraConfig
        del made.offset_of
        return made

    def __post_init__(self) -> None:
        # dataclasses.replace gets here
        raise InputError(
            "the config of an adapter with an offset describes no other adapter: take a LoraConfig of your own"
        )

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


def with_ranks(
    config: dict[str, Any], ranks: Mapping[str, int], scalings: Mapping[str, float]
) -> dict[str, Any]:
    """Give every layer a rank and a scaling."""
    power = 0.5 if config.get("use_rslora") else 1
    alphas = {name: scalings[name] * rank**power for name, rank in ranks.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return config | {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_key(name): own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {_key(name): own for name, own in alphas.items() if own != alpha},
        "init_lora_weights": True,
    }


def with_uniform(config: dict[str, Any], rank: int, alpha: float) -> dict[str, Any]:
    """Give all layers one rank and one alpha, and the scaling alpha / rank."""
    plain = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True}
    if config.get("ensure_weight_tying"):
        # layers that shared their factors and not their scaling no longer can
        plain["ensure_weight_tying"] = False
    return config | {"r": rank, "lora_alpha": alpha} | plain


def is_uniform(config: dict[str, Any]) -> bool:
    """Say whether all layers have one rank and one alpha, and the scaling alpha / rank."""
    return not any(config.get(key) for key in ("rank_pattern", "alpha_pattern", "use_rslora"))


def with_tied_layers(config: dict[str, Any], origin: Any) -> dict[str, Any]:
    """Name the layers that PEFT adapted because they are tied to one that was named (``ensure_weight_tying``).

    PEFT takes them out of its lists and keeps them beside; a file has the lists alone, and from those it finds the ties
    again only where an embedding has one of a few names.
    """
    named = {"target_modules": "target_modules_to_tie", "modules_to_save": "modules_to_tie"}
    found = {}
    for key, beside in named.items():
        tied = getattr(origin, beside, None)
        if tied and not isinstance(config.get(key), str):  # a regular expression still finds what it found
            found[key] = sorted({*(config.get(key) or ()), *tied})
    return config | found


def _commonest(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _key(name: str) -> str:
    # PEFT reads keys as regular expressions for the ends of names
    return f"^{re.escape(name.removeprefix(_BASE))}"
