"""A stack whose factors or states are sharded over processes: gathered for a step, and sharded again after it."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair
from tangora.adapters.pair import as_matrix
from tangora.adapters.sharded import LocalRows, local, zeros_beside
from tangora.optim.exchange import Exchange, Sharing
from tangora.optim.stack import (
    COUNTER,
    Factor,
    Loaded,
    PairStack,
    StateOf,
    copy_unless,
    state_place,
)


class ShardedStack(PairStack):
    """A stack of which this process keeps parts, and steps all members or those dealt to it."""

    def __init__(self, pairs: Sequence[LoraPair], state: StateOf, exchange: Exchange, sharing: Sharing):
        super().__init__(pairs, state)
        self._exchange, self._sharing = exchange, sharing

    @property
    def own_pairs(self) -> list[LoraPair]:
        """The members that this process steps."""
        return self._exchange.own(self.pairs)

    def _create(self, factor: Factor, key: str, shape: tuple[int, ...]) -> None:
        if key == COUNTER:
            super()._create(factor, key, shape)
            return
        for parameter, state in zip(self._parameters[factor], self._states[factor], strict=True):
            if key not in state:
                dtype, _ = state_place(parameter, key)
                shape = tuple(parameter.shape) if shape == as_matrix(parameter).shape else shape
                mesh = self._sharing.mesh(parameter)
                state[key] = zeros_beside(parameter, "BA".index(factor), shape, dtype, mesh)

    def load(self, gradients: Sequence[tuple[FactorA, FactorB]], **options: Any) -> Loaded:
        """Copy factors, gradients and states of the members that this process steps."""
        here = super().load(gradients, **options)
        if self._exchange.eager:  # all processes ask for the same states, also those without a member
            self._fetch(
                [(f, key) for f, states in self._states.items() for key in states[0] if key != COUNTER]
            )
        return here

    def _fetched(self, kinds: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
        return self._exchange.fetch(kinds)

    def state(self, factor: Factor, key: str) -> Float[Tensor, "N ..."]:
        """Return a state of the members that this process steps."""
        if key == COUNTER:
            return self._kept(factor, key)
        if (factor, key) not in self._drafts:
            self._fetch([(factor, key)])
        return self._drafts[factor, key]

    def _fetch(self, names: Sequence[tuple[Factor, str]]) -> None:
        kinds = [[state[key] for state in self._states[factor]] for factor, key in names]
        for (factor, key), values in zip(names, self._exchange.fetch(kinds) if kinds else [], strict=True):
            parameter, held = self._parameters[factor][0], [state[key] for state in self._states[factor]]
            is_factor = held[0].shape == parameter.shape
            stacked = self._stacked(values, held) if is_factor else _stack(values, held[0])
            self._drafts[factor, key] = self._laid_out(factor, stacked)

    def _stacked(self, values: Sequence[Tensor], held: Sequence[Tensor]) -> Tensor:
        stacked = _stack(values, held[0])
        return stacked if stacked.dim() == 3 else stacked.flatten(2)

    def agreed(self, doubt: Bool[Tensor, ""]) -> Bool[Tensor, ""]:
        """Return whether any process that steps members has a doubt."""
        return self._exchange.agreed(doubt)

    def rows_kept(self, key: str) -> LocalRows | None:
        """Return which rows of a state with the shape of the weight this process keeps."""
        return LocalRows.of(self._states["B"][0][key])

    def rows_of(self, key: str, size: int) -> Iterator[Float[Tensor, "N rows n"]]:
        """Yield those rows, member by member."""
        if self.rows_kept(key) is None:
            yield from super().rows_of(key, size)
        else:
            yield from (local(state[key])[None] for state in self._states["B"])

    def write(self, A: FactorA, B: FactorB, *, unless: Bool[Tensor, ""] | None = None) -> None:
        """Write new factors and states into the parts of all processes, unless there is a doubt."""
        self.place(A, B, unless=unless)
        held = [[state[key] for state in self._states[factor]] for factor, key in self._drafts]
        self._store(list(self._drafts.values()), held, unless)
        self._drafts.clear()

    def place(self, A: FactorA, B: FactorB, *, unless: Bool[Tensor, ""] | None = None) -> None:
        """Write factors into the parts of all processes."""
        self._store([A, B], list(self._parameters.values()), unless)

    def _store(
        self, values: Sequence[Tensor], held: Sequence[Sequence[Tensor]], unless: Bool[Tensor, ""] | None
    ) -> None:
        shaped = [
            new.reshape(len(new), *kind[0].shape).unbind() for new, kind in zip(values, held, strict=True)
        ]
        for kind, parts in zip(held, self._exchange.store(shaped, held), strict=True):
            copy_unless([local(each) for each in kind], parts, unless)


def _stack(values: Sequence[Tensor], held: Tensor) -> Tensor:
    return torch.stack(list(values)) if values else local(held).new_empty((0, *held.shape))
