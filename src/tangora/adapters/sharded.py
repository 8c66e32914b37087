"""Tensors of which every process holds a part (DTensor): gathered for a computation, and sharded again after it.

Between steps everything is a part, within a step everything is whole. All processes call these functions together.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import zeros as sharded_zeros


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether this process holds a part of a tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the local part of a tensor, in the tensor's own memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors whole; parts by rows of the same processes come in one communication."""
    made = list(tensors)
    by_rows: dict[tuple[DeviceMesh, int, torch.dtype], dict[int, DTensor]] = defaultdict(dict)
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, DTensor):
            continue
        dim = _rows_dim(tensor)
        if dim is None:
            made[index] = tensor.full_tensor()
        else:
            by_rows[tensor.device_mesh, dim, tensor.dtype][index] = tensor
    for (mesh, dim, _), cut in by_rows.items():
        totals = [tensor.shape[0] for tensor in cut.values()]
        gathered = _gather_rows([tensor.to_local() for tensor in cut.values()], totals, mesh, dim)
        for index, tensor in zip(cut, gathered, strict=True):
            made[index] = tensor
    return made


@torch.no_grad()
def unshard_trained(model: nn.Module) -> None:
    """Give every process all of those parameters that are trained, such as a head copied from a sharded base."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and is_sharded(parameter):
                setattr(module, name, nn.Parameter(whole([parameter])[0]))


def share(value: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this process holds of another of its shape; no communication."""
    if not isinstance(like, DTensor):
        return value
    own = LocalRows.of(like)
    return local(distribute(value, like)) if own is None else value[own.rows]


def distribute(value: Tensor, like: Tensor) -> Tensor:
    """Shard a whole tensor like another of its shape; no communication, since every process has it."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def several_ranks() -> bool:
    """Tell whether ``torch.distributed`` runs with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_processes(device: str) -> DeviceMesh:
    """Return all processes as a mesh of one dimension."""
    assert dist.group.WORLD is not None
    return DeviceMesh.from_group(dist.group.WORLD, device)


def zeros_beside(
    parameter: Tensor, side: int, shape: Sequence[int], dtype: torch.dtype, mesh: DeviceMesh | None = None
) -> Tensor:
    """Make zeros whose rows are those of a side of a matrix: cut as that side is.

    Args:
        parameter: A factor.
        side: 0 for its rows, 1 for its columns.
        shape: Shape of the whole; that of the parameter itself is cut as the parameter is.
        mesh: Among whom the rows are cut if the parameter is not; ``None`` for whole zeros.
    """
    if not isinstance(parameter, DTensor) and mesh is not None and shape:
        return sharded_zeros(*shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
    if not isinstance(parameter, DTensor):
        return torch.zeros(tuple(shape), dtype=dtype, device=parameter.device)
    placements = list(parameter.placements)
    if tuple(shape) != tuple(parameter.shape):
        belongs = bool(shape) and shape[0] == parameter.shape[side]
        cut = [belongs and type(each) is Shard and each.dim == side for each in placements]
        placements = [Shard(0) if each else Replicate() for each in cut]
    return sharded_zeros(*shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements)


def cut_beside(value: Tensor, parameter: Tensor, side: int, mesh: DeviceMesh | None = None) -> Tensor:
    """Copy a tensor, whole or in parts, to where `zeros_beside` would put one of its shape and dtype."""
    made = zeros_beside(parameter, side, value.shape, value.dtype, mesh)
    is_alike = isinstance(value, DTensor) and isinstance(made, DTensor) and value._spec == made._spec
    local(made).copy_(local(value) if is_alike else share(whole([value])[0], made))
    return made


def is_part_of_another(tensor: Tensor) -> bool:
    """Tell whether a tensor holds the part of another process or number of processes, and was read from a file."""
    if not isinstance(tensor, DTensor):
        return False
    if not dist.is_initialized():
        return True
    mesh = tensor.device_mesh
    try:  # groups are found again by their names, whatever their size is by now
        sizes = [mesh.get_group(dim).size() for dim in range(mesh.ndim)]
    except RuntimeError:
        return True
    here = [mesh.get_local_rank(dim) for dim in range(mesh.ndim)]
    return here != [*(mesh.get_coordinate() or ())] or sizes != [*mesh.shape]


def agreed(flags: Bool[Tensor, "..."], tensors: Iterable[Tensor]) -> Bool[Tensor, "..."]:
    """Return which flags hold on all processes that hold parts of some tensors."""
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
    for mesh in meshes:
        sent = flags.to(mesh.device_type, torch.float32)
        for dim in range(mesh.ndim):
            dist.all_reduce(sent, dist.ReduceOp.MIN, group=mesh.get_group(dim))
        flags = sent > 0
    return flags


@dataclass(frozen=True)
class LocalRows:
    """The rows of a matrix that this process computes with, and how those of all are put together."""

    rows: slice
    total: int
    mesh: DeviceMesh
    dim: int

    @classmethod
    def of(cls, parameter: Tensor) -> "LocalRows | None":
        """Return the rows that this process holds of a parameter cut by rows; else ``None``."""
        dim = _rows_dim(parameter) if isinstance(parameter, DTensor) else None
        if not isinstance(parameter, DTensor) or dim is None:
            return None
        mesh, total = parameter.device_mesh, parameter.shape[0]
        start = min(total, mesh.get_local_rank(dim) * chunk_of(total, mesh.size(dim)))
        return cls(slice(start, start + parameter.to_local().shape[0]), total, mesh, dim)

    def summed(self, part: Tensor) -> Tensor:
        """Add up the parts of all processes."""
        part = part.contiguous()
        dist.all_reduce(part, group=self.mesh.get_group(self.dim))
        return part

    def gathered(self, part: Float[Tensor, "N rows r"]) -> Float[Tensor, "N m r"]:
        """Put the rows of all processes under each other."""
        first = part.transpose(0, 1)
        return _gather_rows([first], [self.total], self.mesh, self.dim)[0].transpose(0, 1)


def _rows_dim(tensor: DTensor) -> int | None:
    # the dimension of the mesh over which the rows are cut, where nothing else is
    cut = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    placement = tensor.placements[cut[0]] if len(cut) == 1 else None
    return cut[0] if type(placement) is Shard and placement.dim == 0 else None


def chunk_of(rows: int, parts: int) -> int:
    """Return the rows of each part, as torch.chunk cuts: the last parts may be smaller or empty."""
    return -(-rows // parts)


def _gather_rows(parts: Sequence[Tensor], totals: Sequence[int], mesh: DeviceMesh, dim: int) -> list[Tensor]:
    # padded to equal parts, uneven and empty ones are nothing special
    processes = mesh.size(dim)
    padded = []
    for part, total in zip(parts, totals, strict=True):
        rows = part.reshape(len(part), part.shape[1:].numel())
        padded.append(F.pad(rows, (0, 0, 0, chunk_of(total, processes) - len(rows))).flatten())
    sent = torch.cat(padded)
    received = sent.new_empty(processes * sent.numel())
    dist.all_gather_into_tensor(received, sent, group=mesh.get_group(dim))
    columns = received.view(processes, -1).split([each.numel() for each in padded], dim=1)
    return [
        column.reshape(-1, *part.shape[1:])[:total]
        for column, part, total in zip(columns, parts, totals, strict=True)
    ]
