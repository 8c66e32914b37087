"""Gradient and curvature through training: the numbers of dense references where a run ended, and what is written."""

import csv

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from tangora import CompareSettings, InputError, RunSettings, compare, train
from tangora._folders import ComparisonFolder, RunFolder
from tangora.experiments.comparison.plan import PlanSettings, read_plan
from tangora.experiments.comparison.sweep import planned
from tangora.experiments.run.preparing import Run, load_base, load_run_task
from tangora.experiments.settings_files import preset
from tangora.experiments.values import validated
from tangora.training.curvature import read_curvature
from tests.reference import trajectory as dense
from tests.reference.curvature import DenseCurvature

pytestmark = pytest.mark.filterwarnings("ignore:step .* changes A of")

TARGETS = {"target_modules": "query"}
MEASURED = {
    "measure_every": 3,
    "measure_gradient": 10,
    "curvature_every": 4,
    "curvature_examples": 6,
    "curvature_spaces": "weights,tangent",
}


def trained_model(settings, folder):
    """Load what a run has saved, in float64, with an adapter whose weights are the trained ones."""
    if settings.recipe != "full":
        base = AutoModelForSequenceClassification.from_pretrained(settings.model, num_labels=3)
        return PeftModel.from_pretrained(base, folder.adapter, is_trainable=True).double()
    whole = AutoModelForSequenceClassification.from_pretrained(folder.model)
    return get_peft_model(whole, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")).double()


@pytest.mark.parametrize("name", ["full", "lora", "tangent-muon"])
def test_the_last_point_is_that_of_dense_matrices(classifier, tmp_path, name):
    settings = validated(
        RunSettings, {**classifier, **TARGETS, **MEASURED, "recipe": name, "steps": 5, "batch_size": 8}
    )
    record = train(settings, tmp_path)
    assert [point["step"] for point in record.trajectory] == [0, 3, 5]
    assert [point["step"] for point in record.curvature] == [0, 4, 5]
    folder, task = RunFolder(tmp_path), load_run_task(settings)
    model = trained_model(settings, folder)
    run = Run(settings, task, load_base(settings, task), folder, None)

    at_gradient = DenseCurvature(model, run.sampled(10))
    point, gradients = record.trajectory[-1], at_gradient.G
    assert point["gradient_norm"] == pytest.approx(float(at_gradient.weight_gradient.norm()), rel=1e-4)
    loss = at_gradient.loss("weights", at_gradient.weights)
    assert point["gradient_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    stable, effective, _ = np.array([dense.gradient_shape(g, 2) for g in gradients]).T
    assert point["gradient_stable_rank"] == pytest.approx(stable.mean(), rel=1e-4)
    assert point["gradient_effective_rank"] == pytest.approx(effective.mean(), rel=1e-3)
    values = [torch.linalg.svdvals(g).square() for g in gradients]
    reachable = sum(float(each[:4].sum()) for each in values) / sum(float(each.sum()) for each in values)
    assert point["reachable_energy"] == pytest.approx(reachable, rel=1e-4)

    at_curvature = DenseCurvature(model, run.batches(task.train[:6]))
    point = record.curvature[-1]
    assert point["gradient_norm"] == pytest.approx(float(at_curvature.weight_gradient.norm()), rel=1e-4)
    matrices = {"weights": at_curvature.weight_hessian}
    if name != "full":
        matrices["tangent"] = at_curvature.tangent_hessian
    assert {key.removesuffix("_trace") for key in point if key.endswith("_trace")} == matrices.keys()
    for space, matrix in matrices.items():
        top = float(torch.linalg.eigvalsh(matrix)[-1])
        assert point[f"{space}_top_eigenvalue"] == pytest.approx(top, rel=1e-2)
        error = point[f"{space}_trace_error"]
        assert point[f"{space}_trace"] == pytest.approx(float(matrix.trace()), abs=5 * error)

    if name == "full":
        assert not {"captured_energy", "gradient_norm_A"} & record.trajectory[-1].keys()
        return
    point, energy = record.trajectory[-1], float(at_gradient.weight_gradient.square().sum())
    projected = at_gradient.projector @ at_gradient.weight_gradient
    assert point["captured_energy"] == pytest.approx(float(projected.square().sum()) / energy, rel=1e-4)
    slices = at_gradient.factor_slices().values()
    for side, where in (("A", 0), ("B", 1)):
        parts = [at_gradient.factor_gradient[each[where]] for each in slices]
        assert point[f"gradient_norm_{side}"] == pytest.approx(float(torch.cat(parts).norm()), rel=1e-4)


def test_measured_time_and_memory_are_not_those_of_training(classifier, tmp_path):
    settings = {**classifier, **TARGETS, "recipe": "lora", "steps": 2, "batch_size": 8}
    plain = train(RunSettings(**settings), tmp_path / "plain")
    measured = train(validated(RunSettings, settings | MEASURED), tmp_path / "measured")
    assert plain.measurement_seconds == 0
    assert measured.measurement_seconds > 0
    assert measured.memory.peak_bytes is None
    assert measured.memory.optimizer_state_bytes == plain.memory.optimizer_state_bytes


@pytest.mark.parametrize("name", ["full", "lora"])
def test_curvature_of_some_layers(classifier, tmp_path, name):
    settings = {**classifier, "recipe": name, "steps": 1, "batch_size": 8, "curvature_every": 1}
    some = {"curvature_spaces": "weights", "curvature_layers": "*.self.query", "curvature_examples": 4}
    train(validated(RunSettings, settings | some), tmp_path)
    points = read_curvature(RunFolder(tmp_path).curvature)
    assert [point.spaces["weights"].size for point in points] == [32 * 32] * 2


@pytest.fixture(scope="module")
def compared(classifier, tmp_path_factory):
    folder = ComparisonFolder(tmp_path_factory.mktemp("compared") / "out")
    settings = validated(
        CompareSettings,
        {**classifier, **MEASURED, "target_modules": "query,value", "steps": 6, "batch_size": 8}
        | {"recipes": "full,lora", "learning_rates": 1e-3, "seeds": [0, 1]},
    )
    return folder, compare(settings, folder.path)


def test_one_command_writes_all(compared):
    folder, outcome = compared
    page = folder.report.read_text()
    for key in ("gradient_norm", "gradient_effective_rank", "reachable_energy", "weights_trace"):
        assert f'id="through-training-{key}"' in page
    assert folder.measured_picture.stat().st_size > 0
    with folder.measured.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 2 * len([0, 3, 4, 6])
    points = {(line["recipe"], line["seed"], line["step"]): line for line in lines}
    for record in outcome.comparison.records:
        for point in record.trajectory:
            line = points[record.recipe, str(record.seed), f"{point['step']:.0f}"]
            assert float(line["gradient_norm"]) == point["gradient_norm"]
            assert line["captured_energy"] == str(point.get("captured_energy", ""))
    # of several layers the spread is kept
    assert all(
        point["gradient_norm_low"] < point["gradient_norm_mean"] < point["gradient_norm_high"]
        for record in outcome.comparison.records
        for point in record.trajectory
    )


def test_a_comparison_keeps_no_snapshots(compared):
    folder, outcome = compared
    for record in outcome.comparison.records:
        assert not folder.run(record.id).snapshots.exists()


def test_the_preset_makes_one_run_for_each_seed():
    plan = read_plan(preset("through-training"))
    assert isinstance(plan, PlanSettings)
    for task in plan.tasks.values():
        assert planned(task, []) == len(task.recipes) * len(task.seeds)


@pytest.mark.messages
def test_spaces_of_no_curvature():
    with pytest.raises(InputError, match="curvature_spaces needs curvature_every; got weights alone"):
        validated(RunSettings, {"curvature_spaces": "weights"})
    with pytest.raises(
        InputError, match=r"curvature_layers needs curvature or curvature_every; got '\*' alone"
    ):
        validated(RunSettings, {"curvature_layers": "*"})
    with pytest.raises(InputError, match="curvature_spaces"):
        validated(RunSettings, {"curvature_spaces": "layers", "curvature_every": 2})
