"""The table of methods."""

import copy
import dataclasses

import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from tangora import InputError, find_pairs, recipe, recipes
from tangora.adapters import head_names, head_parameters, load_adapter, save_adapter
from tangora.recipes.prepare import kind_of
from tests.models import tiny_bert, tiny_llama, with_lora

EXPECTED = {
    "full", "lora", "rslora", "lora+", "pissa", "dora", "adalora",
    "adalora+tangent-muon", "adalora+tangent", "adalora+lora-pro",
    "p-lora", "lora-pro", "lora-pro-factor", "lora-pro-sgd", "tangent",
    "tangent-muon", "orthogonal+tangent-muon", "full-muon", "factor-muon", "lora-muon", "polora", "lora-rite",
    "lora-ga+tangent-muon",
    "orthogonal", "orthogonal+tangent", "odelora-euler", "odelora-heun", "odelora-rk4", "odelora-bug",
    "lora-ga", "lora-one", "lora-one-plain", "one-step", "lora-ga+pro", "lora-ga+tangent", "lora-one+tangent",
}  # fmt: skip


def test_all_methods_are_there():
    assert {entry.name for entry in recipes()} == EXPECTED


def test_grids_are_ascending_and_the_aligned_methods_share_that_of_full_fine_tuning():
    for entry in recipes():
        assert list(entry.learning_rates) == sorted(set(entry.learning_rates))
        assert min(entry.learning_rates) > 0
    full = recipe("full").learning_rates
    assert all(recipe(name).learning_rates == full for name in ("lora-pro", "lora-pro-factor", "tangent"))


def test_recipes_are_frozen():
    with pytest.raises(AttributeError):
        recipe("lora").name = "other"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        recipe("dora").options["use_dora"] = False


def test_the_start_depends_on_the_seed_only():
    state = torch.get_rng_state()
    starts = []
    for seed in (0, 0, 1):
        torch.rand(3)
        model = recipe("lora").prepare(
            tiny_bert(), r=2, lora_alpha=4, task_type="SEQ_CLS", total_steps=1, seed=seed
        )
        starts.append(torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    torch.set_rng_state(state)


def test_lora_plus_uses_the_papers_ratio():
    model = recipe("lora+").prepare(tiny_bert(), r=2, lora_alpha=4, task_type="SEQ_CLS", total_steps=1)
    optimizer = recipe("lora+").create_optimizer(model, 1e-4, weight_decay=0.0)
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {1e-4, 16e-4}


@pytest.mark.messages
def test_unknown_recipe():
    with pytest.raises(
        InputError,
        match=r"recipe must be one of full, full-muon, .*; got 'nothing-like-it'$",
    ):
        recipe("nothing-like-it")
    with pytest.raises(InputError, match=r"got 'tangnt' \(did you mean tangent\?\)") as caught:
        recipe("tangnt")
    assert "lora-pro" not in str(caught.value)  # the many others would hide the hint


def rates_by_parameter(optimizer):
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_head_has_its_own_rate_if_asked(name):
    method = recipe(name)
    model = method.prepare(tiny_bert(), r=2, lora_alpha=4, task_type="SEQ_CLS", total_steps=10)
    alone = rates_by_parameter(method.create_optimizer(model, 1e-4))
    both = rates_by_parameter(method.create_optimizer(model, 1e-4, head_lr=1e-2))
    head = {id(p) for p in head_parameters(model)}
    named = {n for n, p in model.named_parameters() if id(p) in head}
    assert len(named) == 2
    assert all("classifier" in n for n in named)
    assert both == {key: 1e-2 if key in head else rate for key, rate in alone.items()}


HEADS = {
    "distilbert": (
        DistilBertForSequenceClassification,
        DistilBertConfig(vocab_size=30, dim=16, hidden_dim=32, n_layers=1, n_heads=2, num_labels=3),
        ["pre_classifier", "classifier"],
        ["q_lin", "v_lin"],
    ),
    "bart": (
        BartForSequenceClassification,
        BartConfig(
            vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
            encoder_attention_heads=2, decoder_attention_heads=2, num_labels=3,
        ),
        ["classification_head"],
        ["q_proj", "v_proj"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HEADS))
@pytest.mark.parametrize("all_linear", [True, False])
def test_heads_that_peft_does_not_know_are_trained_whole(name, all_linear, tmp_path):
    build, config, heads, attention = HEADS[name]
    targets = "all-linear" if all_linear else attention
    torch.manual_seed(0)
    model = build(config).eval()
    assert head_names(model) == heads
    base = copy.deepcopy(model)
    whole = {key for key, _ in model.named_parameters() if key.split(".")[0] in heads}
    adapted = recipe("lora").prepare(
        model, r=2, lora_alpha=4, task_type="SEQ_CLS", total_steps=1, target_modules=targets
    )
    trained = {key for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    in_head = {key for key in trained if any(head in key for head in heads)}
    assert len(in_head) == len(whole)
    assert not any("lora_" in key for key in in_head)
    assert any("lora_" in key for key in trained)
    assert {id(p) for p in head_parameters(adapted)} == {
        id(p) for key, p in adapted.named_parameters() if key in in_head
    }
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    save_adapter(adapted, tmp_path)
    tokens = torch.tensor([[5, 6, 7, 2], [8, 9, 10, 2]])
    again = load_adapter(base, tmp_path)
    torch.testing.assert_close(again(tokens).logits, adapted(tokens).logits)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_no_recipe_decays_biases_and_norms(name):
    torch.manual_seed(0)
    method = recipe(name)
    model = method.prepare(tiny_bert(), r=2, lora_alpha=4, task_type="SEQ_CLS", total_steps=10)
    for key, parameter in model.named_parameters():  # norms, too, where only adapters are trained otherwise
        parameter.requires_grad_(parameter.requires_grad or "LayerNorm" in key or key.endswith("bias"))
    optimizer = method.create_optimizer(model, 1e-4, head_lr=1e-2, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    kept = transformers.Trainer.get_decay_parameter_names(None, model)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert decay[id(parameter)] == (0.1 if key in kept else 0.0), key


def test_the_ratio_of_the_rates_survives_a_schedule():
    model = recipe("lora").prepare(tiny_bert(), r=2, lora_alpha=4, task_type="SEQ_CLS", total_steps=10)
    optimizer = recipe("lora").create_optimizer(model, 1e-4, head_lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=4)
    optimizer.step()
    schedule.step()
    low, high = sorted({group["lr"] for group in optimizer.param_groups})
    assert high / low == pytest.approx(100)


@pytest.mark.messages
def test_a_model_without_a_head_is_refused():
    model = recipe("lora").prepare(tiny_llama(), r=2, lora_alpha=4, task_type="CAUSAL_LM", total_steps=10)
    with pytest.raises(
        InputError, match="head_lr needs a model with a new head; PeftModelForCausalLM has none"
    ):
        recipe("lora").create_optimizer(model, 1e-4, head_lr=1e-2)


def test_options_of_the_optimizer_follow_the_name():
    method = recipe("lora-pro@moments=factor@gauge=zero")
    assert method.name == "lora-pro@gauge=zero@moments=factor"
    assert recipe(method.name).name == method.name
    assert recipe("lora-pro").with_options(moments="factor", gauge="zero").name == method.name
    assert method.learning_rates == recipe("lora-pro").learning_rates
    model = method.prepare(tiny_bert(), r=2, lora_alpha=4, task_type="SEQ_CLS", total_steps=1)
    group = method.create_optimizer(model, 1e-4).param_groups[0]
    assert (group["gauge"], group["moments"]) == ("zero", "factor")


def test_options_that_a_recipe_fixes_can_be_changed():
    model = recipe("lora").prepare(tiny_bert(), r=2, lora_alpha=4, task_type="SEQ_CLS", total_steps=1)
    optimizer = recipe("odelora-euler@scheme=heun").create_optimizer(model, 1e-1)
    assert getattr(optimizer, "scheme") == "heun"  # noqa: B009


def plain_descent(
    model, lr: float, *, momentum: float = 0.0, nesterov=False, weight_decay: float = 0.0, **rest
):
    kept = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(kept, lr, momentum, nesterov=nesterov, weight_decay=weight_decay, **rest)


def test_an_optimizer_that_a_function_makes_has_the_options_that_it_names():
    own = dataclasses.replace(recipe("lora"), name="own", make_optimizer=plain_descent)
    method = own.with_options(momentum="0.5", nesterov=True)
    assert method.name == "own@momentum=0.5@nesterov=True"
    optimizer = method.create_optimizer(torch.nn.Linear(2, 2), 1e-3, weight_decay=0.1)
    assert [optimizer.defaults[key] for key in ("momentum", "nesterov", "weight_decay")] == [0.5, True, 0.1]
    for option in ("lr", "weight_decay", "rest"):
        with pytest.raises(InputError, match="must be one of momentum, nesterov"):
            own.with_options(**{option: 1})


def test_options_of_the_start_follow_the_name_too():
    method = recipe("orthogonal+tangent@size=2@retraction=svd")
    assert dict(method.start_options) == {"size": 2.0}
    model = method.prepare(tiny_bert(), r=2, lora_alpha=4, task_type="SEQ_CLS", total_steps=1)
    method.initialize(model)
    for pair in find_pairs(model):
        torch.testing.assert_close(pair.A @ pair.A.T, 4 * torch.eye(2))
        torch.testing.assert_close(pair.B.T @ pair.B, 4 * torch.eye(2))
    assert method.create_optimizer(model, 1e-4).param_groups[0]["retraction"] == "svd"
    assert dict(recipe("lora-ga@scale=unit").start_options) == {"scale": "unit"}


@pytest.mark.messages
def test_options_in_python_are_checked_like_those_of_a_name():
    with pytest.raises(InputError, match=r"damping: .*valid number"):
        recipe("p-lora").with_options(damping="high")
    with pytest.raises(InputError, match="option of lora-pro"):
        recipe("lora-pro").with_options(gage="zero")


@pytest.mark.messages
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora@gauge=zero", "recipe lora has no options of its own; got @gauge=zero"),
        ("lora-pro@gauge", "options of a recipe are @name=value; got @gauge"),
        (
            "lora-pro@gage=zero",
            r"option of lora-pro must be one of moments, gauge, retraction, .*blocks; got 'gage'",
        ),
        (
            "lora-pro@gauge=none",
            "gauge: input should be 'zero', 'symmetric', 'sylvester' or 'lyapunov'; got 'none'",
        ),
        ("p-lora@damping=high", "damping: input should be a valid number.*; got 'high'"),
        ("lora-ga@scale=large", "scale: input should be 'stable', 'gd', 'unit' or 'weight_svd'; got 'large'"),
        ("lora-por@gauge=zero", "did you mean lora-pro"),
    ],
)
def test_bad_options(name, message):
    with pytest.raises(InputError, match=message):
        recipe(name)


def test_spectral_steps_have_a_smaller_grid_for_causal_models():
    entry = recipe("tangent-muon")
    assert entry.grid() == entry.grid("classification") == entry.learning_rates
    assert max(entry.grid("causal")) <= min(entry.grid())
    assert entry.default_learning_rate("causal") == entry.grid("causal")[1] < entry.default_learning_rate()
    plain = recipe("lora")
    assert plain.grid("causal") == plain.learning_rates
    assert recipe("tangent-muon@momentum=0.9").grid("causal") == entry.grid("causal")


@pytest.mark.parametrize(
    ("make", "task_type", "kind"),
    [(tiny_llama, "CAUSAL_LM", "causal"), (tiny_bert, "SEQ_CLS", "classification")],
)
def test_the_kind_of_a_model(make, task_type, kind):
    assert kind_of(make()) == kind
    assert kind_of(with_lora(make(), task_type=task_type)) == kind
    assert kind_of(torch.nn.Linear(2, 2)) == "classification"
