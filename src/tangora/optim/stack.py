"""Layers of equal shape as one stack: factors and gradients are gathered for a step and written back after it."""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair
from tangora.adapters.pair import as_matrix
from tangora.geometry.tangent import Cotangent

Factor = Literal["A", "B"]
# On a CPU a step is bound by memory traffic, and temporaries should stay in the cache; a GPU wants few kernels.
_CPU_STACK_NUMBERS = 2**20

_Member: TypeAlias = tuple[LoraPair, tuple[FactorA, FactorB]]
StateOf = Callable[[nn.Parameter], dict[str, Any]]


class _Buffer(NamedTuple):
    """A state of all members in one tensor, and the slices of it that the optimizer's state holds."""

    stacked: Tensor
    slices: list[Tensor]


class PairStack:
    """Pairs of equal shape, dtype, device, scaling and age, as stacked matrices in at least float32.

    States live in one tensor per name; the entries of the optimizer's state are views of it, shaped like their
    parameter. A stack is kept from step to step, and notices when an entry has been replaced from outside. Factors and
    gradient are copies, there from `load` to `write` only.

    Attributes:
        pairs: The members.
        A: Factors, ``N r n``.
        B: Factors, ``N m r``, with the long side contiguous like that of ``A``: products with small matrices are
            several times faster so.
        gradient: The cotangent, autograd's gradients divided by the scaling.
        scaling: The common factor $s$.
        step: Number of the step that is being taken, from 1.
    """

    A: FactorA
    B: FactorB
    gradient: Cotangent
    scaling: float
    step: int

    def __init__(self, pairs: Sequence[LoraPair], state: StateOf):
        self.pairs = list(pairs)
        self._parameters: dict[Factor, list[nn.Parameter]] = {
            "A": [pair.A for pair in pairs],
            "B": [pair.B for pair in pairs],
        }
        self._states = {factor: [state(p) for p in self._parameters[factor]] for factor in self._parameters}
        self._buffers: dict[tuple[Factor, str], _Buffer] = {}

    def load(self, gradients: Sequence[tuple[FactorA, FactorB]]) -> None:
        """Read factors and counters, and take the gradients of this step.

        Args:
            gradients: ``(g_A, g_B)`` of each member.
        """
        self.scaling = self.pairs[0].scaling
        self.step = int(self.state("A", "step")[0]) + 1
        self.A = _stack([as_matrix(A) for A in self._parameters["A"]])
        self.B = _long_side_contiguous(_stack([as_matrix(B) for B in self._parameters["B"]]))
        self.gradient = Cotangent(
            _stack([g_A for g_A, _ in gradients]).div_(self.scaling),
            _long_side_contiguous(_stack([g_B for _, g_B in gradients])).div_(self.scaling),
        )

    def state(self, factor: Factor, key: str, *shape: int) -> Float[Tensor, "N ..."]:
        """Return a state of all members as one tensor, zeros where there is none yet.

        Args:
            factor: Parameter that the state belongs to.
            key: Its name.
            *shape: Its shape for one member, as matrix, vector or scalar.

        Returns:
            The tensor that the states are views of: to be updated in place, or by `keep`.
        """
        states, cached = self._states[factor], self._buffers.get((factor, key))
        if cached is not None and all(map(operator.is_, [state.get(key) for state in states], cached.slices)):
            return cached.stacked
        if key in states[0]:
            stacked = torch.stack([state[key].reshape(shape) for state in states])
        else:
            stacked = torch.zeros(
                (len(states), *shape), dtype=self._state_dtype(key), device=self._device(key)
            )
        if factor == "B" and len(shape) == 2:
            stacked = _long_side_contiguous(stacked)
        slices = [
            piece.view(parameter.shape) if piece.numel() == parameter.numel() and shape else piece
            for piece, parameter in zip(stacked.unbind(), self._parameters[factor], strict=True)
        ]
        for state, piece in zip(states, slices, strict=True):
            state[key] = piece
        self._buffers[factor, key] = _Buffer(stacked, slices)
        return stacked

    def keep(self, factor: Factor, **values: Float[Tensor, "N ..."]) -> None:
        """Store new values of states.

        Args:
            factor: Parameter that the states belong to.
            **values: One stacked tensor per state.
        """
        for key, value in values.items():
            self.state(factor, key, *value.shape[1:]).copy_(value)

    def write(self, A: FactorA, B: FactorB) -> None:
        """Write new factors into the parameters, count the step and let the copies go.

        Args:
            A: New factors, ``N r n``.
            B: New factors, ``N m r``.
        """
        self.place(A, B)
        for factor in self._parameters:
            self.state(factor, "step").add_(1)
        del (
            self.A,
            self.B,
            self.gradient,
        )  # as large as adapter and gradient: not to be held while a model runs

    def place(self, A: FactorA, B: FactorB) -> None:
        """Write factors into the parameters, for a look at the gradient there: no step is counted.

        Args:
            A: Factors, ``N r n``.
            B: Factors, ``N m r``.
        """
        factors: dict[Factor, Tensor] = {"A": A.contiguous(), "B": B.contiguous()}
        for factor, values in factors.items():
            parameters = self._parameters[factor]
            torch._foreach_copy_([*parameters], values.view(-1, *parameters[0].shape).unbind())

    def _state_dtype(self, key: str) -> torch.dtype:
        return (
            torch.float32
            if key == "step"
            else torch.promote_types(self._parameters["A"][0].dtype, torch.float32)
        )

    def _device(self, key: str) -> torch.device:
        # like torch's optimizers: counters on the CPU, so that reading them never waits for a GPU
        return torch.device("cpu") if key == "step" else self._parameters["A"][0].device


class Gathered(NamedTuple):
    """A stack, and the gradients of its members that it can be loaded with."""

    stack: PairStack
    gradients: list[tuple[FactorA, FactorB]]

    def by_pair(self) -> Iterator[tuple[LoraPair, Tensor]]:
        """Yield each gradient with the pair that it belongs to."""
        for pair, gradients in zip(self.stack.pairs, self.gradients, strict=True):
            yield from ((pair, gradient) for gradient in gradients)


class StackCache:
    """Groups pairs into stacks, step by step, keeping those whose members stay together."""

    def __init__(self) -> None:
        self._stacks: dict[tuple[int, ...], PairStack] = {}

    def gather(self, pairs: Iterable[LoraPair], state: StateOf) -> list[Gathered]:
        """Group the pairs that can be stepped together.

        Args:
            pairs: Pairs of one parameter group. Those without gradients for both factors, or switched off by a scaling
                of zero, take no step.
            state: Gives the state dictionary of a parameter.

        Returns:
            One stack per shape, dtype, device, scaling and age, not loaded yet.
        """
        members: dict[tuple, list[_Member]] = defaultdict(list)
        for pair in pairs:
            gradients, scaling = pair.gradients(), pair.scaling
            if gradients is None or scaling == 0:
                continue
            age = float(state(pair.A).get("step", 0))
            members[
                pair.A.shape, pair.B.shape, pair.A.dtype, pair.B.dtype, pair.A.device, scaling, age
            ].append((pair, gradients))
        stacks: dict[tuple[int, ...], PairStack] = {}
        gathered = []
        for group in _in_cache_sized_parts(members.values()):
            key = tuple(id(pair) for pair, _ in group)
            stacks[key] = self._stacks.get(key) or PairStack([pair for pair, _ in group], state)
            gathered.append(Gathered(stacks[key], [gradients for _, gradients in group]))
        self._stacks = stacks
        return gathered


def _in_cache_sized_parts(groups: Iterable[list[_Member]]) -> Iterator[list[_Member]]:
    for group in groups:
        m, n, r = group[0][0].shape
        on_cpu = group[0][0].A.device.type == "cpu"
        size = max(1, _CPU_STACK_NUMBERS // (r * (m + n))) if on_cpu else len(group)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _stack(matrices: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(matrices))
    return stacked.to(torch.promote_types(stacked.dtype, torch.float32))


def _long_side_contiguous(stacked: Tensor) -> Tensor:
    return stacked.mT.contiguous().mT
