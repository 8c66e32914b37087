"""Layers of equal shape as one stack: factors and gradients are copied for a step, and written back after it."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair
from tangora.adapters.pair import as_matrix
from tangora.adapters.sharded import LocalRows
from tangora.geometry.tangent import Cotangent

Factor = Literal["A", "B"]
StateShapes: TypeAlias = Mapping[Factor, Mapping[str, tuple[int, ...]]]
"""Shape of each state of a pair by its name, under the factor that it is kept with."""
StateOf = Callable[[nn.Parameter], dict[str, Any]]

COUNTER = "step"
"""Name of the state that counts a pair's steps."""


class _Buffer(NamedTuple):
    """A state of all members in one tensor, and the slices of it that the optimizer's state holds."""

    stacked: Tensor
    slices: list[Tensor]


class Loaded(NamedTuple):
    """Copies of a stack's factors and gradients for one step, in at least float32."""

    A: FactorA
    B: FactorB  # with the long side contiguous like that of A: products with small matrices are several times faster so
    gradient: Cotangent  # autograd's gradients divided by the scaling
    scaling: float
    step: int  # the number of the step that is being taken, from 1


class PairStack:
    """Pairs of one kind, of equal shape, dtype, device, scaling and age, as stacked matrices in at least float32.

    States live in one tensor per name; the entries of the optimizer's state are views of it, shaped like their
    parameter. A stack is kept from step to step, and notices when an entry has been replaced from outside.
    """

    def __init__(self, pairs: Sequence[LoraPair], state: StateOf):
        self.pairs = list(pairs)
        self._parameters: dict[Factor, list[nn.Parameter]] = {
            "A": [pair.A for pair in pairs],
            "B": [pair.B for pair in pairs],
        }
        self._states: dict[Factor, list[dict[str, Any]]] = {
            factor: [state(parameter) for parameter in parameters]
            for factor, parameters in self._parameters.items()
        }
        self._buffers: dict[tuple[Factor, str], _Buffer] = {}
        self._tentative = False
        self._drafts: dict[
            tuple[Factor, str], Tensor
        ] = {}  # states during a step, that are not yet to be kept

    def create(self, shapes: StateShapes) -> None:
        """Give the members the states that they lack, zeros, and their step counters."""
        for factor, states in self._states.items():
            for key, shape in {COUNTER: (), **shapes.get(factor, {})}.items():
                if all(key in state for state in states):
                    continue
                self._create(factor, key, shape)

    def _create(self, factor: Factor, key: str, shape: tuple[int, ...]) -> None:
        states = self._states[factor]
        dtype, device = state_place(self._parameters[factor][0], key)
        stacked = torch.zeros((len(states), *shape), dtype=dtype, device=device)
        for index, state in enumerate(states):
            if key in state:
                stacked[index] = state[key].reshape(shape)
        self._set(factor, key, stacked)

    @property
    def own_pairs(self) -> list[LoraPair]:
        """The members that this process steps."""
        return self.pairs

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the factors are kept in."""
        return self.pairs[0].A.dtype

    @property
    def device(self) -> torch.device:
        """The device that the factors are on."""
        return self.pairs[0].A.device

    @property
    def steps(self) -> int:
        """The number of steps taken so far."""
        return int(self.state("A", COUNTER)[0])

    def load(
        self, gradients: Sequence[tuple[FactorA, FactorB]], *, maximize: bool, tentative: bool = False
    ) -> Loaded:
        """Copy factors and gradients, with the sign that makes every step a descent.

        Args:
            tentative: Whether the step may yet be given up: states are then copies, too.
        """
        scaling = self.pairs[0].scaling
        unit = -scaling if maximize else scaling
        self._drafts.clear()  # of a step that was broken off
        self._tentative = tentative
        kinds = *self._parameters.values(), *zip(*gradients, strict=True)
        fetched = zip(self._fetched(kinds), kinds, strict=True)
        A, B, g_A, g_B = (_at_least_float32(self._stacked(values, held)) for values, held in fetched)
        return Loaded(
            A,
            _long_side_contiguous(B),
            Cotangent(g_A.div_(unit), _long_side_contiguous(g_B).div_(unit)),
            scaling,
            step=self.steps + 1,
        )

    def _fetched(self, kinds: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
        return kinds

    def _stacked(self, values: Sequence[Tensor], held: Sequence[Tensor]) -> Tensor:  # noqa: ARG002
        return torch.stack([as_matrix(value) for value in values])

    def state(self, factor: Factor, key: str) -> Float[Tensor, "N ..."]:
        """Return a state of all members as one tensor of matrices, vectors or scalars."""
        if key == COUNTER or not self._tentative:
            return self._kept(factor, key)
        if (factor, key) not in self._drafts:
            self._drafts[factor, key] = self._kept(factor, key).clone()
        return self._drafts[factor, key]

    def _kept(self, factor: Factor, key: str) -> Tensor:
        states, cached = self._states[factor], self._buffers.get((factor, key))
        parameter = self._parameters[factor][0]
        dtype, device = state_place(parameter, key)
        if (
            cached is not None
            and (cached.stacked.dtype, cached.stacked.device) == (dtype, device)
            and all(map(operator.is_, [state.get(key) for state in states], cached.slices))
        ):
            return cached.stacked
        held = [state[key] for state in states]
        return self._set(
            factor, key, torch.stack([as_kept(value, parameter).to(device, dtype) for value in held])
        )

    def rows_kept(self, key: str) -> LocalRows | None:  # noqa: ARG002
        """Return which rows this process keeps of a state with the shape of the weight; ``None`` if it keeps all."""
        return None

    def rows_of(self, key: str, size: int) -> Iterator[Float[Tensor, "N rows n"]]:
        """Yield a state with the shape of the weight, kept with B: those rows of at most so many members at a time.

        They are never copied: an update that may yet be given up must skip itself.
        """
        yield from self._kept("B", key).split(size)

    def both(self, key: str) -> Cotangent:
        """Return a state that is kept with both factors, in their shapes."""
        return Cotangent(self.state("A", key), self.state("B", key))

    def keep(self, factor: Factor, **values: Float[Tensor, "N ..."]) -> None:
        """Store new values of states."""
        for key, value in values.items():
            self.state(factor, key).copy_(value)

    def write(self, A: FactorA, B: FactorB, *, unless: Bool[Tensor, ""] | None = None) -> None:
        """Write new factors into the parameters, and the states of the step, unless there is a doubt."""
        self.place(A, B, unless=unless)
        for (factor, key), values in self._drafts.items():
            kept = self._kept(factor, key)
            kept.copy_(values if unless is None else torch.where(unless, kept, values))
        self._drafts.clear()
        self._tentative = False

    def agreed(self, doubt: Bool[Tensor, ""]) -> Bool[Tensor, ""]:
        """Return whether any process that steps members of this stack has a doubt."""
        return doubt

    def count(self) -> None:
        """Count a step."""
        for factor in self._parameters:
            self.state(factor, COUNTER).add_(1)

    def place(self, A: FactorA, B: FactorB, *, unless: Bool[Tensor, ""] | None = None) -> None:
        """Write factors into the parameters, for a look at the gradient there: no step is counted."""
        factors: dict[Factor, Tensor] = {"A": A.contiguous(), "B": B.contiguous()}
        for factor, values in factors.items():
            parameters = self._parameters[factor]
            copy_unless(parameters, values.view(-1, *parameters[0].shape).unbind(), unless)

    def _is_like_factor(self, factor: Factor, stacked: Tensor) -> bool:
        return stacked.dim() == 3 and stacked.shape[1:].numel() == self._parameters[factor][0].numel()

    def _laid_out(self, factor: Factor, stacked: Tensor) -> Tensor:
        # moments of B only: those of the whole weight stay row by row, as torch's fused AdamW wants them
        like_B = factor == "B" and self._is_like_factor(factor, stacked)
        return _long_side_contiguous(stacked) if like_B else stacked

    def _set(self, factor: Factor, key: str, stacked: Tensor) -> Tensor:
        parameter = self._parameters[factor][0]
        stacked = self._laid_out(factor, stacked)
        is_like_factor = self._is_like_factor(factor, stacked)
        slices = [piece.view(parameter.shape) if is_like_factor else piece for piece in stacked.unbind()]
        for state, piece in zip(self._states[factor], slices, strict=True):
            state[key] = piece
        self._buffers[factor, key] = _Buffer(stacked, slices)
        return stacked


def copy_unless(held: Sequence[Tensor], new: Sequence[Tensor], unless: Bool[Tensor, ""] | None) -> None:
    """Copy tensors of one shape into others, unless there is a doubt."""
    if unless is not None:
        new = torch.where(unless, torch.stack(list(held)), torch.stack(list(new))).unbind()
    torch._foreach_copy_(list(held), list(new))


def as_kept(state: Tensor, parameter: Tensor) -> Tensor:
    """Return a state as a stack keeps it: shaped like its factor, it is a matrix."""
    return as_matrix(state) if state.shape == parameter.shape else state


def state_place(parameter: Tensor, key: str) -> tuple[torch.dtype, torch.device]:
    """Return dtype and device of a state of a factor.

    Moments are at least float32, beside their parameter. Counters are on the CPU, as in torch's own optimizers: reading
    them never waits for a GPU.
    """
    if key == COUNTER:
        return torch.float32, torch.device("cpu")
    return torch.promote_types(parameter.dtype, torch.float32), parameter.device


def shaped_like_factors(pair: LoraPair, *keys: str) -> StateShapes:
    """Return states of the shapes of the factors."""
    m, n, r = pair.shape
    return {"A": dict.fromkeys(keys, (r, n)), "B": dict.fromkeys(keys, (m, r))}


def _at_least_float32(stacked: Tensor) -> Tensor:
    return stacked.to(torch.promote_types(stacked.dtype, torch.float32))


def _long_side_contiguous(stacked: Tensor) -> Tensor:
    return stacked.mT.contiguous().mT
