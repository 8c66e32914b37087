"""Read-only measures of the share of the full gradient that LoRA adapters capture."""

from tangora._names import DIAGNOSED_STARTS
from tangora.diagnostics.diagnose import diagnose
from tangora.diagnostics.diagnosed_layers import DEFAULT_RANK, GRADIENT_STARTS
from tangora.diagnostics.motion import Track, WeightTrack, find_tracks, fingerprint
from tangora.diagnostics.rank_plan import LayerGradient, RankPlan, plan_ranks, required_rank
from tangora.diagnostics.records import AdapterState, Diagnosis, HeldOut, LayerDiagnosis, Totals
from tangora.diagnostics.snapshots import Reference, write_snapshot
from tangora.diagnostics.trajectory import Measures, Trajectory, TrajectoryPoint

__all__ = [
    "AdapterState",
    "DEFAULT_RANK",
    "GRADIENT_STARTS",
    "Diagnosis",
    "HeldOut",
    "LayerDiagnosis",
    "Measures",
    "RankPlan",
    "Reference",
    "DIAGNOSED_STARTS",
    "LayerGradient",
    "Totals",
    "Track",
    "Trajectory",
    "TrajectoryPoint",
    "WeightTrack",
    "diagnose",
    "find_tracks",
    "fingerprint",
    "plan_ranks",
    "required_rank",
    "write_snapshot",
]
