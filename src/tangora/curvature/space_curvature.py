r"""Two numbers for a Hessian: $\lambda_{\max}$ and the trace."""

from dataclasses import dataclass

from tangora.curvature.eigenpairs import Eigenpairs
from tangora.curvature.hessian import Hessian

# the error of an eigenvalue is of the order of the square of its residual
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class SpaceCurvature:
    r"""The Hessian of the mean loss in one kind of coordinates.

    Attributes:
        size: Their number.
        top_eigenvalue: $\lambda_{\max}$.
        residual: $\|H v - \lambda v\|$ of its eigenvector; some eigenvalue is at most that far away.
        trace: Estimate of the trace.
        trace_error: Its standard error; ``None`` for a single sample.
        products: Products with the Hessian that both took.
    """

    size: int
    top_eigenvalue: float
    residual: float
    trace: float
    trace_error: float | None
    products: int


def space_curvature(
    operator: Hessian, *, top_products: int, trace_products: int, seed: int = 0
) -> tuple[SpaceCurvature, Eigenpairs]:
    """Measure a Hessian with at most so many products; the second value holds the eigenvector."""
    pairs = operator.top_eigenpairs(1, tol=_TOLERANCE, max_products=top_products, seed=seed)
    trace = operator.trace(products=trace_products, seed=seed)
    found = SpaceCurvature(
        size=operator.size,
        top_eigenvalue=float(pairs.values[0]),
        residual=float(pairs.residuals[0]),
        trace=trace.value,
        trace_error=trace.standard_error,
        products=operator.num_products,
    )
    return found, pairs
