"""Measured runs: they train as unmeasured ones do, go on after an interruption, and find their reference."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tangora import InputError, RunSettings, train
from tangora.diagnostics import Trajectory, find_tracks
from tangora.experiments.run.preparing import load_base, load_run_task, target_layers
from tangora.experiments.values import validated
from tangora.recipes import recipe
from tangora.training.callbacks import measured_steps, read_history, read_trajectory
from tests.experiments.small import after_step, ctrl_c, have_same_weights, write_classifier

pytestmark = pytest.mark.filterwarnings("ignore:step .* changes A of")


@pytest.fixture(scope="module")
def reference(classifier, tmp_path_factory):
    """Full fine-tuning with snapshots at steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("reference") / "full"
    settings = RunSettings(**classifier, recipe="full", steps=5, batch_size=8, measure_every=2)
    train(settings, folder)
    return folder


def losses(record):
    return [step.loss for step in record.history], record.metrics


@pytest.mark.parametrize("name", ["full", "lora", "dora", "tangent", "lora-ga", "lora-pro"])
def test_measuring_changes_no_bit_of_training(classifier, reference, tmp_path, name):
    settings = {**classifier, "recipe": name, "steps": 5, "batch_size": 8}
    measuring = {"measure_every": 1 if name == "full" else 2}
    if name != "full":
        measuring |= {"measure_gradient": 8, "reference": str(reference)}
    plain = train(RunSettings(**settings), tmp_path / "plain")
    measured = train(RunSettings(**settings, **measuring), tmp_path / "measured")
    assert losses(measured) == losses(plain)
    file = "model/model.safetensors" if name == "full" else "adapter/adapter_model.safetensors"
    assert have_same_weights(tmp_path / "plain", tmp_path / "measured", file)
    assert plain.trajectory == []
    assert not (tmp_path / "plain" / "trajectory.jsonl").exists()
    points = read_trajectory(tmp_path / "measured" / "trajectory.jsonl")
    assert [point.step for point in points] == measured_steps(5, measuring["measure_every"])
    for point, recorded in zip(points, measured.trajectory, strict=True):
        assert ({"step": point.step} | point.totals.known()).items() <= recorded.items()
    if name == "full":
        return
    assert points[0].totals.path_length == 0
    assert points[0].totals.change == pytest.approx(0, abs=1e-12)
    assert {"distance", "cosine", "captured_energy", "right_angle", "imbalance"} <= measured.trajectory[
        -1
    ].keys()
    assert -1 <= measured.trajectory[-1]["cosine"] <= 1
    assert all(0 <= point.totals.captured_energy <= 1 for point in points)


def test_full_fine_tuning_is_at_no_distance_from_itself(classifier, reference, tmp_path):
    assert sorted(path.name for path in (reference / "snapshots").iterdir()) == [
        f"step-00000{step}.safetensors" for step in (2, 4, 5)
    ]
    settings = RunSettings(
        **classifier, recipe="full", steps=5, batch_size=8, measure_every=2, reference=str(reference)
    )
    record = train(settings, tmp_path / "again")
    assert record.trajectory[-1]["distance"] == 0
    assert record.trajectory[-1]["cosine"] == pytest.approx(1)
    # a saved model's layers are its last snapshot, and nothing else is in it
    saved = load_file(tmp_path / "again" / "model" / "model.safetensors")
    last = load_file(tmp_path / "again" / "snapshots" / "step-000005.safetensors")
    assert all(torch.equal(weight, saved[f"{name}.weight"]) for name, weight in last.items())
    assert not any("classifier" in name or "embeddings" in name for name in last)


@pytest.mark.parametrize("targets", ["all-linear", ["query", "word_embeddings"], r".*layer\.0\..*dense"])
def test_the_layers_of_full_fine_tuning_are_those_of_an_adapter(classifier, targets):
    settings = RunSettings(**classifier | {"target_modules": targets})
    task = load_run_task(settings)
    loaded = load_base(settings, task)
    before = torch.get_rng_state()
    names = target_layers(settings, task, loaded)
    assert torch.equal(torch.get_rng_state(), before)
    adapted = recipe("lora").prepare(
        loaded.model, r=2, lora_alpha=4, task_type="SEQ_CLS", total_steps=1, target_modules=targets
    )
    assert names == [track.name for track in find_tracks(adapted)]


@pytest.mark.parametrize("name", ["full", "tangent"])
def test_an_interrupted_run_measures_every_step_once(classifier, tmp_path, name):
    settings = RunSettings(**classifier, recipe=name, steps=8, batch_size=4, save_every=4, measure_every=3)
    whole = train(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "cut", progress=after_step(7, ctrl_c))
    lines = (tmp_path / "cut" / "trajectory.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 3, 6]
    with (tmp_path / "cut" / "trajectory.jsonl").open("a") as file:
        file.write('{"step": 7, "tot')  # a line that a crash cut off
    record = train(settings, tmp_path / "cut")
    # steps 5 to 8 are taken again from the checkpoint at 4, which no point was measured at
    one, other = (read_history(tmp_path / folder / "trajectory.jsonl") for folder in ("whole", "cut"))
    assert [line["step"] for line in other] == [0, 3, 6, 8]
    assert one == other
    assert record.trajectory == whole.trajectory


def test_an_early_interruption_begins_anew(classifier, tmp_path):
    settings = RunSettings(**classifier, recipe="lora", steps=4, batch_size=4, measure_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path, progress=after_step(1, ctrl_c))
    assert [line["step"] for line in read_history(tmp_path / "trajectory.jsonl")] == [0]
    train(settings, tmp_path)
    assert [line["step"] for line in read_history(tmp_path / "trajectory.jsonl")] == [0, 2, 4]


def test_a_diverging_run_keeps_the_points_before(classifier, tmp_path):
    settings = RunSettings(
        **classifier,
        recipe="lora",
        learning_rate=1e6,
        steps=20,
        batch_size=8,
        measure_every=1,
        measure_gradient=4,
    )
    record = train(settings, tmp_path)
    assert record.status == "diverged"
    points = read_trajectory(tmp_path / "trajectory.jsonl")
    assert points[0].step == 0
    assert len(points) < 20


def test_a_gradient_that_is_not_finite_is_a_divergence(classifier, tmp_path, monkeypatch):
    measure = Trajectory.measure

    def explode(self, step):
        if step == 2:
            raise InputError("batch 0 has loss inf; its gradient is not defined")
        return measure(self, step)

    monkeypatch.setattr(Trajectory, "measure", explode)
    settings = RunSettings(**classifier, recipe="lora", steps=4, batch_size=4, measure_every=1)
    record = train(settings, tmp_path)
    assert (record.status, record.error) == (
        "diverged",
        "step 2: batch 0 has loss inf; its gradient is not defined",
    )


def test_one_step_is_not_training(classifier, tmp_path):
    record = train(RunSettings(**classifier, recipe="one-step", batch_size=8, measure_every=1), tmp_path)
    assert record.trajectory == []


@pytest.mark.messages
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 1}, "is of another run: seed is 0 there and 1 here"),
        ({"batch_size": 4}, "is of another run: batch_size is 8 there and 4 here"),
        ({"accumulate": 2}, "is of another run: accumulate is 1 there and 2 here"),
        ({"max_length": 8}, "is of another run: max_length is 16 there and 8 here"),
        ({"num_train": 100}, "was trained on other examples: data is .* num_train 200 and 100"),
        ({"measure_every": 3}, "has no snapshot of step 3, only of 2, 4, 5"),
        ({"steps": 6}, "has no snapshot of step 6"),
        ({"target_modules": "query,value"}, r"has \d+ layers and this run \d+: target_modules"),
        ({"target_modules": "query,word_embeddings"}, r"has no layer .*word_embeddings: target_modules"),
        ({"recipe": "adalora"}, "has no plain pair"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_reference_of_another_run_is_named(classifier, reference, tmp_path, changes, expected):
    values = {**classifier, "recipe": "lora", "steps": 5, "batch_size": 8, "measure_every": 2}
    settings = validated(RunSettings, values | {"reference": str(reference)} | changes)
    with pytest.raises(InputError, match=expected):
        train(settings, tmp_path / "out")


@pytest.mark.messages
def test_a_reference_on_another_model_is_named(classifier, reference, tmp_path):
    other = write_classifier(tmp_path)  # the same sizes and data
    weights = load_file(tmp_path / "model" / "model.safetensors")
    doubled = {name: 2 * weight for name, weight in weights.items()}
    save_file(doubled, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    settings = RunSettings(
        **other, recipe="lora", steps=5, batch_size=8, measure_every=2, reference=str(reference)
    )
    with pytest.raises(InputError, match="is of another model: its base weights differ"):
        train(settings, tmp_path / "out")


@pytest.mark.messages
def test_settings_that_do_not_go_together(classifier, reference, tmp_path):
    for key, value in (("reference", "full"), ("measure_gradient", 4)):
        with pytest.raises(InputError, match=f"{key} needs measure_every; got only {key} = {value!r}"):
            validated(RunSettings, {key: value})
    lora = RunSettings(**classifier, recipe="lora", steps=1, batch_size=8)
    train(lora, tmp_path / "b")
    measured = lora.model_copy(update={"measure_every": 1, "reference": str(tmp_path / "b")})
    with pytest.raises(
        InputError, match=r"must be a finished run of recipe full; .* contains a run of lora, finished"
    ):
        train(measured, tmp_path / "c")
    assert not (tmp_path / "c").exists()  # so that the right reference can be given
    missing = lora.model_copy(update={"measure_every": 1, "reference": str(tmp_path / "nothing")})
    with pytest.raises(InputError, match="is not a finished run: there is no such file or folder"):
        train(missing, tmp_path / "c")
