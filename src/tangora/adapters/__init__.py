"""The only readers of PEFT's layer types: which parameters form a pair (A, B), and how an adapter is written."""

from tangora.adapters.adalora import from_adalora, is_adalora
from tangora.adapters.discover import Discovery, discover, find_pairs
from tangora.adapters.heads import head_names, head_options, head_parameters, linear_layers
from tangora.adapters.load import load_adapter
from tangora.adapters.merge import merged_model, save_merged
from tangora.adapters.offset import (
    attach_offset,
    detach_offset,
    has_offset,
    mutates_base,
    warn_if_base_changed,
)
from tangora.adapters.pair import LoraPair
from tangora.adapters.peft_models import (
    active_adapter,
    adapter_switches,
    adapters_off,
    base_layer,
    check_not_sharded,
    check_unfused,
    check_unmerged,
    has_adapter,
    uncompiled_modules,
    unwrapped,
)
from tangora.adapters.peft_tools import respect_offsets
from tangora.adapters.save import SavedAdapter, initial_factors, save_adapter
from tangora.adapters.stored_weight import module_weight

__all__ = [
    "Discovery",
    "LoraPair",
    "SavedAdapter",
    "active_adapter",
    "adapter_switches",
    "adapters_off",
    "attach_offset",
    "base_layer",
    "check_not_sharded",
    "check_unfused",
    "check_unmerged",
    "detach_offset",
    "discover",
    "find_pairs",
    "from_adalora",
    "has_adapter",
    "has_offset",
    "head_names",
    "head_options",
    "head_parameters",
    "initial_factors",
    "is_adalora",
    "linear_layers",
    "load_adapter",
    "merged_model",
    "module_weight",
    "mutates_base",
    "save_adapter",
    "save_merged",
    "uncompiled_modules",
    "unwrapped",
    "warn_if_base_changed",
]

respect_offsets()
