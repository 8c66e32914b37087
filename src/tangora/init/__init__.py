"""Initializations: what a LoRA adapter's factors are before training. One per file, pure function first."""

from tangora.init.initialize import Start, initialize
from tangora.init.lora_ga import lora_ga
from tangora.init.lora_one import lora_one, lora_one_v1
from tangora.init.marks import is_trained, mark_started, started_by
from tangora.init.one_step import one_step
from tangora.init.orthogonal import orthogonal
from tangora.init.pissa import pissa
from tangora.init.starts import start_method, starts

__all__ = [
    "Start",
    "initialize",
    "is_trained",
    "lora_ga",
    "lora_one",
    "lora_one_v1",
    "mark_started",
    "one_step",
    "orthogonal",
    "pissa",
    "start_method",
    "started_by",
    "starts",
]
