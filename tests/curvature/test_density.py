"""Stochastic Lanczos quadrature: exact moments, distances to the true spectrum, and what smoothing costs."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

from tangora import InputError
from tangora.curvature.density import SpectralDensity, spectral_density
from tests.curvature.spectra import (
    Rotated,
    indefinite,
    neural_like,
    pooled,
    semicircle,
    smoothed_nodes,
    wasserstein,
)


def distances(operator, found):
    extent = float(operator.values[0] - operator.values[-1])
    raw = wasserstein(*pooled(found), operator.values) / extent
    return raw, wasserstein(*smoothed_nodes(found), operator.values) / extent


def test_moments_are_those_of_the_probes():
    operator = Rotated(indefinite(100))
    found = spectral_density(operator, probes=3, steps=6)
    generator = torch.Generator().manual_seed(0)
    H = operator.dense()
    for power in range(1, 12):
        generator.manual_seed(0)
        exact = []
        for _ in range(3):
            z = (2 * torch.randint(0, 2, (100,), generator=generator, dtype=torch.int8) - 1).double()
            exact.append(float(z @ torch.linalg.matrix_power(H, power) @ z) / 100)
        moment = found.moment(power)
        assert moment.value == pytest.approx(np.mean(exact), rel=1e-10)
        assert moment.standard_error == pytest.approx(np.std(exact, ddof=1) / math.sqrt(3), rel=1e-8)
        assert moment.samples == 3
    assert found.products == moment.products == 18


def test_all_steps_give_all_eigenvalues():
    operator = Rotated(neural_like(80))
    found = spectral_density(operator, probes=1, steps=200)
    assert found.products == 80
    assert np.abs(np.array(found.nodes[0][::-1]) - operator.values.numpy()).max() < 1e-10
    assert found.moment(1).standard_error is None


@pytest.mark.parametrize("steps", [10, 20, 40])
def test_the_error_on_a_semicircle_falls_with_the_steps(steps):
    operator = Rotated(semicircle())
    raw, smooth = distances(operator, spectral_density(operator, probes=4, steps=steps))
    assert raw < 0.35 / steps
    assert smooth < raw


def test_smoothing_costs_nothing_on_a_neural_spectrum():
    operator = Rotated(neural_like())
    found = [distances(operator, spectral_density(operator, seed=seed)) for seed in range(4)]
    raw, smooth = np.mean(found, axis=0)
    assert raw < 5e-4
    assert smooth < raw


def test_float32_is_as_good():
    accurate, single = (Rotated(neural_like(1000), dtype=dtype) for dtype in (torch.float64, torch.float32))
    (one, _), (other, _) = (
        distances(accurate, spectral_density(accurate)),
        distances(single, spectral_density(single)),
    )
    assert other == pytest.approx(one, rel=0.02)


@pytest.mark.parametrize("spectrum", [semicircle, neural_like, indefinite])
def test_the_smoothed_density_is_a_density(spectrum):
    operator = Rotated(spectrum(500))
    found = spectral_density(operator, probes=2, steps=30)
    for width in (None, 0.05):
        x = found.grid(4000, width)
        assert (x.diff() > 0).all()
        values = found.smoothed(x, width)
        assert (values >= 0).all()
        assert trapezoid(values, x) == pytest.approx(1.0, abs=0.02)


def test_a_constant_width_is_a_convolution():
    found = SpectralDensity(((0.0, 2.0),), ((0.25, 0.75),), ((1.0, 1.0),), 10, 2)
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 0.5)
    expected = 0.25 * normal.log_prob(x).exp() + 0.75 * normal.log_prob(x - 2).exp()
    assert torch.allclose(found.smoothed(x, 0.5), expected.double(), rtol=1e-5)


def test_converged_nodes_stay_sharp_and_others_meet():
    found = SpectralDensity(((0.0, 1.0, 1.5, 9.0),), ((0.25,) * 4,), ((0.3, 7.0, 7.0, 0.0),), 10, 4)
    assert found.widths() == (pytest.approx((0.3, 0.25, 0.25, 9e-4)),)


def test_the_distribution_function_and_its_bounds():
    operator = Rotated(indefinite(300))
    found = spectral_density(operator, probes=6, steps=12)
    low, high = found.range
    x = torch.linspace(low - 1, high + 1, 500).double()
    share = found.cdf(x)
    assert share.value[0] == share.lower[0] == 0.0
    assert share.value[-1] == share.upper[-1] == pytest.approx(1.0)
    assert (share.value.diff() >= 0).all()
    assert (share.lower <= share.value).all()
    assert (share.value <= share.upper).all()
    # Chebyshev, Markov, Stieltjes: many more steps with the same probes stay within the bounds
    more = spectral_density(operator, probes=6, steps=200).cdf(x).value
    assert (share.lower <= more + 1e-9).all()
    assert (more <= share.upper + 1e-9).all()
    true = torch.tensor([(operator.values <= point).double().mean() for point in x])
    assert float((share.value - true).abs().mean()) < 0.03
    assert (share.lower - 0.06 <= true).all()
    assert (true <= share.upper + 0.06).all()
    one = spectral_density(operator, probes=1, steps=5).cdf(x)
    assert one.standard_error.isnan().all()


def test_zero_has_all_its_mass_at_zero():
    found = spectral_density(Rotated(torch.zeros(30)), probes=2, steps=10)
    assert found.nodes == ((0.0,), (0.0,))
    assert found.products == 2
    assert found.moment(2).value == 0.0
    assert torch.isfinite(found.smoothed(found.grid(10))).all()
    assert found.cdf(torch.tensor([-1.0, 0.0])).value.tolist() == [0.0, 1.0]


def test_the_same_seed_gives_the_same_and_progress_is_told_of_every_product():
    operator, calls = Rotated(neural_like(200)), []
    options = {"probes": 2, "steps": 8, "progress": lambda *call: calls.append(call)}
    first, second, other = (spectral_density(operator, seed=seed, **options) for seed in (0, 0, 1))
    assert first == second != other
    assert calls[:16] == [("density", count, 16) for count in range(1, 17)]


@pytest.mark.messages
def test_bad_input():
    with pytest.raises(InputError, match="probes"):
        spectral_density(torch.eye(5), probes=0)
    found = spectral_density(torch.eye(5), steps=2)
    with pytest.raises(InputError, match="width"):
        found.smoothed(torch.zeros(1), 0.0)
    with pytest.raises(InputError, match="x must be finite"):
        found.cdf(torch.tensor([math.nan]))
    with pytest.raises(InputError, match="power"):
        found.moment(0)
