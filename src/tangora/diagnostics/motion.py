r"""How far a weight has moved, from thin factors: step norms, distances to another run, principal angles.

Pure functions of one layer, in float64 whatever comes in. The change of a weight is held as $Y = B A$ with everything
(scaling, offset) in the factors; a DoRA layer's weight is $D\,(W_0 + Y)$ with a diagonal $D$.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.linalg import subspace_angles
from torch import Tensor

from tangora._types import FactorA, FactorB, Weight

_BLOCK = 512  # rows of a dense matrix that are held in float64 at once

Rows = Callable[[slice], Weight]
"""Some rows of a matrix, in float64."""


class Update(NamedTuple):
    r"""The change of a weight in factors, $Y = B A$."""

    A: FactorA
    B: FactorB


class Place(NamedTuple):
    r"""Where a weight stands: $D\,(W_0 + Y)$."""

    update: Update
    """$Y$."""
    scale: Float[Tensor, " m"] | None = None
    """$D$ of a DoRA layer."""


def update_from(
    A: FactorA, B: FactorB, *, scaling: float, start: tuple[FactorB, FactorA] | None = None
) -> Update:
    r"""Return $s\,(B A - B_0 A_0)$ as $[s (B - B_0),\; s B_0]\,[A;\; A - A_0]$.

    Written like that it is exactly zero at the start, and as accurate as the change is small.
    """
    A, B = A.double(), scaling * B.double()
    if start is None:
        return Update(A.clone(), B)
    B0, A0 = scaling * start[0].double(), start[1].double()
    return Update(torch.cat([A, A - A0], -2), torch.cat([B - B0, B0], -1))


def difference(new: Update, old: Update) -> Update:
    r"""Return $Y_1 - Y_0 = [B_1 - B_0,\; B_0]\,[A_1;\; A_1 - A_0]$.

    The stack $[B_1,\; -B_0]\,[A_1;\; A_0]$ is the same matrix, but there a small step is the difference of two large
    products.
    """
    return Update(torch.cat([new.A, new.A - old.A], -2), torch.cat([new.B - old.B, old.B], -1))


def norm(update: Update) -> Float[Tensor, "*b"]:
    r"""Return $\|B A\|_F = \|R A\|_F$ with $B = Q R$.

    By Gram matrices, $\mathrm{tr}(B^\top B\, A A^\top)$, the square of a small difference would drown in the rounding
    errors of the square of what it is a difference of; Householder's QR is accurate column by column.
    """
    root = torch.linalg.qr(update.B.double(), mode="r").R
    return torch.linalg.matrix_norm(root @ update.A.double())


def step_norm(new: Place, old: Place, base: Weight | None = None) -> Float[Tensor, ""]:
    r"""Return $\|W_1 - W_0\|_F$ of two places of one weight.

    Nothing $m \times n$ is formed: factors alone do without $D$, and blocks of rows of the base weight with it.
    """
    moved = difference(new.update, old.update)
    if new.scale is None or old.scale is None:
        return norm(moved)
    assert base is not None
    total = moved.A.new_zeros(())
    stretch = new.scale.double() - old.scale.double()
    for rows in blocks(base.shape[0]):
        # D1 (Y1 - Y0) + (D1 - D0) (W + Y0): both small when the step is
        along = new.scale[rows, None].double() * (moved.B[rows] @ moved.A)
        stood = base[rows].double() + old.update.B[rows] @ old.update.A
        total += (along + stretch[rows, None] * stood).square().sum()
    return total.sqrt()


def change_rows(place: Place, base: Rows) -> Rows:
    r"""Return rows of what has been added to the base weight, $(D - 1) W_0 + D Y$."""

    def rows_of(rows: slice) -> Weight:
        update = place.update.B[rows].double() @ place.update.A.double()
        if place.scale is None:
            return update
        scale = place.scale[rows, None].double()
        return (scale - 1) * base(rows) + scale * update

    return rows_of


@dataclass(frozen=True)
class Overlap:
    r"""Sums over entries that say how two changes $X, Z$ of one weight lie to each other; they add up over layers."""

    gap: float = 0.0
    r"""$\|X - Z\|_F^2$, formed entry by entry and not by cancellation."""
    own: float = 0.0
    r"""$\|X\|_F^2$."""
    other: float = 0.0
    r"""$\|Z\|_F^2$."""
    inner: float = 0.0
    r"""$\langle X, Z\rangle$."""

    def __add__(self, more: "Overlap") -> "Overlap":
        return Overlap(
            self.gap + more.gap, self.own + more.own, self.other + more.other, self.inner + more.inner
        )

    @property
    def distance(self) -> float:
        r"""$\|X - Z\|_F$."""
        return self.gap**0.5

    @property
    def relative_distance(self) -> float | None:
        r"""$\|X - Z\|_F / \|Z\|_F$; 1 for an $X$ that has not moved, ``None`` for a $Z$ that has not."""
        return (self.gap / self.other) ** 0.5 if self.other > 0 else None

    @property
    def cosine(self) -> float | None:
        """In [-1, 1]; ``None`` where one of them is zero."""
        size = self.own**0.5 * self.other**0.5
        return max(-1.0, min(self.inner / size, 1.0)) if size > 0 else None


def overlap(own: Rows, other: Rows, num_rows: int) -> Overlap:
    """Compare two changes of one weight, a block of rows at a time."""
    sums = None
    for rows in blocks(num_rows):
        X, Z = own(rows), other(rows)
        part = torch.stack([(X - Z).square().sum(), X.square().sum(), Z.square().sum(), (X * Z).sum()])
        sums = part if sums is None else sums + part
    return Overlap(*sums.tolist()) if sums is not None else Overlap()


def blocks(num_rows: int) -> Iterator[slice]:
    """Split rows into blocks."""
    for first in range(0, num_rows, _BLOCK):
        yield slice(first, min(first + _BLOCK, num_rows))


class Angles(NamedTuple):
    """Principal angles between two subspaces, in degrees: 0 is shared, 90 is orthogonal."""

    largest: float
    mean: float


def principal_angles(one: Float[Tensor, "m k"], other: Float[Tensor, "m l"]) -> Angles | None:
    """Return the principal angles between the column spaces of two matrices.

    There are as many as the smaller space has dimensions.

    Source:
        Knyazev and Argentati (2002), as in ``scipy.linalg.subspace_angles``.
    """
    if not (one.any() and other.any()):
        return None
    angles = torch.from_numpy(subspace_angles(one.double().cpu().numpy(), other.double().cpu().numpy()))
    degrees = torch.rad2deg(angles)
    return Angles(float(degrees.max()), float(degrees.mean()))
