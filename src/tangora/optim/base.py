"""What every pair optimizer shares: building groups, safety against non-finite gradients, AdamW for the rest."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from tangora._checks import InputError, check_choice, check_number
from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair, discover
from tangora.adapters.discover import describe_skipped
from tangora.optim.adamw import adamw_parameters
from tangora.optim.stack import PairStack, StackCache

Params: TypeAlias = nn.Module | Iterable[LoraPair] | Iterable[dict[str, Any]]
"""A PEFT model; or pairs; or parameter groups with ``pairs``, ``params`` or both."""

OnNonfinite = Literal["raise", "skip"]


class _Members(NamedTuple):
    """Who is in a parameter group: pairs, and the parameters that AdamW takes, with names for messages."""

    pairs: list[LoraPair]
    rest: list[nn.Parameter]
    rest_names: list[str]


class PairOptimizer(Optimizer, ABC):
    """An optimizer of LoRA pairs; parameters outside pairs are stepped by AdamW with the same options.

    A subclass says how one stack of pairs moves (`_step_stack`) and which group options it has (`_check_group`).
    """

    def __init__(self, params: Params, defaults: dict[str, Any], on_nonfinite: OnNonfinite = "raise"):
        check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        self._on_nonfinite = on_nonfinite
        self._members: list[_Members] = []
        self._caches: list[StackCache] = []
        super().__init__(parameter_groups(params), defaults)
        if not any(members.pairs for members in self._members):
            raise InputError(
                f"{type(self).__name__} found no trainable LoRA pair: give it a model made by "
                "peft.get_peft_model(base, LoraConfig(...)), or parameter groups with 'pairs'"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group.

        Args:
            param_group: Options, and ``pairs`` (list of `LoraPair`), ``params`` (parameters for AdamW, optionally with
                their names in ``names``), or both.
        """
        group = dict(param_group)
        pairs = list(group.pop("pairs", ()))
        rest = [group["params"]] if isinstance(group.get("params"), Tensor) else list(group.get("params", ()))
        names = list(group.pop("names", ())) or [
            f"parameter {index} of group {len(self.param_groups)}" for index in range(len(rest))
        ]
        group["params"] = [parameter for pair in pairs for parameter in pair.parameters] + rest
        super().add_param_group(group)
        self._check_common(self.param_groups[-1])
        self._check_group(self.param_groups[-1])
        self._members.append(_Members(pairs, rest, names))
        self._caches.append(StackCache())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step.

        Args:
            closure: Evaluates the loss and its gradients again; called once.

        Returns:
            The closure's loss, or ``None``.

        Raises:
            FloatingPointError: If a gradient is not finite and ``on_nonfinite="raise"``; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gathered = [
            cache.gather(members.pairs, self._state_of)
            for cache, members in zip(self._caches, self._members, strict=True)
        ]
        if not self._all_finite([named for each in chain(*gathered) for named in each.by_pair()]):
            return loss
        for group, group_stacks, members in zip(self.param_groups, gathered, self._members, strict=True):
            for stack, gradients in group_stacks:  # one by one: each copies its factors and gradients
                stack.load(gradients)
                stack.write(*self._step_stack(stack, group))
            adamw_parameters(members.rest, self.state, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; moments keep the dtype they were saved in.

        torch casts every state to its parameter's dtype, which would turn float32 moments into bf16 ones.

        Args:
            state_dict: What `state_dict` returned, for the same groups.
        """
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        current = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, current, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    device = self.state[parameter][key].device  # torch knows where counters belong
                    self.state[parameter][key] = value.detach().clone().to(device)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_members": self._members, "_on_nonfinite": self._on_nonfinite}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._caches = [StackCache() for _ in self._members]

    @abstractmethod
    def _step_stack(self, stack: PairStack, group: dict[str, Any]) -> tuple[FactorA, FactorB]:
        """Return the new factors of a stack and keep its states."""

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise `InputError` for a bad option of the method."""

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return self.state[parameter]

    @staticmethod
    def _check_common(group: dict[str, Any]) -> None:
        check_number("lr", group["lr"], low=0)
        check_number("weight_decay", group["weight_decay"], low=0)
        check_number("eps", group["eps"], low=0)
        # at one and beyond, decay would turn the weights over instead of shrinking them
        check_number("lr * weight_decay", group["lr"] * group["weight_decay"], low=0, high=1, open_high=True)
        for index, beta in enumerate(group["betas"]):
            check_number(f"betas[{index}]", beta, low=0, high=1, open_high=True)

    def _all_finite(self, gradients: Sequence[tuple[LoraPair, Tensor]]) -> bool:
        named: list[tuple[LoraPair | str, Tensor]] = [
            *gradients,
            *(
                (name, parameter.grad)
                for members in self._members
                for name, parameter in zip(members.rest_names, members.rest, strict=True)
                if parameter.grad is not None
            ),
        ]
        # A norm is several times cheaper than a test of every entry. It may overflow where all entries are finite, so
        # only its verdict "finite" is final. One device synchronisation for the whole model.
        if get_total_norm([gradient for _, gradient in named]).isfinite():
            return True
        broken = next((name for name, gradient in named if not gradient.isfinite().all()), None)
        if broken is None:
            return True
        if self._on_nonfinite == "raise":
            where = broken if isinstance(broken, str) else f"layer {broken.name} (adapter {broken.adapter})"
            raise FloatingPointError(f"non-finite gradient in {where}; no step was taken")
        return False


def parameter_groups(params: Params) -> list[dict[str, Any]]:
    """Turn what a user gives an optimizer into parameter groups.

    Args:
        params: A PEFT model (pairs in one group, all other trainable parameters in a second one), an iterable of
            pairs, or an iterable of groups, returned as they are.

    Returns:
        Groups with ``pairs``, ``params`` or both.

    Raises:
        InputError: If ``params`` is something else, such as a flat list of parameters: which belong together, and
            with which scaling, cannot be seen from tensors.
    """
    if isinstance(params, nn.Module):
        return _groups_of_model(params)
    items = list(params)
    if items and all(isinstance(item, LoraPair) for item in items):
        return [{"pairs": items}]
    if items and all(isinstance(item, dict) for item in items):
        return [item for item in items if isinstance(item, dict)]
    raise InputError(
        "params must be a PEFT model, LoRA pairs from tangora.find_pairs(model), or parameter groups with 'pairs' "
        f"or 'params'; got {type(items[0]).__name__ + 's' if items else 'nothing'}"
    )


def _groups_of_model(model: nn.Module) -> list[dict[str, Any]]:
    found = discover(model)
    if found.skipped:
        warnings.warn(describe_skipped(found.skipped), stacklevel=4)
    pairs = [pair for pair in found.pairs if pair.trainable]
    taken = {id(parameter) for pair in pairs for parameter in pair.parameters}
    rest = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in taken
    ]
    groups: list[dict[str, Any]] = [{"pairs": pairs}] if pairs else []
    if rest:
        names, parameters = zip(*rest, strict=True)
        groups.append({"params": list(parameters), "names": list(names)})
    return groups or [{"params": []}]
