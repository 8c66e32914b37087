"""Fast branches that serve nearly every matrix, taken for a whole stack without waiting for the device.

Whether all matrices of a stack may take a fast branch is known on the device, and reading it stops a GPU. Under
`guessing` every stack takes the fast branches, and which matrices should not have is noted there; the caller reads that
once, and computes those again. Elsewhere a branch looks, and is exact for all matrices at once.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from jaxtyping import Bool
from torch import Tensor


class _Notes(threading.local):
    doubts: list[Tensor] | None = None


_NOTES = _Notes()


@contextlib.contextmanager
def guessing() -> Iterator[None]:
    """Take fast branches for all matrices, and note those that a branch does not serve."""
    before, _NOTES.doubts = _NOTES.doubts, []
    try:
        yield
    finally:
        _NOTES.doubts = before


def is_guessing() -> bool:
    """Tell whether fast branches are taken without looking."""
    return _NOTES.doubts is not None


def doubt() -> Bool[Tensor, ""] | None:
    """Return whether a matrix has been noted since `guessing` began, on the device; ``None`` if no branch looked."""
    return torch.stack([each.any() for each in _NOTES.doubts]).any() if _NOTES.doubts else None


def all_may(good: Bool[Tensor, "*b"]) -> bool:
    """Tell whether all matrices of a stack take the fast branch: one device synchronisation, unless guessing."""
    if _NOTES.doubts is None:
        return bool(good.all())
    _NOTES.doubts.append(~good)
    return True
