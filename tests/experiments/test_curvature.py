"""`tangora curvature` on models and data from the disk: files, numbers, gauge, and errors that name what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.sparse.linalg import eigsh

from tangora import InputError
from tangora.curvature import EmpiricalFisher, Hessian
from tangora.experiments.curvature.measured_model import load_measured
from tangora.experiments.curvature.measurement import measure_curvature
from tangora.experiments.measurement_settings import CurvatureSettings
from tangora.experiments.settings import RunSettings
from tangora.experiments.train import train
from tangora.experiments.values import validated
from tangora.report.curvature import load_curvature
from tests.experiments.small import write_classifier, write_generator

SMALL = {"num_examples": 7, "batch_size": 4, "top": 2, "max_products": 40, "tolerance": 1e-4, "radius": 0}
QUICK = {"top": 1, "max_products": 6, "probes": 2, "steps": 3, "trace_products": 6}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Pictures take most of the time of a small measurement; `found` has some."""
    monkeypatch.setattr(
        "tangora.experiments.curvature.measurement.save_curvature_pictures", lambda _record, _folder: []
    )


def run_of(small, folder, **changes):
    settings = validated(RunSettings, small | {"steps": 3, "batch_size": 4, "recipe": "lora"} | changes)
    train(settings, folder)
    return folder


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """A finished run of LoRA."""
    return run_of(small, tmp_path_factory.mktemp("runs") / "lora", learning_rate=0.05)


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A finished run of full fine-tuning."""
    return run_of(small, tmp_path_factory.mktemp("runs") / "full", recipe="full")


def settings_of(source, **changes):
    return validated(CurvatureSettings, {"source": str(source)} | SMALL | changes)


def measured(source, folder, **changes):
    return measure_curvature(settings_of(source, **changes), folder)


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    """An ordinary measurement of the LoRA run, and its progress."""
    calls = []
    files = measure_curvature(
        settings_of(run),
        tmp_path_factory.mktemp("found") / "out",
        command="tangora curvature …",
        progress=lambda *call: calls.append(call),
    )
    return files, calls


def test_the_files_say_the_same(found):
    files, _ = found
    assert {path.suffix for path in files.pictures} == {".png", ".svg"}
    names = ["curvature.html", "curvature.json", "log.txt", "pictures", "settings.json"]
    assert sorted(path.name for path in files.page.parent.iterdir()) == names
    assert load_curvature(files.record_path) == files.record
    record = files.record
    assert [spectrum.space for spectrum in record.spectra] == ["tangent", "factors"]
    assert record.command == "tangora curvature …"
    assert record.ranks == [2]
    assert (record.num_examples, record.num_batches) == (7, 2)
    assert record.settings["data_fingerprint"]
    assert record.title == "model after lora on data.jsonl"


def test_products_are_counted_and_promised(found):
    files, calls = found
    assert calls[0] == ("loading", 0, 0)
    calls = [call[1:] for call in calls[1:]]
    done, total = calls[-1]
    assert done == total == files.record.products == sum(one.products for one in files.record.spectra)
    assert calls == sorted(calls, key=lambda call: call[0])
    assert all(before <= expected for before, expected in calls)


@pytest.mark.parametrize("space", ["tangent", "factors"])
def test_eigenvalues_are_those_of_the_hessian(found, run, space):
    subject = load_measured(str(run), None, {}, 0)
    operator = Hessian(subject.model, subject.batches("train", 7, 4), over=space, dtype=torch.float64)
    expected = eigsh(operator.to_scipy(), k=2, which="LA", tol=1e-5, return_eigenvectors=False)[::-1]
    spectrum = found[0].record.of(space)
    assert spectrum.size == operator.size
    assert spectrum.converged
    values = [one.value for one in spectrum.eigenvalues]
    assert values == pytest.approx(expected.tolist(), rel=1e-4)
    assert spectrum.gradient_norm == pytest.approx(float(operator.gradient().norm()), rel=1e-4)
    assert found[0].record.loss == pytest.approx(operator.loss(), rel=1e-5)


def test_only_the_tangent_space_is_free_of_the_gauge(found, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    path = other / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        tensors[name] *= 4.0 if "lora_B" in name else 0.25 if "lora_A" in name else 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    ours, theirs = found[0].record, measured(other, tmp_path / "out").record
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-5)
    assert theirs.of("tangent").largest == pytest.approx(ours.of("tangent").largest, rel=1e-3)
    assert theirs.of("factors").largest != pytest.approx(ours.of("factors").largest, rel=0.5)


@pytest.mark.slow
def test_everything_at_once(run, tmp_path):
    everything = {
        "per_layer": True,
        "layer_eigenvalues": True,
        "per_batch": True,
        "landscape": True,
        "landscape_points": 3,
        "gauss_newton": True,
        "empirical_fisher": True,
        "radius": 0.1,
        "over": "factors,weights,tangent",
    }
    record = measured(run, tmp_path / "out", **QUICK | everything | {"top": 2}).record
    keys = [(spectrum.space, spectrum.operator) for spectrum in record.spectra]
    hessians = [(space, "hessian") for space in ("tangent", "weights", "factors")]
    assert keys == [hessians[0], ("tangent", "gauss-newton"), ("tangent", "empirical-fisher"), *hessians[1:]]
    assert sum(layer.size for layer in record.layers) == record.of("tangent").size
    assert sum(layer.eigenvector_share for layer in record.layers) == pytest.approx(1.0, rel=1e-4)
    assert all("base_model" not in layer.name and layer.largest is not None for layer in record.layers)
    assert sum(batch.weight for batch in record.batch_noise.batches) == pytest.approx(1.0)
    assert len(record.batch_noise.batches) == 2
    (ball,) = record.sharpness
    assert (ball.space, ball.radius) == ("tangent", 0.1)
    assert ball.loss == pytest.approx(record.loss)
    assert ball.rise > 0
    middle = [line.losses[1] for line in record.landscape.lines]
    assert middle == pytest.approx([record.loss] * len(middle), rel=1e-5)
    assert record.landscape.plane.losses[1][1] == pytest.approx(record.loss, rel=1e-5)
    html = (tmp_path / "out" / "curvature.html").read_text()
    assert all(f'id="{name}-title"' in html for name in ("layers", "batches", "lines", "plane"))


def test_the_empirical_fisher_matrix(run, found, tmp_path):
    record = measured(run, tmp_path / "out", **QUICK | {"max_products": 40}, empirical_fisher=True).record
    assert load_curvature(tmp_path / "out" / "curvature.json") == record
    subject = load_measured(str(run), None, {}, 0)
    batches = subject.batches("train", 7, 4)
    operator = EmpiricalFisher(subject.model, batches, over="tangent", dtype=torch.float64)
    (expected,) = eigsh(operator.to_scipy(), k=1, which="LA", tol=1e-5, return_eigenvectors=False)
    fisher = record.of("tangent", "empirical-fisher")
    assert fisher.largest == pytest.approx(expected, rel=1e-4)
    assert record.main == record.of("tangent")  # the Hessian's
    assert record.settings["empirical_fisher"] is True
    # files without it are as they were before there was such a setting, and mean that it is off
    assert "empirical_fisher" not in found[0].record.settings
    assert "empirical_fisher" not in json.loads((found[0].page.parent / "settings.json").read_text())
    again = {**QUICK, "max_products": 40}
    with pytest.raises(InputError, match="empirical_fisher is True there and False here"):
        measured(run, tmp_path / "out", **again)


def test_full_fine_tuning_has_weights_only(whole, tmp_path):
    record = measured(whole, tmp_path / "out", **QUICK, layers="*query,*value").record
    assert [spectrum.space for spectrum in record.spectra] == ["weights"]
    assert record.main.size == 2 * 32 * 32
    assert record.ranks == []


def test_a_model_by_name_and_an_adapter(small, run, tmp_path):
    changes = {key: small[key] for key in ("data", "num_train", "num_validation", "num_test", "max_length")}
    by_name = measured(small["model"], tmp_path / "named", adapter=str(run / "adapter"), **QUICK, **changes)
    by_run = measured(run, tmp_path / "run", **QUICK)
    assert by_name.record.of("tangent") is not None
    # the adapter's head is saved with it, so that both are one model on the same data
    assert by_name.record.loss == pytest.approx(by_run.record.loss, rel=1e-5)
    assert by_name.record.main.eigenvalues == by_run.record.main.eigenvalues


def test_another_split_and_float64(run, tmp_path):
    tested = measured(run, tmp_path / "test", **QUICK, split="test", float64=True).record
    assert (tested.split, tested.dtype) == ("test", "float64")
    trained = measured(run, tmp_path / "train", **QUICK).record
    assert tested.loss != trained.loss


def test_factors_bring_the_tangent_space_along(run, tmp_path):
    record = measured(run, tmp_path / "out", **QUICK, over="factors").record
    assert [spectrum.space for spectrum in record.spectra] == ["tangent", "factors"]


def test_causal_models(tmp_path):
    small = write_generator(tmp_path)
    record = measured(run_of(small, tmp_path / "run"), tmp_path / "out", **QUICK).record
    assert record.of("tangent").largest > 0


def test_again_and_another_configuration(run, tmp_path):
    first = measured(run, tmp_path / "out", **QUICK).record
    again = measured(run, tmp_path / "out", **QUICK).record
    assert [one.eigenvalues for one in again.spectra] == [one.eigenvalues for one in first.spectra]
    with pytest.raises(InputError, match="another configuration: seed is 0 there and 1 here"):
        measured(run, tmp_path / "out", **QUICK, seed=1)


@pytest.mark.messages
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"over": "tangents"}, "over must be one of .*did you mean tangent"),
        ({"top": 0}, "top: .*greater than or equal to 1; got 0"),
        ({"radius": -1}, "radius: .*greater than or equal to 0"),
        ({"split": "tset"}, "split must be one of train, validation, test; got 'tset'"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"adapter": "/nowhere"}, "is a run with its own adapter"),
        ({"layers": "nothing"}, "nothing"),
    ],
)
def test_errors(run, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        measured(run, tmp_path / "out", **changes)


@pytest.mark.messages
def test_what_cannot_be_measured_says_so(small, whole, tmp_path):
    with pytest.raises(InputError, match=r"over tangent needs a LoRA adapter.*--over weights"):
        measured(whole, tmp_path / "out", over="tangent")
    empty = tmp_path / "run"
    empty.mkdir()
    (empty / "settings.json").write_text(json.dumps(small | {"recipe": "full"}))
    with pytest.raises(InputError, match=r"neither an adapter nor a model.*compare --curvature"):
        measured(empty, tmp_path / "out")
    with pytest.raises(InputError, match="minilm-l6"):
        measured("minilm-l7", tmp_path / "out")
