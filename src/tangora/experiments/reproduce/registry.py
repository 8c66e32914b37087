"""All experiments by name. A new one is a module or a folder here with an ``EXPERIMENT``, and a line below."""

from collections.abc import Mapping
from types import MappingProxyType

from tangora._checks import check_choice
from tangora.experiments.reproduce import linear_shift, matrix_sensing, pinn, relu_shift, toy, width
from tangora.experiments.reproduce.experiment import Experiment

EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType(
    {
        module.EXPERIMENT.name: module.EXPERIMENT
        for module in (toy, linear_shift, relu_shift, matrix_sensing, width, pinn)
    }
)
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


__all__ = ["EXPERIMENTS", "Experiment", "experiment"]
