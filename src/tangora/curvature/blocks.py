r"""Where in the model the curvature is: the diagonal block $H_{ll}$ of every layer $l$.

Traces of all blocks come from the same products: with random signs $z$ the part $z_l^\top (H z)_l$ has the mean
$\operatorname{tr} H_{ll}$, since other layers' signs are independent of $z_l$. The largest eigenvalue of a block needs
its own iteration; by interlacing $\lambda_{\max}(H_{ll}) \le \lambda_{\max}(H)$. How much of an eigenvector $v$ of the
whole lies in a layer is $\|v_l\|^2$.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._checks import check_whole
from tangora.curvature.products import random_signs, seeded_generator
from tangora.curvature.surface import LossSurface, mean_and_error

_ACCURACY = 1e-3


@dataclass(frozen=True)
class BlockCurvature:
    r"""One layer.

    Attributes:
        size: Number of its coordinates.
        top_eigenvalue: $\lambda_{\max}(H_{ll})$; ``None`` if it was not asked for.
        residual: $\|H_{ll} v - \lambda v\|$.
        trace: Estimate of $\operatorname{tr} H_{ll}$.
        trace_error: Its standard error.
        trace_share: Of the trace of the whole; negative or above 1 where layers have traces of both signs, ``None``
            if the whole has none.
        eigenvector_shares: $\|v_l\|^2$ of the leading eigenvectors of the whole, each in [0, 1]; over layers they sum
            to 1.
    """

    size: int
    top_eigenvalue: float | None
    residual: float | None
    trace: float
    trace_error: float
    trace_share: float | None
    eigenvector_shares: tuple[float, ...]


@dataclass(frozen=True)
class Blocks:
    r"""All layers.

    Attributes:
        layers: By name.
        eigenvalues: The largest of the whole, descending.
        effective_layers: For each of their eigenvectors $\exp(-\sum_l p_l \log p_l)$ with $p_l = \|v_l\|^2$: 1 if it
            lies in one layer, the number of layers if it is spread evenly.
        trace: Estimate of the trace of the whole.
        trace_error: Its standard error.
        products: Products with the whole Hessian.
        block_products: Products with one layer's block.
    """

    layers: dict[str, BlockCurvature]
    eigenvalues: tuple[float, ...]
    effective_layers: tuple[float, ...]
    trace: float
    trace_error: float
    products: int
    block_products: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return asdict(self)


def block_statistics(
    operator: LossSurface,
    *,
    probes: int = 30,
    top: int = 1,
    eigenvalues: bool = True,
    tol: float = _ACCURACY,
    seed: int = 0,
    progress: Callable[[str], object] | None = None,
) -> Blocks:
    """Measure the curvature of every layer.

    Args:
        operator: Whose coordinates have layers.
        probes: Random vectors for the traces, at least 2.
        top: Number of leading eigenvectors of the whole whose place is told, at least 1.
        eigenvalues: Whether to find the largest eigenvalue of every block, which takes an iteration for each.
        seed: Of the random vectors.
        progress: Called with the name of each layer that is done.

    Returns:
        The layers in the operator's order.

    Raises:
        InputError: If a number is out of range.
    """
    check_whole("probes", probes, low=2)
    check_whole("top", top, low=1)
    layout: Mapping[str, slice] = operator.space.layout
    before = operator.products
    whole = operator.top_eigenpairs(top, tol=tol, seed=seed)
    generator = seeded_generator(seed)
    signs = random_signs((probes, operator.size), generator, operator.dtype, operator.device)
    samples = {name: [] for name in layout}
    for sign in signs:
        for name, value in block_traces(sign, operator.matvec(sign), layout).items():
            samples[name].append(value)
    traces = torch.tensor([samples[name] for name in layout], dtype=torch.float64)
    products = operator.products - before
    each, each_error = (values.tolist() for values in mean_and_error(traces))
    total, total_error = (float(value) for value in mean_and_error(traces.sum(0)))
    shares = vector_shares(whole.vectors, layout)
    layers, count = {}, 0
    for index, (name, part) in enumerate(layout.items()):
        value, residual, used = _largest(operator.block(name), tol, seed) if eigenvalues else (None, None, 0)
        count += used
        layers[name] = BlockCurvature(
            size=part.stop - part.start,
            top_eigenvalue=value,
            residual=residual,
            trace=each[index],
            trace_error=each_error[index],
            trace_share=each[index] / total if total else None,
            eigenvector_shares=tuple(shares[name].tolist()),
        )
        if progress is not None:
            progress(name)
    return Blocks(
        layers=layers,
        eigenvalues=tuple(whole.values.tolist()),
        effective_layers=effective_number(torch.stack(list(shares.values()))),
        trace=total,
        trace_error=total_error,
        products=products,
        block_products=count,
    )


def block_traces(
    vector: Float[Tensor, " n"], product: Float[Tensor, " n"], layout: Mapping[str, slice]
) -> dict[str, float]:
    r"""Return $z_l^\top (H z)_l$ of every layer.

    Args:
        vector: $z$.
        product: $H z$.
        layout: Slice of each layer.

    Returns:
        By name of the layer.
    """
    both = vector.double() * product.double()
    return dict(
        zip(layout, torch.stack([both[part].sum() for part in layout.values()]).tolist(), strict=True)
    )


def vector_shares(
    vectors: Float[Tensor, "n k"], layout: Mapping[str, slice]
) -> dict[str, Float[Tensor, " k"]]:
    r"""Return $\|v_l\|^2 / \|v\|^2$ of every layer and vector.

    Args:
        vectors: In the columns, none of them zero.
        layout: Slice of each layer; together they cover all coordinates.

    Returns:
        By name of the layer, float64 on the CPU; the sum over layers is 1.
    """
    squares = vectors.double().square()
    squares = squares / squares.sum(0)
    return {name: squares[part].sum(0).cpu() for name, part in layout.items()}


def effective_number(shares: Float[Tensor, "l k"]) -> tuple[float, ...]:
    r"""Return $\exp(-\sum_l p_l \log p_l)$ of every column.

    Args:
        shares: $p_l \ge 0$ that sum to 1 over rows.

    Returns:
        One number in [1, number of rows] for each column.
    """
    return tuple(math.exp(value) for value in torch.special.entr(shares).sum(0).tolist())


def _largest(block: Any, tol: float, seed: int) -> tuple[float, float, int]:
    before = block.products
    pairs = block.top_eigenpairs(1, tol=tol, seed=seed)
    return float(pairs.values[0]), float(pairs.residuals[0]), block.products - before
