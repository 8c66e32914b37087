"""`initialize` end to end: the factors that it writes, what it leaves alone, and what it says."""

import copy
import importlib

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tangora import InputError, find_pairs
from tangora.adapters import attach_offset, has_offset
from tangora.init import initialize, is_trained, start_method, started_by, starts
from tangora.init.one_step import STEP_SIZES
from tangora.init.start_method import StartMethod
from tests.adapters.models import quantized
from tests.cases import combinations
from tests.init.test_starts import assert_same_up_to_signs
from tests.probes.models import adapted, batch_of, batches_of, dense_gradients, exact_loss, model_of
from tests.reference import starts as reference
from tests.tolerances import assert_close

R, ALPHA = 3, 6.0
GRADIENT = ("lora-ga", "lora-one", "lora-one-v1", "one-step")
OFFSET = ("orthogonal", "pissa", "lora-ga", "lora-one-v1")
OPTIONS = {"one-step": {"step": 0.05}}
TRAINED = pytest.mark.filterwarnings("ignore:adapter .* is trained")
ACCURATE = {"power_iterations": 8, "oversampling": 12}


class Net(nn.Module):
    """Two layers with an adapter, wider than any sketch here, and one without."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(24, 30), nn.Linear(30, 20)
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


def net(dtype=torch.float64, **config):
    torch.manual_seed(0)
    options = {"r": R, "lora_alpha": ALPHA, "target_modules": ["one", "two"]}
    return get_peft_model(Net().to(dtype), LoraConfig(**options | config), autocast_adapter_dtype=False)


def data(count=1, size=60, seed=0):
    """Batches of inputs and of what a fixed map makes of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 24, dtype=torch.float64, generator=generator)
    teacher = torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    return list(zip(x, x @ teacher, strict=True))


def squared_error(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def start(model, method, batches=None, **options):
    chosen = (ACCURATE if method in GRADIENT else {}) | OPTIONS.get(method, {}) | options
    if method in GRADIENT and batches is None:
        batches = data()
    return initialize(model, method, batches, loss_fn=chosen.pop("loss_fn", squared_error), **chosen)


def gradients_of(model, batches, loss_fn=squared_error):
    from tangora.probes import probed_layers

    return dense_gradients(
        model, probed_layers(model), lambda m: sum(loss_fn(m, batch) for batch in batches) / len(batches)
    )


def factors_of(model, adapter="default"):
    return {pair.name: tuple(f.clone() for f in pair.factors()) for pair in find_pairs(model, adapter)}


def base_weights(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}


def all_of(model, adapter="default"):
    """Everything that a failed start must give back."""
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    offsets = {}
    for pair in find_pairs(model, adapter):
        if (found := pair.offset()) is not None:
            offsets |= {f"{pair.name}.B0": found[0].clone(), f"{pair.name}.A0": found[1].clone()}
    return parameters | offsets


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def randomize(model, seed=9):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
                parameter.copy_(0.2 * noise)


def test_a_row_of_the_table_is_all_that_a_start_needs(monkeypatch):
    def factors(layer, *, step):
        m, n, r = layer.shape
        return step * torch.ones(r, n), torch.ones(m, r)

    row = StartMethod(factors, {"step": float, "held_out": object}, step_sizes=(5.0, 1e-3))
    monkeypatch.setitem(importlib.import_module("tangora.init.starts")._STARTS, "ones", row)
    model = net()
    done = start(model, "ones", held_out=data())
    assert done.step == min(done.line_search, key=done.line_search.__getitem__)
    assert set(done.line_search) == set(row.step_sizes)
    assert all(torch.all(pair.A.eq(done.step)) for pair in find_pairs(model))
    with pytest.raises(InputError, match="'ones' needs either"):
        start(model, "ones")


# --- the factors ---


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "gd", "unit", "weight_svd"])
def test_lora_ga_is_that_of_the_dense_gradient(direction, scale):
    model = net()
    gradients = gradients_of(model, data())
    start(model, "lora-ga", direction=direction, scale=scale)
    for pair in find_pairs(model):
        W0 = pair.layer.get_base_layer().weight.detach()
        expected = reference.lora_ga(gradients[pair.name], W0, R, pair.scaling, direction, scale)
        assert_same_up_to_signs(pair.factors(), expected, 1e-7)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_other_starts_are_those_of_the_dense_matrices(rslora):
    model = net(use_rslora=rslora)
    gradients = gradients_of(model, data())
    for method in ("lora-one", "lora-one-v1", "one-step", "pissa"):
        start(model, method)
        for pair in find_pairs(model):
            G, s = gradients[pair.name], pair.scaling
            W0 = pair.layer.get_base_layer().weight.detach()
            expected = {
                "lora-one": lambda G=G: reference.lora_one(G, R),
                "lora-one-v1": lambda G=G: reference.lora_one_v1(G, R),
                "one-step": lambda G=G, s=s: reference.one_step(G, R, s, 0.05),
                "pissa": lambda W0=W0, s=s: reference.pissa(W0, R, s),
            }[method]()
            assert_same_up_to_signs(pair.factors(), expected, 1e-7)
            A, B = pair.factors()
            assert_close(B @ A, expected[1] @ expected[0], 1e-7)


def test_ranks_and_scalings_of_each_layer():
    model = net(rank_pattern={"one": 2, "two": 5}, alpha_pattern={"two": 20})
    gradients = gradients_of(model, data())
    start(model, "lora-one", gamma=50.0)
    one, two = find_pairs(model)
    assert (one.shape[2], two.shape[2], one.scaling, two.scaling) == (2, 5, 3.0, 4.0)
    for pair in (one, two):
        A, B = pair.factors()
        expected = reference.lora_one(gradients[pair.name], pair.shape[2], 50.0)
        assert_close(B @ A, expected[1] @ expected[0], 1e-7)


@pytest.mark.parametrize("name", ["gpt2", "t5", "vit", "bert", "llama"])
def test_every_layer_of_whole_models(name):
    """Transposed layers, embeddings and convolutions too: s B A is the step, seen on the weight as it is stored."""
    model, batches = adapted(name), batches_of(name, 1)
    gradients = gradients_of(model, batches, exact_loss)
    start(model, "one-step", batches, loss_fn=exact_loss, step=0.1, power_iterations=4)
    tolerance = 1e-3 if name in ("llama", "t5") else 1e-6
    for pair in find_pairs(model):
        G = gradients[pair.name]
        scale = float(G.norm())
        expected = -0.1 * reference.best_rank(G, pair.shape[2])
        error = float((pair.delta_weight() - expected).norm())
        values = torch.linalg.svdvals(G)
        gap = float((values[1] - values[2]) / values[0]) if len(values) > 2 else 1.0
        assert error <= 0.1 * scale * tolerance / max(gap, 1e-9), pair.name


# --- what the model computes ---


# PiSSA reads the weights of every architecture, and LoRA-GA its gradients
@pytest.mark.parametrize(
    ("name", "method"),
    combinations(
        ["gpt2", "t5", "vit", "bert", "llama"],
        OFFSET,
        quick=lambda name, method: name == "vit" or method in ("pissa", "lora-ga"),
    ),
)
def test_starts_with_an_offset_change_no_bit(name, method):
    model, batches = adapted(name, lora_dropout=0.3), batches_of(name, 2)
    weights = base_weights(model)
    with torch.no_grad():
        expected = model_of(name)(**batch_of(name)).logits
    options = {"batches": batches, "power_iterations": 0} if start_method(method).reads_gradients else {}
    done = initialize(model.train(), method, **options)
    assert model.training
    assert_equal(weights, base_weights(model))
    assert set(done.names) == {pair.name for pair in find_pairs(model)}
    assert not done.skipped
    assert done.seconds > 0
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch_of(name)).logits, expected)
        assert all(pair.delta_weight().abs().max() > 0 for pair in find_pairs(model))
        with model.disable_adapter():
            assert torch.equal(model(**batch_of(name)).logits, expected)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("method", ["lora-one", "one-step"])
def test_starts_without_an_offset_compute_what_the_changed_weight_would(method, dora):
    model = net(use_dora=dora)
    weights = base_weights(model)
    start(model, method)
    assert_equal(weights, base_weights(model))
    assert not has_offset(model, "default")
    plain = Net().double()
    plain.load_state_dict(
        {name.rpartition("model.")[2].replace("base_layer.", ""): w for name, w in weights.items()}
    )
    with torch.no_grad():
        for pair in find_pairs(model):
            plain.get_submodule(pair.name.rpartition(".")[2]).weight += pair.delta_weight()
        x = data()[0][0]
        assert_close(model(x), plain(x), 1e-12)
        with model.disable_adapter():
            assert (model(x) - plain(x)).abs().max() > 1e-6


@pytest.mark.parametrize("method", OFFSET)
def test_dora_starts_at_the_base(method):
    model = net(use_dora=True)
    x = data()[0][0]
    with torch.no_grad(), model.disable_adapter():
        expected = model(x)
    start(model, method)
    with torch.no_grad():
        assert_close(model(x), expected, 1e-12)


def test_adapters_in_bfloat16():
    model = net()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    x = data()[0][0]
    with torch.no_grad(), model.disable_adapter():
        expected = model(x)
    gradients = gradients_of(model, data())
    start(model, "lora-ga")
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    for pair in find_pairs(model):
        A, B = pair.factors()
        assert A.dtype == B.dtype == torch.bfloat16
        W0 = pair.layer.get_base_layer().weight.detach()
        G = gradients[pair.name]
        expected_factors = reference.lora_ga(G, W0, R, pair.scaling, "ArB2r", "stable")
        assert_same_up_to_signs((A.double(), B.double()), expected_factors, 2**-8)


@pytest.mark.parametrize("method", ["lora-ga", "lora-one", "orthogonal"])
def test_quantized_bases(method):
    model = get_peft_model(quantized("nf4"), LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["it"]))
    x = torch.randn(12, 64)
    packed = find_pairs(model)[0].base.weight.data.clone()
    with torch.no_grad():
        before = model(x)
    initialize(model, method, [x], loss_fn=lambda m, x: m(x).square().mean())
    with torch.no_grad():
        after = model(x)
    (pair,) = find_pairs(model)
    assert torch.equal(packed, pair.base.weight.data)
    if method == "lora-one":
        assert_close(after, before + x @ pair.delta_weight().T, 1e-4)
        assert after.square().mean() < before.square().mean()
    else:
        assert torch.equal(after, before)


# --- again, with other seeds, and among other adapters ---


@pytest.mark.parametrize("method", starts())
def test_erasing_training_is_said_and_another_start_is_not(method):
    model = net()
    start(model, "orthogonal")
    assert not is_trained(model)
    start(model, method)  # no warning, which would be an error
    assert started_by(model) == method
    assert not is_trained(copy.deepcopy(model))
    with torch.no_grad():
        for pair in find_pairs(model):
            pair.B.add_(1e-4)
    assert is_trained(model)
    with pytest.warns(UserWarning, match="adapter 'default' is trained"):
        start(model, method)
    assert not is_trained(model)


def test_what_was_done_prints_on_one_short_line():
    done = start(net(), "lora-ga")
    assert repr(done).startswith("Start('lora-ga': 2 layers, ")
    assert len(repr(done)) < 80


@TRAINED
@pytest.mark.parametrize("method", starts())
def test_a_second_time_gives_the_same(method):
    once, twice = net(use_dora=True), net(use_dora=True)
    start(once, method)
    start(twice, "orthogonal", seed=5)
    randomize(twice)
    start(twice, method)
    assert has_offset(once, "default") == has_offset(twice, "default") == (method in OFFSET)
    one, other = all_of(once), all_of(twice)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if "lora_" in name or name.endswith(("A0", "B0")):
            assert_close(other[name], value, 1e-6)


@pytest.mark.parametrize("method", starts())
def test_seeds_decide_and_the_global_state_does_not(method):
    options = {"niter": 1} if method == "pissa" else {}
    if method in GRADIENT:
        options = {"power_iterations": 0, "oversampling": 0}

    def factors(seed, state):
        model = net()
        torch.manual_seed(state)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
        start(model, method, seed=seed, **options)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
        return torch.cat([factor.flatten() for pair in factors_of(model).values() for factor in pair])

    one = factors(0, state=0)
    assert_close(factors(0, state=1), one, 1e-9)
    assert (factors(1, state=0) - one).abs().max() > 1e-6 * one.abs().max()


def test_flags_and_gradients_are_left_alone():
    model = net(modules_to_save=["head"]).train()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [(p, id(p), p.requires_grad, p.grad.clone()) for p in model.parameters()]
    start(model, "lora-ga")
    for (old, identity, flag, grad), new in zip(before, model.parameters(), strict=True):
        assert (id(new), new.requires_grad) == (identity, flag)
        assert new is old
        assert torch.equal(new.grad, grad)
    assert model.training


@TRAINED
@pytest.mark.parametrize("active", ["default", "other"])
def test_one_adapter_among_several(active):
    model = net()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=["one"]))
    model.double()
    randomize(model)
    untouched = factors_of(model, "default")
    model.set_adapter(active)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    x = data()[0][0]
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    with model.disable_adapter():
        gradients = gradients_of(model, data())
    done = start(model, "lora-one", adapter_name="other")
    assert {name.rpartition(".")[2] for name in done.names} == {"one"}
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert model.active_adapters == [active]
    assert model.active_adapter == active
    for name, pair in factors_of(model, "default").items():
        assert all(torch.equal(one, other) for one, other in zip(pair, untouched[name], strict=True))
    (pair,) = find_pairs(model, "other")
    expected = reference.lora_one(gradients[pair.name], 2)  # at the base: the other adapter takes no part
    assert_close(pair.factors()[1] @ pair.factors()[0], expected[1] @ expected[0], 1e-7)
    start(model, "lora-ga", adapter_name="other")
    model.set_adapter("other")
    with torch.no_grad():
        assert torch.equal(model(x), base)


# --- one step ---


def test_one_step_searches_its_step_on_held_out_data():
    model, held_out = net(), data(count=2, seed=1)
    with torch.no_grad():
        before = float(sum(squared_error(model, batch) for batch in held_out) / 2)
    done = initialize(model, "one-step", data(), held_out=iter(held_out), loss_fn=squared_error, **ACCURATE)
    assert tuple(done.line_search) == STEP_SIZES
    assert done.step == min(done.line_search, key=done.line_search.get)
    with torch.no_grad():
        after = float(sum(squared_error(model, batch) for batch in held_out) / 2)
    assert after == pytest.approx(done.line_search[done.step], rel=1e-9)
    assert after < before
    given = net()
    direct = start(given, "one-step", step=done.step)
    assert (direct.step, dict(direct.line_search)) == (done.step, {})
    for (A, B), (A1, B1) in zip(factors_of(model).values(), factors_of(given).values(), strict=True):
        assert_close(B @ A, B1 @ A1, 1e-9)


# --- layers that get no start ---


def test_ranks_near_and_above_a_layers_smaller_side():
    class Narrow(Net):
        def __init__(self):
            super().__init__()
            self.two, self.head = nn.Linear(30, 4), nn.Linear(4, 3)

    def made(r):
        torch.manual_seed(0)
        config = LoraConfig(r=r, target_modules=["one", "two"])
        return get_peft_model(Narrow().double(), config, autocast_adapter_dtype=False)

    for method in starts():
        options = {"power_iterations": 0, "oversampling": 8} if method in GRADIENT else {}
        for r in (3, 4):  # fewer than 2 r directions, and just as many as the rank
            model = made(r)
            done = start(model, method, **options)
            assert len(done.names) == 2
            assert not done.skipped
            if method == "lora-ga":
                A, B = factors_of(model)["base_model.model.two"]
                assert_close(A @ A.T / A[0].square().sum(), torch.eye(r, dtype=torch.float64), 1e-9)
        model = made(5)
        if method == "lora":
            assert len(start(model, method).names) == 2
            continue
        with pytest.warns(
            UserWarning, match=r"1 layers keep the plain LoRA initialization \(.*two: rank 5 is above"
        ):
            done = start(model, method, **options)
        assert list(done.skipped) == ["base_model.model.two"]
        assert (factors_of(model)["base_model.model.two"][1] == 0).all()
        assert (factors_of(model)["base_model.model.one"][1] != 0).any()


@pytest.mark.parametrize("method", GRADIENT)
def test_layers_without_a_gradient(method):
    class Beside(Net):
        def forward(self, x):
            return self.head(torch.tanh(self.two(x[:, :1].expand(-1, 30))))

    torch.manual_seed(0)
    config = LoraConfig(r=R, target_modules=["one", "two"])
    model = get_peft_model(Beside().double(), config, autocast_adapter_dtype=False)
    with pytest.warns(UserWarning, match="one: the model does not call it"):
        done = start(model, method, power_iterations=1)
    assert done.names == ("base_model.model.two",)
    assert list(done.skipped) == ["base_model.model.one"]
    assert (factors_of(model)["base_model.model.one"][1] == 0).all()
    with pytest.warns(UserWarning, match=r"2 layers.*two: its gradient is zero on these batches"):
        done = start(model, method, loss_fn=lambda m, batch: 0 * squared_error(m, batch))
    assert done.names == ()


# --- what cannot be done ---


def classifier(**config):
    return adapted("bert", target_modules=["query"], **config)


def merged(model):
    model.merge_adapter()
    return model


def two_active(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def unlabelled():
    return [{"input_ids": batch_of("bert")["input_ids"]}]


def nan_loss(model, batch):
    return model(**batch).loss * float("nan")


BATCHES = {"batches": batches_of("bert")}
WRONG = {
    "no batches": ("lora-ga", {}, "initialization 'lora-ga' reads gradients: give batches"),
    "one batch": ("lora-one", {"batches": batch_of("bert")}, "a single batch: put it into a list"),
    "method": ("lora-gaa", {}, "method must be one of .*did you mean lora-ga"),
    "option": ("lora-one", {**BATCHES, "scale": 1}, "'lora-one' takes gamma, .*got 'scale'"),
    "no options": ("lora", {"gamma": 1}, "'lora' takes no options; got 'gamma'"),
    "direction": ("lora-ga", {**BATCHES, "direction": "BrA"}, "direction must be one of"),
    "labels": ("lora-ga", {"batches": unlabelled()}, "no loss for a batch of input_ids"),
    "nan": ("lora-ga", {**BATCHES, "loss_fn": nan_loss}, "batch 0 has loss nan"),
    "oversampling": ("lora-ga", {**BATCHES, "oversampling": -2}, "oversampling"),
    "no step": ("one-step", BATCHES, r"step=\.\.\. or held_out"),
    "both": ("one-step", {**BATCHES, "step": 1.0, "held_out": []}, r"step=\.\.\. or"),
    "negative step": ("one-step", {**BATCHES, "step": -1.0}, "step must be a number"),
    "held out": ("one-step", {**BATCHES, "held_out": batch_of("bert")}, "held_out must be a list"),
    "adapter": ("lora", {"adapter_name": "nobody"}, "got 'nobody'"),
    "base": ("lora", {}, "must be a PeftModel.*got BertFor"),
    "two": ("lora", {}, "active"),
    "merged": ("lora-one", BATCHES, "'default' is merged"),
    "mutated": ("lora-ga", BATCHES, "has changed the base weights"),
}
MODELS = {
    "base": lambda: model_of("bert"),
    "two": lambda: two_active(classifier()),
    "merged": lambda: merged(classifier()),
    "mutated": lambda: classifier(dtype=torch.float32, init_lora_weights="pissa"),
}


@TRAINED
@pytest.mark.messages
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_named_and_changes_nothing(case):
    method, options, message = WRONG[case]
    model = MODELS.get(case, classifier)()
    if case not in ("base", "merged"):
        randomize(model)
    before = None if case in ("base", "adapter") else all_of(model)
    state = torch.get_rng_state()
    with pytest.raises(InputError, match=message):
        initialize(model, method, **options)
    assert torch.equal(state, torch.get_rng_state())
    if before is not None:
        assert_equal(before, all_of(model))


@TRAINED
@pytest.mark.parametrize("method", [*GRADIENT, "pissa"])
def test_an_error_gives_everything_back(method, monkeypatch):
    """Also magnitudes, biases, an offset that was there, and whichever adapter was active."""
    model = net(use_dora=True)
    start(model, "orthogonal", seed=3)
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.add_(0.3)
    before, x = all_of(model), data()[0][0]
    with torch.no_grad():
        output = model(x)

    def fails(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("tangora.init.initialize"), "_write", fails)
    with pytest.raises(KeyboardInterrupt):
        start(model, method)
    assert has_offset(model, "default")
    assert_equal(before, all_of(model))
    with torch.no_grad():
        assert torch.equal(model(x), output)


@TRAINED
def test_biases_of_lora_are_given_back():
    model = net(lora_bias=True)
    randomize(model)
    before = all_of(model)
    with pytest.raises(InputError, match="loss nan"):
        start(model, "lora-one", loss_fn=lambda m, batch: squared_error(m, batch) * float("nan"))
    assert_equal(before, all_of(model))


def test_an_offset_that_was_attached_by_hand_is_replaced():
    model = net()
    attach_offset(model, "default", {})
    start(model, "lora-ga")
    for pair in find_pairs(model):
        B0, A0 = pair.offset()
        assert torch.equal(pair.factors()[0], A0)
        assert torch.equal(pair.factors()[1], B0)
    start(model, "lora-one")
    assert not has_offset(model, "default")
