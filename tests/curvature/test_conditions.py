"""What curvature needs of a model, what it leaves as it was, and what it refuses, each with one sentence."""

import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.function import once_differentiable

from tangora import InputError, find_pairs
from tangora.curvature import EmpiricalFisher, GaussNewton, Hessian
from tests.curvature.models import problem, random_vector, randomize, shared_problem
from tests.probes.models import adapted, batch_of, bert, llama
from tests.tolerances import assert_close

OVER = ["factors", "tangent", "weights"]


def snapshot(model):
    """Everything that must come back."""
    return {
        "values": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "identities": {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()},
        "gradients": {
            name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        },
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "modes": {name: module.training for name, module in model.named_modules()},
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "cache": getattr(getattr(model, "config", None), "use_cache", None),
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "random": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),  # noqa: NPY002
        "kernels": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other)
    else:
        assert one == other


def in_training(name="gpt2", **options):
    """In training mode, with dropout and gradients."""
    model = adapted(name, lora_dropout=0.3, **options).train()
    randomize(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    return model


@pytest.mark.messages
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Hessian, {}),
        (Hessian, {"cache_graph": True}),
        (Hessian, {"differentiation": "finite_difference"}),
        (GaussNewton, {}),
        (EmpiricalFisher, {}),
    ],
)
@pytest.mark.parametrize("over", OVER)
def test_the_model_is_left_as_it_was(over, kind, options):
    model, batches = in_training("bert"), [batch_of("bert")]
    before = snapshot(model)
    operator = kind(model, batches, over=over, **options)
    with torch.no_grad():
        product = operator.matvec(random_vector(operator))
    assert_same(snapshot(model), before)
    assert not product.requires_grad
    operator.loss(), operator.gradient(), operator.loss_at(random_vector(operator))
    next(iter(operator.per_batch()))[1].matvec(random_vector(operator))
    assert_same(snapshot(model), before)
    # as in evaluation mode without dropout
    model.eval()
    assert torch.equal(operator.matvec(random_vector(operator)), product)


@pytest.mark.messages
@pytest.mark.parametrize("cache_graph", [False, True])
def test_the_model_is_left_as_it_was_when_a_batch_raises(cache_graph):
    model, batch = in_training("bert"), batch_of("bert")
    before = snapshot(model)

    def loss_fn(model, batch):
        loss = model(**batch).loss
        if loss_fn.fails:
            raise RuntimeError("stop")
        return loss

    loss_fn.fails = True
    operator = Hessian(model, [batch, batch], loss_fn=loss_fn, cache_graph=cache_graph)
    with pytest.raises(RuntimeError, match="stop"):
        operator.matvec(random_vector(operator))
    assert_same(snapshot(model), before)
    loss_fn.fails = False
    assert operator.matvec(random_vector(operator)).isfinite().all()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_attention_and_checkpointing_change_nothing(name):
    """SDPA is forced to its differentiable form; non-reentrant checkpointing recomputes with the same stand-ins."""
    made = problem(name)
    expected = {}
    for over in OVER:
        operator = Hessian(made.model, made.batches, over=over)
        expected[over] = operator.matvec(random_vector(operator))
    made.model.set_attn_implementation("eager")
    for over in OVER:
        operator = Hessian(made.model, made.batches, over=over)
        assert_close(operator.matvec(random_vector(operator)), expected[over])
    made.model.set_attn_implementation("sdpa")
    made.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made.model.train()
    for over in OVER:
        for cache_graph in (None, True):
            operator = Hessian(made.model, made.batches[:1], over=over, cache_graph=cache_graph)
            assert operator.caches_graph == bool(cache_graph)
            whole = Hessian(made.model.eval(), made.batches[:1], over=over, cache_graph=False)
            v = random_vector(operator)
            without = whole.matvec(v)
            made.model.train()
            for _ in range(2):
                assert_close(operator.matvec(v), without)


@pytest.mark.messages  # run-time type checks draw from Python's random state themselves
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_reentrant_checkpointing_changes_no_product(name):
    made = problem(name)
    operator = Hessian(made.model, made.batches)
    v = random_vector(operator)
    expected = operator.matvec(v)
    made.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    made.model.train()
    before = snapshot(made.model)
    for options in ({}, {"cache_graph": True}):
        product = Hessian(made.model, made.batches, **options).matvec(v)
        assert_close(product, expected, 1e-4 if name == "llama" else 1e-10)
    assert_same(snapshot(made.model), before)


@pytest.mark.parametrize("kind", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn"])
def test_fused_attention_is_refused(kind):
    made = problem("bert")
    operator = Hessian(made.model, made.batches)
    made.model.config._attn_implementation = kind
    with pytest.raises(
        InputError, match=f"attention '{kind}' has no second derivative.*set_attn_implementation"
    ):
        operator.matvec(random_vector(operator))


def mlp_operator(loss_of_output, **options):
    made = problem("mlp", batches=1)
    operator = Hessian(
        made.model, made.batches, loss_fn=lambda model, batch: loss_of_output(model(batch[0])), **options
    )
    return operator, random_vector(operator)


class Quiet(torch.autograd.Function):
    """A backward pass of one's own that can be differentiated, as bitsandbytes' matrix products can."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def without_second_derivative(output):
    """The fused kernel for CPU attention has a first derivative only."""
    q = output[None, None]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, q, q).square().mean()


@pytest.mark.parametrize("cache_graph", [False, True])
def test_an_operation_without_second_derivative_is_named(cache_graph):
    operator, v = mlp_operator(without_second_derivative, cache_graph=cache_graph)
    with pytest.raises(
        InputError, match=r"aten::_scaled_dot_product_flash_attention\S* has no second derivative: diff"
    ):
        operator.matvec(v)
    operator, v = mlp_operator(lambda output: Once.apply(output).mean(), cache_graph=cache_graph)
    with pytest.raises(InputError, match=r"Once: a function .* has no second derivative"):
        operator.matvec(v)
    exact, _ = mlp_operator(lambda output: output.square().mean())
    differences, _ = mlp_operator(
        lambda output: Once.apply(output).mean(), differentiation="finite_difference"
    )
    assert_close(differences.matvec(v), exact.matvec(v), 1e-6)


def test_a_random_loss_is_refused():
    operator, v = mlp_operator(lambda output: F.dropout(output, 0.5).square().mean())
    with pytest.raises(InputError, match="random in evaluation mode"):
        operator.matvec(v)

    def draws_for_nothing(output):
        torch.rand(())  # as layer dropping does in evaluation mode, too
        return output.square().mean()

    drawing, v = mlp_operator(draws_for_nothing)
    plain, _ = mlp_operator(lambda output: output.square().mean())
    assert torch.equal(drawing.matvec(v), plain.matvec(v))


@pytest.mark.parametrize("cache_graph", [False, True])
@pytest.mark.parametrize(
    ("loss_of_output", "message"),
    [
        (lambda output: output.square(), r"one number; got a tensor of shape \(2, 4\)"),
        (lambda output: 3.0, "one number; got float"),
        (lambda output: output.sum() / 0, "has loss -?inf|has loss nan"),
        (lambda output: (output.sum() * 0).sqrt() + 1, "product with the curvature matrix is not finite"),
    ],
)
def test_losses_without_curvature_are_refused(loss_of_output, message, cache_graph):
    operator, v = mlp_operator(loss_of_output, cache_graph=cache_graph)
    with pytest.raises(InputError, match=message):
        operator.matvec(v)


def test_a_loss_that_is_not_finite_away_from_the_weights_is_returned():
    operator, v = mlp_operator(lambda output: output.exp().exp().mean())
    assert operator.loss_at(1e3 * v) == float("inf")


def test_a_model_loss_that_is_no_scalar_is_refused():
    made = problem("bert")
    made.model.get_base_model().loss_function = lambda **_: torch.ones(3)
    operator = Hessian(made.model, made.batches, loss_fn=None)
    operator.evaluation.loss_fn = None
    inner = made.model.get_base_model()
    original = inner.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.loss = output.loss.expand(3)
        return output

    inner.forward = forward
    with pytest.raises(InputError, match=r"the loss must be one number; got a tensor of shape \(3,\)"):
        operator.matvec(random_vector(operator))


@pytest.mark.messages
@pytest.mark.parametrize(
    ("make", "over", "message"),
    [
        (lambda: nn.Linear(3, 2), "factors", "no trainable LoRA factors"),
        (lambda: nn.Linear(3, 2), "tangent", "no trainable LoRA factors"),
        (lambda: nn.Linear(3, 2).requires_grad_(False), "weights", "no trainable weight matrices"),
        (lambda: problem("bert").model.requires_grad_(False), "factors", "no trainable LoRA factors"),
        (lambda: 3, "factors", r"model must be a torch\.nn\.Module; got int"),
    ],
)
def test_models_without_anything_to_move_are_refused(make, over, message):
    with pytest.raises(InputError, match=message):
        Hessian(make(), [torch.ones(1, 3)], over=over)


@pytest.mark.messages
def test_wrong_batches_vectors_and_choices_are_refused():
    made = shared_problem("bert")
    for batches, options, message in (
        (made.batches[0], {}, "got a single batch"),
        (None, {}, "batches must be a list"),
        (made.batches, {"over": "factor"}, "over must be one of"),
        (made.batches, {"over": int}, "over must be one of"),
        (made.batches, {"differentiation": "forward"}, "differentiation must be one of"),
    ):
        with pytest.raises(InputError, match=message):
            Hessian(made.model, batches, **options)
    empty = Hessian(made.model, [])
    with pytest.raises(InputError, match="at least one batch"):
        empty.matvec(random_vector(empty))
    operator = Hessian(made.model, made.batches)
    parts = operator.space.to_dict(random_vector(operator))
    name = operator.space.names[0]
    for vector, message in (
        (torch.ones(201), r"got \(201,\)"),
        (np.ones(200), "got ndarray"),
        ({key: part for key, part in parts.items() if key != name}, f"{name} is missing"),
        ({**parts, "other": torch.ones(2)}, "other is not one of them"),
        ({**parts, name: torch.ones(2)}, f"{name} must have shape"),
    ):
        with pytest.raises(InputError, match=message):
            operator.matvec(vector)
    with pytest.raises(InputError, match="layer must be one of"):
        operator.block("none")


def test_half_precision_and_hidden_float32_are_told():
    half = adapted("bert", torch.bfloat16)
    randomize(half)
    batch = batch_of("bert")
    with pytest.warns(UserWarning, match=r"half precision .* 1 %: use dtype=torch\.float32"):
        rough = Hessian(half, [batch])
    assert rough.dtype == torch.float32
    exact = Hessian(half, [batch], dtype=torch.float64)
    v = random_vector(exact)
    expected = exact.matvec(v)
    assert float((rough.matvec(v).double() - expected).norm() / expected.norm()) < 0.6  # with these weights
    fine = Hessian(half, [batch], dtype=torch.float32)
    assert_close(fine.matvec(v).double(), expected, 1e-4)
    model = adapted("llama", torch.float32)
    randomize(model)
    operator = Hessian(model, [batch_of("llama")], dtype=torch.float64)
    with pytest.warns(UserWarning, match="float32 inside although float64"):
        operator.matvec(random_vector(operator))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator.matvec(random_vector(operator))
    assert operator.evaluation.rounds_to_float32


@pytest.mark.parametrize("differentiation", ["exact", "finite_difference"])
def test_dtype_converts_floating_inputs_too(differentiation):
    made = problem("mlp", batches=1)
    made.model.float()
    batches = [tuple(part.float() if part.is_floating_point() else part for part in made.batches[0])]
    operator = Hessian(
        made.model, batches, loss_fn=made.loss_fn, dtype=torch.float64, differentiation=differentiation
    )
    v = random_vector(operator)
    single = Hessian(made.model, batches, loss_fn=made.loss_fn).matvec(v.float())
    assert_close(operator.matvec(v).float(), single, 1e-4)


def test_a_compiled_model_is_looked_through():
    made = problem("bert")
    operator = Hessian(made.model, made.batches)
    compiled = Hessian(torch.compile(made.model, backend="eager"), made.batches)
    assert torch.equal(compiled.matvec(random_vector(operator)), operator.matvec(random_vector(operator)))


@pytest.mark.parametrize("maker", [bert, llama])
def test_full_weights_of_a_model_without_adapters(maker):
    torch.manual_seed(0)
    model = maker().eval()
    batch = batch_of("bert" if maker is bert else "llama")
    operator = Hessian(
        model, [batch], over="weights", layers=["*.q_proj.weight", "*.query.weight"][maker is bert :][:1]
    )
    v, h = random_vector(operator) / operator.size**0.5, 1e-2
    central = (operator.gradient_at(h * v) - operator.gradient_at(-h * v)) / (2 * h)
    assert_close(operator.matvec(v), central, 3e-2)
    everything = Hessian(model, [batch], over="weights")
    tied = {id(p) for p in model.parameters() if p.dim() >= 2}
    assert len(everything.space.names) == len(tied)
    assert everything.matvec(random_vector(everything)).isfinite().all()


def test_pairs_that_are_none_are_told():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.conv = nn.Conv1d(4, 4, 1, groups=2)

        def forward(self, x):
            return self.conv(self.linear(x).T[None]).square().mean()

    config = LoraConfig(r=2, target_modules=["linear", "conv"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="groups"):  # PEFT's own
        model = get_peft_model(Experts(), config)
    with pytest.warns(UserWarning, match=r"excluded from the curvature.*groups.*conv"):
        operator = Hessian(model, [torch.randn(3, 4)], loss_fn=lambda model, x: model(x))
    assert list(operator.space.layout) == [find_pairs_quietly(model)[0].name]


def find_pairs_quietly(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return find_pairs(model)


class Attending(nn.Module):
    """An attention of torch's own beside a linear layer."""

    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.messages
@pytest.mark.parametrize("over", ["factors", "tangent", "weights"])
def test_attention_whose_weights_peft_replaces_is_named(over):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["attention", "out"], init_lora_weights=False)
    model = get_peft_model(Attending().double(), config, autocast_adapter_dtype=False)
    batches = [torch.randn(3, 5, 8, dtype=torch.float64)]
    options = {"over": over, "loss_fn": lambda m, x: m(x).tanh().mean()}
    with pytest.raises(InputError, match=r"model\.attention is part of an nn.MultiheadAttention"):
        Hessian(model, batches, **options)
    operator = Hessian(model, batches, layers=["model.out"], **options)
    v = torch.randn(operator.size, dtype=torch.float64)
    step = 1e-4
    difference = (operator.gradient_at(step * v) - operator.gradient_at(-step * v)) / (2 * step)
    torch.testing.assert_close(operator.matvec(v), difference, rtol=1e-5, atol=1e-7)
