r"""Rank-r matrices $Y = U S V^\top$ with orthonormal $U$, $V$, and how they are cut to a rank."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._checks import InputError, check_number, check_whole
from tangora.geometry.retraction import Factors, rebalance


class NotFiniteError(ArithmeticError):
    """Entries that are infinite or not a number turned up in a low-rank step."""


@dataclass(frozen=True)
class Truncation:
    r"""How a matrix is cut: the least rank with $\|Y - Y_r\|_F \le \tau$, within bounds.

    Args:
        tolerance: $\tau \ge 0$, in units of $Y$. At 0 nothing but rounding errors is cut.
        max_rank: Largest rank; where it binds the error may exceed $\tau$. None for no bound.
        min_rank: Smallest rank.

    Raises:
        InputError: For a negative tolerance or bounds that exclude each other.
    """

    tolerance: float = 0.0
    max_rank: int | None = None
    min_rank: int = 1

    def __post_init__(self) -> None:
        check_number("tolerance", self.tolerance, low=0)
        check_whole("min_rank", self.min_rank, low=1)
        if self.max_rank is not None:
            check_whole("max_rank", self.max_rank, low=self.min_rank)

    @classmethod
    def fixed(cls, rank: int) -> "Truncation":
        """Cut to one rank, whatever the error.

        Args:
            rank: The rank.

        Returns:
            The rule.
        """
        return cls(max_rank=rank, min_rank=rank)

    def rank(self, values: Float[Tensor, " k"]) -> int:
        r"""Return the rank to keep.

        Args:
            values: Singular values, descending.

        Returns:
            The least $r$ with $\sum_{j > r} \sigma_j^2 \le \tau^2$, moved into the bounds; at most ``len(values)``.
            A tail at the level of rounding errors counts as zero.
        """
        tails = (
            values.double().square().flip(0).cumsum(0).sqrt()
        )  # from the smallest on, so that small ones count
        rounding = len(values) * torch.finfo(values.dtype).eps * float(values[0])
        kept = len(values) - int((tails <= max(self.tolerance, rounding)).sum())
        if self.max_rank is not None:
            kept = min(kept, self.max_rank)
        return min(max(kept, self.min_rank), len(values))


@dataclass(frozen=True, eq=False)
class LowRank:
    r"""$Y = U S V^\top$. Never changed in place.

    Args:
        U: $m \times r$, orthonormal columns.
        S: $r \times r$ (inside rank-adaptive schemes possibly $k \times l$), any entries, singular allowed.
        V: $n \times r$, orthonormal columns.

    Raises:
        InputError: If the shapes do not fit together.
    """

    U: Float[Tensor, "m k"]
    S: Float[Tensor, "k l"]
    V: Float[Tensor, "n l"]

    def __post_init__(self) -> None:
        if self.S.shape != (self.U.shape[-1], self.V.shape[-1]):
            raise InputError(
                f"S must have shape {(self.U.shape[-1], self.V.shape[-1])} to stand between U and V; "
                f"got {tuple(self.S.shape)}"
            )

    @classmethod
    def from_thin(cls, left: Float[Tensor, "m k"], right: Float[Tensor, "n k"]) -> "LowRank":
        r"""Return $L R^\top$ of two thin matrices, by QR of both; nothing is cut.

        Args:
            left: $L$.
            right: $R$.

        Returns:
            The product.
        """
        (U, R_left), (V, R_right) = torch.linalg.qr(left), torch.linalg.qr(right)
        return cls(U, R_left @ R_right.mT, V)

    @classmethod
    def from_factors(cls, A: Float[Tensor, "r n"], B: Float[Tensor, "m r"]) -> "LowRank":
        r"""Return $B A$.

        Args:
            A: LoRA factor.
            B: LoRA factor.

        Returns:
            The product, at the factors' rank, also where $B A$ is of lower rank.
        """
        return cls.from_thin(B, A.mT)

    @classmethod
    def from_dense(cls, matrix: Float[Tensor, "m n"], truncation: Truncation) -> "LowRank":
        """Cut a dense matrix.

        Args:
            matrix: The matrix.
            truncation: How.

        Returns:
            Its best approximation of the rank that the rule chooses.

        Raises:
            NotFiniteError: If the matrix is not finite.
        """
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return truncate(cls.from_thin(matrix, eye), truncation)

    @property
    def rank(self) -> int:
        """Size of the smaller side of S, an upper bound on the rank of the matrix."""
        return min(self.S.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        return self.U.shape[-2], self.V.shape[-2]

    def dense(self) -> Float[Tensor, "m n"]:
        """Return the matrix itself, m x n.

        Returns:
            The product of the three.
        """
        return self.U @ self.S @ self.V.mT

    def factors(self) -> Factors:
        r"""Return balanced LoRA factors, $B^\top B = A A^\top$.

        Returns:
            $(A, B)$ with $B A = Y$; see `tangora.geometry.retraction.rebalance`.
        """
        if self.U.shape[-1] <= self.V.shape[-1]:
            return rebalance(self.S @ self.V.mT, self.U)
        return rebalance(self.V.mT.contiguous(), self.U @ self.S)


LowRankState = tuple[LowRank, ...]
"""The unknowns of a low-rank scheme, one matrix for each adapted layer."""


def truncate(Y: LowRank, truncation: Truncation) -> LowRank:
    r"""Return the best approximation of the rank that the rule chooses, with diagonal $S$.

    Args:
        Y: The matrix.
        truncation: How to cut.

    Returns:
        $Y_r$, from an SVD of the small core.

    Raises:
        NotFiniteError: If the core is not finite.
    """
    if not bool(Y.S.isfinite().all()):
        raise NotFiniteError("the core of a low-rank matrix is not finite")
    P, values, Qh = torch.linalg.svd(Y.S, full_matrices=False)
    r = truncation.rank(values)
    return LowRank(Y.U @ P[:, :r], values[:r].diag(), Y.V @ Qh[:r].mT)


def rules(state: LowRankState, truncation: Truncation | None) -> tuple[Truncation, ...]:
    """Return the rule for each matrix of a state.

    Args:
        state: The state.
        truncation: One rule for all, or None to keep every matrix at its rank.

    Returns:
        One rule per matrix.
    """
    return tuple(Truncation.fixed(Y.rank) if truncation is None else truncation for Y in state)
