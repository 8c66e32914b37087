"""Read-only measures of how well LoRA adapters can follow the full gradient."""

from tangora._names import STARTS
from tangora.diagnostics.diagnose import diagnose
from tangora.diagnostics.ranks import RankPlan, Spectrum, plan_ranks, required_rank
from tangora.diagnostics.records import AdapterState, Diagnosis, HeldOut, LayerDiagnosis, Totals
from tangora.diagnostics.sites import DEFAULT_RANK
from tangora.diagnostics.snapshots import Reference, write_snapshot
from tangora.diagnostics.starts import GRADIENT_STARTS
from tangora.diagnostics.tracks import Track, WeightTrack, find_tracks, fingerprint
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
    "STARTS",
    "Spectrum",
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
