"""A finished run, written once more."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tangora import InputError, RunSettings, export, load_adapter, train
from tangora.experiments.run.loading import load_base, load_run_task
from tests.experiments.small import write_classifier


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose start carries an offset, so that its adapter has twice the rank."""
    folder = tmp_path_factory.mktemp("run")
    settings = RunSettings(**write_classifier(folder), recipe="lora-ga", steps=5, batch_size=8)
    train(settings, folder / "out")
    return folder / "out", settings


def logits(model, task):
    inputs = {
        "input_ids": torch.tensor([[4, 5, 6, 7]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.int64),
    }
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_a_cut_adapter_is_an_adapter_of_that_rank(run, tmp_path):
    folder, settings = run
    exported = export(folder, tmp_path / "small", rank=1)
    task = load_run_task(settings)
    model = load_adapter(load_base(settings, task).model, tmp_path / "small")
    assert all(p.shape[0] == 1 for name, p in model.named_parameters() if "lora_A" in name)
    assert 0 < exported.relative_error < 1
    assert export(folder, tmp_path / "whole", rank=2 * settings.rank).relative_error < 1e-6


def test_a_merged_model_needs_nothing_but_transformers(run, tmp_path):
    folder, settings = run
    task = load_run_task(settings)
    expected = logits(load_adapter(load_base(settings, task).model, folder / "adapter"), task)
    assert export(folder, tmp_path / "model", merge=True).merged
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(merged, task), expected, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")


def test_cut_and_merged(run, tmp_path):
    folder, settings = run
    export(folder, tmp_path / "small", rank=1)
    task = load_run_task(settings)
    expected = logits(load_adapter(load_base(settings, task).model, tmp_path / "small"), task)
    export(folder, tmp_path / "model", rank=1, merge=True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(merged, task), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.messages
def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match="is no run folder"):
        export(tmp_path, tmp_path / "out")
    (tmp_path / "settings.json").write_text('{"recipes": ["lora"]}')
    with pytest.raises(InputError, match="holds a comparison"):
        export(tmp_path, tmp_path / "out")
    (tmp_path / "settings.json").write_text('{"recipe": "full"}')
    with pytest.raises(InputError, match="holds no adapter"):
        export(tmp_path, tmp_path / "out")
