"""PreconditionedAdamW against PEFT's own implementation of the method."""

import copy

import pytest
import torch
from peft.optimizers import create_riemannian_optimizer

from tangora import InputError, PreconditionedAdamW, find_pairs
from tests.optim.problems import backward, outside_pairs, problem, trainable


@pytest.mark.parametrize("zero_B", [False, True])
def test_equals_peft(zero_B):
    model, x, y = problem(zero_B=zero_B)
    twin = copy.deepcopy(model)
    groups = [{"pairs": find_pairs(model)}, {"params": outside_pairs(model)}]  # PEFT decays biases too
    mine = PreconditionedAdamW(groups, lr=1e-2, damping=1e-2, weight_decay=0.1)
    theirs = create_riemannian_optimizer(twin, torch.optim.AdamW, lr=1e-2, reg=1e-2, weight_decay=0.1)
    for _ in range(10):
        for each, its in ((model, mine), (twin, theirs)):
            backward(each, x, y)
            its.step()
    for a, b in zip(trainable(model), trainable(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.messages
def test_damping_must_be_positive():
    model, _, _ = problem()
    with pytest.raises(InputError, match=r"damping must be a number in \(0, inf\); got 0"):
        PreconditionedAdamW(model, lr=1e-3, damping=0)
