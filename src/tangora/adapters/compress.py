r"""The nearest adapter of a smaller rank, from the factors alone: no matrix of the weight's size is ever formed."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_FACTOR = re.compile(r"^(?P<layer>.*)\.lora_(?:embedding_)?(?P<letter>[AB])(?:\.weight)?$")


@dataclass(frozen=True)
class Compression:
    """Factors of a smaller rank, and what was lost."""

    tensors: dict[str, Tensor]
    """All tensors of the adapter; those of shortened layers are new."""
    ranks: dict[str, int]
    """Rank by the name of the layer."""
    relative_error: float
    """Frobenius norm of what was cut off all updates, relative to that of the updates."""
    errors: dict[str, float]
    """The same for each layer."""


def truncate(
    B: Float[Tensor, "m r"], A: Float[Tensor, "r n"], rank: int
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "k n"], Float[Tensor, " p"]]:
    r"""Cut a product to a smaller rank.

    With $B = Q_B R_B$, $A^\top = Q_A R_A$ and $R_B R_A^\top = P \Sigma Q^\top$, the best approximation of $BA$ has the
    factors $Q_B P_k \Sigma_k^{1/2}$ and $\Sigma_k^{1/2} Q_k^\top Q_A^\top$, which are balanced.

    Source:
        Eckart and Young (1936). Differs in: nothing.

    Example:
        >>> B, A = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.eye(2)
        >>> B1, A1, values = truncate(B, A, 1)
        >>> (B1 @ A1).round(), values
        (tensor([[3., 0.],
                [0., 0.]], dtype=torch.float64), tensor([3., 1.], dtype=torch.float64))
    """
    Q_B, R_B = torch.linalg.qr(B.detach().cpu().double())
    Q_A, R_A = torch.linalg.qr(A.detach().cpu().double().mT)
    P, values, Qh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    root = values[:rank].sqrt()
    missing = max(rank - len(root), 0)
    B_k, A_k = (Q_B @ P[:, :rank]) * root, root[:, None] * (Qh[:rank] @ Q_A.mT)
    return F.pad(B_k, (0, missing)), F.pad(A_k, (0, 0, 0, missing)), values


def compress(tensors: Mapping[str, Tensor], rank: int, scalings: Mapping[str, float]) -> Compression:
    """Cut every layer of an adapter that has a larger rank."""
    result, ranks, lost, total = dict(tensors), {}, {}, {}
    for layer, (key_A, key_B) in layers_of(tensors).items():
        A, B = tensors[key_A], tensors[key_B]
        B_k, A_k, values = truncate(B.flatten(1), A.flatten(1), rank)
        energy = scalings[layer] ** 2 * values.square()
        total[layer], lost[layer], ranks[layer] = float(energy.sum()), 0.0, A.shape[0]
        if rank < A.shape[0]:
            ranks[layer], lost[layer] = rank, float(energy[rank:].sum())
            result[key_A] = A_k.reshape(rank, *A.shape[1:]).to(A.dtype).contiguous()
            result[key_B] = B_k.reshape(len(B), rank, *B.shape[2:]).to(B.dtype).contiguous()
    errors = {layer: _ratio(lost[layer], total[layer]) for layer in total}
    return Compression(result, ranks, _ratio(sum(lost.values()), sum(total.values())), errors)


def resolve(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Write updates that are a difference of two products by their singular values, at the same rank.

    Where $B_0 A_0$ is larger than what was trained, $B A - B_0 A_0$ cancels in every forward pass and loses digits. The
    product's own balanced factors have nothing to cancel. Factors below float32, which cannot hold them as exactly,
    stay as they are, and so do those of a product that is of smaller rank but for rounding: zeros could not be trained
    further.
    """
    result = dict(tensors)
    for key_A, key_B in layers_of(tensors).values():
        A, B = tensors[key_A], tensors[key_B]
        precision = torch.finfo(A.dtype).eps
        if precision > torch.finfo(torch.float32).eps:
            continue
        B_k, A_k, values = truncate(B.flatten(1), A.flatten(1), len(A))
        rounding = precision * float(B.double().norm() * A.double().norm())
        if len(values) == len(A) and values[-1] > rounding:
            result[key_A] = A_k.reshape(A.shape).to(A).contiguous()
            result[key_B] = B_k.reshape(B.shape).to(B).contiguous()
    return result


def trim(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Leave out the ranks of an adapter that are exactly zero in both factors.

    Training with a rank-adaptive method (``ODELoRA(scheme="bug", tolerance=...)``) leaves them. A rank that is zero in
    one factor only, as all are in a fresh adapter, stays: its gradient is not zero.
    """
    result, ranks = dict(tensors), {}
    for layer, (key_A, key_B) in layers_of(tensors).items():
        A, B = tensors[key_A], tensors[key_B]
        used = (A.flatten(1) != 0).any(1) | (B.transpose(0, 1).flatten(1) != 0).any(1)
        if not used.any():
            used[0] = True  # PEFT knows no rank 0
        ranks[layer] = int(used.sum())
        if ranks[layer] < len(used):
            result[key_A], result[key_B] = A[used].contiguous(), B[:, used].contiguous()
    return result, ranks


def ranks_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Read the ranks of a saved adapter."""
    return {layer: tensors[key_A].shape[0] for layer, (key_A, _) in layers_of(tensors).items()}


def layers_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Find the pairs of a saved adapter."""
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        if match := _FACTOR.match(key):
            found.setdefault(match["layer"], {})[match["letter"]] = key
    return {layer: (keys["A"], keys["B"]) for layer, keys in found.items()}


def _ratio(lost: float, total: float) -> float:
    return math.sqrt(lost / total) if total else 0.0
