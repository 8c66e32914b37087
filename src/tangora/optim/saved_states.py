"""What an optimizer keeps for each parameter of its pairs, and whether a saved state is that."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from tangora._checks import InputError
from tangora.adapters import LoraPair
from tangora.adapters.pair import as_matrix
from tangora.adapters.sharded import is_part_of_another
from tangora.optim.groups import FINGERPRINT, PairGroup
from tangora.optim.stack import COUNTER, StateShapes

Shapes = Mapping[str, tuple[int, ...]]


def states_of(
    pairs: Sequence[LoraPair], shapes_of: Callable[[LoraPair], StateShapes]
) -> Iterator[tuple[LoraPair, nn.Parameter, Shapes]]:
    """Yield the parameters of pairs, in their order, with the shapes of the states kept for each."""
    for pair in pairs:
        shapes = shapes_of(pair)
        for factor, parameter in zip(("A", "B"), (pair.A, pair.B), strict=True):
            matrix = as_matrix(parameter).shape
            kept = {COUNTER: (), **shapes.get(factor, {})}
            yield pair, parameter, {k: tuple(parameter.shape) if v == matrix else v for k, v in kept.items()}
        yield from ((pair, parameter, {}) for parameter in pair.parameters[2:])


def check_loadable(
    owner: str,
    state_dict: Mapping[str, Any],
    groups: Sequence[PairGroup],
    state_shapes: Callable[[LoraPair, dict[str, Any]], StateShapes],
) -> None:
    """Raise `InputError` if a saved state belongs to another optimizer, adapter or process."""
    for group, saved in zip(groups, state_dict["param_groups"], strict=False):
        if len(group["params"]) != len(saved["params"]):
            return  # torch's own error says so
        if saved.get(FINGERPRINT, group[FINGERPRINT]) != group[FINGERPRINT]:
            raise InputError(
                f"this state of {owner} was saved for parameters of other shapes, such as an adapter of another rank: "
                "create the adapter and its initialization as in the saved run, then load the state"
            )
        options = group.with_options(group | saved)
        kept = states_of(group.pairs, lambda pair, options=options: state_shapes(pair, options))
        for (pair, _, shapes), index in zip(kept, saved["params"], strict=False):
            _check_state(owner, pair, state_dict["state"].get(index, {}), shapes)


def _check_state(owner: str, pair: LoraPair, state: Mapping[str, Any], shapes: Shapes) -> None:
    if any(map(is_part_of_another, state.values())):
        raise InputError(
            f"the state of {pair.name} is the part of another process: call full_state_dict() on every "
            "process and save its result, or save a distributed checkpoint "
            "(torch.distributed.checkpoint)"
        )
    wrong = [key for key in state if key not in shapes or state[key].numel() != math.prod(shapes[key])]
    if wrong or (state and state.keys() != shapes.keys()):
        raise InputError(
            f"the state of {pair.name} has keys {', '.join(state)}, which are not those of {owner} for "
            f"{pair}: it was saved "
            "by another optimizer or for another adapter"
        )
