"""Singular triplets of gradients that are never formed, against the dense decomposition of those that are."""

import pytest
import torch
from torch import nn

from tangora import InputError
from tangora.probes import gradient_norms, gradient_svds, probed_layers
from tests.cases import combinations
from tests.models import Holder, inputs_of, loss_of
from tests.probes.models import (
    OWN_LOSS_TOLERANCE,
    TOLERANCE,
    adapted,
    batches_of,
    dense_gradients,
    exact_loss,
    mean_loss_of,
    model_of,
)
from tests.tolerances import assert_close

RANK = 3


def mean_exact_loss(batches):
    return lambda model: sum(exact_loss(model, batch) for batch in batches) / len(batches)


def spectra_and_gradients(name, peft=True, count=3, **options):
    model, batches = adapted(name) if peft else model_of(name), batches_of(name, count)
    gradients = dense_gradients(model, probed_layers(model), mean_exact_loss(batches))
    return gradient_svds(model, batches, RANK, loss_fn=exact_loss, **options), gradients


def check_triplets(spectrum, G, tolerance, rank=RANK):
    """Values, and both subspaces as far as a gap in the spectrum defines them."""
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    rank = min(rank, len(S))
    assert (spectrum.svd.S[:rank] - S[:rank]).abs().max() <= tolerance * S[0]
    after = S[rank] if rank < len(S) else 0.0
    gap = float((S[rank - 1] - after) / S[0])
    if gap > 1e-2:
        for seen, exact in ((spectrum.svd.U[:, :rank], U[:, :rank]), (spectrum.svd.Vh[:rank].T, Vh[:rank].T)):
            sine = float((seen - exact @ (exact.T @ seen)).norm())
            assert sine <= 10 * tolerance / gap
            eye = torch.eye(rank, dtype=seen.dtype)
            assert (seen.T @ seen - eye).abs().max() < (1e-5 if seen.dtype == torch.float32 else 1e-12)


# transposed layers, embeddings and convolutions; the others have nothing that these two lack
@pytest.mark.parametrize(
    "name",
    combinations(["gpt2", "t5", "vit", "bert", "llama"], quick=lambda name: name in ("gpt2", "vit")),
)
def test_leading_triplets_with_enough_power_iterations(name):
    spectra, gradients = spectra_and_gradients(name, count=1, oversampling=8, power_iterations=9)
    assert spectra.keys() == gradients.keys()
    for key, G in gradients.items():
        assert len(spectra[key].svd.S) == min(RANK + 8, *G.shape)
        check_triplets(spectra[key], G, max(1e-8, TOLERANCE.get(name, 0)))
        energy = float(G.square().sum())
        assert abs(spectra[key].energy - energy) <= 6 * spectra[key].energy_error + 1e-4 * energy


def test_a_plain_model_and_its_own_loss():
    model, batches = model_of("gpt2"), batches_of("gpt2", 2)
    spectra = gradient_svds(model, batches, RANK, power_iterations=5)
    for key, G in dense_gradients(model, probed_layers(model), mean_loss_of(batches)).items():
        check_triplets(spectra[key], G, OWN_LOSS_TOLERANCE["gpt2"])


def test_layers_narrower_than_the_sketch_are_exact_without_power_iterations():
    spectra, gradients = spectra_and_gradients("bert", oversampling=9, power_iterations=0)
    for key, G in gradients.items():
        if min(G.shape) <= RANK + 9:
            check_triplets(spectra[key], G, 1e-10)
            assert spectra[key].energy == pytest.approx(float(G.square().sum()), rel=1e-9)
            assert spectra[key].energy_error < 1e-12 * spectra[key].energy
            assert len(spectra[key].svd.S) == min(G.shape)


@pytest.mark.parametrize("one_pass", [False, True])
def test_gradients_of_low_rank_are_exact(one_pass):
    torch.manual_seed(0)
    model = Holder(nn.Linear(30, 20).double())
    batch = torch.randn(5, 30, dtype=torch.float64)  # five examples: rank five
    spectrum = gradient_svds(
        model, [batch], 5, power_iterations=0, one_pass=one_pass, loss_fn=lambda m, x: loss_of(m(x))
    )["it"]
    (G,) = dense_gradients(model, probed_layers(model), lambda m: loss_of(m(batch))).values()
    check_triplets(spectrum, G, 1e-10, rank=5)
    assert spectrum.svd.S[5:].abs().sum() < 1e-10 * spectrum.svd.S[0]
    if not one_pass:
        assert spectrum.energy == pytest.approx(float(G.square().sum()), rel=1e-10)


def test_one_pass_is_close_and_reads_once():
    passes = []
    spectra, gradients = spectra_and_gradients(
        "bert", one_pass=True, oversampling=8, progress=lambda _, done, total: passes.append((done, total))
    )
    assert passes == [(1, 3), (2, 3), (3, 3)]
    for key, G in gradients.items():
        S = torch.linalg.svdvals(G)
        assert (spectra[key].svd.S[:RANK] - S[:RANK]).abs().max() < 0.15 * S[0]
        energy = float(G.square().sum())
        assert abs(spectra[key].energy - energy) < 5 * spectra[key].energy_error
        assert spectra[key].energy_error > 0


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_layers_with_few_outputs(m, one_pass):
    torch.manual_seed(0)
    model = Holder(nn.Linear(9, m).double())
    batch = torch.randn(6, 9, dtype=torch.float64)
    spectrum = gradient_svds(
        model, [batch], 4, one_pass=one_pass, loss_fn=lambda model, x: loss_of(model(x))
    )["it"]
    (G,) = dense_gradients(model, probed_layers(model), lambda model: loss_of(model(batch))).values()
    check_triplets(spectrum, G, 1e-10)
    energy = float(G.square().sum())
    assert abs(spectrum.energy - energy) <= 6 * spectrum.energy_error + 1e-9 * energy


def test_energies_are_unbiased():
    """Over seeds the mean of the estimates, which have no power iterations to help them, is the energy."""
    torch.manual_seed(0)
    model = Holder(nn.Linear(30, 20).double())
    batch = torch.randn(60, 30, dtype=torch.float64)
    (G,) = dense_gradients(model, probed_layers(model), lambda m: loss_of(m(batch))).values()
    energy = float(G.square().sum())
    for one_pass in (False, True):
        found = [
            gradient_svds(
                model,
                [batch],
                2,
                oversampling=0,
                power_iterations=0,
                one_pass=one_pass,
                seed=seed,
                loss_fn=lambda m, x: loss_of(m(x)),
            )["it"]
            for seed in range(40)
        ]
        errors = torch.tensor([spectrum.energy_error for spectrum in found])
        mean = sum(spectrum.energy for spectrum in found) / 40
        assert abs(mean - energy) < 3 * float(errors.mean()) / 40**0.5
        assert errors.min() > 0


# --- which, how many, and how reproducible ---


def test_ranks_by_layer():
    model, batches = model_of("bert"), batches_of("bert", 1)
    layers = probed_layers(model, names=["query", "classifier"])
    ranks = {layer.name: 2 + index for index, layer in enumerate(layers)}
    spectra = gradient_svds(model, batches, ranks, layers=layers, oversampling=1, loss_fn=exact_loss)
    for layer in layers:
        svd = spectra[layer.name].svd
        k = min(ranks[layer.name] + 1, layer.m, layer.n)
        assert (svd.U.shape, svd.S.shape, svd.Vh.shape) == ((layer.m, k), (k,), (k, layer.n))


@pytest.mark.parametrize("one_pass", [False, True])
def test_seeds_decide_and_the_global_state_does_not(one_pass):
    model, batches = model_of("bert"), batches_of("bert", 1)

    def values(seed, state):
        torch.manual_seed(state)
        spectra = gradient_svds(
            model, batches, 2, oversampling=0, power_iterations=0, seed=seed, one_pass=one_pass
        )
        return torch.cat([spectrum.svd.S for spectrum in spectra.values()])

    one = values(0, state=0)
    assert_close(
        values(0, state=1), one, 1e-12
    )  # LAPACK's last bits depend on where in memory its arguments lie
    assert (values(1, state=0) - one).abs().max() > 1e-3 * one.max()


def test_precision_follows_the_model():
    batches = batches_of("bert", 1)
    for dtype, expected in ((torch.float64, torch.float64), (torch.float32, torch.float32)):
        spectra = gradient_svds(model_of("bert", dtype), batches, 2)
        assert {spectrum.svd.U.dtype for spectrum in spectra.values()} == {expected}
    rounded = gradient_svds(model_of("bert", torch.bfloat16), batches, 2, power_iterations=4)
    for name, spectrum in rounded.items():
        assert spectrum.svd.S.dtype == torch.float32
        assert spectrum.svd.S[0] == pytest.approx(float(spectra[name].svd.S[0]), rel=0.1)


@pytest.mark.parametrize("memory", [1, 8_000, 2**28])
def test_norms_are_exact_whatever_the_memory(memory):
    model, batches = adapted("gpt2"), batches_of("gpt2")
    passes = []
    norms = gradient_norms(
        model,
        batches,
        memory=memory,
        loss_fn=exact_loss,
        progress=lambda _, done, total: passes.append(total),
    )
    gradients = dense_gradients(model, probed_layers(model), mean_exact_loss(batches))
    assert norms.keys() == gradients.keys()
    for name, G in gradients.items():
        assert norms[name] == pytest.approx(float(G.norm()), rel=1e-10)
    groups = len(passes) // len(batches)
    assert len(passes) == passes[0]
    assert groups == {1: len(norms), 2**28: 1}.get(memory, groups)
    assert 1 <= groups <= len(norms)


@pytest.mark.messages
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1 for every layer; got 0 for it"),
        ({"rank": {"other": 2}}, "got 0 for it"),
        ({"oversampling": -1}, "oversampling must be a number"),
        ({"power_iterations": 0.5}, "power_iterations must be a whole number; got 0.5"),
        ({"batches": {"x": torch.ones(2)}}, "got a single batch: put it into a list"),
        ({"batches": []}, "at least one batch"),
    ],
)
def test_what_is_out_of_range_is_named(options, message):
    model = Holder(nn.Linear(7, 5).double())
    options = {"batches": [inputs_of("linear")], "rank": 2} | options
    with pytest.raises(InputError, match=message):
        gradient_svds(model, loss_fn=lambda m, batch: loss_of(m(*batch)), **options)
