"""Read-only measures of how well LoRA adapters can follow the full gradient."""

from tangora.diagnostics.diagnose import diagnose
from tangora.diagnostics.ranks import RankPlan, Spectrum, plan_ranks, required_rank
from tangora.diagnostics.records import AdapterState, Diagnosis, LayerDiagnosis, Totals
from tangora.diagnostics.starts import STARTS

__all__ = [
    "AdapterState",
    "Diagnosis",
    "LayerDiagnosis",
    "RankPlan",
    "STARTS",
    "Spectrum",
    "Totals",
    "diagnose",
    "plan_ranks",
    "required_rank",
]
