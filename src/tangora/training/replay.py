"""The micro-batches of one update, to evaluate their gradient again: same data, same random numbers."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tangora.probes.stillness import RandomState, preserved_randomness


@dataclass(frozen=True)
class MicroBatch:
    """What one call of ``training_step`` was given, and the random state it began with."""

    inputs: Any
    num_items: Any
    random: RandomState

    @classmethod
    def of(cls, inputs: Any, num_items: Any) -> "MicroBatch":
        """Keep a micro-batch that is about to be evaluated."""
        return cls(dict(inputs) if isinstance(inputs, Mapping) else inputs, num_items, RandomState.now())

    @contextlib.contextmanager
    def again(self) -> Iterator[Any]:
        """Evaluate it again with the random numbers of the first time; the present random state comes back."""
        with preserved_randomness():
            self.random.put_back()
            yield dict(self.inputs) if isinstance(self.inputs, Mapping) else self.inputs
