"""Gauss-Newton and Fisher products against their dense definitions."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tangora import InputError
from tangora.curvature import EmpiricalFisher, GaussNewton, Hessian
from tangora.curvature.gauss_newton import loss_curvature_product, sandwich_product
from tests.curvature.models import (
    FLOAT64,
    NAMES,
    Problem,
    assert_matrix,
    causal_loss,
    counted,
    cross_entropy_of,
    dense,
    label_logits,
    label_losses,
    mlp_loss,
    outputs_of,
    problem,
    random_vectors,
    randomize,
    shared_problem,
    shared_reference,
    small_problem,
)
from tests.tolerances import assert_close

TOLERANCE = {"llama": 2e-5}


def with_outputs(loss_of_outputs):
    """A loss_fn that returns (loss, outputs)."""

    def loss_fn(model, batch):
        outputs = outputs_of(model, batch)
        return loss_of_outputs(outputs, batch), outputs

    return loss_fn


def with_losses(model, batch):
    losses = label_losses(model, batch)
    return losses.mean(), losses


def gauss_newton_of(it: Problem, **options) -> GaussNewton:
    loss_fn = with_outputs(cross_entropy_of) if it.loss_fn else None
    return GaussNewton(it.model, it.batches, loss_fn=loss_fn, **options)


def empirical_fisher_of(it: Problem, **options) -> EmpiricalFisher:
    return EmpiricalFisher(it.model, it.batches, loss_fn=with_losses if it.loss_fn else None, **options)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_that_of_the_dense_definition_and_of_a_cross_entropy_the_fisher_matrix(name):
    operator, reference = gauss_newton_of(shared_problem(name)), shared_reference(name)
    weights = reference.gauss_newton("weights", outputs_of, cross_entropy_of)
    for expected in (
        reference.gauss_newton("factors", outputs_of, cross_entropy_of),
        reference.fisher("factors", label_logits),
        reference.jacobian.T @ weights @ reference.jacobian,
    ):
        assert_matrix(operator, expected, TOLERANCE.get(name, 1e-10))


@pytest.mark.parametrize("name", FLOAT64)
def test_over_the_tangent_space_is_the_projection_of_that_over_the_weights(name):
    it = small_problem(name)
    reference = it.reference()
    weights = reference.gauss_newton("weights", outputs_of, cross_entropy_of)
    spectrum = torch.linalg.eigvalsh(reference.projector @ weights @ reference.projector)
    own = torch.linalg.eigvalsh(dense(gauss_newton_of(it, over="tangent")))
    assert_close(own, spectrum[len(spectrum) - len(own) :], 1e-9)


@pytest.mark.parametrize("make", [gauss_newton_of, empirical_fisher_of])
@pytest.mark.parametrize("name", FLOAT64)
def test_no_eigenvalue_is_negative(name, make):
    it = small_problem(name)
    values = torch.linalg.eigvalsh(dense(make(it)))
    assert values[0] >= -1e-12 * values[-1]
    assert torch.linalg.eigvalsh(it.reference().factor_hessian)[0] < -1e-3  # one of the Hessian's is


@pytest.mark.parametrize("name", FLOAT64)
def test_at_the_start_of_lora_the_block_of_A_vanishes(name):
    it = small_problem(name)
    randomize(it.model, zero=True)
    matrix, slices = dense(gauss_newton_of(it)), it.reference().factor_slices().values()
    for where_A, where_B in slices:
        assert not matrix[where_A].any()
        assert matrix[where_B, where_B].any()


def test_is_the_hessian_where_the_model_is_linear_in_its_leaves():
    """What is left of H - J^T H_z J is the curvature of the outputs: none over the B of the last layer."""
    it = problem("mlp")
    it.model.get_base_model().second.lora_A["default"].weight.requires_grad_(False)
    mine = dense(gauss_newton_of(it, layers=["second"]))
    assert mine.shape == (8, 8)
    assert_close(mine, dense(Hessian(it.model, it.batches, loss_fn=mlp_loss, layers=["second"])))


@pytest.mark.parametrize(
    "loss_of_outputs",
    [
        lambda z, batch: (z - F.one_hot(batch[1], 4)).square().mean(),
        lambda z, batch: F.binary_cross_entropy_with_logits(z, F.one_hot(batch[1], 4).to(z)),
        lambda z, batch: F.huber_loss(z, F.one_hot(batch[1], 4).to(z)),
        lambda z, batch: -z.softmax(-1).gather(1, batch[1][:, None]).mean(),  # not convex
    ],
    ids=["squared", "binary", "huber", "probability"],
)
def test_any_loss_that_returns_its_outputs(loss_of_outputs):
    it, reference = shared_problem("mlp"), shared_reference("mlp")
    own = GaussNewton(it.model, it.batches, loss_fn=with_outputs(loss_of_outputs))
    expected = reference.gauss_newton("factors", outputs_of, loss_of_outputs)
    assert_close(dense(own), expected)


def test_the_loss_hessian_of_cross_entropy_has_its_closed_form():
    torch.manual_seed(0)
    z = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    outputs, u = 2 * z, torch.randn(7, 5, dtype=torch.float64)
    loss = F.cross_entropy(outputs, torch.tensor([0, 1, 2, -100, 4, 0, 1]))
    p = outputs.detach().softmax(-1)
    expected = (p * u - p * (p * u).sum(-1, keepdim=True)) / 6
    expected[3] = 0
    assert_close(loss_curvature_product(loss, outputs, u), expected, 1e-14)
    assert not loss_curvature_product(outputs.sum(), outputs, u).any()  # linear in the outputs


def test_a_sandwich_with_unused_and_linear_leaves():
    x, y, unused = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    outputs = torch.stack([x.sum(), (x * y).sum()])
    product = sandwich_product(outputs, [x, y, unused], [torch.ones(2)] * 3, lambda u: u)
    # J = [[1 1 0 0], [1 1 1 1]], v = 1: J v = (2, 4)
    for own, expected in zip(product, ([6.0, 6.0], [4.0, 4.0], [0.0, 0.0]), strict=True):
        assert own.tolist() == expected


@pytest.mark.parametrize("name", NAMES)
def test_empirical_fisher_is_the_mean_outer_product_of_label_gradients(name):
    it, reference = shared_problem(name), shared_reference(name)
    expected = reference.empirical_fisher("factors", label_losses)
    assert_matrix(empirical_fisher_of(it), expected, TOLERANCE.get(name, 1e-10))


def test_empirical_fisher_per_sequence_weighs_sequences_alike():
    it = problem("gpt2", batches=3)
    it.batches[1]["labels"][1] = -100  # a sequence without labels does not count
    total = 0
    for batch in it.batches:

        def losses_of(model, batch):
            losses, (_, _, sequence) = label_losses(model, batch), counted(outputs_of(model, batch), batch)
            return torch.stack([losses[sequence == row].mean() for row in sequence.unique()])

        counting = int((batch["labels"] != -100).any(1).sum())
        total += counting / 8 * Problem(it.model, [batch]).reference().empirical_fisher("factors", losses_of)
    operator = empirical_fisher_of(it, per="sequence")
    assert operator.batch_weights == [2, 2, 4]
    assert_matrix(operator, total)
    v = torch.ones(operator.size, dtype=torch.float64)
    assert_close(sum(weight / 8 * one.matvec(v) for weight, one in operator.per_batch()), total @ v)


def test_per_sequence_and_per_label_are_the_same_for_a_classifier():
    it = shared_problem("bert")
    v = torch.ones(200, dtype=torch.float64)
    assert_close(empirical_fisher_of(it, per="sequence").matvec(v), empirical_fisher_of(it).matvec(v), 1e-12)


@pytest.mark.parametrize("make", [gauss_newton_of, empirical_fisher_of])
def test_batches_equal_the_full_batch(make):
    it = problem("gpt2", batches=3)
    whole = {key: torch.cat([batch[key] for batch in it.batches]) for key in it.batches[0]}
    v = torch.randn(168, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(make(it).matvec(v), make(Problem(it.model, [whole])).matvec(v))


@pytest.mark.parametrize("several", [False, True], ids=["regression", "several labels"])
def test_other_losses_of_a_classifier(several):
    labels = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = labels if several else labels[:, 0]
    it = problem("bert", batches=1, model_options={"num_labels": 3 if several else 1})
    batches = [it.batches[0] | {"labels": labels}]

    def each(z, batch):
        if several:
            return F.binary_cross_entropy_with_logits(z, batch["labels"], reduction="none").mean(1)
        return (z[:, 0] - batch["labels"]).square()

    reference = Problem(it.model, batches).reference()
    expected = reference.gauss_newton("factors", outputs_of, lambda z, batch: each(z, batch).mean())
    assert_matrix(GaussNewton(it.model, batches), expected)
    losses = reference.empirical_fisher("factors", lambda model, batch: each(outputs_of(model, batch), batch))
    assert_matrix(EmpiricalFisher(it.model, batches), losses)


def test_loss_and_gradient_are_those_of_the_hessian():
    it = problem("mlp")
    hessian = Hessian(it.model, it.batches, loss_fn=it.loss_fn)
    for operator in (gauss_newton_of(it), empirical_fisher_of(it)):
        assert operator.loss() == pytest.approx(hessian.loss(), rel=1e-12)
        assert_close(operator.gradient(), hessian.gradient(), 1e-12)


@pytest.mark.messages
def test_an_operation_without_second_derivative_is_named():
    def loss_fn(model, batch):
        outputs = torch.cdist(model(batch[0]), torch.eye(4, dtype=torch.float64), p=3.0)
        return outputs.mean(), outputs

    it = shared_problem("mlp")
    with pytest.raises(InputError, match=r"_cdist_backward.* has no second derivative"):
        GaussNewton(it.model, it.batches, loss_fn=loss_fn).matvec(torch.ones(42, dtype=torch.float64))


@pytest.mark.messages
@pytest.mark.parametrize(
    ("kind", "loss_fn", "options", "message"),
    [
        (GaussNewton, mlp_loss, {}, r"\(loss, outputs\)"),
        (GaussNewton, lambda m, b: (mlp_loss(m, b), m(b[0])), {}, "does not depend on the outputs"),
        (EmpiricalFisher, mlp_loss, {}, r"\(loss, losses\)"),
        (EmpiricalFisher, lambda m, b: (mlp_loss(m, b), 2 * label_losses(m, b)), {}, "mean"),
        (EmpiricalFisher, with_losses, {"per": "token"}, "per must be one of"),
        (EmpiricalFisher, with_losses, {"per": "sequence"}, 'per="sequence"'),
    ],
)
def test_what_cannot_be_used_is_named(kind, loss_fn, options, message):
    it = shared_problem("mlp")
    with pytest.raises(InputError, match=message):
        kind(it.model, it.batches, loss_fn=loss_fn, **options).matvec(torch.ones(42, dtype=torch.float64))


class Detached(torch.autograd.Function):
    """x² with a backward pass that autograd cannot see through."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * grad.detach()


@pytest.mark.messages
def test_backward_passes_that_hide_something_are_refused():
    it = shared_problem("mlp")

    def in_the_model(model, batch):
        outputs = Detached.apply(model(batch[0]))
        return outputs.mean(), outputs

    def in_the_loss(model, batch):
        outputs = model(batch[0])
        return Detached.apply(outputs).mean(), outputs

    (v,) = random_vectors(gauss_newton_of(it), 1)
    with pytest.raises(InputError, match=r"Detached .* cannot differentiate"):
        GaussNewton(it.model, it.batches, loss_fn=in_the_model).matvec(v)
    with pytest.raises(InputError, match="the loss uses Detached"):
        GaussNewton(it.model, it.batches, loss_fn=in_the_loss).matvec(v)


@pytest.mark.filterwarnings("ignore:curvature")
@pytest.mark.parametrize("make", [gauss_newton_of, empirical_fisher_of])
def test_half_precision_is_near(make):
    it = problem("bert")
    it.model.to(torch.bfloat16)
    rough, fine = make(it), make(it, dtype=torch.float32)
    for v in random_vectors(fine):
        assert rough.dtype == torch.float32
        assert_close(rough.matvec(v), fine.matvec(v), 0.2)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_checkpointing_changes_nothing(name):
    it = problem(name)
    operators = [gauss_newton_of(it), empirical_fisher_of(it)]
    (v,) = random_vectors(operators[0], 1)
    plain = [operator.matvec(v) for operator in operators]
    it.model.gradient_checkpointing_enable({"use_reentrant": False})
    it.model.train()
    for operator, expected in zip(operators, plain, strict=True):
        assert_close(operator.matvec(v), expected, 1e-12)


@pytest.mark.messages
def test_a_loss_that_is_no_mean_over_labels_has_no_empirical_fisher():
    it = problem("gpt2", batches=1)
    inner = it.model.get_base_model()
    inner.loss_function = lambda logits, labels, **_: 1.1 * causal_loss(logits, labels)
    with pytest.raises(InputError, match="mean of the losses of single labels"):
        empirical_fisher_of(it).matvec(torch.ones(168, dtype=torch.float64))


@pytest.mark.messages
def test_a_model_without_logits():
    class Silent(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **batch):
            return SimpleNamespace(loss=self.model(**batch).loss)

    it = problem("bert", batches=1)
    with pytest.raises(InputError, match="no logits"):
        GaussNewton(Silent(it.model), it.batches).matvec(torch.ones(200, dtype=torch.float64))
