"""Optimizers of LoRA pairs: one method per file, the pure step first, then the thin class."""

from tangora.optim.base import PairOptimizer
from tangora.optim.create import (
    create_lora_pro,
    create_ode_lora,
    create_preconditioned_adamw,
    create_tangent_adam,
    create_tangent_muon,
)
from tangora.optim.lora_muon import LoRAMuon
from tangora.optim.lora_pro import LoRAPro
from tangora.optim.lora_rite import LoRARITE
from tangora.optim.muon import MuonAndAdamW
from tangora.optim.ode_lora import ODELoRA
from tangora.optim.polora import PoLoRA
from tangora.optim.preconditioned_adamw import PreconditionedAdamW
from tangora.optim.tangent_adam import TangentAdam
from tangora.optim.tangent_muon import TangentMuon

__all__ = [
    "LoRAMuon",
    "LoRAPro",
    "LoRARITE",
    "MuonAndAdamW",
    "ODELoRA",
    "PairOptimizer",
    "PoLoRA",
    "PreconditionedAdamW",
    "TangentAdam",
    "TangentMuon",
    "create_lora_pro",
    "create_ode_lora",
    "create_preconditioned_adamw",
    "create_tangent_adam",
    "create_tangent_muon",
]
