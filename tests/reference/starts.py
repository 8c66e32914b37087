"""Starts by the formulas of the published code, on the dense decomposition, one direction at a time."""

import torch
from torch import Tensor


def lora_ga(
    G: Tensor, W0: Tensor, r: int, s: float, direction: str, scale: str, gamma: float = 16.0
) -> tuple[Tensor, Tensor]:
    """LoRA-GA as its authors' fork of PEFT has it; ``random`` takes its own draw and is not here."""
    U, _, Vh = torch.linalg.svd(G)
    to_A = {"ArBr": range(1, 2 * r, 2), "A2rBr": range(r, 2 * r), "ArB2r": range(r)}[direction]
    to_B = {"ArBr": range(0, 2 * r, 2), "A2rBr": range(r), "ArB2r": range(r, 2 * r)}[direction]
    A = torch.stack([Vh[i] for i in to_A])
    B = torch.stack([U[:, i] for i in to_B], dim=1)
    m = G.shape[0]
    if scale == "gd":
        A, B = A / s, B / s
    elif scale == "stable":
        A, B = A * m**0.25 / gamma**0.5, B * m**0.25 / gamma**0.5
    elif scale == "weight_svd":
        roots = [float((value / s) ** 0.5) for value in torch.linalg.svdvals(W0)[:r]]
        A, B = A * sum(roots) / r, B * sum(roots) / r
    return A, B


def lora_one(G: Tensor, r: int, gamma: float = 128.0) -> tuple[Tensor, Tensor]:
    """LoRA-One's released code: the decomposition is that of -G, and both factors get the root of S / S[0]."""
    U, S, Vh = torch.linalg.svd(-G, full_matrices=False)
    B = U[:, :r] @ torch.diag(S[:r].sqrt()) / S[0].sqrt() / gamma**0.5
    A = torch.diag(S[:r].sqrt()) @ Vh[:r] / S[0].sqrt() / gamma**0.5
    return A, B


def lora_one_v1(G: Tensor, r: int, gamma: float = 128.0) -> tuple[Tensor, Tensor]:
    """The earlier version: directions of -G without the singular values."""
    U, _, Vh = torch.linalg.svd(-G, full_matrices=False)
    return Vh[:r] / gamma**0.5, U[:, :r] / gamma**0.5


def one_step(G: Tensor, r: int, s: float, step: float) -> tuple[Tensor, Tensor]:
    """The best rank-r part of a step of gradient descent, split in balance."""
    U, S, Vh = torch.linalg.svd(-step * G / s, full_matrices=False)
    return torch.diag(S[:r].sqrt()) @ Vh[:r], U[:, :r] @ torch.diag(S[:r].sqrt())


def pissa(W0: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    """PiSSA's principal directions."""
    U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
    root = torch.diag((S[:r] / s).sqrt())
    return root @ Vh[:r], U[:, :r] @ root


def best_rank(G: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]
