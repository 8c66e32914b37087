"""What the optimizers with momentum in the tangent space promise alike: TangentAdam and TangentMuon."""

import pytest
import torch

from tangora import TangentAdam, TangentMuon, find_pairs
from tests.cases import gauge_transform
from tests.optim.problems import Quadratic, assert_stays_balanced, backward, problem
from tests.tolerances import assert_close

both = pytest.mark.parametrize("optimizer_class", [TangentAdam, TangentMuon])


@both
@pytest.mark.parametrize("retraction", ["auto", "svd", "orthographic"])
@pytest.mark.parametrize("condition", [1.0, 1e3])
@pytest.mark.parametrize("rank", [2, 3])
def test_w_sequence_is_the_same_in_every_gauge(optimizer_class, retraction, condition, rank):
    sequences = []
    for change in (False, True):
        toy = Quadratic(9, 6, rank, seed=3)
        if change:
            toy.A.data, toy.B.data = gauge_transform(toy.A.data, toy.B.data, condition, seed=1)
        optimizer = optimizer_class(toy.model, lr=1e-2, retraction=retraction)
        for _ in range(20):
            toy.set_gradients()
            optimizer.step()
        sequences.append(toy.W)
    assert_close(sequences[1], sequences[0], 1e-7)


@both
@pytest.mark.parametrize("retraction", ["auto", "orthographic", "svd"])
def test_gradients_of_the_factors_stay_as_short_as_balanced_ones(optimizer_class, retraction):
    # clipping by norm, which the Trainer does, would else take the steps of everything: of 100 times too long gradients
    # the heads' moments and the optimizer's own see a hundredth, after they have seen the whole
    toy = Quadratic(40, 30, 4, seed=5, zero_B=True)
    assert_stays_balanced(toy, optimizer_class(toy.model, lr=3e-3, retraction=retraction))


@pytest.mark.parametrize(
    ("optimizer_class", "key"), [(TangentAdam, "exp_avg"), (TangentMuon, "momentum_buffer")]
)
def test_momentum_belongs_to_the_factors_as_they_are_stored(optimizer_class, key):
    """In bf16 the parameters are rounded after the step; (B'M) A' = B' (M A') must hold for the rounded ones."""
    model, x, y = problem(dtype=torch.bfloat16)
    optimizer = optimizer_class(model, lr=1e-2)
    for _ in range(3):
        backward(model, x, y)
        optimizer.step()
    for pair in find_pairs(model):
        A, B = (factor.float() for factor in pair.factors())
        left = optimizer.state[pair.A][key] @ A.T
        right = B.T @ optimizer.state[pair.B][key]
        assert_close(left, right, 1e-4)
