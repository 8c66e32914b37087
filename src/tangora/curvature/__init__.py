"""Curvature of LoRA training: Hessian products in factors, tangent space and weights, and what is read from them."""

from tangora.curvature.batch_noise import BatchNoise, batch_statistics
from tangora.curvature.blocks import Blocks, block_statistics
from tangora.curvature.density import SpectralDensity, spectral_density
from tangora.curvature.eigenpairs import Eigenpairs
from tangora.curvature.empirical_fisher import EmpiricalFisher
from tangora.curvature.evaluation import Evaluation
from tangora.curvature.gauss_newton import GaussNewton
from tangora.curvature.hessian import Hessian
from tangora.curvature.lanczos import lanczos_eigenpairs
from tangora.curvature.landscape import Landscape
from tangora.curvature.low_rank_space import LowRankSpace, TangentSpace
from tangora.curvature.operators import CurvatureOperator
from tangora.curvature.power import power_eigenpairs
from tangora.curvature.sharpness import Sharpness
from tangora.curvature.spaces import FactorSpace, Space
from tangora.curvature.split import CouplingPart, PulledBackSpace, RiemannianHessian, WeightPart
from tangora.curvature.symmetric import SymmetricOperator
from tangora.curvature.trace import Estimate, frobenius_norm, hutch_plus_plus, hutchinson
from tangora.curvature.weight_space import WeightSpace

__all__ = [
    "BatchNoise",
    "Blocks",
    "CouplingPart",
    "CurvatureOperator",
    "Eigenpairs",
    "EmpiricalFisher",
    "Estimate",
    "Evaluation",
    "FactorSpace",
    "GaussNewton",
    "Hessian",
    "Landscape",
    "LowRankSpace",
    "PulledBackSpace",
    "RiemannianHessian",
    "Sharpness",
    "Space",
    "SpectralDensity",
    "SymmetricOperator",
    "TangentSpace",
    "WeightPart",
    "WeightSpace",
    "batch_statistics",
    "block_statistics",
    "frobenius_norm",
    "hutch_plus_plus",
    "hutchinson",
    "lanczos_eigenpairs",
    "power_eigenpairs",
    "spectral_density",
]
