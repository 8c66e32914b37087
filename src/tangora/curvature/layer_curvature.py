r"""Where in the model the curvature is: the diagonal block $H_{ll}$ of every layer $l$.

Traces of all blocks come from the same products: with random signs $z$ the part $z_l^\top (H z)_l$ has the mean
$\operatorname{tr} H_{ll}$, since other layers' signs are independent of $z_l$. The largest eigenvalue of a block needs
its own iteration; by interlacing $\lambda_{\max}(H_{ll}) \le \lambda_{\max}(H)$. How much of an eigenvector $v$ of the
whole lies in a layer is $\|v_l\|^2$.
"""

from dataclasses import dataclass

import torch

from tangora import _names
from tangora._checks import check_whole
from tangora._types import Progress
from tangora.curvature.eigenpairs import Eigenvalue
from tangora.curvature.operators import CurvatureOperator
from tangora.curvature.products import random_signs, seeded_generator
from tangora.curvature.trace import TraceEstimate, means_of


@dataclass(frozen=True)
class LayerCurvature:
    r"""The diagonal block of one layer."""

    name: str
    space: _names.SpaceName
    size: int
    """Number of its coordinates."""
    largest: Eigenvalue | None
    r"""$\lambda_{\max}(H_{ll})$; ``None`` if it was not asked for."""
    trace: TraceEstimate
    eigenvector_share: float
    r"""$\|v_l\|^2$ of the leading eigenvector of the whole, in [0, 1]; over layers they sum to 1."""


def layer_curvatures(
    operator: CurvatureOperator,
    *,
    probes: int = 30,
    eigenvalues: bool = True,
    tol: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[LayerCurvature]:
    """Measure the curvature of every layer.

    Args:
        operator: Whose coordinates have layers.
        probes: Random vectors for the traces, at least 2.
        eigenvalues: Whether to find the largest eigenvalue of every block, which takes an iteration for each.
        tol: Relative residual at which an eigenpair has converged.
        seed: Seed of the random vectors.
        progress: Called after each layer.

    Returns:
        The layers in the operator's order.

    Raises:
        InputError: If a number is out of range.
    """
    check_whole("probes", probes, low=2)
    layout = operator.space.layout
    before = operator.num_products
    squares = operator.top_eigenpairs(1, tol=tol, seed=seed).vectors.double().square()
    squares = squares / squares.sum(0)
    generator = seeded_generator(seed)
    signs = random_signs((probes, operator.shape[0]), generator, operator.dtype, operator.device)
    samples = []
    for sign in signs:
        both = sign.double() * (operator @ sign).double()
        samples.append(torch.stack([both[part].sum() for part in layout.values()]).tolist())
    products = operator.num_products - before
    traces = means_of(torch.tensor(list(zip(*samples, strict=True)), dtype=torch.float64), products)
    found = []
    for (name, part), trace in zip(layout.items(), traces, strict=True):
        largest = operator.block(name).top_eigenpairs(1, tol=tol, seed=seed) if eigenvalues else None
        found.append(
            LayerCurvature(
                name=name,
                space=operator.space.kind,
                size=part.stop - part.start,
                largest=largest and largest.eigenvalues[0],
                trace=trace,
                eigenvector_share=float(squares[part].sum(0)),
            )
        )
        if progress is not None:
            progress("layers", len(found), len(layout))
    return found
