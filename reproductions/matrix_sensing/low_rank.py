r"""Integration schemes for $\dot Y = F(Y)$ on rank-r matrices $Y = U S V^\top$, one or several side by side.

A field gives the forces of all matrices at once; one call is one evaluation of the gradient. All algebra is done
without autograd, on thin matrices: nothing of size $m \times n$ is formed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._checks import InputError, check_number, check_whole
from tangora.geometry.tangent import Coordinates, Frame, Tangent, project
from tangora.integrate import EULER, Field, State, Stepped, Tableau, rk_step


class NotFiniteError(ArithmeticError):
    """Entries that are infinite or not a number turned up in a low-rank step."""


@dataclass(frozen=True)
class Truncation:
    r"""How a matrix is cut: the least rank with $\|Y - Y_r\|_F \le \tau$, within bounds.

    Attributes:
        tolerance: $\tau \ge 0$, in units of $Y$. At 0 nothing but rounding errors is cut.
        max_rank: Largest rank; where it binds the error may exceed $\tau$. None for no bound.
        min_rank: Smallest rank.
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
        """Cut to one rank, whatever the error."""
        return cls(max_rank=rank, min_rank=rank)

    def rank(self, values: Float[Tensor, " k"]) -> int:
        """Return the rank to keep of descending singular values; a tail at the level of rounding errors is zero."""
        # summed from the smallest on, so that small ones count
        tails = values.double().square().flip(0).cumsum(0).sqrt()
        rounding = len(values) * torch.finfo(values.dtype).eps * float(values[0])
        kept = len(values) - int((tails <= max(self.tolerance, rounding)).sum())
        if self.max_rank is not None:
            kept = min(kept, self.max_rank)
        return min(max(kept, self.min_rank), len(values))


@dataclass(frozen=True, eq=False)
class LowRank:
    r"""$Y = U S V^\top$ with orthonormal columns in $U$ and $V$; never changed in place.

    $S$ is $r \times r$ (inside rank-adaptive schemes possibly $k \times l$), any entries, singular allowed.
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
        r"""Return $L R^\top$ of two thin matrices, by QR of both; nothing is cut."""
        (U, R_left), (V, R_right) = torch.linalg.qr(left), torch.linalg.qr(right)
        return cls(U, R_left @ R_right.mT, V)

    @classmethod
    def from_factors(cls, A: Float[Tensor, "r n"], B: Float[Tensor, "m r"]) -> "LowRank":
        """Return B A at the factors' rank, also where the product is of lower rank."""
        return cls.from_thin(B, A.mT)

    @property
    def rank(self) -> int:
        """Size of the smaller side of S, an upper bound on the rank of the matrix."""
        return min(self.S.shape)

    def dense(self) -> Float[Tensor, "m n"]:
        """Return the matrix itself."""
        return self.U @ self.S @ self.V.mT

    def cut(self, truncation: Truncation) -> "LowRank":
        """Return the best approximation of the rank that the rule chooses, with diagonal S; raise if not finite."""
        if not bool(self.S.isfinite().all()):
            raise NotFiniteError("the core of a low-rank matrix is not finite")
        P, values, Qh = torch.linalg.svd(self.S, full_matrices=False)
        r = truncation.rank(values)
        return LowRank(self.U @ P[:, :r], values[:r].diag(), self.V @ Qh[:r].mT)


LowRanks: TypeAlias = tuple[LowRank, ...]


@runtime_checkable
class Force(Protocol):
    r"""$F$ at one point $Y$; for gradient flow $F = -g$.

    The schemes ask for ``right(Y.V)`` and ``left(Y.U)`` of the very $Y$ they gave to the field, and for nothing else:
    one backward pass through a LoRA adapter gives both.
    """

    def right(self, X: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """Return F X."""
        ...

    def left(self, X: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """Return F^T X."""
        ...


@dataclass(frozen=True, eq=False)
class DenseForce:
    """A force given as the dense matrix."""

    F: Float[Tensor, "m n"]

    def right(self, X: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """Return F X."""
        return self.F @ X

    def left(self, X: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """Return F^T X."""
        return self.F.mT @ X


LowRankField: TypeAlias = Callable[[LowRanks], tuple[Force, ...]]


def projected_rk_step(
    field: LowRankField,
    state: LowRanks,
    step_size: float,
    tableau: Tableau,
    *,
    truncation: Truncation | None = None,
) -> Stepped[LowRanks]:
    r"""Take one projected Runge-Kutta step: explicit in the tangent spaces, every stage brought back to rank r.

    $Z_i = \mathrm{SVD}_r(Y + h \sum_j a_{ij} P_{T(Z_j)} F(Z_j))$ and
    $Y_+ = \mathrm{SVD}_r(Y + h \sum_i b_i P_{T(Z_i)} F(Z_i))$. Its order is the tableau's up to the part of the force
    that is normal to the manifold, and its error does not grow as $\sigma_r(Y) \to 0$. With Euler's tableau it is
    Riemannian gradient descent with the SVD retraction. ``truncation`` cuts the new matrices; None keeps their ranks,
    as stages always do.

    Source:
        Kieri & Vandereycken (2019), Projection methods for dynamical low-rank approximation of high-dimensional
        problems, section 4.
    """

    def method(counted: LowRankField) -> LowRanks:
        velocities: list[list[_Thin]] = []
        stage = state
        for row in tableau.a:
            if row:
                stage = _moved(state, step_size, row, velocities, None)
            velocities.append([_thin(Z, force) for Z, force in zip(stage, counted(stage), strict=True)])
        return _moved(state, step_size, tableau.b, velocities, truncation)

    return _attempt(method, field, state)


def ksl_step(
    field: LowRankField, state: LowRanks, step_size: float, *, tableau: Tableau = EULER
) -> Stepped[LowRanks]:
    r"""Take one step of projector splitting (KSL, Lie), first order, at fixed ranks.

    $K$: from $U S$ along $\dot K = F V$ to $K_1 = U_1 \hat S$. $S$: from $\hat S$ backwards along
    $\dot S = -U_1^\top F V$ to $\tilde S$. $L$: from $V \tilde S^\top$ along $\dot L = F^\top U_1$ to
    $L_1 = V_1 S_1^\top$. Each sees the force at where the one before has come, and is solved by one explicit step of
    the tableau. With one frozen $F$ and Euler steps the result is $P_{U_1}(Y + h F)$ with
    $U_1 = \mathrm{orth}((Y + h F) V)$: a sweep of subspace iteration.

    Source:
        Lubich & Oseledets (2014), arXiv:1301.1058, section 3.2.
    """

    def method(counted: LowRankField) -> LowRanks:
        K = _solve(_k_field(counted, state), [Y.U @ Y.S for Y in state], step_size, tableau)
        bases = map(torch.linalg.qr, K)
        turned = tuple(LowRank(U, R, Y.V) for (U, R), Y in zip(bases, state, strict=True))
        S = _solve(_s_field(counted, turned, -1.0), [Y.S for Y in turned], step_size, tableau)
        start = [Y.V @ part.mT for Y, part in zip(turned, S, strict=True)]
        bases = map(torch.linalg.qr, _solve(_l_field(counted, turned), start, step_size, tableau))
        return tuple(LowRank(Y.U, R.mT, V) for Y, (V, R) in zip(turned, bases, strict=True))

    return _attempt(method, field, state)


def bug_step(
    field: LowRankField,
    state: LowRanks,
    step_size: float,
    *,
    tableau: Tableau = EULER,
    truncation: Truncation | None = None,
) -> Stepped[LowRanks]:
    r"""Take one step of the augmented basis-update and Galerkin integrator, first order.

    $K$ and $L$ move from $U S$ and $V S^\top$ as in projector splitting, side by side; the bases become
    $\hat U = \mathrm{orth}[U, K_1]$ and $\hat V = \mathrm{orth}[V, L_1]$; the core moves forwards by
    $\dot S = \hat U^\top F \hat V$ from $\hat U^\top Y \hat V$, and the $2r \times 2r$ result is cut. None as
    ``truncation`` keeps the ranks; a tolerance lets them grow up to twice per step, and shrink. With Euler's tableau
    it takes two evaluations: one for $K$ and $L$, one for $S$.

    Source:
        Ceruti, Kusch, Lubich (2022), arXiv:2104.05247, section 3.1.
    """

    def method(counted: LowRankField) -> LowRanks:
        forces = counted(state)
        velocity_K = tuple(force.right(Y.V) for Y, force in zip(state, forces, strict=True))
        velocity_L = tuple(force.left(Y.U) for Y, force in zip(state, forces, strict=True))
        K0, L0 = [Y.U @ Y.S for Y in state], [Y.V @ Y.S.mT for Y in state]
        K = _solve(_k_field(counted, state), K0, step_size, tableau, velocity_K)
        L = _solve(_l_field(counted, state), L0, step_size, tableau, velocity_L)
        wide = tuple(_augmented(*parts) for parts in zip(state, K, L, strict=True))
        S = _solve(_s_field(counted, wide, 1.0), [Y.S for Y in wide], step_size, tableau)
        return _cut((LowRank(Y.U, part, Y.V) for Y, part in zip(wide, S, strict=True)), state, truncation)

    return _attempt(method, field, state)


def parallel_bug_step(
    field: LowRankField, state: LowRanks, step_size: float, *, truncation: Truncation | None = None
) -> Stepped[LowRanks]:
    r"""Take one step of the parallel basis-update and Galerkin integrator, first order, one evaluation.

    With $[U, \tilde U] = \mathrm{orth}[U, F V]$ and $[V, \tilde V] = \mathrm{orth}[V, F^\top U]$ the new core is
    $\begin{bmatrix} S + h U^\top F V & h U^\top F \tilde V \\ h \tilde U^\top F V & 0 \end{bmatrix}$, then cut; None
    as ``truncation`` keeps the ranks. Before the cut this is $Y + h P_T F$, so that at fixed rank it is Riemannian
    gradient descent with the SVD retraction.

    Source:
        Ceruti, Kusch, Lubich (2024), A parallel rank-adaptive integrator for dynamical low-rank approximation; for
        training, GeoLoRA (ICLR 2025).
    """

    def method(counted: LowRankField) -> LowRanks:
        moved = (_parallel(Y, force, step_size) for Y, force in zip(state, counted(state), strict=True))
        return _cut(moved, state, truncation)

    return _attempt(method, field, state)


def project_force(Y: LowRank, force: Force) -> Tangent:
    r"""Return $P_T F = U K + J V^\top$ at $Y$, the part of the force that keeps the rank."""
    eye = torch.eye(Y.S.shape[-1], dtype=Y.S.dtype, device=Y.S.device)
    # the tangent space of U S V^T is that of U V^T, whose factors need no whitening
    at = Frame(Y.U, Y.V.mT, eye, eye)
    return project(at, Coordinates(force.left(Y.U).mT, force.right(Y.V)))


def _attempt(
    method: Callable[[LowRankField], LowRanks], field: LowRankField, state: LowRanks
) -> Stepped[LowRanks]:
    # counts evaluations, and turns what is not finite into a status; the field runs in the caller's autograd mode
    evaluations = 0
    caller_mode = torch.is_grad_enabled()

    def counted(at: LowRanks) -> tuple[Force, ...]:
        nonlocal evaluations
        evaluations += 1
        with torch.set_grad_enabled(caller_mode):
            return field(at)

    try:
        with torch.no_grad():
            return Stepped(method(counted), evaluations)
    except NotFiniteError:
        return Stepped(state, evaluations, failure="not finite")


def _cut(moved: Iterable[LowRank], state: LowRanks, truncation: Truncation | None) -> LowRanks:
    return tuple(
        Y.cut(Truncation.fixed(before.rank) if truncation is None else truncation)
        for Y, before in zip(moved, state, strict=True)
    )


class _Thin(NamedTuple):
    """A velocity as a product of thin matrices, left @ right^T."""

    left: Float[Tensor, "m k"]
    right: Float[Tensor, "n k"]


def _thin(Z: LowRank, force: Force) -> _Thin:
    K, J = project_force(Z, force)
    return _Thin(torch.cat([Z.U, J], dim=-1), torch.cat([K.mT, Z.V], dim=-1))


def _moved(
    state: LowRanks,
    step_size: float,
    weights: Sequence[float],
    velocities: Sequence[Sequence[_Thin]],
    truncation: Truncation | None,
) -> LowRanks:
    used = [(step_size * weight, v) for weight, v in zip(weights, velocities, strict=True) if weight != 0]
    moved = []
    for i, Y in enumerate(state):
        left = torch.cat([Y.U @ Y.S, *(v[i].left for _, v in used)], dim=-1)
        right = torch.cat([Y.V, *(scale * v[i].right for scale, v in used)], dim=-1)
        moved.append(LowRank.from_thin(left, right))
    return _cut(moved, state, truncation)


# The flows that projector splitting and BUG are made of, each of one factor with the others frozen: no inverse of S
# anywhere, which is why small singular values do no harm.


def _k_field(field: LowRankField, state: LowRanks) -> Field:
    def velocity(K: State) -> State:
        bases = map(torch.linalg.qr, K)
        points = tuple(LowRank(U, R, Y.V) for (U, R), Y in zip(bases, state, strict=True))
        return tuple(force.right(Z.V) for force, Z in zip(field(points), points, strict=True))

    return velocity


def _l_field(field: LowRankField, state: LowRanks) -> Field:
    def velocity(L: State) -> State:
        bases = map(torch.linalg.qr, L)
        points = tuple(LowRank(Y.U, R.mT, V) for (V, R), Y in zip(bases, state, strict=True))
        return tuple(force.left(Z.U) for force, Z in zip(field(points), points, strict=True))

    return velocity


def _s_field(field: LowRankField, state: LowRanks, sign: float) -> Field:
    def velocity(S: State) -> State:
        points = tuple(LowRank(Y.U, part, Y.V) for part, Y in zip(S, state, strict=True))
        forces = field(points)
        return tuple(sign * (Z.U.mT @ force.right(Z.V)) for force, Z in zip(forces, points, strict=True))

    return velocity


def _solve(
    velocity: Field, start: Sequence[Tensor], step_size: float, tableau: Tableau, first: State | None = None
) -> State:
    stepped = rk_step(velocity, tuple(start), step_size, tableau, first=first)
    if stepped.failure is not None:
        raise NotFiniteError("a substep ended in entries that are not finite")
    return stepped.state


def _augmented(Y: LowRank, K: Tensor, L: Tensor) -> LowRank:
    U, _ = torch.linalg.qr(torch.cat([Y.U, K], dim=-1))
    V, _ = torch.linalg.qr(torch.cat([Y.V, L], dim=-1))
    return LowRank(U, (U.mT @ Y.U) @ Y.S @ (Y.V.mT @ V), V)


def _parallel(Y: LowRank, force: Force, step_size: float) -> LowRank:
    K, L = step_size * force.right(Y.V), step_size * force.left(Y.U)
    U_new, V_new = _complement(Y.U, K), _complement(Y.V, L)
    corner = Y.S.new_zeros(U_new.shape[-1], V_new.shape[-1])
    top = torch.cat([Y.S + Y.U.mT @ K, L.mT @ V_new], dim=-1)
    bottom = torch.cat([U_new.mT @ K, corner], dim=-1)
    return LowRank(
        torch.cat([Y.U, U_new], dim=-1), torch.cat([top, bottom], dim=-2), torch.cat([Y.V, V_new], dim=-1)
    )


def _complement(basis: Float[Tensor, "p k"], added: Float[Tensor, "p l"]) -> Float[Tensor, "p j"]:
    # orthonormal columns that span what is added outside of the basis; QR keeps the basis first, up to signs
    Q, _ = torch.linalg.qr(torch.cat([basis, added], dim=-1))
    return Q[:, basis.shape[-1] :]
