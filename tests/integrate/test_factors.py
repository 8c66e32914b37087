"""The flow on factors: its velocity, many layers at once, and states it cannot read."""

import pytest
import torch

from tangora._checks import InputError
from tangora.geometry.gauge import GAUGES
from tangora.integrate import EULER, SCHEMES, factor_field, rebalanced, rk_step
from tests.cases import random_case
from tests.integrate.problems import quadratic
from tests.reference import dense
from tests.tolerances import assert_close


@pytest.mark.parametrize("gauge", GAUGES)
def test_velocity_is_minus_the_projected_gradient_in_the_weight(gauge):
    A, B, g, _ = random_case(9, 7, 3, seed=0)
    s = 2.5
    dA, dB = factor_field(lambda _state: (s * B.T @ g, s * g @ A.T), gauge, s)((A, B))
    H_A, H_B = dense.velocity(A, B, g, s, gauge)
    assert_close(dA, -H_A)
    assert_close(dB, -H_B)
    assert_close(s * (dB @ A + B @ dA), -dense.project(A, B, g))


def test_layers_with_their_own_scalings():
    cases = [random_case(9, 7, 3, seed=0), random_case(5, 8, 2, seed=1)]
    scalings = [2.0, 0.5]

    def gradients(state):
        assert len(state) == 4
        return tuple(
            part
            for (A, B, g, _), s in zip(cases, scalings, strict=True)
            for part in (s * B.T @ g, s * g @ A.T)
        )

    together = factor_field(gradients, "lyapunov", scalings)(tuple(x for case in cases for x in case[:2]))
    for i, ((A, B, g, _), s) in enumerate(zip(cases, scalings, strict=True)):
        dA, dB = together[2 * i : 2 * i + 2]
        assert_close(s * (dB @ A + B @ dA), -dense.project(A, B, g))


def test_rebalancing_changes_the_factors_and_not_the_weight():
    p = quadratic()
    start = (10 * p.A, p.B / 10)
    plain = rk_step(p.factor_field("zero"), start, 0.1, EULER).state
    A, B = rebalanced(SCHEMES["euler"].stepper(p.factor_field("zero")))(start, 0.1).state
    assert_close(B @ A, plain[1] @ plain[0], 1e-12)
    assert_close(B.T @ B, A @ A.T, 1e-12)
    assert float((plain[1].T @ plain[1] - plain[0] @ plain[0].T).norm()) > 1


def test_a_failed_step_is_not_rebalanced():
    p = quadratic()
    field = factor_field(lambda state: tuple(x / 0 for x in state))
    start = (10 * p.A, p.B / 10)
    stepped = rebalanced(SCHEMES["euler"].stepper(field))(start, 0.1)
    assert stepped.failure == "not finite"
    assert stepped.state is start


@pytest.mark.messages
def test_what_is_not_made_of_pairs_is_refused():
    p = quadratic()
    with pytest.raises(InputError, match="gauge"):
        factor_field(lambda state: state, "lyapunow")
    with pytest.raises(InputError, match="scaling"):
        factor_field(lambda state: state, "zero", [1.0, 0.0])
    with pytest.raises(InputError, match="state must hold A and B of 2 pairs, 4 tensors; got 2"):
        factor_field(lambda state: state, "zero", [1.0, 2.0])((p.A, p.B))
    with pytest.raises(InputError, match="state must hold"):
        factor_field(lambda state: state, "zero")((torch.ones(2, 2),))
