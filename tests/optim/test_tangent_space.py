"""What the optimizers with momentum in the tangent space promise alike: TangentAdam and TangentMuon."""

import pytest
import torch

from tangora import TangentAdam, TangentMuon
from tests.cases import combinations
from tests.optim.problems import Quadratic, Training, assert_follows, assert_stays_balanced, problem
from tests.reference.optimizers import AdafactorWithMomentum, Muon
from tests.tolerances import assert_close

both = pytest.mark.parametrize("optimizer_class", [TangentAdam, TangentMuon])
RETRACTIONS = ["auto", "svd", "orthographic"]


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
@both
def test_at_full_rank_they_are_methods_on_the_weight(optimizer_class, shape):
    toy = Quadratic(*shape, min(shape), seed=2)
    m, n, r = (*shape, min(shape))
    reference = {
        TangentAdam: AdafactorWithMomentum(toy.W, 1e-2, (0.9, 0.999), 1e-8, wd=0.1),
        TangentMuon: Muon(toy.W, 1e-2, 1e-2 * (m / n * 8 / r) ** 0.5, wd=0.1),
    }[optimizer_class]
    optimizer = optimizer_class(toy.model, lr=1e-2, weight_decay=0.1)
    assert_follows(toy, optimizer, reference, steps=20, tolerance=1e-8)


@both
@pytest.mark.parametrize(
    ("retraction", "condition", "rank"),
    combinations(
        RETRACTIONS, [1.0, 1e3], [2, 3], quick=lambda _, condition, rank: (condition == 1.0) == (rank == 2)
    ),
)
def test_w_sequence_is_the_same_in_every_gauge(optimizer_class, retraction, condition, rank):
    toys = [Quadratic(9, 6, rank, seed=3).change_gauge(each) for each in (None, condition)]
    one, other = (toy.train(optimizer_class(toy.model, lr=1e-2, retraction=retraction), 20) for toy in toys)
    assert_close(other, one, 1e-7)


@both
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scaling_the_loss_changes_nothing(optimizer_class, scale):
    toys = [Quadratic(9, 6, 3, seed=4) for _ in range(2)]
    one, other = (
        toy.train(optimizer_class(toy.model, lr=1e-2, eps=0.0), 5, scale=each)
        for toy, each in zip(toys, (1.0, scale), strict=True)
    )
    assert_close(other, one, 1e-9)


@both
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_gradients_of_the_factors_stay_as_short_as_balanced_ones(optimizer_class, retraction):
    # clipping by norm, which the Trainer does, would else take the steps of everything: of 100 times too long gradients
    # the heads' moments and the optimizer's own see a hundredth, after they have seen the whole
    toy = Quadratic(40, 30, 4, seed=5, zero_B=True)
    assert_stays_balanced(toy, optimizer_class(toy.model, lr=3e-3, retraction=retraction))


@pytest.mark.parametrize("name", ["tangent", "tangent-muon"])
def test_state_is_about_half_of_adamw(name):
    run = Training(name).step()
    for pair in run.pairs:
        m, n, r = pair.shape
        states = [run.optimizer.state[parameter] for parameter in (pair.A, pair.B)]
        size = sum(value.numel() for state in states for key, value in state.items() if key != "step")
        assert size == r * (m + n) + (m + n if name == "tangent" else 0)


@pytest.mark.parametrize(("name", "key"), [("tangent", "exp_avg"), ("tangent-muon", "momentum_buffer")])
def test_momentum_belongs_to_the_factors_as_they_are_stored(name, key):
    """In bf16 the parameters are rounded after the step; (B'M) A' = B' (M A') must hold for the rounded ones."""
    run = Training(name, of=problem(dtype=torch.bfloat16)).step(3)
    for pair in run.pairs:
        A, B = (factor.float() for factor in pair.factors())
        left = run.optimizer.state[pair.A][key] @ A.T
        right = B.T @ run.optimizer.state[pair.B][key]
        assert_close(left, right, 1e-4)
