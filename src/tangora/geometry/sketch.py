r"""Randomized low-rank factorisation of a matrix that is available only through products.

$G$ is never formed: $Y = G\,\Omega$ for a thin $\Omega$ shows its column space, $C = Q^\top G$ for orthonormal $Q$
holds what that column space captures.

Source: Halko, Martinsson, Tropp (2011), arXiv:0909.4061.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._types import FactorA, FactorB


class LowRankSVD(NamedTuple):
    r"""$G \approx U\,\mathrm{diag}(S)\,V^\top$ with orthonormal columns of $U$ and rows of ``Vh``, $S$ descending."""

    U: FactorB
    S: Float[Tensor, "*b r"]
    Vh: FactorA

    def truncate(self, rank: int) -> "LowRankSVD":
        """Keep the leading directions, as views."""
        return LowRankSVD(self.U[..., :, :rank], self.S[..., :rank], self.Vh[..., :rank, :])


def orthonormalize(tall: FactorB) -> FactorB:
    """Return an orthonormal basis that contains the column space, with as many columns, also if it is deficient."""
    return torch.linalg.qr(tall).Q


def svd_from_range(basis: FactorB, seen: FactorA) -> LowRankSVD:
    r"""Factorise $Q Q^\top G$, the two-pass estimate of $G$.

    Without power iterations $\mathbb E\,\|G - Q Q^\top G\|_F \le (1 + r/(p - 1))^{1/2} (\sum_{j > r} \sigma_j^2)^{1/2}$
    for a Gaussian $\Omega$ with $r + p$ columns.

    Args:
        basis: $Q$ with orthonormal columns.
        seen: $Q^\top G$.

    Returns:
        Its singular value decomposition.

    Source:
        arXiv:0909.4061, algorithm 5.1 and theorem 10.5.
    """
    U, S, Vh = torch.linalg.svd(seen, full_matrices=False)
    return LowRankSVD(basis @ U, S, Vh)


def svd_from_one_pass(
    right: Float[Tensor, "*b m k"], left: Float[Tensor, "*b l n"], left_probe: Float[Tensor, "*b l m"]
) -> LowRankSVD:
    r"""Factorise $Q (\Psi Q)^+ (\Psi G)$ with $Q$ a basis of $G \Omega$: both products come from one reading of $G$.

    Args:
        right: $G \Omega$.
        left: $\Psi G$.
        left_probe: $\Psi$, with at least as many rows as $\Omega$ has columns; twice as many keep the error small.

    Returns:
        The singular value decomposition of the estimate.

    Source:
        Tropp et al. (2017), arXiv:1609.00048, algorithm 4.
    """
    basis = orthonormalize(right)
    return svd_from_range(basis, torch.linalg.lstsq(left_probe @ basis, left).solution)


def outside_energy(
    basis: FactorB, probed: Float[Tensor, "*b m t"]
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    r"""Estimate $\|(I - Q Q^\top) G\|_F^2$ from products of $G$ with fresh standard normal vectors.

    Args:
        basis: $Q$, independent of the vectors.
        probed: $G \omega_1, \dots, G \omega_t$ as columns, $t \ge 2$.

    Returns:
        The unbiased estimate and its standard error.
    """
    samples = (probed - basis @ (basis.mT @ probed)).square().sum(-2)
    return samples.mean(-1), samples.std(-1) / samples.shape[-1] ** 0.5
