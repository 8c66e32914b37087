"""The layers whose motion is followed: a PEFT model's pairs, or chosen weights of a model that is trained whole."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tangora._checks import InputError
from tangora.adapters import (
    LoraPair,
    active_adapter,
    base_weight,
    check_unmerged,
    discover,
    magnitude_scale,
    module_weight,
    mutates_base,
    offset_factors,
)
from tangora.diagnostics.motion import Place, Rows, blocks, change_rows, norm, step_norm, update_from

_BASE = "base_model.model."


class Track(ABC):
    """One weight that is followed.

    Attributes:
        name: Its path in the base model.
    """

    name: str

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""

    @abstractmethod
    def remember(self) -> None:
        """Keep where the weight stands now, for the next `advance`."""

    @abstractmethod
    def advance(self) -> Tensor:
        """Return the Frobenius norm of the motion since the last `remember` or `advance`, and remember."""

    @abstractmethod
    def change_norm(self) -> Tensor:
        r"""Return $\|W - W_0\|_F$."""

    @abstractmethod
    def change(self) -> Rows:
        r"""Return rows of $W - W_0$."""

    @abstractmethod
    def base(self) -> Rows:
        r"""Return rows of $W_0$."""


class AdapterTrack(Track):
    """An adapted layer; an offset's subtracted pair counts as part of the base weight's side."""

    def __init__(self, pair: LoraPair):
        self.pair = pair
        self.name = pair.name.removeprefix(_BASE)
        self._last: Place | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.pair.shape[:2]

    def place(self) -> Place:
        """Return where the weight stands, in tensors of its own."""
        A, B = self.pair.factors()
        start = offset_factors(self.pair)
        update = update_from(A, B, scaling=self.pair.scaling, start=start)
        return Place(update, magnitude_scale(self.pair))

    def remember(self) -> None:
        """Keep where the weight stands now."""
        self._last = self.place()

    def advance(self) -> Tensor:
        """Return the norm of the motion, and remember."""
        now, last = self.place(), self._last
        assert last is not None
        self._last = now
        return step_norm(now, last, None if now.scale is None else base_weight(self.pair))

    def change_norm(self) -> Tensor:
        r"""Return $\|W - W_0\|_F$."""
        place = self.place()
        if place.scale is None:
            return norm(place.update)
        rows_of = change_rows(place, self.base())
        total = sum((rows_of(rows).square().sum() for rows in blocks(self.shape[0])), torch.zeros(()))
        return total.sqrt()

    def change(self) -> Rows:
        r"""Return rows of $W - W_0$."""
        return change_rows(self.place(), self.base())

    def base(self) -> Rows:
        r"""Return rows of $W_0$."""
        weight = base_weight(self.pair)
        return lambda rows: weight[rows].double()


class WeightTrack(Track):
    """A weight that is trained itself; its first value is kept.

    Args:
        name: Path of the layer.
    """

    def __init__(self, name: str, module: nn.Module):
        self.name = name
        self._module = module
        self._first = self.weight().clone()
        self._last = self._first

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        m, n = self._first.shape
        return m, n

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
        for rows in blocks(now.shape[0]):
            total += (now[rows].double() - last[rows].to(now.device).double()).square().sum()
        self.remember()
        return total.sqrt()

    def change_norm(self) -> Tensor:
        r"""Return $\|W - W_0\|_F$."""
        rows_of = self.change()
        return sum((rows_of(rows).square().sum() for rows in blocks(self.shape[0])), torch.zeros(())).sqrt()

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

    Returns:
        The tracks in the order of the model.

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
            f"the start of adapter {adapter!r} changed the base weights, so that its motion cannot be measured: "
            "make the adapter with init_lora_weights=True and tangora.initialize"
        )
    pairs = discover(model, adapter).pairs
    if not pairs:
        raise InputError(f"adapter {adapter!r} has no plain pair (A, B) whose motion could be measured")
    return [AdapterTrack(pair) for pair in pairs]


def fingerprint(tracks: Sequence[Track]) -> str:
    """Return a hash of the base weights, the same for a model trained whole and for one with adapters.

    Args:
        tracks: The weights, in any order.

    Returns:
        SHA-256 over names and values.
    """
    digest = hashlib.sha256()
    for track in sorted(tracks, key=lambda track: track.name):
        digest.update(f"{track.name}\0{track.shape}\0".encode())
        rows_of = track.base()
        for rows in blocks(track.shape[0]):
            digest.update(rows_of(rows).float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
