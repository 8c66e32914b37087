"""Read-only measures of how well LoRA adapters can follow the full gradient."""

from tangora.diagnostics.diagnose import diagnose
from tangora.diagnostics.ranks import RankPlan, Spectrum, plan_ranks, required_rank
from tangora.diagnostics.records import AdapterState, Diagnosis, LayerDiagnosis, Totals
from tangora.diagnostics.sites import DEFAULT_RANK
from tangora.diagnostics.starts import STARTS

__all__ = [
    "AdapterState",
    "DEFAULT_RANK",
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
