"""The largest value of a quadratic in a ball: its optimality conditions, which certify a global maximum."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tangora.curvature.trust_region import maximize_in_krylov_space, maximize_quadratic
from tests.curvature.quadratic import symmetric, vector
from tests.curvature.spectra import Rotated


def certify(H, g, radius, found):
    """(mu I - H) x = g with mu >= max(lambda, 0), on the sphere unless mu = 0: only a global maximum has such a mu."""
    x, top = found.step, float(torch.linalg.eigvalsh(H)[-1])
    scale = float(H.abs().max()) * radius + float(g.norm()) + 1e-300
    size = float(x.norm())
    assert size <= radius * (1 + 1e-9)
    slope = g + H @ x
    multiplier = float(slope @ x) / size**2 if size else 0.0
    torch.testing.assert_close(slope, multiplier * x, rtol=0, atol=1e-7 * scale)
    assert multiplier >= max(top, 0) - 1e-6 * scale / radius
    assert multiplier * (radius - size) <= 1e-7 * scale
    assert found.value == pytest.approx(float(g @ x + x @ H @ x / 2), abs=1e-9 * scale * radius)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 6),
    seed=st.integers(0, 1000),
    shift=st.sampled_from([-20.0, -1.0, 0.0, 3.0]),
    length=st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e4]),
    radius=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_it_is_a_global_maximum(size, seed, shift, length, radius):
    H = symmetric(size, seed) + shift * torch.eye(size, dtype=torch.float64)
    g = length * vector(size, seed + 1)
    certify(H, g, radius, maximize_quadratic(H, g, radius))


@pytest.mark.parametrize("tilt", [0.0, 1e-30, 1e-17, 1e-9])
def test_the_hard_case(tilt):
    """A gradient orthogonal to the leading eigenvector: the ball is filled along it."""
    H = torch.diag(torch.tensor([3.0, 3.0, 1.0, -2.0], dtype=torch.float64))
    g = torch.tensor([tilt, 0.0, 0.5, 1.0], dtype=torch.float64)
    found = maximize_quadratic(H, g, 2.0)
    certify(H, g, 2.0, found)
    x = torch.tensor([0.0, 0.0, 0.25, 0.2], dtype=torch.float64)
    x[0] = (4 - x.square().sum()) ** 0.5
    assert found.value == pytest.approx(float(g @ x + x @ H @ x / 2), rel=1e-7)


def test_a_maximum_inside_of_the_ball():
    H, g = -symmetric(4, 0, low=1.0), vector(4, 1)
    found = maximize_quadratic(H, g, 100.0)
    torch.testing.assert_close(found.step, torch.linalg.solve(-H, g))


def test_a_whole_krylov_space_gives_the_maximum_of_the_ball():
    H, g = symmetric(12, 0), vector(12, 1)
    exact = maximize_quadratic(H, g, 0.7)
    values = [maximize_in_krylov_space(H, g, [g], 0.7, dimension).value for dimension in (1, 2, 4, 12)]
    assert values == sorted(values)
    assert values[0] < exact.value * (1 - 1e-3)
    found = maximize_in_krylov_space(H, g, [g], 0.7, 12)
    assert found.value == pytest.approx(exact.value, rel=1e-10)
    torch.testing.assert_close(found.step, exact.step, rtol=0, atol=1e-8)


def test_the_hard_case_needs_the_eigenvector():
    H = torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.5], dtype=torch.float64))
    g, top = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64), torch.eye(4, dtype=torch.float64)[0]
    exact = maximize_quadratic(H, g, 1.0).value
    assert maximize_in_krylov_space(H, g, [g], 1.0, 4).value < 0.9 * exact
    assert maximize_in_krylov_space(H, g, [g, top], 1.0, 4).value == pytest.approx(exact)


def test_starts_that_are_zero_span_nothing():
    zero = torch.zeros(3, dtype=torch.float64)
    assert maximize_in_krylov_space(symmetric(3, 0), zero, [zero], 1.0, 3).value == 0


def test_no_more_products_than_steps_and_an_invariant_space_ends_early():
    identity = Rotated(torch.ones(5))
    maximize_in_krylov_space(identity, vector(5, 0), [vector(5, 0), vector(5, 1)], 1.0, 4)
    assert identity.num_products == 2
