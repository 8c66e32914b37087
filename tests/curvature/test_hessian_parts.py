"""H = J^T H_W J + Γ and the Riemannian Hessian against their dense definitions, and the identities at B = 0."""

import copy

import pytest
import torch
from torch import Tensor

from tangora import InputError
from tangora.adapters.discover import discover
from tangora.adapters.offset import attach_offset
from tangora.curvature import CouplingPart, GaussNewton, Hessian, RiemannianHessian, WeightPart
from tests.curvature.models import (
    FLOAT64,
    NAMES,
    Problem,
    assert_matrix,
    change_gauge,
    dense,
    displacements,
    problem,
    random_vectors,
    randomize,
    shared_problem,
    shared_reference,
    small_problem,
)
from tests.models import LAYERS, adapted_layer, inputs_of, loss_of
from tests.tolerances import assert_close

TOLERANCE = {"llama": 2e-5}


def made(kind, it: Problem, **options):
    return kind(it.model, it.batches, loss_fn=it.loss_fn, **options)


def spectrum(operator) -> Tensor:
    return torch.linalg.eigvalsh(dense(operator))


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_are_those_of_the_dense_definitions_and_add_up_to_the_hessian(name):
    it, reference = shared_problem(name), shared_reference(name)
    J, tolerance = reference.jacobian, TOLERANCE.get(name, 1e-10)
    hessian, weight_part, coupling = (made(kind, it) for kind in (Hessian, WeightPart, CouplingPart))
    assert_matrix(weight_part, J.T @ reference.weight_hessian @ J, tolerance)
    assert_matrix(coupling, reference.coupling, tolerance)
    for v in random_vectors(hessian):
        assert_close(weight_part @ v + coupling @ v, hessian @ v, tolerance)


@pytest.mark.parametrize("name", [*sorted(LAYERS.keys() - {"attention"}), "linear-offset"])
def test_the_parts_add_up_for_every_kind_of_layer(name):
    kind = name.removesuffix("-offset")
    model = adapted_layer(kind)
    if kind != name:
        attach_offset(model, "default", {pair.name: pair.factors()[::-1] for pair in discover(model).pairs})
        with torch.no_grad():
            discover(model).pairs[0].B.mul_(1.5)
    it = Problem(model, [inputs_of(kind)], lambda model, batch: loss_of(model(*batch)))
    parts = dense(made(WeightPart, it)) + dense(made(CouplingPart, it))
    assert_close(parts, dense(made(Hessian, it)))


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - {"attention"}))
def test_the_riemannian_hessian_is_symmetric_for_every_kind_of_layer(name):
    it = Problem(adapted_layer(name), [inputs_of(name)], lambda model, batch: loss_of(model(*batch)))
    operator = made(RiemannianHessian, it)
    u, v = random_vectors(operator, 2)
    left, right = float(u @ operator.matvec(v)), float(v @ operator.matvec(u))
    assert abs(left - right) <= 1e-11 * float(u.norm() * operator.matvec(v).norm())


def test_one_trained_factor_is_coupled_to_nothing():
    it = problem("mlp")
    for pair in discover(it.model).pairs:
        pair.A.requires_grad_(False)
    coupling = made(CouplingPart, it)
    assert not dense(coupling).any()
    assert_close(dense(made(WeightPart, it)), dense(made(Hessian, it)))


@pytest.mark.parametrize("name", FLOAT64)
def test_the_coupling_has_pairs_of_the_gradients_singular_values(name):
    it = small_problem(name)
    reference = it.reference()
    expected = []
    for pair, G in zip(reference.pairs, reference.G, strict=True):
        m, n, r = pair.shape
        values = pair.scaling * torch.linalg.svdvals(G)
        both = torch.cat([values, -values, values.new_zeros(m + n - 2 * len(values))])
        expected.append(both.repeat(r))
    assert_close(spectrum(made(CouplingPart, it)), torch.cat(expected).sort().values)


@pytest.mark.parametrize("name", FLOAT64)
def test_at_the_start_of_lora(name):
    """B = 0: H_AA = 0, and the singular values of H_AB are s σ_i(G), each r times; J^T H_W J is the block of B."""
    it = small_problem(name)
    randomize(it.model, zero=True)
    reference, hessian, coupling = it.reference(), dense(made(Hessian, it)), dense(made(CouplingPart, it))
    slices = reference.factor_slices()
    where_A = torch.cat([torch.arange(A.start, A.stop) for A, _ in slices.values()])
    where_B = torch.cat([torch.arange(B.start, B.stop) for _, B in slices.values()])
    assert float(hessian[where_A][:, where_A].abs().max()) <= 1e-13 * float(hessian.abs().max())
    assert_close(hessian[where_A][:, where_B], coupling[where_A][:, where_B], 1e-12)
    for pair, G, (A, B) in zip(reference.pairs, reference.G, slices.values(), strict=True):
        values = torch.linalg.svdvals(hessian[A, B])
        expected = pair.scaling * torch.linalg.svdvals(G).repeat_interleave(pair.shape[2])
        assert_close(values[: len(expected)], expected, 1e-12)
    weight_part = dense(made(WeightPart, it))
    assert_close(weight_part[where_B][:, where_B], hessian[where_B][:, where_B], 1e-12)
    weight_part[where_B[:, None], where_B] = 0
    assert not weight_part.any()


@pytest.mark.parametrize("name", FLOAT64)
def test_the_riemannian_hessian_is_its_dense_formula(name):
    it = small_problem(name)
    reference = it.reference()
    operator = made(RiemannianHessian, it)
    E = displacements(operator.space)
    assert operator.size == sum(r * (m + n - r) for m, n, r in reference.shapes)
    assert_close(E.T @ E, torch.eye(operator.size, dtype=torch.float64), 1e-12)
    assert_close(E @ E.T, reference.projector, 1e-10)
    own = dense(operator)
    assert_close(own, E.T @ reference.riemannian_hessian @ E)
    assert_close(own, own.T, 1e-10)
    plain = dense(made(Hessian, it, over="tangent"))
    assert_close(plain, E.T @ reference.weight_hessian @ E)
    assert float((own - plain).abs().max()) > 1e-3 * float(own.abs().max())  # the second term is there


@pytest.mark.parametrize("name", FLOAT64[:2])
def test_the_riemannian_hessian_is_the_second_derivative_along_the_manifold(name):
    it = small_problem(name)
    reference = it.reference()
    operator = made(RiemannianHessian, it)
    E = displacements(operator.space)
    scale = float(dense(operator).abs().max())
    straight = made(Hessian, it, over="tangent")
    for vector in random_vectors(operator):
        v = vector / vector.norm()
        measured = reference.retraction_second_derivative(E @ v)
        assert abs(float(v @ operator.matvec(v)) - measured) <= 1e-7 * scale
        assert (
            abs(float(v @ straight.matvec(v)) - measured) > 1e-5 * scale
        )  # the stencil sees the second term


@pytest.mark.parametrize("name", FLOAT64[:2])
def test_the_riemannian_spectrum_is_the_same_in_every_gauge(name):
    it = small_problem(name)
    kinds = {
        "riemannian": lambda: made(RiemannianHessian, it),
        "tangent": lambda: made(Hessian, it, over="tangent"),
        "factors": lambda: made(Hessian, it),
    }
    before = {key: spectrum(make()) for key, make in kinds.items()}
    change_gauge(discover(it.model).pairs, 100.0)
    after = {key: spectrum(make()) for key, make in kinds.items()}
    for key in ("riemannian", "tangent"):
        assert_close(after[key], before[key], 1e-8)
    change = (after["factors"] - before["factors"]).abs().max() / before["factors"].abs().max()
    assert change > 0.1


def test_an_operator_follows_the_weights():
    it = problem("mlp")
    operators = [made(kind, it) for kind in (RiemannianHessian, WeightPart, CouplingPart)]
    for operator in operators:
        operator.matvec(torch.ones(operator.size, dtype=operator.dtype))
    with torch.no_grad():
        for pair in discover(it.model).pairs:
            pair.B.mul_(1.7)
    for operator in operators:
        fresh = made(type(operator), it)
        for v in random_vectors(operator):
            assert_close(operator.matvec(v), fresh.matvec(v), 1e-12)


def test_nothing_bends_where_every_weight_can_be_reached():
    it = problem("mlp", r=6, batches=1)
    operator = made(RiemannianHessian, it)
    assert operator.size == 5 * 6 + 6 * 4
    assert_close(spectrum(operator), torch.linalg.eigvalsh(it.reference().weight_hessian))


def test_blocks_and_batches():
    it = problem("mlp", batches=3)
    for kind in (RiemannianHessian, WeightPart, CouplingPart):
        operator = made(kind, it)
        (v,) = random_vectors(operator, 1)
        for layer, where in operator.space.layout.items():
            inside = torch.zeros_like(v)
            inside[where] = v[where]
            assert_close(operator.block(layer).matvec(v[where]), operator.matvec(inside)[where])
        total = sum(weight * one.matvec(v) for weight, one in operator.per_batch())
        assert_close(total / sum(operator.batch_weights), operator.matvec(v))


def test_a_cached_graph_changes_nothing():
    it = problem("bert")
    for kind in (RiemannianHessian, WeightPart):
        streamed, cached = (made(kind, it, cache_graph=cache) for cache in (False, True))
        for v in random_vectors(streamed):
            assert_close(cached.matvec(v), streamed.matvec(v), 1e-12)


def test_finite_differences_come_near():
    it = shared_problem("mlp")
    for kind in (RiemannianHessian, WeightPart):
        exact, near = made(kind, it), made(kind, it, differentiation="finite_difference")
        for v in random_vectors(exact):
            assert_close(near.matvec(v), exact.matvec(v), 1e-6)


@pytest.mark.parametrize("kind", [RiemannianHessian, WeightPart, CouplingPart, GaussNewton])
def test_with_copies_in_float64(kind):
    """A float32 model with dtype=torch.float64 is the float64 model of the same weights."""
    it = problem("bert")
    low = copy.deepcopy(it.model).float()
    exact, own = kind(copy.deepcopy(low).double(), it.batches), kind(low, it.batches, dtype=torch.float64)
    (v,) = random_vectors(exact, 1)
    product = own.matvec(v)
    assert product.dtype == torch.float64
    assert_close(product, exact.matvec(v), 1e-9)


@pytest.mark.messages
def test_there_is_no_manifold_where_a_factor_lacks_rank():
    it = problem("mlp", zero=True)
    with pytest.raises(InputError, match=r"lora_B of .*first has rank 0 of 2"):
        made(RiemannianHessian, it)
    it = problem("mlp")
    operator = made(RiemannianHessian, it)
    pair = discover(it.model).pairs[1]
    with torch.no_grad():
        pair.A[1] = pair.A[0]
    with pytest.raises(InputError, match=r"lora_A of .*second has rank 1 of 2"):
        operator.matvec(torch.ones(operator.size, dtype=operator.dtype))
