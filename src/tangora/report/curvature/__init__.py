"""From a measurement of curvature to sentences, terminal tables, pictures and one self-contained page."""

from tangora.report.curvature.curvature_figures import FACTORS
from tangora.report.curvature.curvature_page import (
    curvature_sentences,
    curvature_tables,
    render_curvature,
    save_curvature_pictures,
    write_curvature,
)
from tangora.report.curvature.record import (
    CurvatureRecord,
    Density,
    LandscapeRecord,
    Line,
    Plane,
    SharpnessRecord,
    Spectrum,
    load_curvature,
)

__all__ = [
    "FACTORS",
    "CurvatureRecord",
    "Density",
    "LandscapeRecord",
    "Line",
    "Plane",
    "SharpnessRecord",
    "Spectrum",
    "curvature_tables",
    "curvature_sentences",
    "load_curvature",
    "render_curvature",
    "save_curvature_pictures",
    "write_curvature",
]
