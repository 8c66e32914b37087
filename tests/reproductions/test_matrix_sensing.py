"""E4: the gradient against one made measurement by measurement, what every method reduces to, rates and counts."""

import json

import pytest
import torch

from reproductions.matrix_sensing import QUICK, Settings, run
from reproductions.matrix_sensing.methods import METHODS
from reproductions.matrix_sensing.problem import (
    draw_problems,
    measurements,
    nearby_start,
    random_start,
    spectral_start,
)
from reproductions.matrix_sensing.solve import solve
from tangora import InputError
from tangora.experiments.values import validated
from tests.tolerances import assert_close

FIRST_ORDER = ("Euler", "LoRA-Pro SGD", "SVD retraction", "parallel BUG", "BUG", "ScaledGD", "full descent")


@pytest.fixture(scope="module")
def quick():
    return run(Settings(**QUICK), lambda _done, _total: None)


@pytest.fixture(scope="module")
def problems():
    return draw_problems(7, 5, 2, [1.0, 10.0], 60, [0, 1])


def naive_gradient(W, target, rows):
    """Sum <M_i, W - W*> M_i, one measurement after the other."""
    total = torch.zeros_like(W)
    for row in rows:
        M = row.reshape(W.shape)
        total += (M * (W - target)).sum() * M
    return total


def test_gradient_is_the_naive_sum_over_measurements():
    generator = torch.Generator().manual_seed(4)
    rows = measurements(50, 35, generator)
    drawn = draw_problems(7, 5, 2, [1.0, 10.0], None, [4])
    stack = drawn._replace(gram=(rows.mT @ rows)[None])
    W = torch.randn(1, 2, 7, 5, generator=generator, dtype=torch.float64)
    seen = stack.gradient(W)
    for column in range(2):
        assert_close(seen[0, column], naive_gradient(W[0, column], stack.target[0, column], rows), 1e-12)


def test_targets_have_the_wanted_spectrum():
    drawn = draw_problems(9, 8, 3, [1.0, 100.0], None, [0])
    values = torch.linalg.svdvals(drawn.target[0])
    assert_close(values[0, :3], torch.ones(3, dtype=torch.float64), 1e-12)
    assert_close(values[1, :3], torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64), 1e-12)
    assert values[:, 3:].max() < 1e-12


def test_spectral_start_is_the_truncated_backprojection(problems):
    A, B = spectral_start(problems, 2)
    expected = problems.backprojection()
    U, values, Vh = torch.linalg.svd(expected, full_matrices=False)
    assert_close(B @ A, (U[..., :2] * values[..., None, :2]) @ Vh[..., :2, :], 1e-12)
    assert_close(B.mT @ B, A @ A.mT, 1e-12)


def test_nearby_start_is_as_near_as_asked():
    drawn = draw_problems(9, 8, 3, [1.0, 100.0], None, [0])
    A, B = nearby_start(drawn, 3, 0.1, seed=1)
    distance = torch.linalg.matrix_norm(B @ A - drawn.target)
    smallest = torch.linalg.svdvals(drawn.target)[..., 2]
    assert (distance <= 0.2 * smallest).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_start_is_the_matrix_it_was_made_from(name, problems):
    start = spectral_start(problems, 2)
    method = METHODS[name]
    assert_close(method.weight(method.start(start)), start.B @ start.A, 1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_merge_takes_from_each_where_told(name, problems):
    method = METHODS[name]
    one, other = (method.start(random_start(problems, 2, 1.0, seed)) for seed in (0, 1))
    mask = torch.tensor([[True, False], [False, True]])
    merged = method.weight(method.merge(mask, one, other))
    expected = torch.where(mask[..., None, None], method.weight(one), method.weight(other))
    assert_close(merged, expected, 1e-14)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.own_rates])
def test_a_small_step_descends_along_the_projected_gradient(name, problems):
    # all schemes and all baselines that move W like full fine-tuning agree to first order; plain descent does not
    method, start, h = METHODS[name], spectral_start(problems, 2), 1e-6
    W = start.B @ start.A
    state, evaluations = method.step(problems, method.start(start), h)
    g = problems.gradient(W)
    P_B, P_A = start.B @ torch.linalg.pinv(start.B), torch.linalg.pinv(start.A) @ start.A
    expected = g if name == "full descent" else P_B @ g + g @ P_A - P_B @ g @ P_A
    velocity = (W - method.weight(state)) / h
    error = torch.linalg.matrix_norm(velocity - expected) / torch.linalg.matrix_norm(expected)
    assert evaluations >= 1
    if name in ("plain descent", "ScaledGD"):
        assert (error > 1e-2).all()
    else:
        assert (error < 1e-3).all()


@pytest.mark.parametrize("name", FIRST_ORDER)
@pytest.mark.parametrize("size", [0.25, 0.5])
def test_one_gradient_methods_contract_a_quadratic_by_one_minus_step(name, size):
    drawn = draw_problems(10, 9, 2, [1.0, 100.0], None, [0])
    trace = solve(
        METHODS[name], drawn, nearby_start(drawn, 2, 0.1, 0), size, tolerance=0.0, max_iterations=12
    )
    rate = (trace.errors[12] / trace.errors[4]) ** (1 / 8)
    assert (rate - (1 - size)).abs().max() < 0.02


def test_plain_descent_contracts_slowly_where_the_condition_is_bad():
    drawn = draw_problems(10, 9, 2, [1.0, 100.0], None, [0])
    trace = solve(
        METHODS["plain descent"], drawn, nearby_start(drawn, 2, 0.1, 0), 0.5, tolerance=0.0, max_iterations=12
    )
    rate = (trace.errors[12] / trace.errors[4])[0] ** (1 / 8)
    assert rate[0] < 0.6
    assert rate[1] > 0.9


def test_parallel_bug_repeats_the_svd_retraction(problems):
    start = spectral_start(problems, 2)
    errors = [
        solve(METHODS[name], problems, start, 0.5, tolerance=1e-6, max_iterations=10).errors
        for name in ("parallel BUG", "SVD retraction")
    ]
    assert_close(errors[0], errors[1], 1e-8)


def test_adam_is_torchs(problems):
    start = spectral_start(problems, 2)
    parameters = [torch.nn.Parameter(factor.clone(memory_format=torch.contiguous_format)) for factor in start]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    method = METHODS["Adam on factors"]
    state = method.start(start)
    for _ in range(5):
        optimizer.zero_grad()
        A, B = parameters
        g = problems.gradient((B @ A).detach())
        (g * (B @ A)).sum().backward()
        optimizer.step()
        state, _ = method.step(problems, state, 0.05)
    assert_close(method.weight(state), (parameters[1] @ parameters[0]).detach(), 1e-12)


def test_a_problem_that_diverges_does_not_touch_the_others(problems):
    # six times the measurements' weight makes the step of the second seed far too long
    start = spectral_start(problems, 2)
    mixed = problems._replace(gram=torch.stack([problems.gram[0], 6 * problems.gram[1]]))
    trace = solve(METHODS["Euler"], mixed, start, 0.5, tolerance=1e-6, max_iterations=400)
    alone = solve(
        METHODS["Euler"],
        problems.single(0, 1),
        type(start)(start.A[:1, 1:], start.B[:1, 1:]),
        0.5,
        tolerance=1e-6,
        max_iterations=400,
    )
    assert trace.iterations[0, 1] == alone.iterations[0, 0] < 400
    assert trace.iterations[1].isinf().all()


def test_quick_run_agrees_with_the_derivation(quick):
    assert [check.claim for check in quick.checks if not check.passed] == []
    plain = quick.data["conditions"]["plain descent"][0]["iterations"]
    assert plain[0][0] < 70
    assert plain[0][1] is None  # the negative control


def test_a_run_is_deterministic():
    settings = Settings(**QUICK | {"size": 8, "max_iterations": 10})
    first, second = (run(settings, lambda _done, _total: None) for _ in range(2))
    assert json.dumps(first.data) == json.dumps(second.data)


def test_other_ranks_steps_and_starts_are_tabulated():
    heard = []
    settings = Settings(
        size=8,
        rank=1,
        conditions=[10.0],
        num_seeds=1,
        other_steps=[1.0],
        adam_rates=[0.1, 0.03],
        max_iterations=5,
        max_iterations_elsewhere=3,
        ranks=[(1, 2)],
        random_size=0.1,
    )
    result = run(settings, lambda done, total: heard.append((done, total)))
    assert heard == [(done, 5 * len(METHODS)) for done in range(1, 5 * len(METHODS) + 1)]
    assert len(result.tables) == 4
    assert any("rank 1, searched 2" in table.columns for table in result.tables)


@pytest.mark.messages
def test_bad_settings_are_named():
    with pytest.raises(InputError, match=r"10 among them; got \[1.0, 100.0\]"):
        validated(Settings, {"conditions": [1.0, 100.0]})
    settings = Settings(size=4, rank=1, conditions=[10.0], num_seeds=1, ranks=[(3, 2)])
    with pytest.raises(InputError, match=r"ranks must be pairs .* got \(3, 2\)"):
        run(settings, lambda _done, _total: None)
