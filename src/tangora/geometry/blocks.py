r"""Block-wise velocities: the long sides of both factors are split into blocks, and each block is projected separately.

Block $i$ moves some columns $J$ of $A$ and some rows $I$ of $B$, and so the weight within
$\{B\, H\, E_J + E_I^\top H' A\}$. Its velocity is that whose motion is nearest to the gradient, as if the other blocks
stood still; all move together, so that what two blocks have in common is counted twice.

Source: the blog on LoRA-Pro, section 13.3, says that blocks save work and memory. With the whole gradient at hand they
would; from what LoRA sees of it, which is thin already, they do not.
"""

import torch

from tangora._types import Core, FactorA, FactorB
from tangora.geometry.gram import times
from tangora.geometry.tangent import Coordinates, Frame

# Where one minus the product of two shares is below this, both directions lie in one block, which shares out freely.
_ALONE = 1e-9


def block_velocity(at: Frame, seen: Coordinates, blocks: int) -> tuple[FactorA, FactorB]:
    r"""Return the velocity of the factors, for $s = 1$, of blocks that are projected separately.

    Args:
        seen: $(U^\top g,\; g V^\top)$ of the gradient.
        blocks: How many; of as equal sizes as can be. With one the motion is $P_T(g)$.

    Returns:
        $(H_A, H_B)$.
    """
    parts = (
        tensor.tensor_split(blocks, dim)
        for tensor, dim in ((at.U, -2), (at.V, -1), (seen.right, -2), (seen.left, -1))
    )
    moved_A, moved_B = zip(*(_of_block(*each) for each in zip(*parts, strict=True)), strict=True)
    return at.whiten_B @ torch.cat(moved_A, dim=-1), times(torch.cat(moved_B, dim=-2), at.whiten_A.mT)


def _of_block(U: FactorB, V: FactorA, right: FactorB, left: FactorA) -> tuple[FactorA, FactorB]:
    # normal equations  K + (U' R) V = left,  U (K V') + R = right  of  min |U K E + E' R V - g|
    (p, P), (q, Q) = (torch.linalg.eigh(each.double()) for each in (U.mT @ U, V @ V.mT))
    shared_left, shared_right = (left @ V.mT).double(), (U.mT @ right).double()
    rest = 1 - p[..., :, None] * q[..., None, :]
    known = P.mT @ (shared_left - shared_right @ (V @ V.mT).double()) @ Q
    halved = P.mT @ shared_left @ Q / 2
    core: Core = (P @ (known / rest).where(rest > _ALONE, halved) @ Q.mT).to(U.dtype)
    along = shared_right.to(U.dtype) - (U.mT @ U) @ core
    return left - along @ V, right - U @ core
