"""Curvature recorded while a model trains: the numbers of dense Hessians, and training that stays what it is."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import tangora
from tangora import InputError
from tangora.adapters import find_pairs
from tangora.diagnostics.gradient_views import gradient_views
from tangora.training.callbacks import DivergedError
from tangora.training.curvature import CurvatureCallback, CurvaturePoint, curvature_point, read_curvature
from tangora.training.data import collator, encode
from tests.curvature.models import change_gauge, problem
from tests.models import tiny_bert, tiny_tokenizer
from tests.reference.curvature import DenseCurvature
from tests.training.tiny import labelled_examples

SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


def parts(folder, **changes):
    """A classifier with dropout and adapters on two layers, its training, and batches to measure on."""
    tokenizer = tiny_tokenizer()
    config = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", lora_dropout=0.1)
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(hidden_dropout_prob=0.1, **SMALL), config)
    collate = collator(tokenizer, "classification")
    data = encode(labelled_examples(16), tokenizer, kind="classification", max_length=8)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **{"max_steps": 5, "save_strategy": "no"} | changes,
    )
    batches = [dict(collate([data[index] for index in part])) for part in (range(5), range(5, 7))]
    trainer = {"model": model, "args": arguments, "train_dataset": data, "data_collator": collate}
    return trainer, batches


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_a_point_is_that_of_the_dense_hessian():
    found = problem("bert", r=1, target_modules=["query", "value"])
    point = curvature_point(
        found.model, found.batches, 7, over=("tangent", "factors", "weights"), trace_products=40
    )
    dense = DenseCurvature(found.model, found.batches)
    expected = {
        "tangent": dense.tangent_hessian,
        "factors": dense.factor_hessian,
        "weights": dense.weight_hessian,
    }
    for name, matrix in expected.items():
        space, values = point.spaces[name], torch.linalg.eigvalsh(matrix)
        assert space.top_eigenvalue == pytest.approx(float(values[-1]), rel=5e-3)
        assert space.residual <= 1.1e-2 * float(values.abs().max())
        assert space.trace == pytest.approx(float(values.sum()), abs=5 * space.trace_error)
        assert 0 < space.trace_error < 0.5 * float(values.abs().sum())
    assert point.step == 7
    assert point.loss == pytest.approx(float(dense.loss("factors", dense.factors)))
    assert point.gradient_norm == pytest.approx(float(dense.weight_gradient.norm()))
    projected = dense.projector @ dense.weight_gradient
    share = float(projected.square().sum() / dense.weight_gradient.square().sum())
    assert point.captured_energy == pytest.approx(share)
    assert 0 < share < 1


def test_captured_energy_is_that_of_the_trajectory():
    found = problem("gpt2")
    point = curvature_point(found.model, found.batches, 0, over=("tangent",), trace_products=6)
    views, loss = gradient_views(found.model, find_pairs(found.model), found.batches)
    captured, energy = (sum(getattr(v, key) for v in views.values()) for key in ("captured", "energy"))
    assert point.captured_energy == pytest.approx(captured / energy)
    assert point.loss == pytest.approx(loss)


def test_the_tangent_space_knows_no_gauge_and_the_factors_do():
    one, other = problem("mlp"), problem("mlp")
    change_gauge(find_pairs(other.model), condition=30.0)
    first, second = (
        curvature_point(p.model, p.batches, 0, loss_fn=p.loss_fn, trace_products=40) for p in (one, other)
    )
    for key in ("gradient_norm", "captured_energy", "loss"):
        assert getattr(first, key) == pytest.approx(getattr(second, key), rel=1e-8)
    before, after = first.spaces["tangent"], second.spaces["tangent"]
    assert before.top_eigenvalue == pytest.approx(after.top_eigenvalue, rel=1e-2)
    assert before.trace == pytest.approx(after.trace, abs=5 * (before.trace_error + after.trace_error))
    before, after = first.spaces["factors"], second.spaces["factors"]
    assert abs(before.top_eigenvalue - after.top_eigenvalue) > 0.5 * before.top_eigenvalue


def test_measuring_changes_no_bit_of_training(tmp_path):
    results = []
    for name in ("plain", "measured"):
        options, batches = parts(tmp_path / name)
        callbacks = [CurvatureCallback(batches, every=2, trace_products=6)] if name == "measured" else []
        transformers.Trainer(**options, callbacks=callbacks).train()
        results.append(weights(options["model"]))
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())
    points = read_curvature(tmp_path / "measured" / "curvature.jsonl")
    assert [point.step for point in points] == [0, 2, 4, 5]
    assert len({point.spaces["tangent"].top_eigenvalue for point in points}) == 4
    # at B = 0 the tangent space is that of B alone, 2 layers of rank 2
    assert [point.spaces["tangent"].size for point in points] == [2 * 8 * 2] + 3 * [2 * 2 * (8 + 8 - 2)]
    assert points[-1] == curvature_point(options["model"], batches, 5, trace_products=6)


def test_any_file_and_listener(tmp_path):
    options, batches = parts(tmp_path / "run", max_steps=2)
    heard: list[CurvaturePoint] = []
    callback = CurvatureCallback(
        batches, every=9, path=tmp_path / "deep" / "points.jsonl", over=["weights"], trace_products=6,
        layers=["query"], on_point=heard.append,
    )  # fmt: skip
    tangora.Trainer(**options, callbacks=[callback]).train()
    assert read_curvature(tmp_path / "deep" / "points.jsonl") == heard
    assert [point.step for point in heard] == [0, 2]
    assert heard[0].captured_energy is None
    assert heard[0].spaces["weights"].size == 8 * 8
    assert heard[0].known().keys() == {
        "loss",
        "gradient_norm",
        "weights_top_eigenvalue",
        "weights_trace",
        "weights_trace_error",
    }


def test_a_resumed_run_measures_every_step_once(tmp_path):
    options, batches = parts(tmp_path, save_strategy="steps", save_steps=2, max_steps=5)
    file = tmp_path / "curvature.jsonl"

    def run(options, **resume):
        callback = CurvatureCallback(batches, every=2, path=file, over=["factors"], trace_products=6)
        transformers.Trainer(**options, callbacks=[callback]).train(**resume)

    run(options)
    whole = file.read_text()
    with file.open("a") as lines:
        lines.write('{"step": 5, "lo')  # a line that a crash cut off
    options, _ = parts(tmp_path, save_strategy="no", max_steps=5)
    run(options, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 2, 4, 5]
    assert file.read_text() == whole


def test_a_loss_that_is_no_number_ends_training(tmp_path):
    options, batches = parts(tmp_path)
    callback = CurvatureCallback(batches, every=1, over=["factors"], trace_products=6)

    class Breaks(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)

    trainer = transformers.Trainer(**options, callbacks=[Breaks(), callback])
    with pytest.raises(DivergedError, match=r"step 2: a batch has loss nan"):
        trainer.train()
    assert [point.step for point in read_curvature(tmp_path / "curvature.jsonl")] == [0, 1]


@pytest.mark.messages
def test_bad_input(tmp_path):
    options, batches = parts(tmp_path)
    with pytest.raises(InputError, match=r"every must be a number in \[1"):
        CurvatureCallback(batches, every=0)
    with pytest.raises(InputError, match=r"trace_products must be a number in \[6"):
        CurvatureCallback(batches, every=1, trace_products=3)
    with pytest.raises(InputError, match="over must be a list of tangent, weights, factors; got 'tangent'"):
        CurvatureCallback(batches, every=1, over="tangent")
    with pytest.raises(InputError, match="did you mean tangent"):
        CurvatureCallback(batches, every=1, over=["tangents"])
    with pytest.raises(InputError, match="put it into a list"):
        CurvatureCallback(batches[0], every=1)
    options["model"].requires_grad_(False)
    with pytest.raises(InputError, match="no trainable LoRA factors"):
        curvature_point(options["model"], batches, 0)
