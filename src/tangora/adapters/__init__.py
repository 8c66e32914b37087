"""The only readers of PEFT's layer types: which parameters form a pair (A, B), and how an adapter is written."""

from tangora.adapters.discover import Discovery, discover, find_pairs
from tangora.adapters.export import initial_factors, load_adapter, save_adapter
from tangora.adapters.pair import LoraPair

__all__ = [
    "Discovery",
    "LoraPair",
    "discover",
    "find_pairs",
    "initial_factors",
    "load_adapter",
    "save_adapter",
]
