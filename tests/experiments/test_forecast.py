"""What `compare --dry-run` foretells, against what real runs record and hold."""

import pytest
import torch
from peft import PeftModel

from tangora import CompareSettings, InputError, train
from tangora._names import MODELS
from tangora.experiments.comparison.plan import read_plan
from tangora.experiments.comparison.sweep import due
from tangora.experiments.forecast import forecast
from tangora.experiments.run.estimate import LiveTensors, estimate
from tangora.experiments.run.execute import execute
from tangora.experiments.run.preparing import load_base, load_run_task, prepare_run
from tangora.experiments.settings import RunSettings
from tangora.experiments.settings_files import preset
from tangora.recipes import recipe, recipes
from tangora.training.models import empty_model, load_model
from tests.experiments.small import write_classifier, write_generator

pytestmark = pytest.mark.filterwarnings("ignore:step .* changes A of")
KINDS = {"classification": write_classifier, "causal": write_generator}


@pytest.fixture(scope="module", params=KINDS)
def task(request, tmp_path_factory):
    """Settings of a tiny model and its data, and the kind of it."""
    return KINDS[request.param](tmp_path_factory.mktemp(request.param)), request.param


def read(settings):
    return empty_model.read_config(settings.model)


OPTIMIZERS = {str(each.make_optimizer) + str(each.adapter): each.name for each in reversed(recipes())}
"""One recipe for each optimizer and kind of adapter."""


@pytest.mark.parametrize(
    ("task", "name"),
    [
        *(("classification", name) for name in (*OPTIMIZERS.values(), "dora", "orthogonal", "one-step")),
        *(("causal", name) for name in ("full", "lora", "lora-pro", "tangent")),
    ],
    indirect=["task"],
)
def test_trained_parameters_and_states_are_what_a_run_records(task, tmp_path, name):
    values, kind = task
    steps = 4 if "adalora+" in name else 1  # two phases
    settings = RunSettings(**values | {"recipe": name, "steps": steps, "rank": 2})
    data = load_run_task(settings)
    found = estimate([settings], read(settings), kind, len(data.labels) or 2)[0]
    record = execute(settings, data, tmp_path / "run", run_id="run")
    assert record.status == "finished", record.error
    if settings.chosen_recipe.search is not None:  # the first phase has more parameters
        assert found.state >= record.memory.optimizer_state_bytes
        assert found.trained == found.gradients >= record.memory.adapter_bytes
    else:
        assert found.state == record.memory.optimizer_state_bytes
        assert found.trained == found.gradients == record.memory.adapter_bytes


def held(settings, task, kind):
    """Bytes at the peak of real micro-batches beside the model, all examples at full length."""
    loaded = load_base(settings, task)
    model = prepare_run(settings, task, loaded.model).train()
    model.config.use_cache = False
    tokens = torch.ones(settings.batch_size, settings.max_length, dtype=torch.long)
    labels = tokens if kind == "causal" else torch.zeros(settings.batch_size, dtype=torch.long)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    with LiveTensors([*model.parameters(), *model.buffers(), *batch.values()]) as tensors:
        for _ in range(settings.accumulate):
            model(**batch).loss.backward()
    return tensors.peak


@pytest.mark.parametrize("name", ["full", "lora", "dora"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_activations_are_little_more_than_real_passes_hold(task, name, accumulate):
    values, kind = task
    changes = {"recipe": name, "rank": 2, "batch_size": 8, "max_length": 32, "accumulate": accumulate}
    settings = RunSettings(**values | changes)
    data = load_run_task(settings)
    found = estimate([settings], read(settings), kind, len(data.labels) or 2)[0]
    passes = found.total - found.weights - found.trained - found.state
    assert 0.95 <= passes / held(settings, data, kind) <= 1.15
    assert found.activations <= passes <= found.activations + found.gradients + found.activations / 2


def test_what_changes_the_memory_changes_the_estimate(tmp_path):
    values = write_generator(tmp_path) | {"recipe": "lora", "rank": 2}
    config = read(RunSettings(**values))

    def of(**changes):
        return estimate([RunSettings(**values | changes)], config, "causal")[0]

    usual = of()
    half, checkpointed, longer = of(dtype="bfloat16"), of(gradient_checkpointing=True), of(max_length=512)
    assert half.weights == pytest.approx(usual.weights / 2, rel=1e-3)
    assert (half.trained, half.state) == (usual.trained, usual.state)
    assert checkpointed.activations < usual.activations < longer.activations
    assert of(recipe="orthogonal").weights == usual.weights + usual.trained  # the product that is subtracted


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-2-7b-hf", "google-t5/t5-base", "openai/clip-vit-base-patch16"]
)
def test_the_models_of_the_papers_are_known(name):
    published = {"Llama-2-7b-hf": (6_738_415_616, "causal"), "t5-base": (222_903_552, "classification")}
    published["clip-vit-base-patch16"] = (85_799_424, "classification")  # without text model and projections
    numbers, kind = published[name.split("/")[1]]
    model = empty_model.empty_model(empty_model.read_config(name), kind, 2)
    backbone = getattr(model, model.base_model_prefix) if kind == "classification" else model
    assert sum(parameter.numel() for parameter in backbone.parameters()) == numbers


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "smollm2-135m" else ()) for n in MODELS]
)
def test_packaged_models_are_known_without_their_weights(name, tmp_path, monkeypatch):
    kind = "causal" if name == "smollm2-135m" else "classification"
    real = load_model(name, kind=kind, num_labels=None if kind == "causal" else 5).model
    monkeypatch.setenv("TANGORA_CACHE", str(tmp_path))
    empty = empty_model.empty_model(empty_model.read_config(name), kind, 5)
    assert {k: v.shape for k, v in empty.named_parameters()} == {
        k: v.shape for k, v in real.named_parameters()
    }
    assert not [*tmp_path.iterdir()]


def test_a_forecast_counts_what_a_comparison_plans(tmp_path, monkeypatch):
    values = write_classifier(tmp_path) | {
        "recipes": ["full", "lora"],
        "seeds": [0, 1],
        "extend": 2,
        "steps": 5,
    }
    settings = CompareSettings(**values, learning_rates={"full": [1e-3], "lora": [1e-3, 1e-2]})
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(PeftModel, "from_pretrained", None)
    (found,) = forecast(settings).values()
    assert sorted(tmp_path.rglob("*")) == before
    assert found.runs == len(due(settings, [])) + 2
    assert (found.further_runs, found.steps, found.missing) == (4, 5, None)
    assert [(each.recipe, each.learning_rates) for each in found.recipes] == [
        ("full", (1e-3,)), ("lora", (1e-3, 1e-2))
    ]  # fmt: skip
    epochs = settings.model_copy(update={"steps": None, "epochs": 2.0, "batch_size": 7})
    (longer,) = forecast(epochs).values()
    assert longer.examples is not None
    assert longer.steps == epochs.num_steps(longer.examples[0]) > 5
    assert all(each.memory is not None for each in longer.recipes)


def test_the_papers_settings_can_be_foretold_without_the_hub():
    plan = read_plan(preset("paper-math"), {"recipes": ["lora-pro"]})
    (found,) = forecast(plan).values()
    memory = found.recipes[0].memory
    assert found.examples is None
    assert found.paper is not None
    assert found.paper.results["GSM8K"]["lora-pro"] == 54.23
    assert memory is not None
    assert memory.weights == pytest.approx(2 * 6_738_415_616, rel=1e-3)
    layers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert memory.state == pytest.approx(2 * 4 * layers, rel=1e-3)


def test_a_model_that_is_not_here_is_unknown_and_one_that_does_not_fit_is_an_error(tmp_path):
    shared = {"recipes": ["lora"], "data": "some/data"}
    (unknown,) = forecast(CompareSettings(**shared)).values()
    assert (unknown.recipes[0].memory, unknown.steps) == (None, 100)
    assert unknown.missing is not None
    (absent,) = forecast(CompareSettings(**shared, kind="causal", model="nobody/nothing")).values()
    assert absent.missing is not None
    assert absent.recipes[0].memory is None
    small = write_classifier(tmp_path) | {"recipes": ["lora"], "target_modules": ["nothing"]}
    with pytest.raises(InputError, match="nothing"):
        forecast(CompareSettings(**small))
    with pytest.raises(InputError, match="one: "):
        forecast(read_plan({"tasks": {"one": small}}))


def test_rates_of_spectral_steps_depend_on_the_kind_of_model(task, tmp_path):
    values, kind = task
    shared = values | {"kind": None, "steps": 1, "num_train": 16}
    entry = recipe("tangent-muon")
    found = forecast(CompareSettings(**shared, recipes=["tangent-muon"]))[""]
    assert found.recipes[0].learning_rates == entry.grid(kind)
    record = train(RunSettings(**shared, recipe="tangent-muon"), tmp_path / "run")
    assert record.learning_rate == entry.default_learning_rate(kind)
    assert train(RunSettings(**shared, recipe="tangent-muon"), tmp_path / "run").id == record.id
