"""Traces and norms: exact where they must be, unbiased, and with errors that are worth what they say."""

import math

import pytest
import torch

from tangora import InputError
from tangora.curvature.trace import TraceEstimate, frobenius_norm, hutch_plus_plus, hutchinson
from tests.curvature.spectra import Function, Rotated, neural_like

METHODS = [hutchinson, hutch_plus_plus, frobenius_norm]


def true_value(method, operator):
    return float(operator.values.norm() if method is frobenius_norm else operator.values.sum())


@pytest.mark.parametrize(
    ("method", "dtype"), [*((each, torch.float64) for each in METHODS), (hutch_plus_plus, torch.float32)]
)
def test_standard_errors_cover_the_truth_and_estimates_are_unbiased(method, dtype):
    operator = Rotated(neural_like(200), dtype=dtype)
    truth = true_value(method, operator)
    found = [method(operator, products=20, seed=seed) for seed in range(300)]
    inside = sum(low <= truth <= high for low, high in (estimate.interval(0.95) for estimate in found))
    assert 0.88 <= inside / 300 <= 0.99
    # of the norm only the square is unbiased
    power = 2 if method is frobenius_norm else 1
    values = torch.tensor([estimate.value for estimate in found]).double() ** power
    assert abs(float(values.mean()) - truth**power) < 4 * float(values.std()) / 300**0.5


@pytest.mark.parametrize("method", METHODS)
def test_products_are_counted_and_told(method):
    operator, calls = Rotated(neural_like(200)), []
    estimate = method(operator, products=13, progress=lambda *call: calls.append(call))
    assert estimate.products == operator.num_products == 13
    assert [call[1:] for call in calls] == [(count, 13) for count in range(1, 14)]


def test_hutchinson_is_exact_for_a_diagonal_operator():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate = hutchinson(torch.diag(values), products=3)
    assert estimate.value == pytest.approx(float(values.sum()), rel=1e-12)
    assert estimate.standard_error < 1e-12
    assert estimate.samples == 3


@pytest.mark.parametrize("method", [hutch_plus_plus, frobenius_norm])
def test_it_is_exact_when_the_krylov_space_is_everything(method):
    operator = Rotated(neural_like(60))
    estimate = method(operator, products=200)
    assert estimate.value == pytest.approx(true_value(method, operator), rel=1e-12)
    assert estimate.standard_error == 0.0
    assert estimate.products == operator.num_products == 60


@pytest.mark.parametrize("values", [[0.0] * 40, [5.0, -3.0, 1.0] + [0.0] * 37])
@pytest.mark.parametrize("method", [hutch_plus_plus, frobenius_norm])
def test_it_is_exact_for_low_rank(values, method):
    operator = Rotated(values)
    estimate = method(operator, products=12)
    assert estimate.value == pytest.approx(true_value(method, operator), abs=1e-12)
    assert estimate.standard_error < 1e-12


def test_hutch_plus_plus_is_better_where_there_are_outliers():
    operator = Rotated(neural_like(1000))
    truth = float(operator.values.sum())
    errors = {
        method: sum((method(operator, products=60, seed=seed).value - truth) ** 2 for seed in range(10))
        for method in (hutchinson, hutch_plus_plus)
    }
    assert errors[hutch_plus_plus] < errors[hutchinson] / 100


def test_half_a_percent_from_sixty_products():
    operator = Rotated(neural_like())
    truth = float(operator.values.sum())
    found = [hutch_plus_plus(operator, seed=seed).value for seed in range(8)]
    assert math.sqrt(sum((value / truth - 1) ** 2 for value in found) / 8) < 0.005


def test_intervals_are_students():
    estimate = TraceEstimate(10.0, 2.0, 5, 5)
    low, high = estimate.interval(0.9)
    assert high - 10 == pytest.approx(10 - low) == pytest.approx(2 * 2.13184678, rel=1e-6)
    assert TraceEstimate(1.0, None, 1).interval() == (-math.inf, math.inf)


def test_multiples_and_roots_of_an_estimate():
    assert TraceEstimate(3.0, 0.25, 4, 5).scaled(3.0) == TraceEstimate(9.0, 0.75, 4, 5)
    assert TraceEstimate(9.0, 0.75, 4, 5).root() == TraceEstimate(3.0, 0.125, 4, 5)
    assert TraceEstimate(0.0, 0.0, 4, 4).root() == TraceEstimate(0.0, 0.0, 4, 4)
    assert TraceEstimate(4.0, None, 4).scaled(4.0).root() == TraceEstimate(4.0, None, 4)


@pytest.mark.messages
def test_bad_input():
    for method, products in ((hutchinson, 1), (hutch_plus_plus, 3)):
        with pytest.raises(InputError, match="products"):
            method(torch.eye(5), products=products)
    with pytest.raises(InputError, match="product 1 is not finite"):
        frobenius_norm(Function(lambda vector: vector * torch.inf, 5))
    with pytest.raises(InputError, match="level"):
        TraceEstimate(1.0, 1.0, 2, 2).interval(1.0)
