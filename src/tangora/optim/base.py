"""Base of all pair optimizers: groups, states, checks of gradients, AdamW for other parameters."""

import contextlib
import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from tangora._checks import InputError, check_callable, check_choice, check_kind, check_number, shown
from tangora.adapters import LoraPair
from tangora.adapters.sharded import agreed, cut_beside, is_sharded, local, whole
from tangora.optim.adamw import adamw_parameters, adamw_states
from tangora.optim.exchange import Sharing
from tangora.optim.gathering import Gathered
from tangora.optim.gradients import Watch
from tangora.optim.groups import PairGroup, Params, grouped, prepared
from tangora.optim.saved_states import check_loadable, states_of
from tangora.optim.sharded_stack import ShardedStack
from tangora.optim.stack import COUNTER, PairStack, StateShapes, state_place

OnNonfinite = Literal["raise", "skip"]


class CommonOptions(TypedDict, total=False):
    """Keyword options of every pair optimizer; see `PairOptimizer`."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool
    foreach: bool | None
    on_nonfinite: OnNonfinite
    shard_state: bool


class PairOptimizer(Optimizer, ABC):
    """An optimizer of LoRA pairs; parameters outside pairs are stepped by AdamW with the same options.

    Args:
        params: PEFT model; pairs; or parameter groups with ``pairs``, ``params`` or both.
        lr: Learning rate, in the method's own units.
        own: Options of the method, kept in each group beside those below.
        adamw_lr: Learning rate of AdamW for parameters outside pairs, such as a new head. Default ``lr``.
        betas: Decay rates of the method's moments, where it has them, and of AdamW's.
        eps: Added to the root of the second moment, in the gradient's units.
        weight_decay: Decoupled decay per unit of ``lr``.
        maximize: Whether to climb instead of descend.
        foreach: ``None`` or ``True``: layers of equal shape take their step together as one stack, this library's
            counterpart of torch's ``foreach``; ``False``: one layer at a time.
        on_nonfinite: ``"raise"`` or ``"skip"`` the step when a gradient is not finite; nothing has changed then.

        shard_state: Whether the processes that train together keep a part each of the pairs' states, and step a part of
            the layers each (LoRA-Pro with moments of the weight: a part of each weight), instead of all doing all.

    Raises:
        InputError: For an option outside its range, or ``params`` without a trainable pair.

    ``group["params"]`` is the truth, as in torch: whoever puts other parameters there (sharding, float32 copies) finds
    them stepped, with their states, or gets an error. States exist from the start, so that distributed checkpoints
    agree on all ranks.

    A subclass declares its states (`_state_shapes`), moves the pairs (`_step_pairs`) and checks its options
    (`_check_group`).
    """

    param_groups: list[PairGroup]  # pyright: ignore

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        own: Mapping[str, Any] = MappingProxyType({}),
        adamw_lr: float | Tensor | None = None,
        /,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        on_nonfinite: OnNonfinite = "raise",
        shard_state: bool = False,
        **unknown: Any,
    ):
        for name in unknown:
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
        check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        check_choice("shard_state", shard_state, (True, False))
        self._on_nonfinite = on_nonfinite
        self._sharing = Sharing(shard_state=shard_state)
        self._rest = {} if adamw_lr is None else {"lr": adamw_lr}
        defaults = {
            "lr": lr,
            **own,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
        }
        self._check_common(defaults | self._rest)
        self._watch = Watch()
        super().__init__(grouped(params, type(self).__name__), defaults)
        if isinstance(params, nn.Module):
            self._watch = Watch(weakref.ref(params))

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.__signature__ = _signature(cls)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group.

        Args:
            param_group: Options, and ``pairs`` (list of `LoraPair`), ``params`` (parameters for AdamW, or
                ``(name, parameter)``), or both.

        Raises:
            InputError: If an option is out of range or a pair cannot be stepped; the optimizer is then as it was.
        """
        named = any("param_names" in group for group in self.param_groups)
        group = prepared(param_group, type(self).__name__, named=named, index=len(self.param_groups))
        groups = group.apart(self._rest) if self._rest else [group]
        for each in groups:
            self._check(self.defaults | each)
        for each in groups:
            super().add_param_group(each)
            self._create_states(each)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step.

        Args:
            closure: Evaluates the loss and its gradients again; called once, or as often as the method says.

        Returns:
            The closure's loss, or ``None``.

        Raises:
            InputError: If the parameters were replaced by what is no LoRA pair, no gradient can ever reach them, one
                is sparse, or an option is out of range by now.
            FloatingPointError: If a gradient is not finite and ``on_nonfinite="raise"``; nothing has changed then.
        """
        if closure is not None:
            check_callable("closure", closure, "a function that evaluates the loss and its gradients")
        self._adopt()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # schedulers and users change them
            self._check(group)
        gathered = [
            each
            for group in self.param_groups
            for each in group.cache.gather(
                group.pairs, self._state_of, _options(group), self._stack_of(group)
            )
        ]
        pairs = [pair for group in self.param_groups for pair in group.pairs]
        self._watch.check(pairs, moving=[pair for each in gathered for pair in each.stack.pairs])
        try:
            self._step_pairs(gathered, closure)
        except FloatingPointError:
            if self._on_nonfinite == "raise":
                raise
            return loss
        for group in self.param_groups:
            adamw_parameters(group.rest, self.state, _options(group))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizers do.

        Returns:
            ``state`` and ``param_groups``; the pairs themselves are no part of it.
        """
        self._adopt()
        return super().state_dict()

    def full_state_dict(self) -> dict[str, Any]:
        """Return the state with all parts of sharded tensors put together, to be saved by one process.

        Call it on every process.
        """
        found = self.state_dict()
        names = [(index, key) for index, state in found["state"].items() for key in state]
        tensors = whole([found["state"][index][key] for index, key in names])
        found["state"] = {
            index: {} for index in found["state"]
        }  # torch's holds the optimizer's own dictionaries
        for (index, key), tensor in zip(names, tensors, strict=True):
            found["state"][index][key] = tensor
        return found

    @contextlib.contextmanager
    def saved_whole(self) -> Iterator[None]:
        """Let `state_dict` return what `full_state_dict` does, on every process: for programs in which one saves."""
        full = self.full_state_dict()
        self.state_dict = lambda: full  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            del self.state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, saved on any device and in any dtype.

        Moments are at least float32 (torch casts every state to its parameter's dtype, which would round the moments of
        bf16 adapters), and step counters stay on the CPU.

        Args:
            state_dict: Result of `state_dict` for the same groups.

        Raises:
            InputError: If a state belongs to another optimizer or to an adapter of another shape; nothing is loaded.
        """
        self._adopt()
        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
            raise InputError(f"state_dict must be what state_dict() returned; got {shown(state_dict)}")
        check_loadable(type(self).__name__, state_dict, self.param_groups, self._state_shapes)
        groups = self.param_groups
        super().load_state_dict(state_dict)
        loaded: Any = [
            old.with_options(self.defaults | new) for old, new in zip(groups, self.param_groups, strict=True)
        ]
        self.param_groups = loaded  # pyright: ignore
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            kept = states_of(group.pairs, self._shapes_in(group))
            for (pair, factor, shapes), index in zip(kept, saved["params"], strict=False):
                for key, value in state_dict["state"].get(index, {}).items():
                    dtype, device = state_place(factor, key)
                    given = value.detach().to(device, dtype).reshape(shapes[key])
                    side = 1 if factor is pair.A else 0
                    mesh = self._sharing.mesh(factor)
                    part = given.clone() if key == COUNTER else cut_beside(given, factor, side, mesh)
                    self.state[factor][key] = part
            for parameter in group.rest:
                # torch keeps counters as they are, in the memory of what it was given
                self.state[parameter] = {
                    key: value.clone() if key == COUNTER else cut_beside(value, parameter, 0)
                    for key, value in self.state[parameter].items()
                }
            self._create_states(group)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_on_nonfinite": self._on_nonfinite,
            "_rest": self._rest,
            "_sharing": self._sharing,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_watch"):
            self._watch = Watch()

    @abstractmethod
    def _step_pairs(self, gathered: Sequence[Gathered], closure: Callable[[], Any] | None) -> None:
        """Move all pairs, or raise `FloatingPointError` before anything has changed."""

    def _state_shapes(self, pair: LoraPair, group: dict[str, Any]) -> StateShapes:  # noqa: ARG002
        """Return the states of a pair beside its counter; none by default."""
        return {}

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise `InputError` for a bad option of the method."""

    def _adopt(self) -> None:
        """Let parameters that were replaced from outside take the place, and the states, of the old ones."""
        for group in self.param_groups:
            for old, new in group.adopt(type(self).__name__).items():
                if old in self.state:
                    self.state[new] = self.state.pop(old)
                    self._cut_states(group, new)

    def _cut_states(self, group: PairGroup, parameter: nn.Parameter) -> None:
        # states of a parameter that is sharded by now are cut as it is
        if is_sharded(parameter):
            side = 1 if any(parameter is pair.A for pair in group.pairs) else 0
            self.state[parameter] = {
                key: value if key == COUNTER else cut_beside(value, parameter, side)
                for key, value in self.state[parameter].items()
            }

    def _create_states(self, group: PairGroup) -> None:
        shapes = self._shapes_in(group)
        group.cache.create_states(group.pairs, self._state_of, group, shapes, self._stack_of(group))
        adamw_states(group.rest, self.state)

    def _shapes_in(self, group: PairGroup) -> Callable[[LoraPair], StateShapes]:
        return lambda pair: self._state_shapes(pair, group)

    def _stack_of(self, group: PairGroup) -> Callable[[Sequence[LoraPair]], PairStack]:
        def stack(pairs: Sequence[LoraPair]) -> PairStack:
            exchange = self._sharing.of(pairs, dealt=self._may_deal(group))
            if exchange is None:
                return PairStack(pairs, self._state_of)
            return ShardedStack(pairs, self._state_of, exchange, self._sharing)

        return stack

    def _may_deal(self, group: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Tell whether processes may deal the layers among them; by default each steps all."""
        return False

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return self.state[parameter]

    def _check(self, group: dict[str, Any]) -> None:
        self._check_common(group)
        self._check_group(group)

    @staticmethod
    def _check_common(group: Mapping[str, Any]) -> None:
        lr: Any = group["lr"]
        lr = lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr
        check_number("lr", lr, low=0)
        check_number("weight_decay", group["weight_decay"], low=0)
        check_number("eps", group["eps"], low=0)
        # at one and beyond, decay would turn the weights over instead of shrinking them
        check_number("lr * weight_decay", lr * group["weight_decay"], low=0, high=1, open_high=True)
        check_kind("betas", group["betas"], (list, tuple), "two numbers in [0, 1)")
        if len(group["betas"]) != 2:
            raise InputError(f"betas must be two numbers in [0, 1); got {shown(group['betas'])}")
        for index, beta in enumerate(group["betas"]):
            check_number(f"betas[{index}]", beta, low=0, high=1, open_high=True)
        check_choice("maximize", group["maximize"], (True, False))
        check_choice("foreach", group["foreach"], (None, True, False))

    def _check_finite(self, gathered: Iterable[Gathered]) -> None:
        """Raise `FloatingPointError` if a gradient is not finite, naming its layer."""
        named: list[tuple[LoraPair | str, Tensor]] = [
            *(pair_and_gradient for each in gathered for pair_and_gradient in each.by_pair()),
            *(
                (name, parameter.grad)
                for group in self.param_groups
                for name, parameter in zip(group.names, group.rest, strict=True)
                if parameter.grad is not None
            ),
        ]
        # those of pairs are dense already, `LoraPair.gradients` makes them so
        if sparse := [name for name, gradient in named if gradient.is_sparse]:
            raise InputError(f"the gradient of {sparse[0]} is sparse: make its embedding with sparse=False")
        # A norm is several times cheaper than a test of every entry. It may overflow where all entries are finite, so
        # only its verdict "finite" is final. One device synchronisation for the whole model, and one message between
        # the processes that hold its parts: all take the step, or none.
        gradients = [gradient for _, gradient in named]
        parts = [local(gradient) for gradient in gradients]
        finite = get_total_norm(parts).isfinite()
        if bool(agreed(finite, gradients)):
            return
        broken = [name for (name, _), part in zip(named, parts, strict=True) if not part.isfinite().all()]
        if not agreed(torch.full_like(finite, not broken), gradients):
            where = "layers of another process"
            if broken:
                first = broken[0]
                where = first if isinstance(first, str) else f"layer {first.name} (adapter {first.adapter})"
            raise FloatingPointError(f"non-finite gradient in {where}; no step was taken")


def _signature(optimizer: type[PairOptimizer]) -> inspect.Signature:
    """Name the common options in the signature, for help and editors, instead of ``**common``."""
    _, *own = inspect.signature(optimizer.__init__).parameters.values()
    common = inspect.signature(PairOptimizer.__init__).parameters
    named = {each.name: each for each in own if each.kind is not each.VAR_KEYWORD}
    return inspect.Signature(
        [*named.values(), *(common[name] for name in CommonOptions.__annotations__ if name not in named)]
    )


def _options(group: PairGroup) -> dict[str, Any]:
    return {**group, "lr": float(group["lr"])}
