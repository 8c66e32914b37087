"""Live curves: what trackers are sent is what the run's own files say."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tangora import CompareSettings, InputError, RunSettings, compare, train
from tangora.training.callbacks import check_trackers, trackers


@pytest.fixture
def small(classifier):
    return classifier | {"steps": 4, "batch_size": 8}


def scalars(folder, name):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_shows_what_the_record_says(small, tmp_path):
    settings = RunSettings(**small, recipe="tangent", report_to="tensorboard", evaluate_every=2)
    record = train(settings, tmp_path / "out")
    sent = tmp_path / "out" / "tensorboard"
    for name in ("loss", "learning_rate", "grad_norm"):
        steps = [(step.step, pytest.approx(getattr(step, name), rel=1e-6)) for step in record.history]
        assert scalars(sent, f"train/{name}") == steps
    first = record.evaluations[0]
    assert scalars(sent, "eval/accuracy") == [(2, pytest.approx(first.metrics["accuracy"], rel=1e-6))]


def test_every_run_of_a_comparison_has_its_own_curves(small, tmp_path):
    rates = {"learning_rates": {"lora": [1e-3, 3e-3]}}
    settings = CompareSettings(**small, **rates, recipes=["lora"], seeds=[0], report_to=["tensorboard"])
    outcome = compare(settings, tmp_path)
    for record in outcome.comparison.records:
        assert len(scalars(tmp_path / "runs" / record.id / "tensorboard", "train/loss")) == 4
    # where curves are shown is no part of what is compared
    again = compare(settings.model_copy(update={"report_to": None}), tmp_path)
    assert [r.created for r in again.comparison.records] == [r.created for r in outcome.comparison.records]


def test_training_is_the_same_with_and_without(small, tmp_path):
    losses = []
    for name, chosen in (("with", ["tensorboard"]), ("without", None)):
        record = train(RunSettings(**small, recipe="lora", report_to=chosen), tmp_path / name)
        losses.append([step.loss for step in record.history])
    assert losses[0] == losses[1]
    assert not (tmp_path / "without" / "tensorboard").exists()


@pytest.mark.messages
def test_a_tracker_that_is_not_installed_is_named(small, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "tangora.training.callbacks.get_available_reporting_integrations", lambda: ["tensorboard"]
    )
    check_trackers(["tensorboard"])
    with pytest.raises(InputError, match="report_to wandb needs the package wandb: pip install wandb"):
        train(RunSettings(**small, report_to="tensorboard, wandb"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert trackers([], tmp_path) == []
