"""TangentAdam against a dense version of itself, against Adafactor, and under changes of gauge."""

import pytest
import torch

from tangora import InputError, TangentAdam, find_pairs
from tangora.geometry.tangent import Cotangent, coordinates, frame, project
from tangora.optim.tangent_adam import adafactor_metric
from tests.cases import gauge_transform
from tests.optim.problems import Quadratic, backward, problem
from tests.reference.optimizers import AdafactorWithMomentum, DenseTangentAdam
from tests.tolerances import assert_close


@pytest.mark.parametrize("shape", [(9, 6, 3), (5, 8, 2), (7, 7, 1)])
@pytest.mark.parametrize("zero_B", [False, True])
def test_equals_its_dense_version(shape, zero_B):
    toy = Quadratic(*shape, seed=1, zero_B=zero_B)
    optimizer = TangentAdam(toy.model, lr=1e-2, retraction="svd")
    reference = DenseTangentAdam(toy.A.detach(), toy.B.detach(), toy.s, 1e-2)
    for _ in range(10):
        toy.set_gradients()
        optimizer.step()
        reference.step(toy.gradient(reference.s * reference.Y))
        assert_close(toy.W, reference.s * reference.Y, 1e-7)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_full_rank_equals_adafactor_with_momentum(shape):
    toy = Quadratic(*shape, min(shape), seed=2)
    optimizer = TangentAdam(toy.model, lr=1e-2, weight_decay=0.1)
    reference = AdafactorWithMomentum(toy.W, 1e-2, (0.9, 0.999), 1e-8, wd=0.1)
    for _ in range(20):
        toy.set_gradients()
        optimizer.step()
        reference.step(toy.gradient(reference.W))
        assert_close(toy.W, reference.W, 1e-8)


def test_state_is_about_half_of_adamw():
    model, x, y = problem()
    optimizer = TangentAdam(model, lr=1e-2)
    backward(model, x, y)
    optimizer.step()
    for pair in find_pairs(model):
        m, n, r = pair.shape
        state = [v for p in (pair.A, pair.B) for k, v in optimizer.state[p].items() if k != "step"]
        assert sum(v.numel() for v in state) == r * (m + n) + m + n


def test_scaling_the_loss_changes_nothing():
    sequences = []
    for scale in (1.0, 1e6):
        toy = Quadratic(9, 6, 3, seed=4)
        optimizer = TangentAdam(toy.model, lr=1e-2, eps=0.0)
        for _ in range(5):
            toy.set_gradients()
            toy.A.grad *= scale
            toy.B.grad *= scale
            optimizer.step()
        sequences.append(toy.W)
    assert_close(sequences[1], sequences[0], 1e-9)


def test_rows_and_columns_without_gradient():
    toy = Quadratic(9, 6, 3, seed=5)
    toy.weights[4] = 0
    toy.weights[:, 2] = 0
    optimizer = TangentAdam(toy.model, lr=1e-2)
    for _ in range(10):
        toy.set_gradients()
        optimizer.step()
    assert toy.W.isfinite().all()


def test_no_gradient_at_all_moves_nothing():
    toy = Quadratic(9, 6, 3, seed=5)
    before = toy.W
    optimizer = TangentAdam(toy.model, lr=1e-2)
    toy.A.grad, toy.B.grad = torch.zeros_like(toy.A), torch.zeros_like(toy.B)
    optimizer.step()
    assert_close(toy.W, before, 1e-14)


def test_adafactor_metric_is_the_rank_one_model_of_v():
    rows, columns = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([1.0, 3.0])
    metric = adafactor_metric(rows, columns, 0.0)
    V = torch.outer(rows, columns) / rows.mean()
    torch.testing.assert_close(torch.outer(metric.rows, metric.columns), V.sqrt())


@pytest.mark.messages
def test_bad_retraction():
    model, _, _ = problem()
    with pytest.raises(InputError, match="retraction must be one of auto, orthographic, svd; got 'factors'"):
        TangentAdam(model, lr=1e-3, retraction="factors")


def momentum_of(toy, optimizer):
    """Rebuild the dense momentum from the state."""
    A, B = toy.A.detach(), toy.B.detach()
    at = frame(A, B)
    state = Cotangent(optimizer.state[toy.A]["exp_avg"], optimizer.state[toy.B]["exp_avg"])
    tangent = project(at, coordinates(at, state))
    return at.U @ tangent.K + tangent.J @ at.V


def test_the_state_belongs_to_w_and_changes_basis_with_the_factors():
    """Under (B, A) -> (B R, R^-1 A) the dense momentum stays, and the state is (B^T M, M A^T) in either basis."""
    found = []
    for change in (False, True):
        toy = Quadratic(9, 6, 3, seed=3)
        if change:
            toy.A.data, toy.B.data = gauge_transform(toy.A.data, toy.B.data, 100.0, seed=1)
        optimizer = TangentAdam(toy.model, lr=1e-2)
        for _ in range(5):
            toy.set_gradients()
            optimizer.step()
        M = momentum_of(toy, optimizer)
        assert_close(optimizer.state[toy.A]["exp_avg"], toy.B.detach().T @ M, 1e-9)
        assert_close(optimizer.state[toy.B]["exp_avg"], M @ toy.A.detach().T, 1e-9)
        found.append((M, optimizer.state[toy.A]["exp_avg_sq_col"], optimizer.state[toy.B]["exp_avg_sq_row"]))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-8)
