"""TangentAdam against a dense version of itself, and where gradients vanish."""

import pytest
import torch

from tangora import InputError, TangentAdam
from tangora.geometry.tangent import Cotangent, coordinates, frame, project
from tangora.optim.tangent_adam import adafactor_metric
from tests.optim.problems import Quadratic, assert_follows, problem
from tests.reference.optimizers import DenseTangentAdam
from tests.tolerances import assert_close


@pytest.mark.parametrize("shape", [(9, 6, 3), (5, 8, 2), (7, 7, 1)])
@pytest.mark.parametrize("zero_B", [False, True])
def test_equals_its_dense_version(shape, zero_B):
    toy = Quadratic(*shape, seed=1, zero_B=zero_B)
    reference = DenseTangentAdam(toy.A.detach(), toy.B.detach(), toy.s, 1e-2)
    optimizer = TangentAdam(toy.model, lr=1e-2, retraction="svd")
    assert_follows(toy, optimizer, reference, steps=10, tolerance=1e-7, factors=False)


def test_rows_and_columns_without_gradient():
    toy = Quadratic(9, 6, 3, seed=5)
    toy.weights[4] = 0
    toy.weights[:, 2] = 0
    optimizer = TangentAdam(toy.model, lr=1e-2)
    assert toy.train(optimizer, 10).isfinite().all()


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
    for change in (None, 100.0):
        toy = Quadratic(9, 6, 3, seed=3).change_gauge(change)
        optimizer = TangentAdam(toy.model, lr=1e-2)
        toy.train(optimizer, 5)
        M = momentum_of(toy, optimizer)
        assert_close(optimizer.state[toy.A]["exp_avg"], toy.B.detach().T @ M, 1e-9)
        assert_close(optimizer.state[toy.B]["exp_avg"], M @ toy.A.detach().T, 1e-9)
        found.append((M, optimizer.state[toy.A]["exp_avg_sq_col"], optimizer.state[toy.B]["exp_avg_sq_row"]))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-8)
