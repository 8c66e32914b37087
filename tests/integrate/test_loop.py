"""The loop: where it ends and why, what it keeps, and error control."""

import math

import pytest
import torch

from tangora._checks import InputError
from tangora.integrate import SCHEMES, Control, DenseForce, for_one, integrate
from tests.integrate.problems import nearby, quadratic

DOUBLE = torch.float64
ONE = (torch.ones(1, dtype=DOUBLE),)


def decay(state):
    return tuple(-y for y in state)


def explode(state):
    return tuple(y.square() for y in state)  # from 1 infinite at t = 1


def test_the_last_step_is_shortened_to_end_on_time():
    times = []
    solution = integrate(
        SCHEMES["rk4"].stepper(decay), ONE, 1.0, 0.3, observe=lambda t, _state: times.append(t)
    )
    assert solution.status == "finished"
    assert times == pytest.approx([0, 0.3, 0.6, 0.9, 1.0])
    assert solution.t == 1.0
    assert (solution.steps, solution.evaluations) == (4, 16)
    assert abs(float(solution.state[0]) - math.exp(-1)) < 1e-4


@pytest.mark.parametrize("count", [3, 7, 10, 49, 1000])
def test_rounding_adds_no_step(count):
    assert integrate(SCHEMES["euler"].stepper(decay), ONE, 1.0, 1 / count).steps == count


def test_the_parts_work_without_the_loop():
    state, stepper = ONE, SCHEMES["heun"].stepper(decay)
    for _ in range(4):
        state = stepper(state, 0.25).state
    assert torch.equal(state[0], integrate(stepper, ONE, 1.0, 0.25).state[0])


def test_first_same_as_last_saves_evaluations_and_changes_nothing():
    stepper = SCHEMES["bogacki_shampine"].stepper(decay)
    solution = integrate(stepper, ONE, 1.0, 0.1)
    assert solution.evaluations == 4 + 9 * 3
    state = ONE
    for _ in range(10):
        state = stepper(state, 0.1).state
    assert torch.allclose(solution.state[0], state[0], rtol=1e-14)


def test_a_force_that_is_not_finite_leaves_the_last_good_state():
    p = quadratic()
    seen = []

    def field(Y):
        g = p.gradient(Y.dense())
        return DenseForce(-g if len(seen) < 4 else g * float("nan"))

    for name, scheme in SCHEMES.items():
        if scheme.kind == "factors":
            continue
        seen.clear()
        solution = integrate(
            scheme.stepper(for_one(field)),
            (p.start(),),
            1.0,
            0.1,
            observe=lambda _t, state: seen.append(state),
        )
        assert solution.status == "not finite", name
        assert solution.state is seen[-1]
        assert solution.state[0].dense().isfinite().all()
        assert solution.steps == 3
        assert solution.message.startswith("not finite at t = 0.3, step 4 of size 0.1 ("), name


def test_an_explosion_under_fixed_steps_is_not_finite():
    seen = []
    solution = integrate(
        SCHEMES["rk4"].stepper(explode), ONE, 3.0, 0.05, observe=lambda t, state: seen.append((t, state))
    )
    assert solution.status == "not finite"
    assert not solution.finished
    assert (solution.t, solution.state) == seen[-1]
    assert 1 < solution.t < 1.5
    assert solution.state[0].isfinite()


@pytest.mark.parametrize("name", ["heun", "bogacki_shampine"])
def test_an_explosion_under_error_control_collapses_the_step_where_it_happens(name):
    scheme = SCHEMES[name]
    control = scheme.control(rtol=1e-3, atol=1e-9, min_step=1e-6)
    solution = integrate(scheme.stepper(explode), ONE, 3.0, 0.05, control=control)
    assert solution.status == "step size collapsed"
    assert abs(solution.t - 1) < 1e-2
    assert solution.step_size < 1e-4
    assert solution.state[0].isfinite()
    assert f"step size collapsed at t = {solution.t:g}, step {solution.steps + 1}" in solution.message


def test_an_implicit_solve_that_does_not_converge_ends_the_loop():
    # the iteration contracts by 5 t: it works at first, later it swings to and fro
    def stiffening(state):
        t, y = state
        return torch.ones_like(t), -100 * t * y.tanh()

    seen = []
    start = (torch.zeros(1, dtype=DOUBLE), *ONE)
    stepper = SCHEMES["implicit_midpoint"].stepper(stiffening)
    solution = integrate(stepper, start, 2.0, 0.1, observe=lambda _t, state: seen.append(state))
    assert solution.status == "implicit solve did not converge"
    assert solution.state is seen[-1]
    assert 0 < solution.t < 1
    assert solution.evaluations > 50


def test_too_many_steps():
    solution = integrate(SCHEMES["euler"].stepper(decay), ONE, 1.0, 0.1, max_steps=4)
    assert (solution.status, solution.steps) == ("too many steps", 4)
    assert solution.t == pytest.approx(0.4)


def test_control_steps_back_from_where_the_field_is_not_defined():
    # the square root of what an overshoot makes negative is not a number
    def field(state):
        return (-50 * state[0].sqrt() * state[0],)

    scheme = SCHEMES["heun"]
    solution = integrate(scheme.stepper(field), ONE, 1.0, 1.0, control=scheme.control(rtol=1e-6))
    assert solution.finished
    assert solution.rejected > 0
    assert float(solution.state[0]) == pytest.approx((1 + 25) ** -2, rel=1e-3)


def test_control_reports_a_field_that_is_nowhere_finite():
    scheme = SCHEMES["heun"]
    solution = integrate(
        scheme.stepper(lambda state: (state[0] / 0,)), ONE, 1.0, 0.1, control=scheme.control()
    )
    assert (solution.status, solution.t, solution.state) == ("not finite", 0.0, ONE)


@pytest.mark.parametrize("name", ["heun", "bogacki_shampine"])
@pytest.mark.parametrize("coefficients", [{}, {"proportional": 0.0, "integral": 1.0}], ids=["PI", "standard"])
def test_error_control_meets_the_tolerance(name, coefficients):
    p = nearby(quadratic())
    field, start = p.factor_field("sylvester"), (p.A, p.B)
    exact = integrate(SCHEMES["rk4"].stepper(field), start, 1.0, 1 / 64).state
    scheme = SCHEMES[name]
    errors = []
    for tolerance in (1e-3, 1e-4, 1e-5):
        control = scheme.control(rtol=tolerance, atol=tolerance, **coefficients)
        solution = integrate(scheme.stepper(field), start, 1.0, 0.5, control=control)
        assert solution.finished
        errors.append(
            control.ratio(tuple(x - y for x, y in zip(solution.state, exact, strict=True)), start, exact)
        )
    assert max(errors) < 3  # in units of the tolerance: the flow contracts, so local errors do not pile up


@pytest.mark.parametrize("name", ["heun", "bogacki_shampine"])
def test_error_control_is_cheaper_than_fixed_steps_at_equal_error(name):
    # a small singular value: fast at first, slow once it has grown
    p = nearby(quadratic(values=(2.0, 1.5, 0.03)))
    field, start = p.factor_field("sylvester"), (p.A, p.B)
    tight = SCHEMES["bogacki_shampine"]
    exact = integrate(
        tight.stepper(field), start, 1.0, 1e-3, control=tight.control(rtol=1e-6, atol=1e-6)
    ).state
    scheme = SCHEMES[name]

    def error(solution):
        return max(float((x - y).norm()) for x, y in zip(solution.state, exact, strict=True))

    controlled = integrate(
        scheme.stepper(field), start, 1.0, 1e-3, control=scheme.control(rtol=1e-3, atol=1e-3)
    )
    # as many evaluations at fixed step size do not come as close
    steps = math.ceil(controlled.evaluations / scheme.evaluations)
    fixed = integrate(scheme.stepper(field), start, 1.0, 1 / steps)
    assert fixed.evaluations >= controlled.evaluations
    assert error(fixed) > 2 * error(controlled)


@pytest.mark.messages
def test_arguments_out_of_range_are_refused():
    stepper = SCHEMES["rk4"].stepper(decay)
    for arguments, key in (
        ((0.0, 0.1), "t_end"),
        ((1.0, 0.0), "step_size"),
        ((1.0, float("nan")), "step_size"),
    ):
        with pytest.raises(InputError, match=key):
            integrate(stepper, ONE, *arguments)
    with pytest.raises(InputError, match="max_steps"):
        integrate(stepper, ONE, 1.0, 0.1, max_steps=0)
    with pytest.raises(InputError, match="heun, bogacki_shampine for error control; got 'rk4'"):
        SCHEMES["rk4"].control()
    with pytest.raises(InputError, match="without an error estimate"):
        integrate(stepper, ONE, 1.0, 0.1, control=Control(3))
    for options in ({"rtol": -1.0}, {"min_step": 0.0}, {"max_step": 1e-12}, {"shrink": 1.0}, {"safety": 0.0}):
        with pytest.raises(InputError, match=next(iter(options))):
            Control(1, **options)
    with pytest.raises(InputError, match="rtol or atol"):
        Control(1, rtol=0.0, atol=0.0)
