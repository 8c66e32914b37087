"""Coordinates: what a flat vector does to the weight, for every kind of layer, and the Hessian there."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call, hessian

from tangora import InputError, find_pairs
from tangora.adapters.offset import attach_offset
from tangora.curvature import Hessian, LowRankSpace, TangentSpace, WeightSpace
from tests.adapters.models import tiny_llama
from tests.curvature.models import (
    FLOAT64,
    dense,
    displacements,
    random_vector,
    shared_problem,
    shared_reference,
)
from tests.models import LAYERS, Holder, adapted_layer, inputs_of, loss_of
from tests.tolerances import assert_close

KINDS = sorted(LAYERS.keys() - {"attention", "embedding-padding"})


def holder_loss(model, batch):
    return loss_of(torch.tanh(model(*batch)))


def operator_of(model, name, **options):
    return Hessian(model, [inputs_of(name)], loss_fn=holder_loss, **options)


def weight_hessian(pair, inputs):
    """Of the loss as a function of the matrix V = W0 + s B A of an equivalent plain layer, on vec(V) by rows."""
    base = copy.deepcopy(pair.layer.get_base_layer())
    stored = base.weight.detach()
    W = (stored.T if pair.transposed else stored.flatten(1)) + pair.delta_weight()

    def loss(V):
        weight = V.view(W.shape)
        weight = weight.T if pair.transposed else weight.reshape(stored.shape)
        return loss_of(torch.tanh(functional_call(base, {"weight": weight}, inputs)))

    return hessian(loss)(W.flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_tangent_and_weights_agree_with_a_plain_layer(kind):
    model = adapted_layer(kind)
    (pair,) = find_pairs(model)
    expected = weight_hessian(pair, inputs_of(kind))
    tangent = operator_of(model, kind, over="tangent")
    m, n, r = pair.shape
    assert tangent.size == r * (m + n - r)
    E = displacements(tangent.space)
    assert_close(dense(tangent), E.T @ expected @ E)
    stored = pair.layer.get_base_layer().weight
    found = dense(operator_of(model, kind, over="weights")).view(*stored.shape, *stored.shape)
    found = found.permute(1, 0, 3, 2) if pair.transposed else found
    assert_close(found.reshape(m * n, m * n), expected)


@pytest.mark.parametrize(
    ("kind", "over"),
    [
        *(("linear", over) for over in ("factors", "tangent")),
        *(("gpt2-conv1d", over) for over in ("tangent", "weights")),
        ("embedding", "weights"),
        ("conv2d", "factors"),
    ],
)
def test_an_offset_is_one_more_constant(kind, over):
    """The layer's weight is W0 + s (B A - B0 A0): the same Hessians as on that base without an offset."""
    plain, carrying = adapted_layer(kind), adapted_layer(kind)
    (pair,) = find_pairs(carrying)
    B0, A0 = torch.randn_like(pair.factors()[1]), torch.randn_like(pair.factors()[0])
    attach_offset(carrying, "default", {pair.name: (B0, A0)})
    (other,) = find_pairs(plain)
    weight = other.layer.get_base_layer().weight
    subtracted = other.scaling * (B0 @ A0)
    weight.data -= (subtracted.T if other.transposed else subtracted).reshape(weight.shape)
    expected = dense(operator_of(plain, kind, over=over))
    assert_close(dense(operator_of(carrying, kind, over=over)), expected)


@pytest.mark.parametrize("name", FLOAT64)
def test_tangent_coordinates_are_an_isometry_onto_the_tangent_space(name):
    made, reference = shared_problem(name), shared_reference(name)
    operator = Hessian(made.model, made.batches, loss_fn=made.loss_fn, over="tangent")
    E = displacements(operator.space)
    assert_close(E.T @ E, torch.eye(operator.size, dtype=E.dtype))
    assert_close(E @ E.T, reference.projector)
    v = random_vector(operator)
    assert_close(E @ operator.matvec(v), reference.tangent_hessian @ (E @ v))
    assert_close(operator.gradient(), E.T @ reference.weight_gradient)
    joined = torch.cat([leaf.flatten() for leaf in operator.space.to_leaves(v).values()])
    assert_close(operator.space.from_leaves(joined), v)


def test_directions_in_which_a_factor_vanishes_are_left_out():
    model = adapted_layer("linear")
    (pair,) = find_pairs(model)
    m, n, r = pair.shape
    with torch.no_grad():
        pair.B.zero_()
    assert operator_of(model, "linear", over="tangent").size == m * r
    with torch.no_grad():
        pair.A[1] = 2 * pair.A[0]
    operator = operator_of(model, "linear", over="tangent")
    assert operator.size == m
    E = displacements(operator.space)
    assert_close(dense(operator), E.T @ weight_hessian(pair, inputs_of("linear")) @ E)
    with torch.no_grad():
        pair.B[:, 0] = 1
    assert operator_of(model, "linear", over="tangent").size == m + n - 1


@pytest.mark.parametrize("tied_by", ["parameter", "memory"])
def test_tied_layers_move_together(tied_by):
    """An embedding and a head with the same weight and factors: derivatives see both uses."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    torch.manual_seed(0)
    model = get_peft_model(
        Tied().double(), LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=False)
    )
    one, two = (
        layer for layer in model.modules() if type(layer).__name__ == "Linear" and hasattr(layer, "lora_A")
    )
    A, B = one.lora_A["default"], one.lora_B["default"]
    if tied_by == "parameter":
        two.lora_A["default"].weight, two.lora_B["default"].weight = A.weight, B.weight
    else:
        two.lora_A["default"].weight.data, two.lora_B["default"].weight.data = (
            B.weight.data.T,
            A.weight.data.T,
        )

    def flip(matrix):
        return matrix if tied_by == "parameter" else matrix.T

    x = torch.randn(4, 5, dtype=torch.float64)
    W1, W2 = one.get_base_layer().weight.detach(), two.get_base_layer().weight.detach()
    s, shape = one.scaling["default"], (2, 5)
    a, b = A.weight.detach(), B.weight.detach()

    def loss_fn(model, x):
        return model(x).square().mean()

    def of_change(D):
        return (torch.tanh(x @ (W1 + D).T) @ (W2 + flip(D)).T).square().mean()

    def of_factors(flat):
        return of_change(s * flat[10:].view(5, 2) @ flat[:10].view(shape))

    def of_weights(flat):
        return of_change(s * b @ a + flat.view(5, 5))

    factors = Hessian(model, [x], loss_fn=loss_fn)
    assert factors.size == 20
    expected = hessian(of_factors)(torch.cat([a.flatten(), b.flatten()]))
    assert_close(dense(factors), expected)
    tangent = Hessian(model, [x], loss_fn=loss_fn, over="tangent")
    E = displacements(tangent.space)
    assert_close(dense(tangent), E.T @ hessian(of_weights)(torch.zeros(25, dtype=torch.float64)) @ E)


def test_pulled_back_chart_gives_the_weights_part_of_the_factor_hessian():
    made, reference = shared_problem("bert"), shared_reference("bert")
    base = Hessian(made.model, made.batches)
    layers = base.space.layers
    bases = {}
    for layer in layers:
        A, B = layer.factors(base.evaluation)
        bases[layer.name] = layer.pair.scaling * B, layer.pair.scaling * A
    space = LowRankSpace(base.evaluation, layers, bases)
    operator = Hessian(made.model, made.batches, over=space)
    assert operator.size == base.size
    v = random_vector(base)
    expected = reference.jacobian.T @ (reference.weight_hessian @ (reference.jacobian @ v))
    assert_close(operator.matvec(v), expected)


def test_a_layout_is_contiguous_per_layer_and_names_are_its_parts():
    made = shared_problem("bert")
    for over in ("factors", "tangent", "weights"):
        operator = Hessian(made.model, made.batches, over=over)
        layout, space = operator.space.layout, operator.space
        assert [layout[name].start for name in layout] == [0, *[layout[name].stop for name in layout]][:-1]
        assert list(layout.values())[-1].stop == operator.size
        assert list(layout) == [pair.name for pair in find_pairs(made.model)]
        v = random_vector(operator)
        parts = space.to_dict(v)
        assert list(parts) == space.names
        assert {name: tuple(part.shape) for name, part in parts.items()} == space.shapes
        assert torch.equal(space.to_flat(dict(reversed(parts.items()))), v)
        product = operator.matvec(parts)
        assert torch.equal(space.to_flat(product), operator.matvec(v))


@pytest.mark.parametrize("over", ["factors", "tangent", "weights"])
def test_blocks_are_the_diagonal_blocks(over):
    made = shared_problem("mlp")
    operator = Hessian(made.model, made.batches, loss_fn=made.loss_fn, over=over)
    whole = dense(operator)
    for name, part in operator.space.layout.items():
        assert_close(dense(operator.block(name)), whole[part, part])
    only = Hessian(made.model, made.batches, loss_fn=made.loss_fn, over=over, layers=["second"])
    assert_close(dense(only), whole[part, part])
    assert only.size < operator.size
    pattern = Hessian(made.model, made.batches, loss_fn=made.loss_fn, over=over, layers="*.fir*")
    assert list(pattern.space.layout) == list(operator.space.layout)[:1]


def test_one_factor_alone():
    model = adapted_layer("linear")
    (pair,) = find_pairs(model)
    whole = dense(operator_of(model, "linear"))
    pair.A.requires_grad_(False)
    only_B = operator_of(model, "linear")
    assert only_B.space.names == [f"{pair.name}.lora_B"]
    assert_close(dense(only_B), whole[pair.A.numel() :, pair.A.numel() :])
    pair.B.requires_grad_(False)
    everything = operator_of(model, "linear", adapter_name="default")
    assert_close(dense(everything), whole)


def test_weights_of_a_plain_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def loss_fn(model, x):
        return model(x).square().mean()

    operator = Hessian(model, [x], loss_fn=loss_fn, over="weights")
    assert list(operator.space.layout) == ["0.weight", "2.weight"]

    def of(flat):
        weights = {"0.weight": flat[:12].view(4, 3), "2.weight": flat[12:].view(2, 4)}
        return functional_call(model, weights, (x,)).square().mean()

    weights = torch.cat([model[0].weight.detach().flatten(), model[2].weight.detach().flatten()])
    expected = hessian(of)(weights).detach()
    assert_close(dense(operator), expected)
    for name in ("2.weight", "2"):
        last = Hessian(model, [x], loss_fn=loss_fn, over="weights", layers=[name])
        assert_close(dense(last), expected[12:, 12:])
    model[0].requires_grad_(False)
    assert isinstance(last.space, WeightSpace)
    assert list(Hessian(model, [x], loss_fn=loss_fn, over="weights").space.layout) == ["2.weight"]


@pytest.mark.parametrize("wide", [True, False])
def test_quantized_base_weights(wide):
    """NF4: tangent and factors as ever; full weights through an identity. Compared with the dequantized model."""
    bnb = pytest.importorskip("bitsandbytes")
    m, n = (64, 128) if wide else (128, 64)
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(n, m, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict({"weight": torch.randn(m, n)})
    layer.to("cpu")
    quantized = Holder(layer).to("cpu")
    with torch.no_grad():
        quantized(torch.randn(2, n))  # bitsandbytes packs its weights at the first call
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    plain = nn.Linear(n, m, bias=False)
    plain.weight.data.copy_(weight.view(m, n))
    config = LoraConfig(r=2, target_modules=["it"], init_lora_weights=False)
    models = []
    for base in (quantized, Holder(plain)):
        torch.manual_seed(1)
        models.append(get_peft_model(base, config))
    x = torch.randn(6, n)
    for over in ("factors", "tangent", "weights"):
        one, other = (Hessian(model, [(x,)], loss_fn=holder_loss, over=over) for model in models)
        assert one.size == other.size
        for seed in range(2):
            v = torch.randn(one.size, generator=torch.Generator().manual_seed(seed))
            assert_close(one.matvec(v), other.matvec(v), 1e-4)


def test_dora_merged_inactive_and_ambiguous_adapters_are_refused():
    with pytest.raises(InputError, match="DoRA, which treats its norm as a constant"):
        operator_of(adapted_layer("linear", use_dora=True), "linear")
    merged = adapted_layer("linear")
    merged.merge_adapter()
    with pytest.raises(InputError, match="unmerge_adapter first"):
        operator_of(merged, "linear")
    two = adapted_layer("linear")
    two.add_adapter("other", LoraConfig(r=1, target_modules=["it"]))
    with pytest.raises(InputError, match="not active"):
        operator_of(two, "linear", adapter_name="other")
    two.base_model.set_adapter(["default", "other"])
    with pytest.raises(InputError, match="adapter_name must choose"):
        operator_of(two, "linear")
    with pytest.raises(InputError, match="adapter_name must be one of"):
        operator_of(two, "linear", adapter_name="third")
    with pytest.raises(InputError, match="must name layers of the model"):
        operator_of(adapted_layer("linear"), "linear", layers=["that"])


def test_a_tangent_space_follows_the_weights():
    model = adapted_layer("linear")
    (pair,) = find_pairs(model)
    operator = operator_of(model, "linear", over="tangent")
    old = displacements(operator.space)
    with torch.no_grad():
        pair.A.add_(torch.randn_like(pair.A))
    operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    assert (displacements(operator.space) - old).norm() > 0.1
    assert isinstance(operator.space, TangentSpace)
    assert_close(dense(operator), dense(operator_of(model, "linear", over="tangent")))


def test_a_lm_head_that_is_tied_to_the_embedding_moves_alone():
    """An adapter belongs to its layer, so full weights of the head do not move the embedding."""
    model = tiny_llama(tie_word_embeddings=True).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about tied layers
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([[1, 2, 3, 4]])}
    operator = Hessian(model, [batch], over="weights")
    v = random_vector(operator)
    with pytest.warns(UserWarning, match="float32"):
        product = operator.matvec(v)

    def loss_fn(model, batch):
        inner = model.get_base_model()
        with torch.no_grad():
            hidden = inner.model(batch["input_ids"]).last_hidden_state
        logits = inner.lm_head(hidden)[0, :-1]
        return nn.functional.cross_entropy(logits, batch["labels"][0, 1:])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = Hessian(model, [batch], over="weights", loss_fn=loss_fn)
        assert_close(product, alone.matvec(v), 1e-5)
