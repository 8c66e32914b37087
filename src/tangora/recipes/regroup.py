"""Options of their own for some parameters of an optimizer that is made already."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tangora.optim.groups import PairGroup


def regroup(optimizer: Optimizer, parameters: Iterable[nn.Parameter], **options: Any) -> None:
    """Give parameters other options, in groups of their own where they share one with others."""
    chosen = {id(parameter) for parameter in parameters}
    for index, group in enumerate(list(optimizer.param_groups)):
        inside = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if len(inside) == len(group["params"]):
            group.update(options)
        elif inside:
            own = {key: value for key, value in group.items() if key not in {"params", "param_names"}}
            if isinstance(group, PairGroup):
                optimizer.param_groups[index] = group.without(inside)
            else:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group({**own, **options, "params": inside})
