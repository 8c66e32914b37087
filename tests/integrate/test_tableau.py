"""Tableaus check themselves; one Runge-Kutta step does what the tableau says, in every dtype and autograd mode."""

import math

import pytest
import torch

from tangora._checks import InputError
from tangora.integrate import (
    HEUN,
    RK4,
    TABLEAUS,
    Tableau,
    rk_step,
)

DOUBLE = torch.float64


class Counted:
    """dy/dt = -y^2, with a count; its solution from 1 is 1 / (1 + t)."""

    def __init__(self):
        self.calls = 0

    def __call__(self, state):
        self.calls += 1
        return tuple(-y.square() for y in state)


@pytest.mark.messages
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": (0.5, 0.4)}, "b = 1 "),
        ({"b": (0.4, 0.6)}, "bc = 0.5"),
        ({"order": 3}, "bcc = 0.333333"),
        ({"order": 5}, "at most 4"),
        ({"order": 0}, "order of tableau mine"),
        ({"a": ((), (1.0, 0.0))}, "explicit"),
        ({"b": (1.0,)}, "one weight per stage, 2"),
    ],
)
def test_wrong_tableaus_are_refused(changes, message):
    right = {"name": "mine", "a": ((), (1.0,)), "b": (0.5, 0.5), "order": 2}
    Tableau(**right)
    with pytest.raises(InputError, match=message):
        Tableau(**{**right, **changes})


@pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=TABLEAUS)
def test_no_tableau_is_better_than_it_says(tableau):
    if tableau.order < 4:
        with pytest.raises(InputError):
            Tableau("better", tableau.a, tableau.b, tableau.order + 1)
    assert tableau.c[0] == 0
    assert math.isclose(sum(tableau.b), 1)


def test_order_four_conditions_can_fail_one_by_one():
    # Kutta's third-order method meets all conditions up to 3 and none of order 4 is implied by them
    Tableau("kutta3", ((), (0.5,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), 3)
    with pytest.raises(InputError, match="order-4"):
        Tableau("kutta3", ((), (0.5,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), 4)


@pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=TABLEAUS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_step_is_the_taylor_polynomial_on_a_linear_field(tableau, dtype):
    # y' = M y: a method of order p with s = p effective stages gives sum of (h M)^j / j!, j <= p, exactly
    M = torch.tensor([[-1.0, 2.0], [0.5, -0.3]], dtype=dtype)
    y = torch.tensor([1.0, -2.0], dtype=dtype)
    stepped = rk_step(lambda state: (M @ state[0],), (y,), 0.1, tableau)
    expected = sum(
        torch.linalg.matrix_power(0.1 * M, j) @ y / math.factorial(j) for j in range(tableau.order + 1)
    )
    assert stepped.state[0].dtype == dtype
    assert torch.allclose(stepped.state[0], expected, rtol=20 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=TABLEAUS)
def test_evaluations_are_counted_and_none_is_wasted(tableau):
    field, y = Counted(), (torch.ones(1, dtype=DOUBLE),)
    stepped = rk_step(field, y, 0.1, tableau)
    assert stepped.evaluations == field.calls == tableau.stages
    known = rk_step(field, y, 0.1, tableau, first=(-y[0].square(),))
    assert known.evaluations == tableau.stages - 1
    assert torch.equal(known.state[0], stepped.state[0])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_the_field_may_use_autograd(mode):
    def field(state):
        with torch.enable_grad():
            leaves = [part.requires_grad_() for part in state]
            loss = sum(part.pow(4).sum() for part in leaves)
            return tuple(-g for g in torch.autograd.grad(loss, leaves))

    start = (torch.ones(2, dtype=DOUBLE, requires_grad=True), torch.full((1,), 2.0, dtype=DOUBLE))
    with mode():
        new = rk_step(field, start, 0.01, RK4).state
    assert not any(part.requires_grad for part in new)
    assert start[0].grad is None
    assert not start[1].requires_grad
    assert torch.allclose(new[1], 2 / (1 + 8 * 4 * torch.tensor(0.01, dtype=DOUBLE)).sqrt(), rtol=1e-4)


def test_a_field_that_is_not_finite_fails_the_step():
    y = (torch.ones(1, dtype=DOUBLE),)
    stepped = rk_step(lambda state: (state[0] / 0,), y, 0.1, HEUN)
    assert stepped.failure == "not finite"
    assert stepped.state is y
