"""The starts as a table: what each one takes and reads, and the factors that it makes of one layer.

Models stay outside: nothing here writes a parameter. `initialize` carries out what the table says.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch

from tangora._checks import InputError, check_choice
from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair, base_weight
from tangora.init.lora_ga import lora_ga
from tangora.init.lora_one import lora_one, lora_one_v1
from tangora.init.one_step import one_step
from tangora.init.orthogonal import orthogonal
from tangora.init.pissa import pissa
from tangora.probes import GradientSpectrum, why_unread

Factors = tuple[FactorA, FactorB]


@dataclass(frozen=True)
class Site:
    """One layer to start, and what its start is made of."""

    pair: LoraPair
    spectrum: GradientSpectrum | None
    generator: torch.Generator


@dataclass(frozen=True)
class Method:
    """One start."""

    factors: Callable[..., Factors]
    """``(site, **options)`` -> $(A_0, B_0)$."""
    options: Mapping[str, Any]
    """Types of its options, by name."""
    directions: int = 0
    """Gradient directions per unit of rank; 0 for starts that do not look at the gradient."""
    values: bool = False
    """Whether it weighs directions by singular values, which few passes tell too roughly."""
    offset: bool = False
    """Whether $-s B_0 A_0$ is carried along, so that the model starts from the base."""


def starts() -> tuple[str, ...]:
    """List the starts.

    Returns:
        Names for `initialize`.
    """
    return tuple(METHODS)


def start_options(method: str) -> Mapping[str, Any]:
    """List what can be chosen about a start.

    Returns:
        Types of its options, by name.
    """
    return METHODS[method].options


def needs_batches(method: str) -> bool:
    """Tell whether a start reads gradients.

    Returns:
        Whether `initialize` needs batches for it.
    """
    return METHODS[method].directions > 0


def carries_offset(method: str) -> bool:
    """Tell whether a start subtracts its product, which is then carried along.

    Returns:
        Whether layers started so have an offset.
    """
    return METHODS[method].offset


def check_method(method: str, options: Mapping[str, Any], *, has_batches: bool) -> Method:
    """Look up a start and check what it is given."""
    check_choice("method", method, tuple(METHODS))
    chosen = METHODS[method]
    allowed = (*chosen.options, *(PROBE_OPTIONS if chosen.directions else ()))
    for key in options:
        if key not in allowed:
            raise InputError(f"start {method!r} takes {', '.join(allowed) or 'no options'}; got {key!r}")
    if chosen.directions and not has_batches:
        raise InputError(
            f"start {method!r} reads gradients: give batches, a list of model inputs with labels"
        )
    if method == "one-step" and ("step" in options) == (options.get("held_out") is not None):
        raise InputError("start 'one-step' needs either step=... or held_out=batches to search the step on")
    return chosen


def find_sites(
    pairs: list[LoraPair], spectra: Mapping[str, GradientSpectrum], chosen: Method, seed: int
) -> tuple[list[Site], dict[str, str]]:
    """Divide layers into those that can get a start and those that cannot."""
    sites, skipped = [], {}
    for index, pair in enumerate(pairs):
        m, n, r = pair.shape
        spectrum = spectra.get(pair.name)
        if r > min(m, n) and chosen.factors is not _lora:
            skipped[pair.name] = f"rank {r} is above its smaller side {min(m, n)}"
        elif chosen.directions and spectrum is None:
            skipped[pair.name] = why_unread(pair.layer)
        elif spectrum is not None and not spectrum.svd.S[0] > 0:
            skipped[pair.name] = "its gradient is zero on these batches"
        else:
            generator = torch.Generator().manual_seed((seed << 20) + index)
            sites.append(Site(pair, spectrum, generator))
    return sites, skipped


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed, and leave the global random state as it was."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _lora_ga(site: Site, **options: Any) -> Factors:
    assert site.spectrum is not None
    values = None
    if options.get("scale") == "weight_svd":
        values = torch.linalg.svdvals(base_weight(site.pair))
    r, scaling = site.pair.shape[2], site.pair.scaling
    return lora_ga(
        site.spectrum.svd, r, scaling, weight_singular_values=values, generator=site.generator, **options
    )


def _lora_one(site: Site, **options: Any) -> Factors:
    assert site.spectrum is not None
    return lora_one(site.spectrum.svd, site.pair.shape[2], **options)


def _lora_one_v1(site: Site, **options: Any) -> Factors:
    assert site.spectrum is not None
    return lora_one_v1(site.spectrum.svd, site.pair.shape[2], **options)


def _one_step(site: Site, **options: Any) -> Factors:
    assert site.spectrum is not None
    return one_step(site.spectrum.svd, site.pair.shape[2], site.pair.scaling, **options)


def _orthogonal(site: Site, **options: Any) -> Factors:
    return orthogonal(*site.pair.shape, generator=site.generator, **options)


def _pissa(site: Site, **options: Any) -> Factors:
    with seeded(site.generator.initial_seed()):  # the randomized decomposition knows the global state only
        return pissa(base_weight(site.pair), site.pair.shape[2], site.pair.scaling, **options)


def _lora(site: Site) -> Factors:
    return site.pair.factors()  # as PEFT drew them


def _typed(function: Callable[..., Factors], *names: str) -> dict[str, Any]:
    hints = get_type_hints(function)
    return {name: hints.get(name, Any) for name in names}


METHODS = {
    "lora": Method(_lora, {}),
    "orthogonal": Method(_orthogonal, _typed(orthogonal, "size"), offset=True),
    "pissa": Method(_pissa, _typed(pissa, "niter"), offset=True),
    "lora-ga": Method(
        _lora_ga, _typed(lora_ga, "direction", "scale", "stable_gamma"), directions=2, offset=True
    ),
    "lora-one": Method(_lora_one, _typed(lora_one, "gamma"), directions=1, values=True),
    "lora-one-v1": Method(_lora_one_v1, _typed(lora_one_v1, "gamma"), directions=1, offset=True),
    "one-step": Method(_one_step, _typed(one_step, "step", "held_out"), directions=1, values=True),
}
PROBE_OPTIONS = ("oversampling", "power_iterations", "one_pass")
