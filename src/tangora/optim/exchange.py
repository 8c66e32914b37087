"""A step shared by processes: all compute with whole tensors and keep their parts, or each computes its own layers.

Between steps everything is in parts. All processes call these functions together.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor

from tangora.adapters import LoraPair
from tangora.adapters.sharded import (
    LocalRows,
    all_processes,
    chunk_of,
    local,
    several_ranks,
    share,
    whole,
)

Kinds = Sequence[Sequence[Tensor]]
"""Tensors of each member of a stack, kind by kind; those of a kind are equal in shape, dtype and cut."""


class Replicas:
    """Every process computes with all members, and keeps its parts."""

    eager = False

    def own(self, pairs: Sequence[LoraPair]) -> list[LoraPair]:
        """Return the members of a stack that this process computes with."""
        return list(pairs)

    def fetch(self, kinds: Kinds) -> list[list[Tensor]]:
        """Return whole tensors of the members that this process computes with."""
        tensors = iter(whole([tensor for kind in kinds for tensor in kind]))
        return [[next(tensors) for _ in kind] for kind in kinds]

    def store(self, values: Kinds, held: Kinds) -> list[list[Tensor]]:
        """Return this process's parts of all members, of values that `fetch`'s members have now."""
        return [
            [share(value, old) for value, old in zip(new, kind, strict=True)]
            for new, kind in zip(values, held, strict=True)
        ]

    def agreed(self, doubt: Bool[Tensor, ""]) -> Bool[Tensor, ""]:
        """Return whether any process has a doubt."""
        return doubt


class Owners:
    """Every process computes with the members dealt to it; parts by rows travel to their owner and back.

    Args:
        owner: The process, along a dimension of a mesh, that computes with each member.
    """

    eager = True

    def __init__(self, owner: Sequence[int], mesh: DeviceMesh, dim: int):
        self._group, self._processes, self._rank = (
            mesh.get_group(dim),
            mesh.size(dim),
            mesh.get_local_rank(dim),
        )
        self._members = [
            [index for index, dealt_to in enumerate(owner) if dealt_to == process]
            for process in range(self._processes)
        ]
        self._own = self._members[self._rank]

    def own(self, pairs: Sequence[LoraPair]) -> list[LoraPair]:
        """Return the members of a stack that this process computes with."""
        return [pairs[index] for index in self._own]

    def fetch(self, kinds: Kinds) -> list[list[Tensor]]:
        """Return whole tensors of the members that this process computes with, as they are now."""
        found = [[local(kind[index]) for index in self._own] for kind in kinds]  # what is whole everywhere
        for some in _alike(kinds, cut=True):
            for index, tensors in zip(some, self._to_owners([kinds[index] for index in some]), strict=True):
                found[index] = tensors
        return found

    def store(self, values: Kinds, held: Kinds) -> list[list[Tensor]]:
        """Return this process's parts of all members, from the values that their owners have."""
        found: list[list[Tensor]] = [[] for _ in held]
        for cut in (True, False):
            for some in _alike(held, cut=cut):
                new = [[v.to(held[index][0].dtype) for v in values[index]] for index in some]
                send = self._to_parts if cut else self._to_all
                for index, tensors in zip(some, send(new, [held[index] for index in some]), strict=True):
                    found[index] = tensors
        return found

    def agreed(self, doubt: Bool[Tensor, ""]) -> Bool[Tensor, ""]:
        """Return whether any of the processes has a doubt."""
        flag = doubt.float()
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return flag > 0

    def _to_owners(self, kinds: Kinds) -> list[list[Tensor]]:
        padded = [[self._padded(local(tensor), tensor.shape[0]) for tensor in kind] for kind in kinds]
        parts = [self._of(members, padded) for members in self._members]
        mine = parts[self._rank]
        arrived = self._exchanged(
            torch.cat(parts), [len(mine)] * self._processes, [len(part) for part in parts]
        )
        columns = arrived.view(self._processes, -1).split(
            [p[i].numel() for p in padded for i in self._own], dim=1
        )
        wanted = [kind[index] for kind in kinds for index in self._own]
        made = iter(
            column.reshape(-1, *tensor.shape[1:])[: tensor.shape[0]]
            for column, tensor in zip(columns, wanted, strict=True)
        )
        return [[next(made) for _ in self._own] for _ in kinds]

    def _to_parts(self, values: Kinds, held: Kinds) -> list[list[Tensor]]:
        rows = [chunk_of(kind[0].shape[0], self._processes) for kind in held]
        sizes = [count * kind[0].shape[1:].numel() for count, kind in zip(rows, held, strict=True)]
        whole_ones = [
            F.pad(value.flatten(), (0, size * self._processes - value.numel())).view(self._processes, size)
            for new, size in zip(values, sizes, strict=True)
            for value in new
        ]
        sent = torch.cat(whole_ones, dim=1).flatten() if whole_ones else local(held[0][0]).new_empty(0)
        counts = [sum(sizes) * len(members) for members in self._members]
        arrived = self._exchanged(sent, counts, [counts[self._rank]] * self._processes)
        return self._placed(arrived.split(counts), sizes, held)

    def _to_all(self, values: Kinds, held: Kinds) -> list[list[Tensor]]:
        sizes = [kind[0].numel() for kind in held]
        most = sum(sizes) * max(map(len, self._members))
        flat = [value.flatten() for new in values for value in new]
        sent = torch.cat([*flat, local(held[0][0]).new_empty(most - sum(each.numel() for each in flat))])
        arrived = sent.new_empty(self._processes * most)
        dist.all_gather_into_tensor(arrived, sent, group=self._group)
        return self._placed(arrived.view(self._processes, most).unbind(), sizes, held)

    def _placed(self, arrived: Sequence[Tensor], sizes: Sequence[int], held: Kinds) -> list[list[Tensor]]:
        """Give what came from each owner, kind by kind and perhaps padded, the places and shapes of what is held."""
        found = [list(kind) for kind in held]
        for members, part in zip(self._members, arrived, strict=True):
            used = [size for size in sizes for _ in members]
            pieces = iter(part[: sum(used)].split(used))
            for kind, index in ((kind, index) for kind in range(len(held)) for index in members):
                old = local(held[kind][index])
                found[kind][index] = next(pieces)[: old.numel()].view(old.shape)
        return found

    def _padded(self, part: Tensor, total: int) -> Tensor:
        size = chunk_of(total, self._processes) * part.shape[1:].numel()
        return F.pad(part.flatten(), (0, size - part.numel()))

    @staticmethod
    def _of(members: Sequence[int], kinds: Kinds) -> Tensor:
        some = [kind[index] for kind in kinds for index in members]
        return torch.cat(some) if some else kinds[0][0].new_empty(0)

    def _exchanged(self, sent: Tensor, arriving: Sequence[int], leaving: Sequence[int]) -> Tensor:
        arrived = sent.new_empty(sum(arriving))
        dist.all_to_all_single(arrived, sent, [*arriving], [*leaving], group=self._group)
        return arrived


Exchange = Replicas | Owners


def _alike(kinds: Kinds, *, cut: bool) -> list[list[int]]:
    """Return the kinds that are cut by rows, or are not, in groups of one dtype: those travel in one message."""
    groups: dict[torch.dtype, list[int]] = {}
    for index, (first, *_) in enumerate(kinds):
        if (LocalRows.of(first) is not None) == cut:
            groups.setdefault(first.dtype, []).append(index)
    return [*groups.values()]


class Sharing:
    """Decides how the processes share the steps of an optimizer's stacks, and deals the work evenly.

    Args:
        shard_state: Whether states of factors that every process holds whole are kept in parts, and whether every
            process computes with the layers dealt to it only.
    """

    def __init__(self, *, shard_state: bool):
        self.shard_state = shard_state
        self._dealt: list[int] = []

    def mesh(self, factor: Tensor) -> DeviceMesh | None:
        """Return the processes among which states of a factor that is whole everywhere are cut; ``None`` if not."""
        needed = self.shard_state and several_ranks() and not isinstance(factor, DTensor)
        return all_processes(factor.device.type) if needed else None

    def of(self, pairs: Sequence[LoraPair], *, dealt: bool) -> Exchange | None:
        """Return how a stack is shared; ``None`` if every process takes its step alone."""
        first = pairs[0]
        mesh = self.mesh(first.A)
        place = None if mesh is None else (mesh, 0)
        if self.shard_state and first.sharded:
            rows = [LocalRows.of(factor) for factor in (first.A, first.B)]
            places = {(each.mesh, each.dim) for each in rows if each is not None}
            place = places.pop() if len(places) == 1 and None not in rows else None
        if place is not None and dealt:
            return Owners(self._deal(pairs, place[0].size(place[1])), *place)
        return Replicas() if first.sharded or mesh is not None else None

    def _deal(self, pairs: Iterable[LoraPair], processes: int) -> list[int]:
        self._dealt += [0] * (processes - len(self._dealt))
        owners = []
        for pair in pairs:
            owners.append(min(range(processes), key=self._dealt.__getitem__))
            self._dealt[owners[-1]] += pair.A.numel() + pair.B.numel()
        return owners
