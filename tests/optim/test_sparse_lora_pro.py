"""Sparse LoRA-Pro: its objective against a general solver, and what its options promise."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from tangora import InputError, LoRAPro, find_pairs
from tangora.geometry.gauge import factor_velocity
from tangora.geometry.sparse import sparse_velocity
from tangora.geometry.tangent import Cotangent, coordinates, frame, project
from tests.cases import random_case
from tests.optim.problems import Quadratic, Training
from tests.tolerances import assert_close

quiet = pytest.mark.filterwarnings("ignore:step .* changes A of")


def objective(case, H_A, H_B, penalty):
    residual = case.B @ H_A + H_B @ case.A - case.g
    return residual.square().sum() + penalty * (H_A.abs().sum() + H_B.abs().sum())


def solved(case, penalty):
    """The least objective by L-BFGS-B on positive and negative parts: smooth, with bounds."""
    shapes = case.A.shape, case.B.shape
    sizes = [a * b for a, b in shapes]

    def value(x):
        parts = torch.tensor(x, requires_grad=True)
        plus, minus = parts.chunk(2)
        H_A, H_B = (h.view(shape) for h, shape in zip((plus - minus).split(sizes), shapes, strict=True))
        residual = case.B @ H_A + H_B @ case.A - case.g
        loss = residual.square().sum() + penalty * parts.sum()
        loss.backward()
        return loss.item(), parts.grad.numpy()

    options = {"maxiter": 20_000, "maxfun": 100_000, "ftol": 1e-16, "gtol": 1e-12, "maxcor": 50}
    found = minimize(
        value,
        np.zeros(2 * sum(sizes)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * (2 * sum(sizes)),
        options=options,
    )
    return found.fun


def velocity(case, sparsity, **options):
    cotangent = Cotangent(case.B.T @ case.g, case.g @ case.A.T)
    at = frame(case.A, case.B)
    start = Cotangent(
        *factor_velocity(case.A, case.B, at, project(at, coordinates(at, cotangent)), "sylvester")
    )
    penalty = sparsity * 2 * max(part.abs().max() for part in cotangent)
    return sparse_velocity(case.A, case.B, cotangent, start, sparsity, **options), start, penalty


@pytest.mark.parametrize("sparsity", [1e-3, 0.03, 0.3])
@pytest.mark.parametrize("shape", [(9, 6, 3), (5, 8, 2), (4, 6, 4)])
def test_the_objective_is_the_least(shape, sparsity):
    case = random_case(*shape, seed=1)
    found, start, penalty = velocity(case, sparsity, iterations=20_000, tolerance=1e-12)
    least = solved(case, penalty)
    assert objective(case, *found, penalty) <= least * (1 + 1e-6)
    assert objective(case, *start, penalty) > least * (1 + 1e-6)
    assert any((part == 0).any() for part in found)


def test_zeros_grow_with_the_penalty_until_nothing_moves():
    case = random_case(12, 10, 3, seed=2)
    shares = []
    for sparsity in (0.01, 0.1, 0.5, 1.0):
        found, _, _ = velocity(case, sparsity, iterations=5000, tolerance=1e-10)
        shares.append(float(torch.cat([part.flatten() for part in found]).eq(0).double().mean()))
    assert shares == sorted(shares)
    assert shares[0] < 0.5
    assert shares[-1] == 1.0


@quiet
@pytest.mark.parametrize("moments", ["weight", None])
def test_without_a_penalty_it_is_lora_pro(moments):
    toys = [Quadratic(9, 6, 3, seed=2) for _ in range(2)]
    plain = LoRAPro(toys[0].model, lr=1e-2, moments=moments)
    tiny = LoRAPro(toys[1].model, lr=1e-2, moments=moments, sparsity=1e-16)
    for toy, optimizer in zip(toys, (plain, tiny), strict=True):
        toy.train(optimizer, 10)
    assert_close(toys[0].A.detach(), toys[1].A.detach(), 1e-10)
    assert_close(toys[0].B.detach(), toys[1].B.detach(), 1e-10)


@quiet
@pytest.mark.parametrize("moments", ["weight", None])
def test_it_trains_and_counts_its_zeros(moments):
    training = Training("lora-pro-weight", moments=moments, lr=0.02, sparsity=0.1)
    before = training.loss()
    training.step(30)
    assert training.loss() < 0.9 * before
    for pair in training.pairs:
        for factor in (pair.A, pair.B):
            assert 0 < training.optimizer.state[factor]["zeros"] < 1
    still = Training("lora-pro-weight", moments=moments, sparsity=2.0)
    adapters = [pair.delta_weight().clone() for pair in find_pairs(still.model)]
    still.step(3)
    for pair, was in zip(find_pairs(still.model), adapters, strict=True):
        assert torch.equal(pair.delta_weight(), was)
        assert still.optimizer.state[pair.A]["zeros"] == 1


@pytest.mark.parametrize(
    "options", [{"moments": "factor"}, {"moments": None, "retraction": "auto"}, {"sparsity": -1}]
)
def test_what_would_fill_the_zeros_is_refused(options):
    with pytest.raises(InputError, match="sparsity"):
        LoRAPro(Quadratic(9, 6, 3, seed=2).model, lr=1e-2, **{"sparsity": 0.1, **options})
