"""The formulas of the starts, each against the published code's and against what it promises."""

import pytest
import torch

from tangora import InputError
from tangora._names import DIAGNOSED_STARTS
from tangora.diagnostics import GRADIENT_STARTS
from tangora.geometry.sketch import LowRankSVD
from tangora.geometry.tangent import dense_captured_energy, frame
from tangora.init import lora_ga, lora_one, lora_one_v1, one_step, orthogonal, pissa, start_method, starts
from tangora.init.lora_ga import DIRECTIONS, SCALES
from tests.reference import starts as reference
from tests.tolerances import assert_close

M, N, R, S = 18, 13, 3, 1.7


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(m=M, n=N, seed=0):
    return normal(m, n, seed=seed)


def triplets(G):
    return LowRankSVD(*torch.linalg.svd(G, full_matrices=False))


def assert_same_up_to_signs(actual, expected, tolerance=1e-10):
    """Rows of A and columns of B have a sign that no decomposition determines."""
    for one, other in ((actual[0], expected[0]), (actual[1].T, expected[1].T)):
        assert_close(one * (one * other).sum(1, keepdim=True).sign(), other, tolerance)


def energy(A, B, G):
    return float(dense_captured_energy(frame(A, B), G))


def shares(G):
    squares = torch.linalg.svdvals(G).square()
    return squares.cumsum(0) / squares.sum()


def test_the_names_that_settings_know_without_torch_are_rows_of_the_table():
    assert set(DIAGNOSED_STARTS) <= set(starts())
    assert [start for start in DIAGNOSED_STARTS if start_method(start).reads_gradients] == list(
        GRADIENT_STARTS
    )


# --- LoRA-GA ---


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", SCALES)
def test_lora_ga_is_that_of_the_published_code(direction, scale):
    G, W0 = gradient(), normal(M, N, seed=1)
    found = lora_ga(
        triplets(G),
        R,
        S,
        direction=direction,
        scale=scale,
        stable_gamma=9.0,
        weight_singular_values=torch.linalg.svdvals(W0),
    )
    assert_same_up_to_signs(found, reference.lora_ga(G, W0, R, S, direction, scale, 9.0))


def test_random_directions_are_disjoint_and_drawn_with_the_seed():
    svd = triplets(gradient())

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return lora_ga(svd, R, S, direction="random", scale="unit", generator=generator)

    A, B = draw(0)
    taken = [(A @ svd.Vh.T).abs() > 0.5, (svd.U.T @ B).abs().T > 0.5]
    to_A, to_B = ({int(i) for i in rows.nonzero()[:, 1]} for rows in taken)
    assert to_A | to_B == set(range(2 * R))
    assert not to_A & to_B
    assert all(torch.equal(one, other) for one, other in zip((A, B), draw(0), strict=True))
    assert any(not torch.equal(A, draw(seed)[0]) for seed in range(1, 4))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lora_ga_sees_all_that_rank_r_can_see(direction):
    G = gradient()
    A, B = lora_ga(triplets(G), R, S, direction=direction)
    assert energy(A, B, G) == pytest.approx(float(shares(G)[2 * R - 1]), abs=1e-10)
    for seed in range(20):  # no other pair sees more
        assert energy(normal(R, N, seed=seed), normal(M, R, seed=50 + seed), G) < energy(A, B, G)


def test_an_aligned_start_sees_half_the_directions():
    G = gradient()
    for A, B in (
        lora_one(triplets(G), R),
        lora_one_v1(triplets(G), R),
        one_step(triplets(G), R, S, step=0.1),
    ):
        assert energy(A, B, G) == pytest.approx(float(shares(G)[R - 1]), abs=1e-10)


def test_lora_ga_minimises_the_distance_of_the_first_steps():
    """|s^2 (B B'G + G A'A) - zeta G| for orthonormal directions of any size, the theorem that it is built on."""
    G = gradient()
    A, B = lora_ga(triplets(G), R, S, scale="gd")

    def distance(A, B):
        step = S**2 * (B @ (B.T @ G) + (G @ A.T) @ A)
        zeta = (step * G).sum() / step.square().sum()
        return float((zeta * step - G).norm() / G.norm())

    step = S**2 * (B @ (B.T @ G) + (G @ A.T) @ A)
    assert_close(step, reference.best_rank(G, 2 * R))
    for seed in range(20):
        other = orthogonal(M, N, R, generator=torch.Generator().manual_seed(seed))
        assert distance(A, B) < distance(*(factor.double() for factor in other))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("m", "n", "r"), [(4, 9, 3), (9, 4, 3), (4, 9, 4), (5, 5, 5), (1, 6, 1), (6, 1, 1)])
def test_lora_ga_with_fewer_directions_than_two_r(direction, m, n, r):
    G = gradient(m, n)
    A, B = lora_ga(triplets(G), r, S, direction=direction, scale="unit")
    assert_close(A @ A.T, torch.eye(r, dtype=torch.float64))
    assert_close(B.T @ B, torch.eye(r, dtype=torch.float64))
    assert energy(A, B, G) == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("scale", SCALES)
def test_factors_of_lora_ga_are_orthogonal_and_equally_long(scale):
    values = torch.linalg.svdvals(normal(M, N, seed=1))
    A, B = lora_ga(triplets(gradient()), R, S, scale=scale, weight_singular_values=values)
    length = A[0].norm()
    assert_close(A @ A.T, length**2 * torch.eye(R, dtype=torch.float64))
    assert_close(B.T @ B, length**2 * torch.eye(R, dtype=torch.float64))


def test_the_stable_size_is_the_published_one():
    """2.83 for 256 outputs, rank 8 and gamma 16, measured on the authors' code."""
    A, B = lora_ga(triplets(gradient(256, 128)), 8, 2.0)
    assert float((B @ A).norm()) == pytest.approx(2.83, abs=0.01)


@pytest.mark.parametrize("size", [1e-8, 1e-4, 1e4])
def test_no_start_but_one_step_depends_on_the_size_of_the_gradient(size):
    G = gradient()
    for start in (
        lambda svd: lora_ga(svd, R, S),
        lambda svd: lora_one(svd, R),
        lambda svd: lora_one_v1(svd, R),
    ):
        (A, B), (A1, B1) = start(triplets(size * G)), start(triplets(G))
        assert_close((B @ A).norm(), (B1 @ A1).norm())
    A, B = one_step(triplets(size * G), R, S, step=0.3)
    assert_close(S * B @ A, -0.3 * size * reference.best_rank(G, R))


# --- the others ---


@pytest.mark.parametrize("gamma", [1.0, 128.0])
def test_lora_one_is_that_of_the_published_code(gamma):
    G = gradient()
    A, B = lora_one(triplets(G), R, gamma=gamma)
    assert_same_up_to_signs((A, B), reference.lora_one(G, R, gamma))
    expected = reference.lora_one(G, R, gamma)
    assert_close(B @ A, expected[1] @ expected[0])
    # one step of gradient descent, and its factors in balance
    values = torch.linalg.svdvals(G)
    assert_close(S * B @ A, -S / (values[0] * gamma) * reference.best_rank(G, R))
    assert_close(B.T @ B, A @ A.T)
    assert float(torch.linalg.matrix_norm(S * B @ A, 2)) == pytest.approx(S / gamma)


def test_the_size_of_lora_one_is_the_published_one():
    """0.044 for rank 8, alpha 16, rsLoRA and gamma 128."""
    A, B = lora_one(triplets(gradient()), 8)
    assert float(torch.linalg.matrix_norm(16 / 8**0.5 * B @ A, 2)) == pytest.approx(0.044, abs=5e-4)


def test_the_earlier_lora_one_has_the_directions_only():
    G = gradient()
    A, B = lora_one_v1(triplets(G), R)
    assert_same_up_to_signs((A, B), reference.lora_one_v1(G, R))
    expected = reference.lora_one_v1(G, R)
    assert_close(B @ A, expected[1] @ expected[0])


def test_one_step_is_the_best_part_of_a_step():
    G = gradient()
    A, B = one_step(triplets(G), R, S, step=0.05)
    assert_close(S * B @ A, -0.05 * reference.best_rank(G, R))
    assert_close(B.T @ B, A @ A.T)
    expected = reference.one_step(G, R, S, 0.05)
    assert_close(B @ A, expected[1] @ expected[0])
    assert all((factor == 0).all() for factor in one_step(triplets(G), R, S, step=0.0))


@pytest.mark.parametrize("niter", [None, 60])
def test_pissa(niter):
    W0 = normal(M, N)
    torch.manual_seed(0)
    A, B = pissa(W0, R, S, niter=niter)
    assert_same_up_to_signs((A, B), reference.pissa(W0, R, S), 1e-10 if niter is None else 1e-6)
    assert_close(S * B @ A, reference.best_rank(W0, R), 1e-10 if niter is None else 1e-6)
    assert_close(B.T @ B, A @ A.T, 1e-6)


@pytest.mark.parametrize(("m", "n", "r"), [(18, 13, 3), (13, 18, 13), (4, 4, 4)])
def test_orthogonal(m, n, r):
    draws = [
        orthogonal(m, n, r, size=0.5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    for A, B in draws:
        assert (A.shape, B.shape) == ((r, n), (m, r))
        assert_close(A @ A.T, 0.25 * torch.eye(r), 1e-5)
        assert_close(B.T @ B, 0.25 * torch.eye(r), 1e-5)
    assert torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][0], draws[2][0])


def test_gradients_of_low_rank_still_give_full_frames():
    G = normal(M, 2) @ normal(2, N, seed=1)
    A, B = lora_ga(triplets(G), R, S, scale="unit")
    assert_close(A @ A.T, torch.eye(R, dtype=torch.float64))
    assert_close(B.T @ B, torch.eye(R, dtype=torch.float64))
    A, B = lora_one(triplets(G), R)
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()
    assert torch.linalg.matrix_rank(B @ A, rtol=1e-6) == 2


@pytest.mark.messages
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda svd: lora_ga(svd, R, S, direction="ArB"),
            r"direction must be one of ArBr, A2rBr, ArB2r, random; got 'ArB'",
        ),
        (lambda svd: lora_ga(svd, R, S, scale="stabel"), r"scale must be one of .*did you mean stable"),
        (lambda svd: lora_ga(svd, R, S, stable_gamma=0), "stable_gamma must be a number"),
        (lambda svd: lora_ga(svd, R, S, scale="weight_svd"), "needs weight_singular_values"),
        (lambda svd: lora_one(svd, R, gamma=-1.0), "gamma must be a number"),
        (lambda svd: lora_one_v1(svd, R, gamma=float("nan")), "gamma must be a number"),
        (lambda svd: one_step(svd, R, S, step=-0.1), "step must be a number"),
        (lambda svd: orthogonal(4, 4, 2, size=0.0), "size must be a number"),
    ],
)
def test_options_out_of_range_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call(triplets(gradient()))
