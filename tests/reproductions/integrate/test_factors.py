"""The flow on factors: its velocity."""

import pytest

from reproductions.matrix_sensing.schemes import factor_field
from tangora.geometry.gauge import GAUGES
from tests.cases import random_case
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
