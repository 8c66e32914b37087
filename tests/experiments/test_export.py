"""A finished run, written once more."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from tangora import InputError, RunSettings, export, load_adapter, train
from tangora.experiments.run.preparing import load_base, load_run_task
from tangora.report import load_record
from tests.experiments.small import write_classifier, write_generator
from tests.models import tiny_tokenizer


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


def card_code(adapter, base):
    """Return what the code of a card leaves behind when it is run as a reader would run it."""
    code = (adapter / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "tangora" not in code
    code = code.replace("path or name of the base model", str(base))
    scope = {}
    exec(code.replace("path or name of this adapter", str(adapter)), scope)
    return scope


def test_the_adapter_folder_alone_serves_a_classifier(run, capsys):
    folder, settings = run
    scope = card_code(folder / "adapter", settings.model)
    (answer,) = eval(capsys.readouterr().out)
    task = load_run_task(settings)
    assert answer in task.labels
    assert tuple(scope["config"].id2label.values()) == task.labels
    expected = logits(load_adapter(load_base(settings, task).model, folder / "adapter"), task)
    torch.testing.assert_close(logits(scope["model"], task), expected)
    # transformers' own way to an adapter
    direct = AutoModelForSequenceClassification.from_pretrained(folder / "adapter", config=scope["config"])
    torch.testing.assert_close(logits(direct, task), expected)


def test_the_names_of_the_classes_are_in_the_folder(tmp_path):
    values = write_classifier(tmp_path) | {"num_train": 20}
    path = tmp_path / "data.csv"
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    lines = [f"{row['text']},{['bad', 'fair', 'good'][row['label']]}\n" for row in rows]
    path.write_text("review,sentiment\n" + "".join(lines))
    record = train(RunSettings(**values | {"data": str(path)}, steps=1), tmp_path / "out")
    assert "text = 'review', label = 'sentiment'" in " ".join(record.notes)
    names = json.loads((tmp_path / "out" / "adapter" / "base_config" / "config.json").read_text())["id2label"]
    assert names == {"0": "bad", "1": "fair", "2": "good"}
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert all(f"| classes: {number} | {name} |" in card for number, name in names.items())
    assert str(tmp_path) not in card


@pytest.mark.parametrize("chat", [None, True])
def test_the_adapter_folder_alone_serves_a_generator(chat, tmp_path, capsys):
    values = write_generator(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} sea {% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path / "model")
    settings = RunSettings(**values, steps=1, chat_template=chat, exact_match=True)
    train(settings, tmp_path / "out")
    scope = card_code(tmp_path / "out" / "adapter", settings.model)
    assert ("apply_chat_template" in (tmp_path / "out" / "adapter" / "README.md").read_text()) == bool(chat)
    assert scope["tokenizer"].chat_template == tokenizer.chat_template
    assert capsys.readouterr().out


def test_exports_need_no_data(run, tmp_path):
    folder, settings = run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    values = json.loads((copy / "settings.json").read_text()) | {"data": str(tmp_path / "gone.jsonl")}
    (copy / "settings.json").write_text(json.dumps(values))
    export(copy, tmp_path / "small", rank=1)
    export(copy, tmp_path / "model", rank=1, merge=True)
    names = AutoConfig.from_pretrained(tmp_path / "model").id2label
    assert tuple(names.values()) == load_run_task(settings).labels
    assert load_record(folder / "record.json").settings["data_fingerprint"] in (
        (tmp_path / "small" / "README.md").read_text()
    )


def test_runs_of_older_versions_are_exported_with_their_data(run, tmp_path):
    folder, settings = run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name in ("base_config/config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / "adapter" / name).unlink()
    export(copy, tmp_path / "model", merge=True)
    names = AutoConfig.from_pretrained(tmp_path / "model").id2label
    assert tuple(names.values()) == load_run_task(settings).labels
    values = json.loads((copy / "settings.json").read_text()) | {"data": str(tmp_path / "gone.jsonl")}
    (copy / "settings.json").write_text(json.dumps(values))
    with pytest.raises(
        InputError, match=r"without the names of its classes, .* cannot be read: .*gone\.jsonl"
    ):
        export(copy, tmp_path / "other")


@pytest.mark.messages
def test_an_export_never_replaces_the_runs_own_adapter(run):
    folder, _ = run
    for output in (folder / "adapter", folder):
        with pytest.raises(InputError, match="exists already"):
            export(folder, output, rank=1)


@pytest.mark.messages
def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        export(tmp_path, tmp_path / "out")
    (tmp_path / "settings.json").write_text('{"recipes": ["lora"]}')
    with pytest.raises(InputError, match="contains a comparison"):
        export(tmp_path, tmp_path / "out")
    (tmp_path / "settings.json").write_text('{"recipe": "full"}')
    with pytest.raises(InputError, match="contains no adapter"):
        export(tmp_path, tmp_path / "out")
