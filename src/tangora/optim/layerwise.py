"""Optimizers whose layers move one by one, each by its own gradient."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tangora._types import FactorA, FactorB
from tangora.adapters.sharded import agreed
from tangora.geometry.guess import doubt, guessing
from tangora.geometry.precision import full_precision
from tangora.optim.base import PairOptimizer
from tangora.optim.stack import Gathered, Loaded, PairStack

# The first steps, from B = 0, rarely take the fast branches.
_FIRST_GUESS = 4


class LayerwiseOptimizer(PairOptimizer):
    """A pair optimizer whose layers move one by one, each by its own gradient.

    On a GPU every stack first takes the fast branches, and what comes of it is written where no doubt was noted. The
    doubts of the whole model are read at once; the stacks that have one, and have not moved, are stepped again.
    """

    def _step_pairs(self, gathered: Sequence[Gathered], closure: Callable[[], Any] | None) -> None:
        del closure
        self._check_finite(gathered)
        guessed = [
            each
            for each in gathered
            if _waiting_costs(each.stack.device)
            and each.stack.steps + 1 >= _FIRST_GUESS
            and self._may_guess(each.options)
        ]
        doubts = [self._try(each) for each in guessed]  # one by one: each copies its factors and gradients
        doubtful = dict(zip(map(id, guessed), _read(doubts, gathered), strict=True))
        for each in gathered:
            if doubtful.get(id(each), True):
                self._step_one(each)
            else:
                each.stack.count()

    def _may_guess(self, group: dict[str, Any]) -> bool:  # noqa: ARG002
        """Tell whether `_step_stack` may guess: nothing fails on garbage, and it moves nothing but copies."""
        return False

    def _try(self, gathered: Gathered) -> Bool[Tensor, ""]:
        """Take the step without looking, keep it where there is no doubt; returns whether there is one."""
        here = gathered.load(tentative=True)
        with full_precision(here.A.device), guessing():
            new = self._step_stack(gathered.stack, here, gathered.options)
            noted = doubt()
            gathered.stack.write(*new, unless=noted)
        return torch.zeros((), dtype=torch.bool, device=here.A.device) if noted is None else noted

    def _step_one(self, gathered: Gathered) -> None:
        here = gathered.load()
        with full_precision(here.A.device):
            new = self._step_stack(gathered.stack, here, gathered.options)
            gathered.stack.write(*new)
        gathered.stack.count()

    @abstractmethod
    def _step_stack(self, stack: PairStack, here: Loaded, group: dict[str, Any]) -> tuple[FactorA, FactorB]:
        """Return the new factors of a stack and keep its states."""


def _waiting_costs(device: torch.device) -> bool:
    return device.type == "cuda"


def _read(doubts: Sequence[Bool[Tensor, ""]], gathered: Sequence[Gathered]) -> list[bool]:
    """Return the doubts of all stacks, in one device synchronisation; those of one process are those of all."""
    if not doubts:
        return []
    flags = torch.stack([each.to(doubts[0].device) for each in doubts])
    factors = [pair.A for each in gathered for pair in each.stack.pairs]
    return [not fine for fine in agreed(~flags, factors).tolist()]
