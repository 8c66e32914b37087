"""Curvature of LoRA training: Hessian–vector products over factors, tangent space and weights, and their spectra."""

from tangora.curvature.batch_noise import BatchCurvature, BatchNoise, Spread, batch_statistics
from tangora.curvature.density import SpectralDensity, spectral_density
from tangora.curvature.eigenpairs import Eigenpairs, Eigenvalue
from tangora.curvature.empirical_fisher import EmpiricalFisher
from tangora.curvature.evaluation import Evaluation
from tangora.curvature.gauss_newton import GaussNewton
from tangora.curvature.hessian import Hessian
from tangora.curvature.hessian_parts import CouplingPart, RiemannianHessian, WeightPart
from tangora.curvature.lanczos import lanczos_eigenpairs
from tangora.curvature.landscape import Landscape
from tangora.curvature.layer_curvature import LayerCurvature, layer_curvatures
from tangora.curvature.operators import CurvatureOperator
from tangora.curvature.power import power_eigenpairs
from tangora.curvature.sharpness import Sharpness
from tangora.curvature.spaces import FactorSpace, LowRankSpace, Space, TangentSpace
from tangora.curvature.trace import TraceEstimate, frobenius_norm, hutch_plus_plus, hutchinson
from tangora.curvature.weight_space import WeightSpace

__all__ = [
    "BatchCurvature",
    "BatchNoise",
    "CouplingPart",
    "CurvatureOperator",
    "Eigenpairs",
    "Eigenvalue",
    "EmpiricalFisher",
    "Evaluation",
    "FactorSpace",
    "GaussNewton",
    "Hessian",
    "Landscape",
    "LayerCurvature",
    "LowRankSpace",
    "RiemannianHessian",
    "Sharpness",
    "Space",
    "SpectralDensity",
    "Spread",
    "TangentSpace",
    "TraceEstimate",
    "WeightPart",
    "WeightSpace",
    "batch_statistics",
    "frobenius_norm",
    "hutch_plus_plus",
    "hutchinson",
    "lanczos_eigenpairs",
    "layer_curvatures",
    "power_eigenpairs",
    "spectral_density",
]
