"""The implicit midpoint rule: what it solves, and that it never hands out what it could not solve."""

import pytest
import torch

from tangora._checks import InputError
from tangora.integrate import implicit_midpoint_step

DOUBLE = torch.float64
ROTATION = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=DOUBLE)


def rotate(state):
    return (ROTATION.to(state[0].dtype) @ state[0],)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_step_is_the_cayley_transform_on_a_linear_field(dtype):
    y = torch.tensor([1.0, 0.25], dtype=dtype)
    stepped = implicit_midpoint_step(rotate, (y,), 0.3)
    eye = torch.eye(2, dtype=DOUBLE)
    expected = torch.linalg.solve(eye - 0.15 * ROTATION, (eye + 0.15 * ROTATION) @ y.double())
    assert stepped.failure is None
    assert torch.allclose(stepped.state[0].double(), expected, rtol=100 * torch.finfo(dtype).eps)


def test_a_quadratic_invariant_is_kept():
    state = (torch.tensor([1.0, 0.25], dtype=DOUBLE),)
    before = state[0].norm()
    for _ in range(200):
        state = implicit_midpoint_step(rotate, state, 0.3).state
    assert abs(float(state[0].norm() - before)) < 1e-12


def test_iterations_are_counted_as_evaluations():
    calls = []

    def field(state):
        calls.append(state)
        return rotate(state)

    y = (torch.ones(2, dtype=DOUBLE),)
    stepped = implicit_midpoint_step(field, y, 0.3)
    assert stepped.evaluations == len(calls)


@pytest.mark.parametrize(("step_size", "iterations"), [(3.0, 50), (0.3, 2)])
def test_what_does_not_converge_fails_and_keeps_the_state(step_size, iterations):
    y = (torch.ones(2, dtype=DOUBLE),)
    stepped = implicit_midpoint_step(rotate, y, step_size, max_iterations=iterations)
    assert stepped.failure == "implicit solve did not converge"
    assert stepped.state is y
    assert stepped.evaluations == iterations + 1


def test_a_field_that_is_not_finite_fails_the_step():
    y = (torch.ones(1, dtype=DOUBLE),)
    assert implicit_midpoint_step(lambda state: (state[0] / 0,), y, 0.1).failure == "not finite"


@pytest.mark.messages
@pytest.mark.parametrize(("option", "value"), [("tolerance", 0.0), ("max_iterations", 0)])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(InputError, match=option):
        implicit_midpoint_step(rotate, (torch.ones(2, dtype=DOUBLE),), 0.1, **{option: value})
