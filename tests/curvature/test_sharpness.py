"""Sharpness in a ball: exact on quadratics, never below the second order's own maximum on what is not one."""

import math

import pytest
import torch

from tangora import InputError
from tangora.adapters import find_pairs
from tangora.curvature import Hessian
from tangora.curvature.sharpness import sharpness
from tangora.curvature.trust_region import maximize_quadratic
from tests.curvature.models import change_gauge, mlp_loss, problem
from tests.curvature.quadratic import Quadratic, symmetric, vector
from tests.reference.curvature import DenseCurvature


@pytest.mark.parametrize("radius", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("curvature", ["indefinite", "convex", "concave"])
def test_exact_on_a_quadratic(radius, curvature):
    H = {
        "indefinite": symmetric(8, 0),
        "convex": symmetric(8, 0, low=0.1),
        "concave": -symmetric(8, 0, low=0.1),
    }[curvature]
    loss = Quadratic([H], [vector(8, 1)])
    exact = maximize_quadratic(H, loss.gradient(), radius).value
    found = sharpness(loss, radius, krylov=8)
    assert found.rise == pytest.approx(exact, rel=1e-9)
    assert found.second_order == pytest.approx(exact, rel=1e-9)
    assert exact <= found.second_order_bound * (1 + 1e-12)
    assert float(found.displacement.norm()) <= radius * (1 + 1e-12)
    assert found.rise == pytest.approx(loss.loss_at(found.displacement) - loss.loss())
    assert found.loss == loss.loss()


def test_ascent_finds_the_maximum_without_the_second_order():
    """Gradients alone, from every other start, on a convex quadratic."""
    H = symmetric(8, 0, low=0.1)
    loss = Quadratic([H], [vector(8, 1)])
    found = sharpness(loss, 0.5, steps=300, random_starts=2)
    exact = maximize_quadratic(H, loss.gradient(), 0.5).value
    assert len(found.starts) == 6
    assert found.starts["gradient"] == pytest.approx(exact, rel=1e-6)
    # a start on the other side may stay in a local maximum, and never rises above
    assert all(value <= exact * (1 + 1e-9) for value in found.starts.values())


class Bowl(Quadratic):
    """Quartic along the first axis: the second order sees nothing of it."""

    def loss_at(self, displacement):
        return super().loss_at(displacement) + 50 * float(displacement[0] ** 4)

    def gradient_at(self, displacement):
        more = torch.zeros_like(displacement)
        more[0] = 200 * displacement[0] ** 3
        return super().gradient_at(displacement) + more


def test_ascent_goes_beyond_the_second_order():
    H = torch.diag(torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64))
    g = torch.tensor([0.01, 0.1, 0.1], dtype=torch.float64)
    found = sharpness(Bowl([H], [g]), 1.0, steps=50)
    assert found.rise >= 50
    assert found.rise > 10 * found.second_order_bound


def test_nothing_rises_at_a_strict_maximum():
    found = sharpness(Quadratic([-torch.eye(3, dtype=torch.float64)]), 1.0)
    assert found.rise == 0
    assert not found.displacement.any()


class Cliff(Quadratic):
    """No number beyond a wall."""

    def loss_at(self, displacement):
        return math.nan if displacement[0] > 0.5 else super().loss_at(displacement)


def test_a_loss_that_is_no_number_is_infinitely_sharp():
    H = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    found = sharpness(Cliff([H], [vector(2, 0).abs()]), 1.0)
    assert found.rise == math.inf
    assert float(found.displacement[0]) > 0.5


def test_products_progress_and_seed():
    loss, calls = Quadratic([symmetric(6, 0)], [vector(6, 1)]), []
    options = {"steps": 4, "krylov": 5, "progress": lambda *call: calls.append(call)}
    found, again = (sharpness(loss, 0.3, **options) for _ in range(2))
    assert found.products == 5 + 1
    assert found.space == "weights"
    names = [f"sharpness from {name}" for name in found.starts]
    assert calls[:5] == [(name, count, 5) for count, name in enumerate(names, 1)]
    assert again.displacement.equal(found.displacement)
    assert again.starts == found.starts


@pytest.mark.messages
@pytest.mark.parametrize("options", [{"radius": 0.0}, {"steps": -1}, {"krylov": 1}])
def test_bad_input(options):
    with pytest.raises(InputError, match=next(iter(options))):
        sharpness(Quadratic([symmetric(3, 0)]), **{"radius": 1.0} | options)


def model_hessian(over, found=None):
    found = found or problem("mlp")
    return Hessian(found.model, found.batches, over=over, loss_fn=found.loss_fn)


@pytest.mark.parametrize("over", ["factors", "tangent"])
def test_small_balls_of_a_model_are_quadratic(over):
    """What the second order misses falls with the third power of the radius."""
    operator = model_hessian(over)
    dense = DenseCurvature(operator.model, list(operator.batches), mlp_loss)
    if over == "factors":
        H, g = dense.factor_hessian, dense.factor_gradient
    else:
        H, g = dense.tangent_hessian, dense.projector @ dense.weight_gradient
    missed = []
    for radius in (0.02, 0.01):
        found = sharpness(operator, radius, steps=20, krylov=12, tol=1e-6)
        exact = maximize_quadratic(H, g, radius).value
        assert found.second_order == pytest.approx(exact, rel=1e-6)
        assert exact <= found.second_order_bound
        rise = operator.loss_at(found.displacement) - operator.loss()
        assert found.rise == pytest.approx(rise)
        missed.append(abs(found.rise - exact))
        assert missed[-1] < 0.05 * exact
    assert missed[1] < missed[0] / 5


def test_the_ball_of_the_tangent_space_knows_no_gauge_and_that_of_the_factors_does():
    one, other = problem("mlp"), problem("mlp")
    change_gauge(find_pairs(other.model))
    tangent = [sharpness(model_hessian("tangent", each), 0.5, random_starts=0).rise for each in (one, other)]
    assert tangent[0] == pytest.approx(tangent[1], rel=1e-3)
    factors = [sharpness(model_hessian("factors", each), 0.5, random_starts=0).rise for each in (one, other)]
    assert abs(factors[0] - factors[1]) > 0.1 * max(factors)
