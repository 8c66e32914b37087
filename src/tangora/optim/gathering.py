"""Group layers that take their step together as one stack, anew at every step unless nothing has changed."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair
from tangora.optim.stack import COUNTER, Loaded, PairStack, StateOf, StateShapes

# On a CPU a step is bound by memory traffic, and temporaries should stay in the cache; a GPU wants few kernels, but a
# step holds some copies of its stack.
_CPU_STACK_NUMBERS, _STACK_NUMBERS = 2**20, 2**26

Shared: TypeAlias = Callable[[Sequence[LoraPair]], PairStack]
"""From equal pairs to their stack, which may be shared by several processes."""


class Gathered(NamedTuple):
    """A stack, the gradients of its members, and the options of their group."""

    stack: PairStack
    gradients: list[tuple[FactorA, FactorB]]
    options: dict[str, Any]

    def load(self, *, tentative: bool = False) -> Loaded:
        """Copy factors and gradients for a step."""
        return self.stack.load(self.gradients, maximize=self.options["maximize"], tentative=tentative)

    def by_pair(self) -> Iterator[tuple[LoraPair, Tensor]]:
        """Yield each gradient with the pair that it belongs to."""
        for pair, gradients in zip(self.stack.pairs, self.gradients, strict=True):
            yield from ((pair, gradient) for gradient in gradients)


class StackCache:
    """Groups pairs into stacks, step by step, keeping those whose members stay together."""

    def __init__(self) -> None:
        self._stacks: dict[tuple[int, ...], PairStack] = {}

    def __reduce__(self) -> tuple[type["StackCache"], tuple[()]]:
        return StackCache, ()  # a copy has states of its own

    def create_states(
        self,
        pairs: Iterable[LoraPair],
        state: StateOf,
        options: Mapping[str, Any],
        shapes: Callable[[LoraPair], StateShapes],
        made: Shared,
    ) -> None:
        """Give pairs the states that they lack, in the stacks that they will be stepped in."""
        for stack in self._stacked(pairs, state, options, made):
            stack.create(shapes(stack.pairs[0]))

    def gather(
        self, pairs: Iterable[LoraPair], state: StateOf, options: dict[str, Any], made: Shared
    ) -> list[Gathered]:
        """Group the pairs that have gradients and can be stepped together."""
        found = [(pair, pair.gradients()) for pair in pairs if pair.scaling != 0]
        gradients = {id(pair): given for pair, given in found if given is not None}
        stacks = self._stacked((pair for pair, _ in found if id(pair) in gradients), state, options, made)
        return [Gathered(stack, [gradients[id(pair)] for pair in stack.pairs], options) for stack in stacks]

    def _stacked(
        self, pairs: Iterable[LoraPair], state: StateOf, options: Mapping[str, Any], made: Shared
    ) -> list[PairStack]:
        alike: dict[tuple, list[LoraPair]] = defaultdict(list)
        for pair in pairs:
            A, B, age = pair.A, pair.B, float(state(pair.A).get(COUNTER, 0))
            cuts = [getattr(factor, "placements", ()) for factor in (A, B)]
            key = (A.shape, B.shape, A.dtype, B.dtype, A.device, *cuts, pair.scaling, pair.looks_up, age)
            alike[(id(pair),) if options["foreach"] is False else key].append(pair)
        stacks: dict[tuple[int, ...], PairStack] = {}
        for part in _in_parts(alike.values()):
            key = tuple(map(id, part))
            stacks[key] = self._stacks.get(key) or made(part)
        self._stacks = stacks
        return [*stacks.values()]


def _in_parts(groups: Iterable[list[LoraPair]]) -> Iterator[list[LoraPair]]:
    for group in groups:
        m, n, r = group[0].shape
        most = _CPU_STACK_NUMBERS if group[0].A.device.type == "cpu" else _STACK_NUMBERS
        size = max(1, most // (r * (m + n)))
        for start in range(0, len(group), size):
            yield group[start : start + size]
