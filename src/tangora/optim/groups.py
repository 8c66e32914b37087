"""Parameter groups that know their pairs, and how they are made from a model, from pairs or from dictionaries."""

import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tangora._checks import InputError, shown
from tangora.adapters import LoraPair, discover, warn_if_base_changed
from tangora.adapters.discover import by_reason, describe_skipped, some_of
from tangora.optim.gathering import StackCache

Params: TypeAlias = nn.Module | Iterable[LoraPair] | Iterable[dict[str, Any]]
"""A PEFT model; or pairs; or parameter groups with ``pairs``, ``params`` or both."""

_SHARD_THE_BASE = (
    "use DistributedDataParallel, DeepSpeed stage 0, or shard the base only: from_pretrained(..., "
    "distributed_config=DistributedConfig(fsdp_size=N)), then get_peft_model"
)
FINGERPRINT = "fingerprint"
"""Option of a group that tells the shapes of its parameters, so that no state of others is loaded."""
# transformers.Trainer's rule for parameters without weight decay, beside everything inside a LayerNorm
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


class PairGroup(dict[str, Any]):
    """A parameter group of torch, and beside it the pairs that its parameters form.

    ``group["params"]`` lists the parameters of all pairs, then the others. The pairs are an attribute and no key,
    because distributed checkpoints look up every key in the state dictionary.

    Attributes:
        pairs: The pairs.
        rest: Parameters for AdamW.
        names: Their names, for messages.
        cache: Stacks of equal layers, kept from step to step.
    """

    def __init__(
        self,
        options: dict[str, Any],
        pairs: Sequence[LoraPair],
        rest: Sequence[nn.Parameter],
        names: Sequence[str],
    ):
        super().__init__(options, params=[*_parameters(pairs), *rest])
        self.pairs, self.rest, self.names = list(pairs), list(rest), list(names)
        self.cache = StackCache()
        self._shapes = [parameter.shape for parameter in self["params"]]
        # moments of the weight's size say nothing of the rank that they were made with
        self[FINGERPRINT] = zlib.crc32(repr([tuple(shape) for shape in self._shapes]).encode())

    def with_options(self, options: dict[str, Any]) -> "PairGroup":
        """Return a group of the same parameters with other options."""
        return PairGroup(options, self.pairs, self.rest, self.names)

    def apart(self, options: dict[str, Any]) -> list["PairGroup"]:
        """Return groups of the pairs and of the others, which take other options unless they are given their own."""
        if not self.pairs:
            return [PairGroup(options | self, [], self.rest, self.names)]
        if not self.rest:
            return [self]
        first, second = dict(self), dict(self) | options
        if names := self.get("param_names"):
            count = len([*_parameters(self.pairs)])
            first["param_names"], second["param_names"] = names[:count], names[count:]
        return [PairGroup(first, self.pairs, [], []), PairGroup(second, [], self.rest, self.names)]

    def without(self, parameters: Iterable[nn.Parameter]) -> "PairGroup":
        """Return a group that leaves out some parameters, which belong to no pair."""
        gone = {id(parameter) for parameter in parameters}
        kept = [(name, p) for name, p in zip(self.names, self.rest, strict=True) if id(p) not in gone]
        return PairGroup(dict(self), self.pairs, [p for _, p in kept], [name for name, _ in kept])

    def adopt(self, owner: str) -> dict[nn.Parameter, nn.Parameter]:
        """Take over parameters that someone has put in the place of this group's own.

        Accelerate does so for FSDP2; DeepSpeed and Apex do for float32 copies of half-precision weights.
        """
        given, held = self["params"], [*_parameters(self.pairs), *self.rest]
        if [parameter.shape for parameter in given] != self._shapes:
            raise InputError(_not_ours(owner, given, self._shapes))
        new = {old: now for old, now in zip(held, given, strict=True) if old is not now}
        if new:
            self.pairs = [_moved(pair, new) for pair in self.pairs]
            self.rest = [new.get(parameter, parameter) for parameter in self.rest]
            self.cache = StackCache()
        return new


def grouped(params: Params, owner: str) -> list[dict[str, Any]]:
    """Turn what a user gives an optimizer into parameter groups."""
    if isinstance(params, nn.Module):
        return _groups_of_model(params, owner)
    items = list(params) if isinstance(params, Iterable) else []
    if items and all(isinstance(item, LoraPair) for item in items):
        return [{"pairs": items}]
    if not items or not all(isinstance(item, dict) for item in items):
        got = f"{type(items[0]).__name__}s" if items else "nothing"
        raise InputError(
            "params must be a PEFT model (not its parameters), LoRA pairs from tangora.find_pairs(model), or parameter "
            f"groups with 'pairs' or 'params'; got {got if isinstance(params, Iterable) else shown(params)}"
        )
    groups = [dict(item) for item in items if isinstance(item, dict)]
    if not any(map(_has_pairs, groups)):
        raise InputError(f"{owner} found no trainable LoRA pair: no parameter group has 'pairs'")
    return groups


def _has_pairs(group: dict[str, Any]) -> bool:
    pairs = group.get("pairs", ())
    # what is no list of pairs is refused later; a tensor or model does not say whether it is empty
    return not isinstance(pairs, (list, tuple)) or len(pairs) > 0


def prepared(given: dict[str, Any], owner: str, *, named: bool, index: int) -> PairGroup:
    """Turn a dictionary into a group that knows its pairs; the dictionary stays as it is."""
    options = {key: value for key, value in given.items() if key not in {"pairs", "params", "names"}}
    pairs, rest = given.get("pairs", ()), given.get("params", ())
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(pair, LoraPair) for pair in pairs):
        raise InputError(
            f"pairs of a group must be a list from tangora.find_pairs(model); got {shown(pairs)}"
        )
    if not isinstance(rest, Iterable):
        raise InputError(f"params of a group must be parameters or (name, parameter); got {shown(rest)}")
    pairs = list(pairs)
    rest = [rest] if isinstance(rest, Tensor) else list(rest)
    known = [item[0] for item in rest if isinstance(item, tuple)]
    tensors: list[Any] = [item[1] if isinstance(item, tuple) else item for item in rest]
    if other := [type(item).__name__ for item in tensors if not isinstance(item, Tensor)]:
        raise InputError(f"params of a group must be parameters or (name, parameter); got {other[0]}")
    names = known if len(known) == len(rest) else list(given.get("names", ()))
    names = names or [f"parameter {number} of group {index}" for number in range(len(rest))]
    if lone := [pair for pair in pairs if _is_lone(pair)]:
        if len(lone) == len(pairs):
            raise InputError(
                f"{owner} trains both factors of a pair, but {_frozen(lone)}: {_TO_DO_WITH_LONE}"
            )
        warnings.warn(f"{_frozen(lone)}: AdamW trains the other factor", stacklevel=4)
        pairs = [pair for pair in pairs if not _is_lone(pair)]
        alone = [(name, p) for pair in lone for name, p in pair.named_parameters() if p.requires_grad]
        names, tensors = [*(name for name, _ in alone), *names], [*(p for _, p in alone), *tensors]
    if (known and len(known) == len(rest)) or (named and not rest):
        options["param_names"] = [*(name for pair in pairs for name, _ in pair.named_parameters()), *names]
    return PairGroup(options, pairs, tensors, names)


def decay_groups(model: nn.Module, taken: Iterable[nn.Parameter] = ()) -> list[dict[str, Any]]:
    """Group a model's trainable parameters, biases and norms in a group without weight decay.

    The rule is that of ``transformers.Trainer``.
    """
    left_out = {id(parameter) for parameter in taken}
    norms = {
        id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters(recurse=False)
    }
    groups: dict[bool, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in left_out:
            decays = id(parameter) not in norms and _UNDECAYED.search(name.lower()) is None
            group = groups.setdefault(decays, {"params": [], "names": []})
            group["params"].append(parameter)
            group["names"].append(name)
    return [groups[decays] | ({} if decays else {"weight_decay": 0.0}) for decays in sorted(groups)[::-1]]


def _groups_of_model(model: nn.Module, owner: str) -> list[dict[str, Any]]:
    found = discover(model)
    pairs = [pair for pair in found.pairs if pair.trainable]
    if not pairs:
        raise InputError(
            f"{owner} found no trainable LoRA pair: {_why_none(model, found.pairs, found.skipped)}"
        )
    warn_if_base_changed(model)
    if found.skipped:
        warnings.warn(describe_skipped(found.skipped), stacklevel=5)
    if lone := [pair for pair in found.pairs if _is_lone(pair)]:
        warnings.warn(f"{_frozen(lone)}: AdamW trains the other factor", stacklevel=5)
    return [{"pairs": pairs}, *decay_groups(model, _parameters(pairs))]


def _why_none(model: nn.Module, pairs: Sequence[LoraPair], skipped: dict[str, str]) -> str:
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return f"FSDP1 has flattened the parameters of {type(model).__name__}; {_SHARD_THE_BASE}"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return f"DeepSpeed ZeRO-3 has partitioned the parameters; {_SHARD_THE_BASE}"
    if lone := [pair for pair in pairs if _is_lone(pair)]:
        return f"it trains both factors of a pair, but {_frozen(lone)}; {_TO_DO_WITH_LONE}"
    if pairs:
        adapters = ", ".join(sorted({repr(pair.adapter) for pair in pairs}))
        return (
            f"all factors of adapter {adapters} are frozen; load it with is_trainable=True, or call "
            "model.set_adapter or requires_grad_(True)"
        )
    if skipped:
        return f"its adapters are not plain LoRA pairs ({by_reason(skipped)}); use torch.optim.AdamW"
    return (
        "create the model with peft.get_peft_model(base, LoraConfig(...)), or pass parameter groups "
        "with 'pairs'; "
        f"got {type(model).__name__}"
    )


_TO_DO_WITH_LONE = "train both factors, or use torch.optim.AdamW or peft.optimizers.create_lorafa_optimizer"


def _is_lone(pair: LoraPair) -> bool:
    return pair.A.requires_grad != pair.B.requires_grad


def _frozen(lone: Sequence[LoraPair]) -> str:
    factors = " and ".join(sorted({"B" if pair.A.requires_grad else "A" for pair in lone}))
    return f"factor {factors} is frozen in {some_of([pair.name for pair in lone])}"


def _parameters(pairs: Iterable[LoraPair]) -> Iterator[nn.Parameter]:
    return (parameter for pair in pairs for parameter in pair.parameters)


def _moved(pair: LoraPair, new: dict[nn.Parameter, nn.Parameter]) -> LoraPair:
    A, B, *tied = (new.get(parameter, parameter) for parameter in pair.parameters)
    return replace(pair, A=A, B=B, tied=tuple(zip(tied[::2], tied[1::2], strict=True)))


def _not_ours(owner: str, given: Sequence[Tensor], shapes: Sequence[torch.Size]) -> str:
    changed = [now.shape for now, was in zip(given, shapes, strict=False) if now.shape != was]
    what = f"of shape {tuple(changed[0])}" if changed else f"{len(given)} in number"
    return (
        f"{owner} was created for {len(shapes)} parameters in a group, but other parameters, {what}, "
        "have replaced them: DeepSpeed ZeRO and FSDP1 flatten or partition parameters, which removes "
        f"the LoRA pairs; {_SHARD_THE_BASE}"
    )
