"""Read-only measures of how well LoRA adapters can follow the full gradient."""

from tangora.diagnostics.diagnose import diagnose
from tangora.diagnostics.ranks import RankPlan, Spectrum, plan_ranks, required_rank
from tangora.diagnostics.records import AdapterState, Diagnosis, HeldOut, LayerDiagnosis, Totals
from tangora.diagnostics.sites import DEFAULT_RANK
from tangora.diagnostics.starts import GRADIENT_STARTS, STARTS

__all__ = [
    "AdapterState",
    "DEFAULT_RANK",
    "GRADIENT_STARTS",
    "Diagnosis",
    "HeldOut",
    "LayerDiagnosis",
    "RankPlan",
    "STARTS",
    "Spectrum",
    "Totals",
    "diagnose",
    "plan_ranks",
    "required_rank",
]
