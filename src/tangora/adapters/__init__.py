"""The only readers of PEFT's layer types: which parameters form a pair (A, B), and how an adapter is written."""

from tangora.adapters.discover import Discovery, active_adapter, discover, find_pairs
from tangora.adapters.export import SavedAdapter, initial_factors, save_adapter
from tangora.adapters.load import load_adapter
from tangora.adapters.merge import merged_model, save_merged
from tangora.adapters.offset import (
    attach_offset,
    detach_offset,
    has_offset,
    mutates_base,
    offset_factors,
    warn_if_base_changed,
)
from tangora.adapters.pair import LoraPair
from tangora.adapters.peft_tools import respect_offsets
from tangora.adapters.switch import adapters_off, check_unmerged
from tangora.adapters.weight import base_weight, magnitude_scale, module_weight, refresh_magnitude
from tangora.adapters.wrapped import check_not_sharded, uncompiled_modules, unwrapped

__all__ = [
    "Discovery",
    "LoraPair",
    "SavedAdapter",
    "active_adapter",
    "adapters_off",
    "attach_offset",
    "base_weight",
    "check_not_sharded",
    "check_unmerged",
    "detach_offset",
    "discover",
    "find_pairs",
    "has_offset",
    "initial_factors",
    "load_adapter",
    "magnitude_scale",
    "merged_model",
    "module_weight",
    "mutates_base",
    "offset_factors",
    "uncompiled_modules",
    "refresh_magnitude",
    "save_adapter",
    "save_merged",
    "unwrapped",
    "warn_if_base_changed",
]

respect_offsets()
