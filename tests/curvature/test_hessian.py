"""Hessian products against the dense Hessian, streamed, from a kept graph, and by differences; means over batches."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import tangora
from tangora import InputError, find_pairs
from tangora.curvature import CouplingPart, Hessian
from tests.curvature.models import (
    FLOAT64,
    NAMES,
    dense,
    problem,
    random_vector,
    shared_problem,
    shared_reference,
    small_problem,
)
from tests.probes.models import batch_of
from tests.processes import in_processes
from tests.tolerances import assert_close

TOLERANCE = {"llama": 2e-6}
RANKS = 2


def hessian_of(made, **options):
    return Hessian(made.model, made.batches, loss_fn=made.loss_fn, **options)


@pytest.mark.parametrize("cache_graph", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_products_agree_with_the_dense_hessian(name, cache_graph):
    operator, reference = hessian_of(shared_problem(name), cache_graph=cache_graph), shared_reference(name)
    assert tangora.curvature.Hessian is Hessian
    tolerance = TOLERANCE.get(name, 1e-10)
    for seed in range(2):
        v = random_vector(operator, seed)
        assert_close(operator.matvec(v), reference.factor_hessian.to(v) @ v, tolerance)
    assert operator.num_products == 2
    assert torch.equal(operator @ v, operator.matvec(v))
    assert operator.shape == (operator.size, operator.size)
    assert_close(operator.gradient(), reference.factor_gradient.to(v), tolerance)
    loss = float(reference.loss("factors", reference.factors))
    assert operator.loss() == pytest.approx(loss, rel=tolerance)
    assert operator.num_products == 4


@pytest.mark.parametrize("over", ["factors", "tangent", "weights"])
@pytest.mark.parametrize("name", FLOAT64)
def test_the_operator_is_symmetric(name, over):
    operator = hessian_of(shared_problem(name), over=over)
    u, v = random_vector(operator, 1), random_vector(operator, 2)
    Hu, Hv = operator.matvec(u), operator.matvec(v)
    assert abs(float(u @ Hv - v @ Hu)) < 1e-10 * float(u.norm() * Hv.norm())
    assert Hv.norm() > 0


@pytest.mark.parametrize("over", ["factors", "tangent", "weights"])
def test_the_product_is_the_derivative_of_the_gradient_and_that_of_the_loss(over):
    operator = hessian_of(shared_problem("bert"), over=over)
    v, h = random_vector(operator) / operator.size**0.5, 1e-4
    central = (operator.gradient_at(h * v) - operator.gradient_at(-h * v)) / (2 * h)
    assert_close(central, operator.matvec(v), 1e-5)
    slope = (operator.loss_at(h * v) - operator.loss_at(-h * v)) / (2 * h)
    assert slope == pytest.approx(float(operator.gradient() @ v), rel=1e-6)
    assert torch.equal(operator.gradient_at(0 * v), operator.gradient())


@pytest.mark.parametrize("cache_graph", [False, True])
def test_uneven_batches_add_up_to_the_whole(cache_graph):
    made = shared_problem("bert")
    whole = batch_of("bert", size=64, length=5)
    parts = [
        {key: value[:60] for key, value in whole.items()},
        {key: value[60:] for key, value in whole.items()},
    ]
    full, split = Hessian(made.model, [whole]), Hessian(made.model, parts, cache_graph=cache_graph)
    v = random_vector(full)
    assert_close(split.matvec(v), full.matvec(v), 1e-12)
    assert split.loss() == pytest.approx(full.loss(), rel=1e-12)
    assert split.batch_weights == [60, 4]


def test_tokens_weigh_alike_in_a_causal_model():
    """Batches of 3 x 2 and 4 x 2 labels, and one without any, which does not count."""
    made = shared_problem("gpt2")
    one, two = (batch_of("gpt2", size=size, seed=4, length=6) for size in (2, 3))
    empty = {"input_ids": one["input_ids"], "labels": torch.full_like(one["labels"], -100)}
    whole = {key: torch.cat([one[key], two[key]]) for key in one}
    full, split = Hessian(made.model, [whole]), Hessian(made.model, [one, empty, two])
    v = random_vector(full)
    assert_close(split.matvec(v), full.matvec(v), 1e-12)
    assert split.batch_weights[1] == 0
    cached = Hessian(made.model, [one, empty, two], cache_graph=True)
    assert_close(cached.matvec(v), full.matvec(v), 1e-12)


def test_each_batch_alone():
    made = problem("bert", batches=3)
    operator = Hessian(made.model, made.batches)
    v = random_vector(operator)
    weighted = [(weight, alone.matvec(v), alone.loss()) for weight, alone in operator.per_batch()]
    assert [weight for weight, _, _ in weighted] == operator.batch_weights == [2, 3, 4]
    mean = sum(weight * product for weight, product, _ in weighted) / 9
    assert_close(mean, operator.matvec(v), 1e-12)
    assert sum(weight * loss for weight, _, loss in weighted) / 9 == pytest.approx(operator.loss(), rel=1e-12)
    assert operator.num_products == 1
    expected = Hessian(made.model, made.batches[1:2]).matvec(v)
    assert torch.equal(weighted[1][1], expected)


def test_a_shuffled_loader_is_read_in_the_same_order_again():
    made = problem("bert")
    samples = [
        {key: value[0] for key, value in batch_of("bert", size=1, seed=seed).items()} for seed in range(7)
    ]
    loader = DataLoader(samples, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(5))
    operator = Hessian(made.model, loader)
    v, state = random_vector(operator), torch.get_rng_state()
    assert torch.equal(operator.matvec(v), operator.matvec(v))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("over", ["factors", "tangent", "weights"])
def test_a_kept_graph_gives_the_same_and_notices_changed_weights(over):
    made = problem("bert")
    streamed = hessian_of(made, over=over, cache_graph=False)
    cached = hessian_of(made, over=over, cache_graph=True)
    v = random_vector(cached)
    for _ in range(2):
        assert torch.equal(cached.matvec(v), streamed.matvec(v))
    before = cached.matvec(v)
    for key, parameter in made.model.named_parameters():
        if "value" in key:  # factors and base alike
            with torch.no_grad():
                parameter.mul_(1.5)
    assert torch.equal(cached.matvec(v), streamed.matvec(v))
    assert (cached.matvec(v) - before).norm() > 1e-3 * before.norm()
    for pair in find_pairs(made.model):
        pair.layer.scaling["default"] *= 2
    changed = cached.matvec(v)
    assert_close(changed, hessian_of(made, over=over, cache_graph=False).matvec(v))


def test_an_optimizer_step_between_products_is_noticed():
    made = problem("mlp", batches=1)
    operator = hessian_of(made)
    assert operator.caches_graph
    v = random_vector(operator)
    before = operator.matvec(v)
    pairs = find_pairs(made.model)
    optimizer = torch.optim.SGD([pair.A for pair in pairs], lr=1.0)
    for pair in pairs:
        pair.A.grad = torch.ones_like(pair.A)
    optimizer.step()
    after = operator.matvec(v)
    assert (after - before).norm() > 1e-3 * before.norm()
    assert torch.equal(after, hessian_of(made).matvec(v))


def test_every_copy_of_an_eigenvalue_is_found_on_request():
    """Those of the coupling are s sigma_i(G), each r times."""
    made = problem("bert", batches=1)
    (pair,) = (pair for pair in find_pairs(made.model) if pair.name.endswith("0.intermediate.dense"))
    where = [pair.name for pair in find_pairs(made.model)].index(pair.name)
    gradient, r = made.reference().G[where], pair.shape[2]
    coupling = CouplingPart(made.model, made.batches, loss_fn=made.loss_fn, layers=[pair.name])
    found = coupling.top_eigenpairs(2 * r, tol=1e-10, copies=True)
    expected = pair.scaling * torch.linalg.svdvals(gradient)[:2].repeat_interleave(r)
    assert found.converged
    assert_close(found.values, expected, 1e-8)


def test_float64_on_copies_of_a_float32_model():
    made = problem("bert")
    expected = hessian_of(made)
    v = random_vector(expected)
    product = expected.matvec(v)
    made.model.float()
    for name, parameter in shared_problem("bert").model.named_parameters():
        made.model.get_parameter(name).data.copy_(parameter)
    rounded = problem("bert")
    for name, parameter in made.model.named_parameters():
        rounded.model.get_parameter(name).data.copy_(parameter)
    operator = hessian_of(made, dtype=torch.float64)
    assert operator.dtype == torch.float64
    assert_close(operator.matvec(v), hessian_of(rounded).matvec(v))
    assert_close(hessian_of(made).matvec(v.float()).double(), product, 1e-4)
    assert all(parameter.dtype == torch.float32 for parameter in made.model.parameters())
    with torch.no_grad():  # the copies are of the weights as they are
        made.model.get_parameter(name).mul_(2)
        rounded.model.get_parameter(name).mul_(2)
    assert_close(operator.matvec(v), hessian_of(rounded).matvec(v))


def test_scipy_finds_the_eigenvalues():
    operator = hessian_of(problem("mlp", batches=1))
    values = torch.linalg.eigvalsh(dense(operator))
    found = eigsh(operator.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    assert_close(torch.from_numpy(np.sort(found)), values[-3:])


@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_the_whole_spectrum_and_its_sums_agree_with_the_dense_hessian(name):
    made = small_problem(name)
    operator, matrix = hessian_of(made), made.reference().factor_hessian
    values, n = torch.linalg.eigvalsh(matrix).flip(0), operator.size
    pairs = operator.top_eigenpairs(n, tol=1e-12)
    assert_close(pairs.values, values, 1e-8)
    assert operator.num_products == pairs.products
    for method, which in (("lanczos", "both"), ("power", "magnitude")):
        few = operator.top_eigenpairs(4, method=method, which=which, tol=1e-7, max_products=20_000)
        chosen = values[[0, 1, -2, -1]] if which == "both" else values[values.abs().argsort()[-4:]]
        assert_close(few.values, chosen.sort(descending=True).values, 1e-8)
    assert operator.trace(products=3 * n).value == pytest.approx(float(matrix.trace()), rel=1e-8)
    norm = operator.frobenius_norm(products=100)
    assert norm.value == pytest.approx(float(matrix.norm()), rel=1e-12, abs=5 * norm.standard_error)
    density = operator.spectral_density(probes=2, steps=n)
    assert density.products <= 2 * n  # fewer where eigenvalues coincide
    for nodes in torch.tensor([probe[:1] + probe[-1:] for probe in density.nodes], dtype=torch.float64):
        assert_close(nodes, values[[-1, 0]], 1e-8)


@pytest.mark.messages
def test_more_eigenpairs_than_dimensions_and_unknown_methods_are_refused():
    operator = hessian_of(problem("mlp", batches=1))
    with pytest.raises(InputError, match=f"{operator.size}; got 99"):
        operator.top_eigenpairs(99)
    with pytest.raises(InputError, match="did you mean lanczos"):
        operator.top_eigenpairs(1, method="lanczo")
    with pytest.raises(InputError, match="method must be one of"):
        operator.trace(method="xtrace")
    assert operator.num_products == 0


@pytest.mark.parametrize("over", ["factors", "tangent", "weights"])
def test_sharpness_and_landscape_write_nothing(over):
    made = problem("bert", batches=1)
    made.model.train()
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    operator, random = hessian_of(made, over=over), torch.get_rng_state()
    found = operator.sharpness(0.1, steps=2, krylov=5)
    assert found.rise > 0
    assert operator.loss_at(found.displacement) == pytest.approx(operator.loss() + found.rise, rel=1e-8)
    assert operator.landscape("random", span=10.0, points=3, dimensions=2).losses.shape == (3, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())
    assert all(parameter.grad is None for parameter in made.model.parameters())
    assert made.model.training
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", NAMES)
def test_finite_differences_agree_and_say_how_well(name):
    made = shared_problem(name)
    exact, differences = hessian_of(made), hessian_of(made, differentiation="finite_difference")
    assert differences.differentiation == "finite_difference"
    assert exact.differentiation == "exact"
    v = random_vector(exact)
    error = float((differences.matvec(v) - exact.matvec(v)).norm() / exact.matvec(v).norm())
    assert error < (1e-3 if name == "llama" else 1e-6)
    assert exact.discrepancy is None
    # the error of the coarser step is that of the step, four times the other's, or rounding
    assert 0 < differences.discrepancy < (1e-3 if name == "llama" else 1e-6)
    scaled = differences.matvec(1e6 * v)
    assert_close(scaled, 1e6 * differences.matvec(v), 1e-5 if name == "llama" else 1e-6)
    assert float(differences.matvec(0 * v).norm()) == 0


def test_finite_differences_that_say_nothing_are_refused():
    made = problem("mlp", batches=1)
    model = made.model

    def rough(model, batch):
        return made.loss_fn(model, batch) + 1e-2 * torch.sin(1e6 * model(batch[0])).sum()

    operator = Hessian(model, made.batches, loss_fn=rough, differentiation="finite_difference")
    with pytest.raises(InputError, match="when the step is halved"):
        operator.matvec(random_vector(operator))


def test_a_loss_without_curvature_and_one_that_ignores_a_layer():
    made = problem("mlp", batches=1)

    def only_first(model, batch):
        return model.get_submodule("base_model.model.first")(batch[0]).square().mean()

    operator = Hessian(made.model, made.batches, loss_fn=only_first)
    product = operator.space.to_dict(operator.matvec(random_vector(operator)))
    second = [part for name, part in product.items() if "second" in name]
    assert second
    assert all(not part.any() for part in second)
    constant = Hessian(made.model, made.batches, loss_fn=lambda model, batch: torch.zeros(()).double())
    assert not constant.matvec(random_vector(constant)).any()
    one_factor = Hessian(
        made.model,
        made.batches,
        loss_fn=lambda model, batch: model(batch[0]).sum(),
        over="weights",
        layers=["second"],
    )
    assert not one_factor.matvec(random_vector(one_factor)).any()


def wrapped(model):
    return DistributedDataParallel(model, broadcast_buffers=False)


def work(rank):
    """What each process does: its own share of the batches."""
    made = problem("bert", batches=5)
    share, found = made.batches[rank::RANKS], {}
    for over in ("factors", "tangent", "weights"):
        for cache_graph in (False, True):
            operator = Hessian(wrapped(made.model), share, over=over, cache_graph=cache_graph)
            found[over, cache_graph] = operator.matvec(random_vector(operator)), operator.loss()
    found["alone"] = [alone.matvec(random_vector(alone)) for _, alone in operator.per_batch()]
    empty = Hessian(made.model, made.batches if rank == 0 else [])
    found["empty"] = empty.matvec(random_vector(empty))
    for cache_graph in (False, True):
        bad = [{"input_ids": share[0]["input_ids"]}]
        operator = Hessian(made.model, share if rank == 0 else bad, cache_graph=cache_graph)
        with pytest.raises(InputError) as caught:
            operator.matvec(random_vector(operator))
        found["failure", cache_graph] = str(caught.value)
    return found


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    found = in_processes(work, tmp_path, RANKS)
    made = problem("bert", batches=5)
    for over in ("factors", "tangent", "weights"):
        operator = Hessian(made.model, made.batches, over=over)
        expected, loss = operator.matvec(random_vector(operator)), operator.loss()
        for cache_graph in (False, True):
            for one in found:
                assert_close(one[over, cache_graph][0], expected, 1e-12)
                assert one[over, cache_graph][1] == pytest.approx(loss, rel=1e-12)
            assert torch.equal(found[0][over, cache_graph][0], found[1][over, cache_graph][0])
    alone = [one.matvec(random_vector(one)) for _, one in operator.per_batch()]
    for rank, one in enumerate(found):  # each on its own, though they have not the same number
        assert all(torch.equal(*both) for both in zip(one["alone"], alone[rank::RANKS], strict=True))
        factors = Hessian(made.model, made.batches)
        assert_close(one["empty"], factors.matvec(random_vector(factors)), 1e-12)
    for cache_graph in (False, True):
        assert [one["failure", cache_graph][:12] for one in found] == ["another rank", "the model re"]
