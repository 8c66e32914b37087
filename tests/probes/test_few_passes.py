"""Directions in one pass, or two where the spectrum falls slowly, against dense gradients of any spectrum."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tangora import find_pairs, initialize
from tangora.geometry.tangent import dense_captured_energy, frame
from tangora.probes import gradient_spectra
from tests.adapters.models import Holder

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
    spectrum = gradient_spectra(
        model,
        batches,
        rank,
        loss_fn=lambda each, x: (each(x) * G.T).sum(),
        progress=lambda done, total: calls.append(done),
        **options,
    )["it"]
    assert len(calls) == copies * spectrum.passes
    return spectrum


def captured(spectrum, G, r=RANK):
    """What LoRA-GA's factors capture: the first directions on the right, the next ones on the left."""
    return float(dense_captured_energy(frame(spectrum.svd.Vh[:r], spectrum.svd.U[:, r : 2 * r]), G))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("decay", "passes"), [(0.5, 1), (0.1, 1), (0.03, 2), (0.01, 2), (0.0, 2)])
def test_a_second_pass_is_made_where_the_spectrum_falls_slowly(decay, passes, seed):
    G = matrix(decay, seed=seed)
    adaptive = read(G, power_iterations=None, seed=seed)
    assert adaptive.passes == passes
    four = captured(read(G, power_iterations=1, seed=seed), G)
    assert captured(adaptive, G) >= 0.95 * four
    if passes == 2 and decay:  # no directions of a flat spectrum are better than others
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
    assert torch.equal(one.svd.U, again.svd.U)
    other = read(G, power_iterations=None, seed=1)
    assert not torch.allclose(one.svd.S, other.svd.S, rtol=1e-3)


@pytest.mark.parametrize(
    ("method", "options", "passes"),
    [
        ("lora-ga", {}, 1),
        ("lora-one", {}, 1),
        ("one-step", {"step": 0.1}, 1),
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
