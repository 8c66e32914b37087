"""TangentMuon against a dense version of itself, and the size of its steps."""

import math

import pytest
import torch
from torch import nn

from tangora import InputError, TangentMuon, find_pairs
from tangora.optim.tangent_muon import spectral_step_size
from tests.models import with_lora
from tests.optim.problems import Quadratic, assert_follows, problem
from tests.reference.optimizers import DenseTangentMuon
from tests.tolerances import assert_close


@pytest.mark.parametrize("shape", [(9, 6, 2), (5, 8, 2), (7, 7, 1)])
@pytest.mark.parametrize("zero_B", [False, True])
@pytest.mark.parametrize(("nesterov", "iterations"), [(True, 1), (False, 1), (True, 3)])
def test_equals_its_dense_version(shape, zero_B, nesterov, iterations):
    toy = Quadratic(*shape, seed=1, zero_B=zero_B)
    options = {"nesterov": nesterov, "iterations": iterations}
    size = spectral_step_size(*shape, 1e-2)
    reference = DenseTangentMuon(toy.A.detach(), toy.B.detach(), toy.s, size, **options)
    optimizer = TangentMuon(toy.model, lr=1e-2, retraction="svd", **options)
    assert_follows(toy, optimizer, reference, steps=10, tolerance=1e-7, factors=False)


def test_w_sequence_is_the_same_for_every_alpha():
    sequences = []
    for alpha in (1.0, 3.0, 64.0):
        toy = Quadratic(9, 6, 2, seed=3, alpha=alpha)
        toy.B.data /= toy.s
        sequences.append(toy.train(TangentMuon(toy.model, lr=1e-2), 20))
    assert_close(sequences[1], sequences[0], 1e-8)
    assert_close(sequences[2], sequences[0], 1e-8)


@pytest.mark.parametrize("shape", [(40, 30, 4), (30, 40, 2), (64, 16, 8)])
def test_no_step_is_longer_than_it_says(shape):
    toy = Quadratic(*shape, seed=0)
    before = toy.W
    m, n, r = shape
    change = toy.train(TangentMuon(toy.model, lr=1e-5), 1) - before
    values = torch.linalg.svdvals(change) / (1e-5 * math.sqrt(m / n * 8 / r))
    assert values.max() > 0.99
    assert values.max() < 2 / math.sqrt(3) + 1e-3  # a contraction without one block


@pytest.mark.messages
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"iterations": 0},
        {"nesterov": "yes"},
        {"retraction": "factors"},
    ],
)
def test_bad_options(options):
    model, _, _ = problem()
    with pytest.raises(InputError, match=next(iter(options))):
        TangentMuon(model, **options)


def test_no_row_of_an_embedding_moves_further_than_the_rate():
    torch.manual_seed(0)
    model = with_lora(nn.Sequential(nn.Embedding(50, 12)), r=8, lora_alpha=24, target_modules=["0"])
    (pair,) = find_pairs(model)
    optimizer = TangentMuon(model, lr=1e-3)
    moved = []
    for _ in range(3):
        before = pair.delta_weight().detach().clone()
        model(torch.arange(40).view(5, 8)).square().sum().backward()
        optimizer.step()
        moved.append((pair.delta_weight() - before).square().mean(0 if before.shape[0] == 12 else 1).sqrt())
    assert max(each.max() for each in moved) < 1e-3 * 2 / 3**0.5
    assert max(each.max() for each in moved) > 3e-4


@pytest.mark.parametrize(("retraction", "longest"), [("auto", 1.5), ("svd", 1.25)])
def test_steps_from_b_equal_zero_are_a_little_longer_while_the_product_is_small(retraction, longest):
    toy = Quadratic(20, 30, 4, seed=0, zero_B=True)
    optimizer = TangentMuon(toy.model, lr=0.02, retraction=retraction)
    sizes = []
    for _ in range(12):
        before = toy.W
        toy.train(optimizer, 1)
        sizes.append(torch.linalg.matrix_norm(toy.W - before, 2) / spectral_step_size(20, 30, 4, 0.02))
    assert 0.99 < sizes[0] < 1.01
    assert 1.1 < max(sizes) < longest
    assert max(sizes[5:]) < 2 / 3**0.5
