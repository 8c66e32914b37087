"""TangentMuon against a dense version of itself, against Muon, and under changes of gauge, alpha and gradient size."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tangora import InputError, TangentMuon, find_pairs
from tangora.optim.tangent_muon import spectral_step_size
from tests.optim.problems import Quadratic, backward, problem
from tests.reference.optimizers import DenseTangentMuon, Muon
from tests.tolerances import assert_close


@pytest.mark.parametrize("shape", [(9, 6, 2), (5, 8, 2), (7, 7, 1)])
@pytest.mark.parametrize("zero_B", [False, True])
@pytest.mark.parametrize(("nesterov", "iterations"), [(True, 1), (False, 1), (True, 3)])
def test_equals_its_dense_version(shape, zero_B, nesterov, iterations):
    toy = Quadratic(*shape, seed=1, zero_B=zero_B)
    options = {"nesterov": nesterov, "iterations": iterations}
    optimizer = TangentMuon(toy.model, lr=1e-2, retraction="svd", **options)
    size = spectral_step_size(*shape, 1e-2)
    reference = DenseTangentMuon(toy.A.detach(), toy.B.detach(), toy.s, size, **options)
    for _ in range(10):
        toy.set_gradients()
        optimizer.step()
        reference.step(toy.gradient(reference.s * reference.Y))
        assert_close(toy.W, reference.s * reference.Y, 1e-7)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_full_rank_equals_muon(shape):
    toy = Quadratic(*shape, min(shape), seed=2)
    optimizer = TangentMuon(toy.model, lr=1e-2, weight_decay=0.1)
    reference = Muon(toy.W, 1e-2, spectral_step_size(*shape, min(shape), 1e-2), wd=0.1)
    for _ in range(20):
        toy.set_gradients()
        optimizer.step()
        reference.step(toy.gradient(reference.W))
        assert_close(toy.W, reference.W, 1e-8)


def test_w_sequence_is_the_same_for_every_alpha():
    sequences = []
    for alpha in (1.0, 3.0, 64.0):
        toy = Quadratic(9, 6, 2, seed=3, alpha=alpha)
        toy.B.data /= toy.s
        optimizer = TangentMuon(toy.model, lr=1e-2)
        for _ in range(20):
            toy.set_gradients()
            optimizer.step()
        sequences.append(toy.W)
    assert_close(sequences[1], sequences[0], 1e-8)
    assert_close(sequences[2], sequences[0], 1e-8)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scaling_the_loss_changes_nothing(scale):
    sequences = []
    for factor in (1.0, scale):
        toy = Quadratic(9, 6, 2, seed=4)
        optimizer = TangentMuon(toy.model, lr=1e-2)
        for _ in range(5):
            toy.set_gradients()
            toy.A.grad *= factor
            toy.B.grad *= factor
            optimizer.step()
        sequences.append(toy.W)
    assert_close(sequences[1], sequences[0], 1e-9)


@pytest.mark.parametrize("shape", [(40, 30, 4), (30, 40, 2), (64, 16, 8)])
def test_no_step_is_longer_than_it_says(shape):
    toy = Quadratic(*shape, seed=0)
    before = toy.W
    toy.set_gradients()
    TangentMuon(toy.model, lr=1e-5).step()
    m, n, r = shape
    values = torch.linalg.svdvals(toy.W - before) / (1e-5 * math.sqrt(m / n * 8 / r))
    assert values.max() > 0.99
    assert values.max() < 2 / math.sqrt(3) + 1e-3  # a contraction without one block


def test_state_is_half_of_adamw():
    model, x, y = problem()
    optimizer = TangentMuon(model)
    backward(model, x, y)
    optimizer.step()
    for pair in find_pairs(model):
        m, n, r = pair.shape
        state = [v for p in (pair.A, pair.B) for k, v in optimizer.state[p].items() if k != "step"]
        assert sum(v.numel() for v in state) == r * (m + n)


def test_parameters_outside_pairs_have_a_rate_of_their_own():
    model, _, _ = problem()
    optimizer = TangentMuon(model, lr=0.02, adamw_lr=3e-4)
    rates = {bool(group.pairs): group["lr"] for group in optimizer.param_groups}
    assert rates == {True: 0.02, False: 3e-4}


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
    config = LoraConfig(r=8, lora_alpha=24, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Embedding(50, 12)), config, autocast_adapter_dtype=False)
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
        toy.set_gradients()
        optimizer.step()
        sizes.append(torch.linalg.matrix_norm(toy.W - before, 2) / spectral_step_size(20, 30, 4, 0.02))
    assert 0.99 < sizes[0] < 1.01
    assert 1.1 < max(sizes) < longest
    assert max(sizes[5:]) < 2 / 3**0.5
