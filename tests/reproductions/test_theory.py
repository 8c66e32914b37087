"""The experiments of LoRA-One's theory: quick runs agree with the source, and their parts with dense linear algebra."""

import numpy as np
import pytest
import torch

from reproductions import relu_shift
from reproductions.__main__ import module_of, settings_of
from reproductions.linear_shift.dynamics import (
    Problems,
    draw_problems,
    first_below,
    follow,
    follow_rates,
    lora_starts,
    start_errors,
)
from reproductions.shift import (
    Factors,
    contraction,
    descend,
    draw_inputs,
    draw_shift,
    plain_step,
    sine_of_angle,
    slope,
    spectral_start,
)
from reproductions.toy import descend as descend_toy
from reproductions.toy import distance_to_minimisers, toy_loss

THEORY = ("toy", "linear-shift", "relu-shift")


def quick(name, seed=0):
    heard = []
    settings = settings_of(name, {}, quick=True, seed=seed)
    result = module_of(name).run(settings, lambda *done: heard.append(done))
    return result, heard


@pytest.fixture(scope="module")
def runs():
    return {name: quick(name) for name in THEORY}


@pytest.mark.parametrize("name", THEORY)
def test_quick_run_agrees_with_the_source(runs, name):
    result, heard = runs[name]
    assert [check.claim for check in result.checks if not check.passed] == []
    assert result.findings
    assert [done for done, _ in heard] == list(range(1, heard[-1][1] + 1))


@pytest.mark.parametrize("name", ["toy", "linear-shift", pytest.param("relu-shift", marks=pytest.mark.slow)])
def test_run_depends_on_the_seed_and_on_nothing_else(runs, name):
    torch.manual_seed(123)
    assert quick(name)[0] == runs[name][0]
    assert quick(name, seed=1)[0] != runs[name][0]


def test_toy_gradient_is_autograd_s():
    start = torch.tensor([0.3, -0.7, 0.4], dtype=torch.float64, requires_grad=True)
    toy_loss(start).backward()
    assert start.grad is not None
    torch.testing.assert_close(
        descend_toy(start.detach(), 0.1, 1)[1], start.detach() - 0.1 * start.grad, rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("point", [(0.3, -0.7, 0.4), (2.0, 1.0, 1.0), (-1.0, 0.5, -3.0), (0.0, 0.0, 0.0)])
def test_distance_to_the_minimisers_is_the_smallest_of_a_fine_grid(point):
    t = np.concatenate([-np.geomspace(1e-2, 1e2, 400_001), np.geomspace(1e-2, 1e2, 400_001)])
    a1, a2, b = point
    grid = np.sqrt((2 / t - a1) ** 2 + (1 / t - a2) ** 2 + (t - b) ** 2).min()
    assert distance_to_minimisers(torch.tensor(point, dtype=torch.float64)) == pytest.approx(grid, abs=1e-6)


@pytest.fixture(scope="module")
def linear():
    seeds = range(2)
    problems = draw_problems(9, 12, 3, 3.0, 60, "gaussian", seeds)
    return problems, seeds


def test_theorem_3_1_against_a_dense_svd(linear):
    problems, seeds = linear
    factors = lora_starts(problems, 6, torch.tensor([0.5], dtype=torch.float64), seeds)
    eta = 0.1
    for seed in seeds:
        A, B = factors.A[0, seed].numpy(), factors.B[0, seed].numpy()
        shift, covariance = problems.shift[seed].numpy(), problems.covariance[seed].numpy()
        outside_G = np.linalg.svd(-shift @ covariance)[0][:, 3:]
        for _ in range(200):
            g = (B @ A - shift) @ covariance
            A, B = A - eta * B.T @ g, B - eta * g @ A.T
            assert np.linalg.norm(outside_G.T @ np.linalg.svd(B)[0][:, :3], 2) < 1e-10
        # not so for the rows of A, nor for B without LoRA's start
        assert np.linalg.norm(np.linalg.svd(shift @ covariance)[2][3:] @ np.linalg.svd(A)[2][:3].T, 2) > 0.1


def test_dynamics_see_what_a_dense_svd_sees(linear):
    problems, seeds = linear
    eta = torch.tensor([0.1], dtype=torch.float64)
    start = lora_starts(problems, 6, torch.tensor([0.01], dtype=torch.float64), seeds)
    seen = follow(problems, start, 3, (eta, eta), 30)
    A, B = start.A[0, 1].numpy(), start.B[0, 1].numpy()
    shift, covariance = problems.shift[1].numpy(), problems.covariance[1].numpy()
    G = -shift @ covariance
    H = np.block([[np.eye(12), -0.1 * G.T], [-0.1 * G, np.eye(9)]])
    Z_linear = np.linalg.matrix_power(H, 30) @ np.vstack([A.T, B])
    for _ in range(30):
        g = (B @ A - shift) @ covariance
        A, B = A - 0.1 * B.T @ g, B - 0.1 * g @ A.T
    right = np.linalg.svd(G)[2]
    sine = np.linalg.norm(right[3:] @ np.linalg.svd(A)[2][:3].T, 2)
    deviation = np.linalg.norm(np.vstack([A.T, B]) - Z_linear, 2) / np.linalg.norm(Z_linear, 2)
    assert float(seen.sine_A[-1, 0, 1]) == pytest.approx(sine, rel=1e-6)
    assert float(seen.deviation[-1, 0, 1]) == pytest.approx(deviation, rel=1e-6)
    assert float(seen.risk[-1, 0, 1]) == pytest.approx(0.5 * np.sum((B @ A - shift) ** 2), rel=1e-10)


def test_gradient_is_autograd_s(linear):
    problems, _ = linear
    generator = torch.Generator().manual_seed(5)
    X = draw_inputs(40, 12, "uniform", generator)
    one = Problems(problems.shift[:1], (X.T @ X / 40)[None])
    Y = torch.randn(1, 9, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    ((X @ (Y[0] - one.shift[0]).T).square().sum() / 80).backward()
    torch.testing.assert_close(one.gradient(Y.detach()), Y.grad, rtol=1e-12, atol=1e-12)


def test_plain_step_is_autograd_s(linear):
    problems, seeds = linear
    A, B = (torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 12), (9, 4)))
    X = torch.linalg.cholesky(problems.covariance).mT
    (0.5 * (X @ (B @ A - problems.shift).mT).square().sum()).backward()
    found = plain_step(Factors(A.detach(), B.detach()), problems.gradient((B @ A).detach()))
    torch.testing.assert_close(found.A, A.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.B, B.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inputs", ["gaussian", "rademacher", "uniform"])
def test_inputs_have_unit_covariance(inputs):
    X = draw_inputs(40_000, 4, inputs, torch.Generator().manual_seed(0))
    torch.testing.assert_close(X.T @ X / 40_000, torch.eye(4, dtype=torch.float64), rtol=0, atol=0.05)


def test_shift_has_the_spectrum_that_was_asked_for():
    values = torch.linalg.svdvals(draw_shift(9, 7, 3, 100.0, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(
        values[:3], torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64), rtol=1e-10, atol=0
    )
    assert values[3] < 1e-12


def test_sine_is_accurate_for_small_angles():
    angle = 1e-9
    basis = torch.eye(4, 1, dtype=torch.float64)
    other = torch.tensor([[np.cos(angle)], [np.sin(angle)], [0.0], [0.0]])
    assert float(sine_of_angle(basis, other)) == pytest.approx(1e-9, rel=1e-6)


def test_spectral_start_is_the_best_step_of_its_rank():
    G = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = spectral_start(G, 2, step=0.7)
    U, S, Vh = torch.linalg.svd(G[1, 2])
    torch.testing.assert_close(start.product[1, 2], -0.7 * (U[:, :2] * S[:2]) @ Vh[:2])
    torch.testing.assert_close(start.B.mT @ start.B, start.A @ start.A.mT)


def test_more_examples_bring_the_spectral_start_nearer():
    errors = start_errors(10, 12, 3, 10.0, (24, 96, 384), "rademacher", 0)
    assert errors[0] > errors[1] > errors[2] > 0


def test_only_preconditioning_makes_the_condition_number_harmless(linear):
    problems = [draw_problems(9, 12, 3, condition, 800, "gaussian", range(2)) for condition in (1.0, 100.0)]
    stacked = Problems(*(torch.stack(parts) for parts in zip(*problems, strict=True)))
    rates = follow_rates(stacked, 3, 0.5, 200, 1e-6)
    assert (rates.preconditioned[-1] < 1e-10).all()
    assert (rates.plain[-1, 0] < 1e-10).all()
    assert (rates.plain[-1, 1] > 1e-6).all()


def test_descent_ends_when_the_watcher_says_so():
    seen = []
    start = Factors(torch.ones(1, 2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64))
    descend(start, lambda Y: Y, plain_step, (0.1, 0.1), 9, lambda t, _: seen.append(t) or t == 4)
    assert seen == [0, 1, 2, 3, 4]


def test_fits_recover_what_they_were_made_of():
    t = torch.arange(50, dtype=torch.float64)
    assert contraction(0.3 * 0.8**t, 1e-3, 1.0) == pytest.approx(0.8)
    assert np.isnan(contraction(0.3 * 0.8**t, 1e-30, 1e-29))
    assert float(slope(t, 3 - 2 * t)) == pytest.approx(-2)
    curves = torch.tensor([[3.0, 1.0], [2.0, 1.0], [1.0, 3.0]])
    assert first_below(curves, 2.0).tolist() == [1.0, 0.0]
    assert first_below(curves, 0.5).isnan().all()


RELU = relu_shift.Settings(m=5, n=6, examples=4096, conditions=(1.0, 3.0))


def test_true_relu_gradient_is_autograd_s():
    problem = relu_shift.draw_problem(RELU, 0)
    generator = torch.Generator().manual_seed(1)
    Y = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    before = problem.inputs @ (problem.weight + Y).mT
    after = problem.inputs @ (problem.weight + problem.shift).mT
    ((before.relu() - after.relu()).square().sum() / (2 * 4096)).backward()
    torch.testing.assert_close(problem.gradient(Y.detach(), "true"), Y.grad, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(problem.gradient(Y.detach(), "GLM-tron"), Y.grad, rtol=0.1)


def test_expected_glm_gradient_is_half_the_error():
    problem = relu_shift.draw_problem(RELU.model_copy(update={"examples": 400_000}), 0)
    Y = 0.3 * torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(problem.gradient(Y, "GLM-tron"), (Y - problem.shift) / 2, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ["GLM-tron", "true"])
def test_both_gradients_vanish_at_the_shift(kind):
    problem = relu_shift.draw_problem(RELU, 0)
    assert problem.gradient(problem.shift, kind).abs().max() == 0
    assert (problem.error(problem.shift, RELU.rank) == 0).all()
    assert (problem.error(problem.start(kind, RELU.rank).product, RELU.rank) < 1).all()
