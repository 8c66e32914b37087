"""Experiments of the papers behind tangora, repeated: ``python -m reproductions NAME``.

Each experiment is a module or folder of its name with

- ``Settings``: sizes, as a class whose defaults are the full size; ``QUICK``: those of a run of a few seconds;
- ``STAND_INS``: what the source leaves open or was made smaller, one sentence each;
- ``run(settings, progress)``: a `reproductions.result.Result`, deterministic in the settings, which draws nothing.

This file imports none of them, so that experiments are listed at once.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    """Description of an experiment, known before it is loaded."""

    title: str
    source: str
    duration: str
    """Duration of the full size on two cores, in words."""


EXPERIMENTS = {
    "toy": Experiment(
        "Toy of LoRA-One: trajectories from LoRA's start and from the spectral one",
        "LoRA-One (arXiv:2502.01235), toy example of the slides",
        "3 seconds",
    ),
    "linear-shift": Experiment(
        "Linear model of LoRA-One: alignment, spectral start and linear rates",
        "LoRA-One (arXiv:2502.01235), theorems 3.1 to 3.6 and figure 1",
        "1 minute",
    ),
    "relu-shift": Experiment(
        "ReLU model of LoRA-One: preconditioned descent with GLM-tron's and the true gradient",
        "LoRA-One (arXiv:2502.01235), theorem 4.3",
        "1 minute",
    ),
    "matrix-sensing": Experiment(
        "Matrix sensing: iterations and gradients against the condition number",
        "ODELoRA, arXiv:2602.07479, abstract (linear convergence, matrix sensing)",
        "about three minutes",
    ),
    "width": Experiment(
        "Size of a step's effect on a layer's output as the width grows",
        "ODELoRA, arXiv:2602.07479, abstract (stable feature learning)",
        "about five minutes",
    ),
    "pinn": Experiment(
        "Physics-informed networks: from one coefficient to another",
        "ODELoRA, arXiv:2602.07479: the experiment on physics-informed networks",
        "about 10 minutes on a quiet machine",
    ),
}
"""All experiments by name."""
