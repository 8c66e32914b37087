"""Optimizers that update each layer independently, with its own gradient."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tangora._checks import InputError
from tangora._types import FactorA, FactorB
from tangora.adapters.sharded import agreed
from tangora.geometry.guess import all_may, doubt, guessing, is_guessing
from tangora.geometry.precision import full_precision
from tangora.optim.base import PairOptimizer
from tangora.optim.gathering import Gathered
from tangora.optim.stack import Loaded, PairStack

# The first steps, from B = 0, rarely take the fast branches.
_FIRST_GUESS = 4
# A step is compiled for so many shapes of layers at most.
_SHAPES = 64


class LayerwiseOptimizer(PairOptimizer):
    """A pair optimizer that updates each layer independently, with its own gradient.

    On a GPU every stack first takes the fast branches, and what comes of it is written where no doubt was noted. The
    doubts of the whole model are read at once; the stacks that have one, and have not moved, are stepped again.
    """

    _compile_options: dict[str, Any] | None = None
    _compiled: dict[Callable[..., Any], Callable[..., Any]] = {}  # noqa: RUF012

    def compile(self, **options: Any) -> None:
        """Compile the steps of stacks with `torch.compile`, each whole, and once for all learning rates.

        Few large kernels instead of many small ones: for GPUs. Which optimizers have steps that compile: `TangentMuon`,
        `TangentAdam` and `LoRAPro`, but with ``retraction="svd"``, and LoRA-Pro with moments of the weight and any
        retraction.

        Args:
            **options: As for `torch.compile`, such as ``mode`` or ``backend``.

        Raises:
            InputError: If no step compiles with the optimizer's options, or torch is older than 2.7.
        """
        if not any(self._may_guess(group) for group in self.param_groups if group.pairs):
            raise InputError(
                f"this {type(self).__name__} cannot be compiled: do not call compile(). TangentMuon, "
                "TangentAdam and LoRAPro support it, except with retraction='svd', and LoRAPro except "
                "with moments='weight' and a retraction other than 'factors'"
            )
        if torch.__version__ < "2.7":  # compared as versions
            raise InputError(f"compile() needs torch 2.7 or newer; this is {torch.__version__}")
        self._compile_options, self._compiled = options, {}

    def _step_pairs(self, gathered: Sequence[Gathered], closure: Callable[[], Any] | None) -> None:
        del closure
        self._check_finite(gathered)
        guessed = [
            each
            for each in gathered
            if (_waiting_costs(each.stack.device) or self._compile_options is not None)
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

    def _pure(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of tensors, compiled if that was asked for and it is called to guess."""
        if self._compile_options is None or not is_guessing():
            return function
        if function not in self._compiled:
            self._compiled[function] = _compiled(function, self._compile_options)
        return self._compiled[function]

    def _number(self, value: float, stack: PairStack) -> float | Tensor:
        """Return a number that changes from step to step as `_pure` functions take it: compiled ones as a tensor."""
        if self._compile_options is None or not is_guessing():
            return value
        return torch.full((), value, dtype=torch.float64, device=stack.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compile_options": self._compile_options, "_compiled": {}}

    def _may_guess(self, group: dict[str, Any]) -> bool:  # noqa: ARG002
        """Tell whether `_step_stack` may guess: nothing fails on garbage, and it changes only copies."""
        return False

    def _try(self, gathered: Gathered) -> Bool[Tensor, ""]:
        """Take the step without looking, keep it where there is no doubt; returns whether there is one."""
        here = gathered.load(tentative=True)
        with full_precision(here.A.device), guessing():
            new = self._new_factors(gathered, here)
            noted = doubt()
            noted = torch.zeros((), dtype=torch.bool, device=here.A.device) if noted is None else noted
            noted = gathered.stack.agreed(noted)
            gathered.stack.write(*new, unless=noted)
        return noted

    def _step_one(self, gathered: Gathered) -> None:
        here = gathered.load()
        with full_precision(here.A.device):
            gathered.stack.write(*self._new_factors(gathered, here))
        gathered.stack.count()

    def _new_factors(self, gathered: Gathered, here: Loaded) -> tuple[FactorA, FactorB]:
        if len(here.A) == 0:  # another process steps all members
            return here.A, here.B
        return self._step_stack(gathered.stack, here, gathered.options)

    def _may_deal(self, group: Mapping[str, Any]) -> bool:  # noqa: ARG002
        return True

    @abstractmethod
    def _step_stack(self, stack: PairStack, here: Loaded, group: dict[str, Any]) -> tuple[FactorA, FactorB]:
        """Return the new factors of a stack and keep its states."""


def _compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def guessed(*arguments: Any, **keywords: Any) -> Any:
        with guessing():  # what a step changes in place are copies: graphs are replayed on their own memory
            copies = tree_map_only(Tensor, torch.clone, arguments)
            return function(*copies, **keywords), doubt()

    compiled = torch.compile(guessed, fullgraph=True, **options)

    def run(*arguments: Any, **keywords: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_SHAPES):
            result, noted = compiled(*arguments, **keywords)
        if noted is not None:
            all_may(~noted)
        return result

    return run


def _waiting_costs(device: torch.device) -> bool:
    return device.type == "cuda"


def _read(doubts: Sequence[Bool[Tensor, ""]], gathered: Sequence[Gathered]) -> list[bool]:
    """Return the doubts of all stacks, in one device synchronisation; those of one process are those of all."""
    if not doubts:
        return []
    flags = torch.stack([each.to(doubts[0].device) for each in doubts])
    factors = [pair.A for each in gathered for pair in each.stack.pairs]
    return [not fine for fine in agreed(~flags, factors).tolist()]
