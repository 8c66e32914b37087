"""Muon for some matrices and AdamW for everything else, as one optimizer: a yardstick for full weights or factors.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; on LoRA's factors as in arXiv:2605.10468. Both
parts are torch's own.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tangora._checks import InputError


class MuonAndAdamW(Optimizer):
    """``torch.optim.Muon`` and ``torch.optim.AdamW`` side by side.

    Args:
        matrices: Parameters for Muon, each a matrix, or groups of them.
        rest: Parameters or groups for AdamW.
        lr: Muon's learning rate: a step changes an ``m x n`` matrix by this norm times ``sqrt(max(1, m / n))``.
        nesterov: Whether Muon looks ahead.
        weight_decay: Decoupled decay of both.

    Raises:
        InputError: If torch is older than 2.9, which has no Muon; if there is no matrix, or a parameter of
            another shape among them.
    """

    def __init__(
        self,
        matrices: Iterable[Any],
        rest: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        adamw_lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        if not hasattr(torch.optim, "Muon"):
            raise InputError(f"Muon needs torch 2.9 or newer; this is {torch.__version__}")
        groups, others = _as_groups(matrices), _as_groups(rest)
        shapes = [tuple(each.shape) for group in groups for each in group["params"]]
        if not shapes:
            raise InputError("Muon needs at least one matrix; got none")
        other = next((shape for shape in shapes if len(shape) != 2), None)
        if other is not None:
            raise InputError(
                f"Muon trains only matrices; got a parameter of shape {other}: exclude its layer"
            )
        own: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
        }  # torch's types forbid a tensor
        muon = torch.optim.Muon([{"params": []}], weight_decay=weight_decay, **own)
        adamw = torch.optim.AdamW([{"params": []}], adamw_lr, weight_decay=weight_decay, betas=betas, eps=eps)
        self._parts: tuple[Optimizer, Optimizer] = (muon, adamw)
        super().__init__([*(muon.defaults | group for group in groups), *others], adamw.defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step.

        Args:
            closure: Evaluates the loss and its gradients again.

        Returns:
            The closure's loss, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            is_muon = isinstance(part, torch.optim.Muon)
            # groups and states are this optimizer's, which schedulers, checkpoints and others change
            part.param_groups = [group for group in self.param_groups if ("ns_steps" in group) == is_muon]
            part.state = self.state
            part.step()
        return loss


def _as_groups(given: Iterable[Any]) -> list[dict[str, Any]]:
    given = list(given)
    return given if all(isinstance(each, dict) for each in given) else [{"params": given}]
