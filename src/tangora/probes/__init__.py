"""Full gradients measured through thin products: no gradient of the size of a weight is ever stored."""

from tangora.probes.batches import as_batches, mean_loss
from tangora.probes.gradient import GradientProbe, Reading, Request
from tangora.probes.layers import ProbedLayer, probed_layers, why_unread
from tangora.probes.singular_values import GradientSVD, gradient_norms, gradient_svds

__all__ = [
    "GradientProbe",
    "GradientSVD",
    "ProbedLayer",
    "Reading",
    "Request",
    "as_batches",
    "gradient_norms",
    "gradient_svds",
    "mean_loss",
    "probed_layers",
    "why_unread",
]
