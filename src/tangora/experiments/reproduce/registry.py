"""All experiments by name. A new one is a module or a folder here, its ``PARTS`` in `parts`, and an entry below."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from tangora._checks import InputError, check_choice
from tangora.experiments.reproduce.experiment import Experiment, Parts
from tangora.experiments.values import Settings, validated


def _entry(name: str, title: str, source: str, duration: str) -> Experiment:
    def load() -> Parts:
        return import_module(f"tangora.experiments.reproduce.parts.{name.replace('-', '_')}").PARTS

    return Experiment(name, title, source, load, duration)


_ALL = (
    _entry(
        "toy",
        "Toy of LoRA-One: trajectories from LoRA's start and from the spectral one",
        "LoRA-One (arXiv:2502.01235), toy example of the slides",
        "3 seconds",
    ),
    _entry(
        "linear-shift",
        "Linear model of LoRA-One: alignment, spectral start and linear rates",
        "LoRA-One (arXiv:2502.01235), theorems 3.1 to 3.6 and figure 1",
        "1 minute",
    ),
    _entry(
        "relu-shift",
        "ReLU model of LoRA-One: preconditioned descent with GLM-tron's and the true gradient",
        "LoRA-One (arXiv:2502.01235), theorem 4.3",
        "1 minute",
    ),
    _entry(
        "matrix-sensing",
        "Matrix sensing: iterations and gradients against the condition number",
        "ODELoRA, arXiv:2602.07479, abstract (linear convergence, matrix sensing)",
        "about three minutes",
    ),
    _entry(
        "width",
        "Size of a step's effect on a layer's output as the width grows",
        "ODELoRA, arXiv:2602.07479, abstract (stable feature learning)",
        "about five minutes",
    ),
    _entry(
        "pinn",
        "Physics-informed networks: from one coefficient to another",
        "ODELoRA, arXiv:2602.07479: the experiment on physics-informed networks",
        "about 10 minutes on a quiet machine",
    ),
)

EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType({entry.name: entry for entry in _ALL})
"""Experiment by name."""


def experiment(name: str) -> Experiment:
    """Look an experiment up.

    Args:
        name: Its name.

    Returns:
        The experiment.

    Raises:
        InputError: If there is none of this name.
    """
    check_choice("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]


def settings_of(
    wanted: Experiment, values: Mapping[str, Any], *, quick: bool = False, seed: int | None = None
) -> Settings:
    """Make the settings of an experiment.

    Args:
        wanted: The experiment.
        values: By key; they win.
        quick: Whether the small size is the default.
        seed: Shorthand for ``seed``, or for ``seeds`` with one number where the experiment has that.

    Returns:
        The settings.

    Raises:
        InputError: Naming the first bad key, its value and what is allowed.
    """
    given = dict(values)
    if seed is not None:
        fields = wanted.parts.settings.model_fields
        if "seed" not in fields and "seeds" not in fields:
            raise InputError(f"{wanted.name} takes no seed; allowed: {', '.join(fields)}")
        given |= {"seed": seed} if "seed" in fields else {"seeds": (seed,)}
    return validated(wanted.parts.settings, (dict(wanted.parts.quick) if quick else {}) | given)


__all__ = ["EXPERIMENTS", "Experiment", "experiment", "settings_of"]
