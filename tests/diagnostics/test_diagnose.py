"""`diagnose` on small models, against dense gradients of plain autograd."""

import json
import math

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

from tangora import InputError, find_pairs
from tangora.adapters import has_offset
from tangora.diagnostics import DIAGNOSED_STARTS, Diagnosis, diagnose
from tangora.init import initialize
from tests.adapters.models import dense_gradient, quantized
from tests.cases import combinations
from tests.diagnostics.models import (
    adapted,
    bert,
    causal_batches,
    classifier_batches,
    dense_gradients,
    gpt2,
    moved,
)
from tests.models import adapted_layer, inputs_of, loss_of, tiny_llama
from tests.reference import dense


def look(model, batches, **options):
    return diagnose(model, batches, progress=False, **options)


def by_name(diagnosis):
    return {layer.name: layer for layer in diagnosis.layers}


def factors(model):
    return {
        pair.name.removeprefix("base_model.model."): (pair, *pair.factors()) for pair in find_pairs(model)
    }


def energy(matrix):
    return float(matrix.square().sum())


# --- against dense gradients ---


@pytest.mark.parametrize(
    ("base", "batches", "task", "rel"),
    [
        (bert, classifier_batches(), "SEQ_CLS", 1e-8),
        (gpt2, causal_batches(), "CAUSAL_LM", 1e-5),  # transformers takes causal losses in float32
    ],
)
def test_a_moved_adapter_against_dense_gradients(base, batches, task, rel):
    options = {"fan_in_fan_out": True} if base is gpt2 else {}
    model = moved(adapted(base(), task_type=task, **options))
    there, base_gradients = dense_gradients(model, batches), dense_gradients(model, batches, off=True)
    found = look(model, batches, rank=2)
    assert not found.plain_start
    assert found.exact_norms
    assert found.num_batches == len(batches)
    inner = squared = 0.0
    for name, (pair, A, B) in factors(model).items():
        layer, G = by_name(found)[name], there[name]
        state, residual = layer.adapter, G - dense.project(A, B, G)
        assert state.gradient.norm == pytest.approx(G.norm().item(), rel=rel)
        assert state.captured_energy == pytest.approx(1 - energy(residual) / energy(G), rel=rel, abs=1e-12)
        assert state.alignment_error == pytest.approx(residual.norm().item(), rel=rel)
        step = pair.scaling**2 * (B @ B.T @ G + G @ A.T @ A)
        inner, squared = inner + float((step * G).sum()), squared + energy(step)
        assert state.cosine == pytest.approx(float((step * G).sum() / (step.norm() * G.norm())), rel=rel)
        expected = torch.linalg.svdvals(base_gradients[name])
        assert layer.gradient.norm == pytest.approx(base_gradients[name].norm().item(), rel=rel)
        assert layer.gradient.singular_values[:4] == pytest.approx(expected[:4].tolist(), rel=1e-3)
    whole = sum(energy(there[name]) for name in factors(model))
    assert found.totals.cosine == pytest.approx(inner / math.sqrt(squared * whole), rel=rel)
    captured = sum(layer.adapter.captured_energy * layer.adapter.gradient.energy for layer in found.layers)
    assert found.totals.adapter == pytest.approx(captured / whole, rel=rel)


def test_a_plain_start_is_what_A_sees():
    batches, model = classifier_batches(), adapted(bert())
    gradients, found = dense_gradients(model, batches), look(model, batches)
    assert found.plain_start
    assert found.loss == found.adapter_loss
    for name, (_, A, _) in factors(model).items():
        layer, G = by_name(found)[name], gradients[name]
        P_A, _ = dense.projectors(A, torch.zeros(1, 1, dtype=A.dtype))
        assert layer.starts["lora"] == layer.adapter.captured_energy
        assert layer.adapter.captured_energy == pytest.approx(energy(G @ P_A) / energy(G), rel=1e-9)
        assert layer.adapter.gradient == layer.gradient
        assert (layer.adapter.condition_B, layer.adapter.effective_rank) == (None, 0.0)
        assert layer.adapter.relative_imbalance == pytest.approx(1.0)


def test_starts_see_what_their_theory_says():
    batches, model = classifier_batches(), adapted(bert())
    gradients, found = dense_gradients(model, batches), look(model, batches, power_iterations=4)
    for layer in found.layers:
        G = gradients[layer.name]
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        ga = (S[:4].square().sum() / energy(G)).item()
        assert layer.starts["lora-ga"] == pytest.approx(ga, rel=1e-4)
        assert layer.reachable == pytest.approx(ga, rel=1e-4)
        assert layer.reachable >= max(layer.starts.values()) - 1e-9
        one = energy(dense.project(Vh[:2], U[:, :2], G)) / energy(G)
        assert layer.starts["lora-one"] == pytest.approx(one, rel=1e-4)
        weight = model.base_model.model.get_submodule(layer.name).base_layer.weight
        U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
        principal = energy(dense.project(Vh[:2], U[:, :2], G)) / energy(G)
        assert layer.starts["pissa"] == pytest.approx(principal, rel=1e-6)
    assert found.starts == DIAGNOSED_STARTS


@pytest.mark.parametrize("exact", [True, False])
def test_starts_on_other_examples(exact):
    batches, others, model = classifier_batches(), classifier_batches((5, 2), seed=1), adapted(bert())
    own, new = dense_gradients(model, batches), dense_gradients(model, others)
    found = look(model, batches, held_out=others, power_iterations=4, exact_norms=exact)
    captured = dict.fromkeys(DIAGNOSED_STARTS, 0.0)
    for layer in found.layers:
        G, H = own[layer.name], new[layer.name]
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        held = layer.held_out
        assert held.energy == pytest.approx(energy(H), rel=1e-9 if exact else 0.2)
        assert (held.energy_error == 0) == exact
        ga = energy(dense.project(Vh[:2], U[:, 2:4], H)) / held.energy
        assert held.starts["lora-ga"] == pytest.approx(ga, rel=1e-3, abs=1e-4)
        one = energy(dense.project(Vh[:2], U[:, :2], H)) / held.energy
        assert held.starts["lora-one"] == pytest.approx(one, rel=1e-3, abs=1e-4)
        for start in DIAGNOSED_STARTS:
            captured[start] += held.starts[start] * held.energy
    whole = sum(layer.held_out.energy for layer in found.layers)
    assert found.totals.held_out == pytest.approx({start: each / whole for start, each in captured.items()})
    assert found.totals.held_out["lora-ga"] < found.totals.starts["lora-ga"]


def test_the_same_examples_again_are_no_other_examples():
    batches = classifier_batches()
    found = look(adapted(bert()), batches, held_out=batches)
    assert found.totals.held_out == pytest.approx(found.totals.starts, rel=1e-9)


def test_a_random_start_sees_r_of_n_on_average():
    batches, model = classifier_batches(), bert()
    found = [look(model, batches, rank=3, starts=["lora", "orthogonal"], seed=seed) for seed in range(6)]
    square = [layer for one in found for layer in one.layers if layer.m == layer.n == 16]
    lora = [layer.starts["lora"] for layer in square]
    both = [layer.starts["orthogonal"] for layer in square]
    assert sum(lora) / len(lora) == pytest.approx(3 / 16, rel=0.15)
    assert sum(both) / len(both) == pytest.approx(1 - (1 - 3 / 16) ** 2, rel=0.15)


def test_plain_models_are_seen_as_peft_would_adapt_them():
    batches = classifier_batches()
    plain = look(bert(), batches, rank=2)
    adapter = look(adapted(bert()), batches)
    assert [layer.name for layer in plain.layers] == [layer.name for layer in adapter.layers]
    assert plain.totals.adapter is None
    assert plain.totals.cosine is None
    assert plain.adapter_loss is None
    assert plain.loss == pytest.approx(adapter.loss, rel=1e-12)
    for one, other in zip(plain.layers, adapter.layers, strict=True):
        assert one.adapter is None
        assert one.gradient.energy == pytest.approx(other.gradient.energy, rel=1e-10)
        assert one.starts["lora-ga"] == pytest.approx(other.starts["lora-ga"], rel=1e-8)
        assert one.starts["orthogonal"] == pytest.approx(other.starts["orthogonal"], rel=1e-8)
    assert plain.plan.ranks == adapter.plan.ranks


def test_heads_are_left_out_and_layers_can_be_named():
    causal, batches = gpt2(), causal_batches()
    names = {layer.name for layer in look(causal, batches, rank=2).layers}
    assert len(names) == 8
    assert "lm_head" not in names
    chosen = look(causal, batches, rank=2, target_modules=["c_attn"])
    assert [layer.name for layer in chosen.layers] == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
    ]


@pytest.mark.parametrize(
    ("method", "dora"),
    combinations(
        ["lora-ga", "lora-one-v1", "pissa"],
        [False, True],
        quick=lambda method, dora: (method == "lora-ga") == dora and method != "lora-one-v1",
    ),
)
def test_a_start_that_was_made_sees_what_was_foreseen(method, dora):
    batches = classifier_batches()
    foreseen = look(adapted(bert(), use_dora=dora), batches)
    model = adapted(bert(), use_dora=dora)
    initialize(model, method, batches, seed=0, progress=False)
    found = look(model, batches)
    assert not found.plain_start  # the offset hides that it has not moved, and costs another reading
    assert found.adapter_loss == pytest.approx(found.loss, rel=1e-9)
    name = "lora-one" if method == "lora-one-v1" else method
    assert found.totals.adapter == pytest.approx(foreseen.totals.starts[name], rel=1e-3)
    assert has_offset(model, "default")


def test_dora_moves_scaled_rows():
    model, inputs = adapted_layer("linear", use_dora=True), inputs_of("linear")
    (pair,) = find_pairs(model)
    magnitude = pair.layer.lora_magnitude_vector["default"].weight.detach()
    _, g = dense_gradient(pair, inputs, magnitude)
    A, B = pair.factors()
    V = pair.layer.get_base_layer().weight + pair.delta_weight()
    D = (magnitude / V.norm(dim=1)).detach()
    G = g / D[:, None]
    found = look(model, [inputs], loss_fn=lambda model, batch: loss_of(model(*batch)), starts=["orthogonal"])
    state = found.layers[0].adapter
    assert state.gradient.norm == pytest.approx(G.norm().item(), rel=1e-9)
    expected = energy(dense.project(A, D[:, None] * B, G)) / energy(G)
    assert state.captured_energy == pytest.approx(expected, rel=1e-9)
    step = D[:, None] * (B @ B.T @ g + g @ A.T @ A)
    assert state.cosine == pytest.approx(float((step * G).sum() / (step.norm() * G.norm())), rel=1e-9)


@pytest.mark.parametrize("name", ["gpt2-conv1d", "embedding", "conv2d"])
def test_other_layers(name):
    model, inputs = adapted_layer(name), inputs_of(name)
    (pair,) = find_pairs(model)
    _, G = dense_gradient(pair, inputs)
    A, B = pair.factors()
    found = look(model, [inputs], loss_fn=lambda model, batch: loss_of(model(*batch)))
    state = found.layers[0].adapter
    expected = energy(dense.project(A, B, G)) / energy(G)
    assert state.captured_energy == pytest.approx(expected, rel=1e-9)
    assert found.layers[0].starts["lora"] > 0


# --- estimates, precision, quantization ---


def test_estimated_norms_agree_with_exact_ones():
    torch.manual_seed(0)
    model = tiny_llama()
    batches = causal_batches((8, 8, 8))
    exact = look(model, batches, rank=1, num_values=2)
    guess = look(model, batches, rank=1, num_values=2, exact_norms=False)
    assert exact.exact_norms
    assert not guess.exact_norms
    assert exact.totals.energy_error == 0
    scores = []
    for one, other in zip(exact.layers, guess.layers, strict=True):
        assert one.gradient.energy_error == 0
        error = other.gradient.energy_error
        scores.append((other.gradient.energy - one.gradient.energy) / error)
        assert other.gradient.energy == pytest.approx(one.gradient.energy, rel=0.2)
    assert max(map(abs, scores)) < 6
    assert abs(sum(scores)) / len(scores) < 2
    assert guess.totals.starts["lora-ga"] == pytest.approx(exact.totals.starts["lora-ga"], rel=0.05)


def test_bfloat16():
    model = adapted(tiny_llama().to(torch.bfloat16), task_type="CAUSAL_LM")
    reference = look(adapted(tiny_llama(), task_type="CAUSAL_LM"), causal_batches())
    found = look(model, causal_batches())
    assert found.totals.starts["lora-ga"] == pytest.approx(reference.totals.starts["lora-ga"], rel=0.02)
    assert found.plain_start


def test_four_bit_layers():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    holder = quantized("nf4")
    layer = holder.it
    model = get_peft_model(holder, LoraConfig(r=4, target_modules=["it"]))
    x = torch.randn(6, 64)
    options = {"loss_fn": lambda model, batch: loss_of(model(batch))}
    plain = look(model, [x], **options)
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    weight = weight.reshape(32, 64)
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    moved(model)
    (pair,) = find_pairs(model)
    copy = nn.Linear(64, 32, bias=False)
    copy.weight.data = weight.clone()
    loss_of(copy(x)).backward()
    G = copy.weight.grad
    principal = energy(dense.project(Vh[:4], U[:, :4], G)) / energy(G)
    assert plain.layers[0].starts["pissa"] == pytest.approx(principal, rel=1e-3)
    found = look(model, [x], **options)
    copy.weight.data += pair.delta_weight()
    copy.weight.grad = None
    loss_of(copy(x)).backward()
    expected = energy(dense.project(*pair.factors(), copy.weight.grad)) / energy(copy.weight.grad)
    assert found.layers[0].adapter.captured_energy == pytest.approx(expected, rel=1e-3)


# --- what it leaves behind ---


def state_of(model):
    return (
        {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: len(module._forward_hooks) for name, module in model.named_modules()},
        {name: getattr(module, "_disable_adapters", None) for name, module in model.named_modules()},
    )


@pytest.mark.parametrize("make", ["plain start", "moved", "frozen", "plain model", "offset"])
def test_nothing_is_changed(make):
    batches = classifier_batches()
    model = bert() if make == "plain model" else adapted(bert())
    if make in {"moved", "frozen"}:
        moved(model)
    if make == "frozen":
        model.requires_grad_(False)
    if make == "offset":
        initialize(model, "lora-ga", batches, progress=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    before, random = state_of(model), torch.get_rng_state()
    look(model, batches)
    after = state_of(model)
    assert torch.equal(random, torch.get_rng_state())
    for name, (value, requires_grad) in before[0].items():
        assert torch.equal(value, after[0][name][0])
        assert requires_grad == after[0][name][1]
    assert before[1:] == after[1:]
    for parameter in model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        assert parameter.grad is None or torch.equal(parameter.grad, torch.ones_like(parameter))


def test_nothing_is_changed_by_a_failure():
    model, batches = moved(adapted(bert())), classifier_batches()
    before = state_of(model)
    broken = [*batches, {"input_ids": batches[0]["input_ids"]}]
    with pytest.raises(InputError):
        look(model, broken)
    assert before[1:] == state_of(model)[1:]


def test_the_same_seed_gives_the_same_numbers():
    batches = classifier_batches()
    one, other = look(bert(), batches, rank=2).to_dict(), look(bert(), batches, rank=2).to_dict()
    assert one.pop("seconds") > 0
    other.pop("seconds")
    assert one == other


def test_json_holds_everything():
    found = look(moved(adapted(bert())), classifier_batches(), held_out=classifier_batches((2,)))
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Diagnosis.from_dict(content) == found
    del content["plan"]["ranks"]
    with pytest.raises(InputError, match=r"plan\.ranks"):
        Diagnosis.from_dict(content)


def test_worst_layers_come_in_order():
    found = look(adapted(bert()), classifier_batches())
    missed = [found.missed_share(layer) for layer in found.worst_layers(len(found.layers))]
    assert missed == sorted(missed, reverse=True)
    assert sum(missed) == pytest.approx(1 - found.totals.adapter)
    assert len(found.worst_layers(3)) == 3


def test_progress_counts_every_batch():
    heard = []
    batches = classifier_batches()
    diagnose(moved(adapted(bert())), batches, progress=lambda _, done, total: heard.append((done, total)))
    assert heard == [(index, 30) for index in range(1, 31)]  # 2 points, 5 passes, 3 batches
    heard.clear()
    diagnose(bert(), batches, held_out=batches[:2], progress=lambda _, *seen: heard.append(seen))
    assert heard[-1] == (17, 17)
    assert len(heard) == 17


def test_iterators_and_layers_without_gradient():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.never = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x):
            return self.used(x) + 0 * self.idle(x)

    torch.manual_seed(0)
    found = look(
        Idle(), iter([torch.randn(4, 6)]), rank=1, loss_fn=lambda model, batch: loss_of(model(batch))
    )
    assert list(found.skipped) == ["never"]
    idle = by_name(found)["idle"]
    assert idle.gradient.energy == 0
    only = look(
        Idle(), [torch.randn(4, 6)], rank=1, starts=["lora-ga"], loss_fn=lambda m, batch: loss_of(m(batch))
    )
    assert by_name(only)["idle"].starts == {"lora-ga": 0.0}
    assert set(idle.starts.values()) == {0.0}
    assert (idle.reachable, set(idle.ranks_needed.values())) == (0.0, {None})
    assert found.totals.starts["lora-ga"] == by_name(found)["used"].starts["lora-ga"]


def test_the_plan_keeps_the_scaling_and_fits_peft():
    batches = classifier_batches()
    model = adapted(bert(), r=3, lora_alpha=9, use_rslora=True)
    plan = look(model, batches, budget_rank=2).plan
    assert (plan.r, plan.use_rslora) == (2, True)
    again = get_peft_model(
        bert(), LoraConfig(**plan.config(), target_modules="all-linear", task_type="SEQ_CLS")
    )
    ranks = {name: pair.shape[2] for name, (pair, _, _) in factors(again).items()}
    assert ranks == plan.ranks
    scalings = {round(pair.scaling, 9) for pair in find_pairs(model) + find_pairs(again)}
    assert len(scalings) == 1
    assert look(model, batches, budget_rank=2, alpha=7).plan.lora_alpha == 7


def test_other_ranks_than_the_adapters():
    batches, model = classifier_batches(), adapted(bert())
    found = look(model, batches, rank=4)
    own = look(model, batches)
    assert found.totals.starts["lora"] > found.totals.adapter == own.totals.starts["lora"]
    assert {layer.rank for layer in found.layers} == {4}
    assert found.plan.r == 4


# --- what cannot be diagnosed ---


def merged(model):
    model.merge_adapter()
    return model


def disabled(model):
    model.base_model.disable_adapter_layers()
    return model


def two_adapters(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    model.base_model.set_adapter(["default", "other"])
    return model


def other_active(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query"]))
    model.set_adapter("other")
    return model


def adalora():
    config = AdaLoraConfig(init_r=2, target_r=2, total_step=10, target_modules=["query"])
    return get_peft_model(bert(), config)


@pytest.mark.messages
@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (bert, {"rank": 17}, "rank must be at most 16, the smaller side of layer .*; got 17"),
        (bert, {"rank": 0}, "rank must be"),
        (bert, {"budget_rank": 0}, "budget_rank must be"),
        (bert, {"budget_rank": 17}, "budget_rank must be at most 16"),
        (bert, {"rank": 4, "num_values": 7}, r"num_values must be a number in \[8, inf\); got 7"),
        (bert, {"starts": ["lora-gaa"]}, "starts must be one of .*did you mean lora-ga"),
        (bert, {"target_modules": ["nothing"]}, "no linear layer called nothing"),
        (bert, {"adapter_name": "x"}, "adapter_name must be one of"),
        (lambda: adapted(bert()), {"target_modules": ["query"]}, "target_modules is only for models without"),
        (lambda: adapted(bert()), {"rank": 17}, "rank must be at most 16"),
        (lambda: merged(adapted(bert())), {}, "merged into .*unmerge_adapter first"),
        (lambda: disabled(adapted(bert())), {}, "disabled"),
        (
            lambda: two_adapters(adapted(gpt2(), task_type="CAUSAL_LM", fan_in_fan_out=True)),
            {},
            "adapter_name must be given: 2 adapters are active",
        ),
        (lambda: other_active(adapted(bert())), {"adapter_name": "default"}, "must be active"),
        (lambda: adapted(bert().float(), init_lora_weights="pissa"), {}, "changed the base weights"),
        (adalora, {}, "AdaLoRA"),
        (lambda: nn.Sequential(nn.ReLU()), {}, "no linear layer"),
    ],
)
def test_errors(make, options, message):
    with pytest.raises(InputError, match=message):
        look(make(), classifier_batches(), **options)
