"""The results of a diagnosis, as plain dataclasses that can be saved as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tangora._checks import InputError
from tangora.diagnostics.rank_plan import LayerGradient, RankPlan

SHARES = (50, 80, 90)
"""Shares of the gradient's energy, in percent, whose rank is looked for."""


@dataclass(frozen=True)
class AdapterState:
    r"""One layer's adapter as it stands, measured on the gradient $G$ of the adapted model."""

    rank: int
    scaling: float
    gradient: LayerGradient
    """Gradient of the adapted model; the base model's where the adapter's product is still zero."""
    captured_energy: float
    r"""$\kappa = \|P_T(G)\|_F^2 / \|G\|_F^2$."""
    alignment_error: float
    r"""$\varepsilon = \|G - P_T(G)\|_F$, in the gradient's units."""
    cosine: float | None
    r"""Between $G$ and the weight's step under plain LoRA gradients; $\sqrt\kappa$ is the best possible. ``None`` where
    one of them is zero."""
    condition_A: float | None
    r"""Ratio of the extreme eigenvalues of $A A^\top$; ``None`` for a factor without full rank."""
    condition_B: float | None
    r"""The same of $B^\top B$; ``None`` at the initialization $B = 0$."""
    imbalance: float
    r"""$\|B^\top B - A A^\top\|_F$."""
    relative_imbalance: float
    r"""The same over $\|B^\top B\|_F + \|A A^\top\|_F$: 0 is balanced, 1 is a zero factor."""
    effective_rank: float
    """Exponential of the entropy of the singular values of $B A$; 0 for $B A = 0$."""

    @property
    def missed_energy(self) -> float:
        r"""$\varepsilon^2$, the energy that the adapter does not capture."""
        return self.alignment_error**2


@dataclass(frozen=True)
class HeldOut:
    """The base model's gradient on examples that no initialization was made from."""

    energy: float
    energy_error: float
    """Standard error of the energy; 0 where it is exact."""
    starts: dict[str, float]
    r"""Captured energy $\kappa$ by initialization."""


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer, by its path in the base model."""

    name: str
    m: int
    n: int
    rank: int
    """Rank of the initializations."""
    gradient: LayerGradient
    """Gradient of the base model."""
    adapter: AdapterState | None
    """The adapter as it stands; ``None`` for a model without one."""
    starts: dict[str, float]
    r"""Captured energy $\kappa$ of the base model's gradient by initialization, at `rank`."""
    reachable: float
    r"""The largest $\kappa$ that any adapter of `rank` could have there."""
    ranks_needed: dict[str, int | None]
    """Smallest rank that could capture 50, 80 and 90 % of the base model's gradient, by ``"50"`` and so on; ``None`` if
    it lies beyond the singular values that were computed."""
    held_out: HeldOut | None = None


@dataclass(frozen=True)
class Totals:
    """The same over all layers, each weighted with its energy."""

    starts: dict[str, float]
    held_out: dict[str, float] | None
    reachable: float
    adapter: float | None
    """Captured energy of the adapter as it stands."""
    cosine: float | None
    """Between the full gradient and the step of plain LoRA gradients, over all layers at once."""
    energy_error: float
    """Standard error of the gradient's energy, relative; 0 where the norms are exact."""
    adapter_energy_error: float
    """The same of the adapted model's gradient."""


@dataclass(frozen=True)
class Diagnosis:
    """The share of the full gradient that adapters capture."""

    layers: tuple[LayerDiagnosis, ...]
    """In the order of the model."""
    totals: Totals
    plan: RankPlan
    """Ranks by layer for the same number of parameters as a uniform rank."""
    plain_start: bool
    """Whether the adapter still leaves the model as the base is, so that both have one gradient."""
    exact_norms: bool
    """Whether the gradients' norms are exact, or estimated from random probes."""
    num_batches: int | None
    """``None`` if batches have no length."""
    loss: float
    """Mean loss of the base model."""
    adapter_loss: float | None
    """The adapted model's; ``None`` without an adapter."""
    skipped: dict[str, str]
    """Adapted layers that could not be measured, with the reason."""
    seconds: float

    @property
    def starts(self) -> tuple[str, ...]:
        """Names of the initializations that were compared."""
        return tuple(self.totals.starts)

    def worst_layers(self, count: int = 5) -> list[LayerDiagnosis]:
        """List the layers where the adapter, or without one the first initialization, misses most energy."""
        return sorted(self.layers, key=_missed_energy, reverse=True)[:count]

    def missed_share(self, layer: LayerDiagnosis) -> float:
        """Return the energy not captured in one layer, as a share in [0, 1] of that of all layers' gradients."""
        total = sum((each.adapter.gradient if each.adapter else each.gradient).energy for each in self.layers)
        return _missed_energy(layer) / total if total > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries and lists, as JSON can hold them."""
        return TypeAdapter(Diagnosis).dump_python(self, mode="json")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Diagnosis":
        """Make a diagnosis from the result of `to_dict`.

        Raises:
            InputError: If something is missing or of the wrong type.
        """
        try:
            return TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InputError(f"invalid diagnosis: {place}: {first['msg']}") from error


def _missed_energy(layer: LayerDiagnosis) -> float:
    """Return the energy of a layer's gradient that the adapter does not capture."""
    if layer.adapter is not None:
        return layer.adapter.missed_energy
    captured = next(iter(layer.starts.values()), layer.reachable)
    return (1 - captured) * layer.gradient.energy


def totals(layers: Sequence[LayerDiagnosis], cosine: float | None) -> Totals:
    """Add up over layers."""
    gradients = [layer.gradient for layer in layers]
    others = [layer.held_out for layer in layers if layer.held_out is not None]
    names = list(layers[0].starts)
    adapters = [layer.adapter for layer in layers if layer.adapter is not None]
    return Totals(
        starts={name: mean_share([layer.starts[name] for layer in layers], gradients) for name in names},
        held_out={name: mean_share([each.starts[name] for each in others], others) for name in names}
        if others
        else None,
        reachable=mean_share([layer.reachable for layer in layers], gradients),
        adapter=mean_share([a.captured_energy for a in adapters], [a.gradient for a in adapters])
        if adapters
        else None,
        cosine=cosine,
        energy_error=_relative_error(gradients),
        adapter_energy_error=_relative_error([adapter.gradient for adapter in adapters] or gradients),
    )


def mean_share(shares: Sequence[float], gradients: Sequence[LayerGradient] | Sequence[HeldOut]) -> float:
    """Average captured shares over layers."""
    total = sum(gradient.energy for gradient in gradients)
    captured = sum(share * gradient.energy for share, gradient in zip(shares, gradients, strict=True))
    return captured / total if total > 0 else 0.0


def _relative_error(gradients: Sequence[LayerGradient]) -> float:
    total = sum(gradient.energy for gradient in gradients)
    error = sum(gradient.energy_error**2 for gradient in gradients) ** 0.5
    return error / total if total > 0 else 0.0
