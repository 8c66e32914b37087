"""`tangora curvature`: what is measured, of whom, and with what."""

from tangora.experiments.curvature.measure import (
    RECORD,
    CurvatureFiles,
    CurvatureSettings,
    measure_curvature,
    rewrite,
)

__all__ = ["RECORD", "CurvatureFiles", "CurvatureSettings", "measure_curvature", "rewrite"]
