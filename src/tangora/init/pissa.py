"""PiSSA: train the weight's own principal directions."""

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tangora._checks import check_whole
from tangora._types import FactorA, FactorB
from tangora.init.start_method import LayerToStart, StartFactors, StartMethod, option_types
from tangora.probes.stillness import seeded


def pissa(weight: Tensor, r: int, scaling: float, *, niter: int | None = None) -> tuple[FactorA, FactorB]:
    r"""Build PiSSA's factors, $B_0 = U_r \sqrt{S_r / s}$ and $A_0 = \sqrt{S_r / s}\, V_r^\top$ of $W_0 = U S V^\top$.

    Args:
        weight: $W_0$, ``m x n``, floating point.
        r: Rank, at most $\min(m, n)$.
        niter: Rounds of randomized subspace iteration; default the exact decomposition. Draws from torch's global
            random state.

    Returns:
        $A_0$ and $B_0$; the base weight must become $W_0 - s B_0 A_0$.

    Source:
        arXiv:2404.02948, equations 2 to 4.
    """
    if niter is not None:
        check_whole("niter", niter, low=0)
    if niter is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(weight, q=min(r + 8, *weight.shape), niter=niter)
        Vh = V.T
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def _start(layer: LayerToStart, **options: Any) -> StartFactors:
    with seeded(layer.generator.initial_seed()):  # the randomized decomposition knows the global state only
        return pissa(layer.weight(), layer.shape[2], layer.scaling, **options)


PISSA = StartMethod(
    _start,
    option_types(pissa, "niter"),
    offset=True,
    reads_weight=lambda _: True,
    approximation=MappingProxyType({"niter": 16}),  # as PEFT users take it, "pissa_niter_16"
)
