r"""How far weights have moved: a PEFT model's pairs, from thin factors, or weights that are trained themselves.

In float64 whatever comes in. The change of a weight is held as $Y = B A$ with everything (scaling, offset) in the
factors; a DoRA layer's weight is $D\,(W_0 + Y)$ with a diagonal $D$.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.linalg import subspace_angles
from torch import Tensor, nn

from tangora._checks import InputError
from tangora._types import FactorA, FactorB, Weight
from tangora.adapters import (
    LoraPair,
    active_adapter,
    check_unmerged,
    discover,
    module_weight,
    mutates_base,
)

_BLOCK = 512  # rows of a dense matrix that are held in float64 at once

Rows = Callable[[slice], Weight]
"""Some rows of a matrix, in float64."""


class Update(NamedTuple):
    r"""The change of a weight in factors, $Y = B A$."""

    A: FactorA
    B: FactorB


class WeightState(NamedTuple):
    r"""Where a weight stands: $D\,(W_0 + Y)$, with the diagonal $D$ of a DoRA layer."""

    update: Update
    scale: Float[Tensor, " m"] | None = None


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


def change_between(new: Update, old: Update) -> Update:
    r"""Return $Y_1 - Y_0 = [B_1 - B_0,\; B_0]\,[A_1;\; A_1 - A_0]$.

    The stack $[B_1,\; -B_0]\,[A_1;\; A_0]$ is the same matrix, but there a small step is the difference of two large
    products.
    """
    return Update(torch.cat([new.A, new.A - old.A], -2), torch.cat([new.B - old.B, old.B], -1))


def product_norm(update: Update) -> Float[Tensor, "*b"]:
    r"""Return $\|B A\|_F = \|R A\|_F$ with $B = Q R$.

    By Gram matrices, $\mathrm{tr}(B^\top B\, A A^\top)$, the square of a small difference would drown in the rounding
    errors of the square of what it is a difference of; Householder's QR is accurate column by column.
    """
    root = torch.linalg.qr(update.B.double(), mode="r").R
    return torch.linalg.matrix_norm(root @ update.A.double())


def step_norm(new: WeightState, old: WeightState, base: Weight | None = None) -> Float[Tensor, ""]:
    r"""Return $\|W_1 - W_0\|_F$ of two places of one weight.

    Nothing $m \times n$ is formed: factors alone do without $D$, and blocks of rows of the base weight with it.
    """
    moved = change_between(new.update, old.update)
    if new.scale is None or old.scale is None:
        return product_norm(moved)
    assert base is not None
    total = moved.A.new_zeros(())
    stretch = new.scale.double() - old.scale.double()
    for rows in _blocks(base.shape[0]):
        # D1 (Y1 - Y0) + (D1 - D0) (W + Y0): both small when the step is
        along = new.scale[rows, None].double() * (moved.B[rows] @ moved.A)
        stood = base[rows].double() + old.update.B[rows] @ old.update.A
        total += (along + stretch[rows, None] * stood).square().sum()
    return total.sqrt()


def change_rows(place: WeightState, base: Rows) -> Rows:
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
    for rows in _blocks(num_rows):
        X, Z = own(rows), other(rows)
        part = torch.stack([(X - Z).square().sum(), X.square().sum(), Z.square().sum(), (X * Z).sum()])
        sums = part if sums is None else sums + part
    return Overlap(*sums.tolist()) if sums is not None else Overlap()


def _blocks(num_rows: int) -> Iterator[slice]:
    for first in range(0, num_rows, _BLOCK):
        yield slice(first, min(first + _BLOCK, num_rows))


class Angles(NamedTuple):
    """Principal angles between two subspaces, in degrees: 0 is shared, 90 is orthogonal."""

    largest: float
    mean: float


def principal_angles(one: Float[Tensor, "m k"], other: Float[Tensor, "m l"]) -> Angles | None:
    """Return the principal angles between the column spaces of two matrices (Knyazev and Argentati, 2002).

    There are as many as the smaller space has dimensions.
    """
    if not (one.any() and other.any()):
        return None
    angles = torch.from_numpy(subspace_angles(one.double().cpu().numpy(), other.double().cpu().numpy()))
    degrees = torch.rad2deg(angles)
    return Angles(float(degrees.max()), float(degrees.mean()))


class Track(ABC):
    """One weight whose motion is followed, by its path in the base model."""

    name: str
    shape: tuple[int, int]
    """``(m, n)``."""

    @abstractmethod
    def remember(self) -> None:
        """Keep where the weight stands now, for the next `advance`."""

    @abstractmethod
    def advance(self) -> Tensor:
        """Return the Frobenius norm of the motion since the last `remember` or `advance`, and remember."""

    @abstractmethod
    def change(self) -> Rows:
        r"""Return rows of $W - W_0$."""

    @abstractmethod
    def base(self) -> Rows:
        r"""Return rows of $W_0$."""

    def change_norm(self) -> Tensor:
        r"""Return $\|W - W_0\|_F$."""
        rows_of = self.change()
        return sum((rows_of(rows).square().sum() for rows in _blocks(self.shape[0])), torch.zeros(())).sqrt()


class AdapterTrack(Track):
    """An adapted layer; an offset's subtracted pair counts as part of the base weight's side."""

    def __init__(self, pair: LoraPair):
        self.pair, self.name, self.shape = pair, pair.path, pair.shape[:2]
        self._last: WeightState | None = None

    def place(self) -> WeightState:
        """Return where the weight stands, in tensors of its own."""
        A, B = self.pair.factors()
        return WeightState(
            update_from(A, B, scaling=self.pair.scaling, start=self.pair.offset()), self.pair.row_scale()
        )

    def remember(self) -> None:
        """Keep where the weight stands now."""
        self._last = self.place()

    def advance(self) -> Tensor:
        """Return the norm of the motion, and remember."""
        now, last = self.place(), self._last
        assert last is not None
        self._last = now
        return step_norm(now, last, None if now.scale is None else self.pair.base_weight())

    def change_norm(self) -> Tensor:
        r"""Return $\|W - W_0\|_F$, from the factors alone where there is no $D$."""
        place = self.place()
        return super().change_norm() if place.scale is not None else product_norm(place.update)

    def change(self) -> Rows:
        r"""Return rows of $W - W_0$."""
        return change_rows(self.place(), self.base())

    def base(self) -> Rows:
        r"""Return rows of $W_0$."""
        weight = self.pair.base_weight()
        return lambda rows: weight[rows].double()


class WeightTrack(Track):
    """A weight that is trained itself; its first value is kept."""

    def __init__(self, name: str, module: nn.Module):
        self.name = name
        self._module = module
        self._first = self._last = self.weight().clone()
        m, n = self._first.shape
        self.shape = m, n

    def weight(self) -> Tensor:
        """Return the weight as it is now, ``m x n``, in its own dtype; it may share memory with the model."""
        return module_weight(self._module).to(self._module.weight.dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def remember(self) -> None:
        """Keep where the weight stands now."""
        self._last = self.weight().clone()

    def advance(self) -> Tensor:
        """Return the norm of the motion, and remember."""
        now, last = self.weight(), self._last
        total = torch.zeros((), dtype=torch.float64, device=now.device)
        for rows in _blocks(now.shape[0]):
            total += (now[rows].double() - last[rows].to(now.device).double()).square().sum()
        self._last = now.clone()
        return total.sqrt()

    def change(self) -> Rows:
        r"""Return rows of $W - W_0$."""
        weight, base = self.weight(), self.base()
        return lambda rows: weight[rows].double() - base(rows)

    def base(self) -> Rows:
        r"""Return rows of $W_0$."""
        first, device = self._first, self.weight().device
        return lambda rows: first[rows].to(device).double()


def find_tracks(model: nn.Module, names: Sequence[str] | None = None) -> Sequence[Track]:
    """List the weights of a model whose motion can be followed.

    Args:
        model: PEFT model with one active adapter of plain pairs; or, with ``names``, a model that is trained whole, as
            it is before training.
        names: Paths of the layers of a model without adapters.

    Raises:
        InputError: If the adapter has no plain pair, is merged, or began by changing the base weights; or a name is no
            layer with a weight.
    """
    if names is not None:
        modules = dict(model.named_modules())
        if unknown := next((name for name in names if not hasattr(modules.get(name), "weight")), None):
            raise InputError(f"names must be layers with a weight; got {unknown!r}")
        return [WeightTrack(name, modules[name]) for name in names]
    adapter = active_adapter(model)
    check_unmerged(model)
    if mutates_base(model.peft_config[adapter]):  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
        raise InputError(
            f"the initialization of adapter {adapter!r} changed the base weights, so that its motion cannot be "
            "measured: make the adapter with init_lora_weights=True and tangora.initialize"
        )
    pairs = discover(model, adapter).pairs
    if not pairs:
        raise InputError(f"adapter {adapter!r} has no plain pair (A, B) whose motion could be measured")
    return [AdapterTrack(pair) for pair in pairs]


def fingerprint(tracks: Sequence[Track]) -> str:
    """Return SHA-256 of names and base weights, the same for a model trained whole and for one with adapters."""
    digest = hashlib.sha256()
    for track in sorted(tracks, key=lambda track: track.name):
        digest.update(f"{track.name}\0{track.shape}\0".encode())
        rows_of = track.base()
        for rows in _blocks(track.shape[0]):
            digest.update(rows_of(rows).float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
