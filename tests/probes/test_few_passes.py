"""Directions in one pass, or three where the spectrum falls slowly, against dense gradients of any spectrum."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tangora import find_pairs, initialize
from tangora.geometry.tangent import dense_captured_energy, frame
from tangora.probes import gradient_svds
from tests.models import Holder

M, N, RANK = 400, 500, 8


def matrix(decay: float, m=M, n=N, seed=0) -> torch.Tensor:
    """A random matrix with singular values ``exp(-decay k)``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(size, min(m, n), dtype=torch.float64, generator=generator) for size in (m, n))
    U, V = (torch.linalg.qr(each).Q for each in drawn)
    return (U * torch.exp(-decay * torch.arange(min(m, n)))) @ V.T


def read(G, rank=2 * RANK, copies=1, **options):
    """Spectra of a layer whose mean gradient is ``G``: a linear loss on unit vectors."""
    m, n = G.shape
    model = Holder(nn.Linear(n, m, bias=False).double())
    batches, calls = [torch.eye(n, dtype=torch.float64)] * copies, []
    spectrum = gradient_svds(
        model,
        batches,
        rank,
        loss_fn=lambda each, x: (each(x) * G.T).sum(),
        progress=lambda _, done, total: calls.append(done),
        **options,
    )["it"]
    assert len(calls) == copies * spectrum.passes
    return spectrum


def captured(spectrum, G, r=RANK):
    """What LoRA-GA's factors capture: the first directions on the right, the next ones on the left."""
    return float(dense_captured_energy(frame(spectrum.svd.Vh[:r], spectrum.svd.U[:, r : 2 * r]), G))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("decay", "passes"), [(0.5, 1), (0.1, 1), (0.03, 3), (0.01, 3), (0.0, 3)])
def test_more_passes_are_made_where_the_spectrum_falls_slowly(decay, passes, seed):
    G = matrix(decay, seed=seed)
    adaptive = read(G, power_iterations=None, seed=seed)
    assert adaptive.passes == passes
    four = captured(read(G, power_iterations=1, seed=seed), G)
    assert captured(adaptive, G) >= 0.95 * four
    if passes == 3 and decay:  # no directions of a flat spectrum are better than others
        assert captured(adaptive, G) > captured(read(G, one_pass=True, seed=seed), G)


@pytest.mark.parametrize("decay", [0.5, 0.02])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (40, 5), (3, 50), (64, 64)])
def test_sketches_as_wide_as_the_layer_are_exact(decay, shape):
    G = matrix(decay, *shape)
    spectrum = read(G, rank=min(16, *shape), power_iterations=None)
    S = torch.linalg.svdvals(G)
    assert float((spectrum.svd.S[: len(S)] - S).abs().max()) < 1e-10
    svd = spectrum.svd
    torch.testing.assert_close(svd.U * svd.S @ svd.Vh, G, rtol=0, atol=1e-10)


@pytest.mark.parametrize("decay", [0.5, 0.02])
def test_energies_of_few_passes(decay):
    G = matrix(decay)
    energy = float(G.square().sum())
    found = [read(G, power_iterations=None, seed=seed) for seed in range(8)]
    mean = sum(one.energy for one in found) / len(found)
    assert abs(mean - energy) < 0.05 * energy
    assert all(abs(one.energy - energy) < 6 * one.energy_error + 1e-2 * energy for one in found)


def test_batches_are_replayed_and_seeds_decide():
    G = matrix(0.002)
    one, again = read(G, power_iterations=None, copies=3), read(G, power_iterations=None, copies=3)
    torch.testing.assert_close(one.svd.U, again.svd.U, rtol=0, atol=1e-8)  # sums in BLAS have no fixed order
    other = read(G, power_iterations=None, seed=1)
    assert not torch.allclose(one.svd.S, other.svd.S, rtol=1e-3)


@pytest.mark.parametrize(
    ("method", "options", "passes"),
    [
        ("lora-ga", {}, 1),
        ("lora-one-v1", {}, 1),
        ("lora-one", {}, 4),
        ("one-step", {"step": 0.1}, 4),
        ("lora-one", {"power_iterations": None}, 1),
        ("lora-ga", {"power_iterations": 1}, 4),
        ("lora-ga", {"power_iterations": 0}, 2),
        ("lora-ga", {"one_pass": True}, 1),
        ("orthogonal", {}, 0),
    ],
)
def test_initialize_says_how_often_it_read(method, options, passes):
    torch.manual_seed(0)
    model = get_peft_model(Holder(nn.Linear(N, M, bias=False)), LoraConfig(r=RANK, target_modules=["it"]))
    G = matrix(0.3).float()
    batches = [torch.eye(N)]
    done = initialize(
        model, method, batches, loss_fn=lambda each, x: (each(x) * G.T).sum(), progress=False, **options
    )
    assert done.passes == passes
    if method == "lora-ga":
        (pair,) = find_pairs(model)
        assert float(dense_captured_energy(frame(*pair.factors()), G)) > 0.95


@pytest.mark.parametrize("decay", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_more_passes_find_what_four_would_in_spectra_like_powers(decay, seed):
    generator = torch.Generator().manual_seed(seed)
    U, V = (
        torch.linalg.qr(torch.randn(size, M, dtype=torch.float64, generator=generator)).Q for size in (M, N)
    )
    G = (U / torch.arange(1, M + 1) ** decay) @ V.T
    four, few = (read(G, power_iterations=count, seed=seed) for count in (1, None))
    assert captured(few, G) >= 0.95 * captured(four, G)


@pytest.mark.parametrize("method", ["lora-one", "one-step"])
def test_the_step_keeps_the_energy_of_the_best_one_of_its_rank(method):
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, M)).Q for size in (M, N))
    spikes = torch.full((M,), 0.1)
    spikes[:2] = 2.0
    G = (U * (spikes + torch.exp(-0.05 * torch.arange(M)))) @ V.T
    model = get_peft_model(Holder(nn.Linear(N, M, bias=False)), LoraConfig(r=RANK, target_modules=["it"]))
    options = {"step": 0.1} if method == "one-step" else {}
    initialize(
        model,
        method,
        [torch.eye(N)],
        loss_fn=lambda each, x: (each(x) * G.T).sum(),
        progress=False,
        **options,
    )
    (pair,) = find_pairs(model)
    A, B = pair.factors()
    step = B @ A / (B @ A).norm()
    best = torch.linalg.svdvals(G)[:RANK].norm()
    assert float((step * -G).sum()) > 0.98 * float(best)
