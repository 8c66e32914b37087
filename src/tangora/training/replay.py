"""The micro-batches of one update, to evaluate their gradient again: same data, same random numbers."""

import contextlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The random state of Python, numpy and torch (CPU and CUDA) at one moment."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: tuple[Tensor, ...]

    @classmethod
    def now(cls) -> "RandomState":
        """Copy the present state.

        Returns:
            The copy.
        """
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), tuple(cuda))  # noqa: NPY002

    def put_back(self) -> None:
        """Make it the present state again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 - the global state, which data collators may use
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))


@dataclass(frozen=True)
class MicroBatch:
    """What one call of ``training_step`` was given, and the random state it began with."""

    inputs: Any
    num_items: Any
    random: RandomState

    @classmethod
    def of(cls, inputs: Any, num_items: Any) -> "MicroBatch":
        """Keep a micro-batch that is about to be evaluated.

        Args:
            inputs: The model's inputs; a mapping is copied, because losses may take labels out of it.
            num_items: Items in the whole batch.

        Returns:
            The micro-batch.
        """
        return cls(dict(inputs) if isinstance(inputs, Mapping) else inputs, num_items, RandomState.now())

    @contextlib.contextmanager
    def again(self) -> Iterator[Any]:
        """Evaluate it again with the random numbers of the first time; the present random state comes back.

        Yields:
            Its inputs.
        """
        present = RandomState.now()
        self.random.put_back()
        try:
            yield dict(self.inputs) if isinstance(self.inputs, Mapping) else self.inputs
        finally:
            present.put_back()
