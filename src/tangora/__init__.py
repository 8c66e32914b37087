"""tangora: LoRA fine-tuning that follows full fine-tuning, shows how far it is from it, and proves it."""

from tangora._checks import InputError
from tangora.adapters import LoraPair, find_pairs, initial_factors, load_adapter, save_adapter
from tangora.optim import LoRAPro, PreconditionedAdamW, TangentAdam

__all__ = [
    "InputError",
    "LoRAPro",
    "LoraPair",
    "PreconditionedAdamW",
    "TangentAdam",
    "find_pairs",
    "initial_factors",
    "load_adapter",
    "save_adapter",
]
