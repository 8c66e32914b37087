"""Digits and their model: what is pretrained on what, that both take the way of text, and what a message says."""

import gzip
import json

import numpy
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from transformers import ViTForImageClassification

from tangora._checks import InputError
from tangora.adapters import save_adapter
from tangora.training.data import collator, encode, load_task, packaged_images
from tangora.training.metrics import evaluate, predictions
from tangora.training.models import ImageScaler, load_model
from tangora.training.models import digits as vit
from tangora.training.models.digits import PRETRAINING_DIGITS, TASK_DIGITS, read_digits
from tangora.training.paths import PackagedFiles, install_command, locate
from tests.models import tiny_tokenizer
from tests.training.tiny import labelled_examples, rng_state_unchanged


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return load_task("digits")


@pytest.fixture(scope="module")
def cached(tmp_path_factory, digits):
    """`vit-digits` after a single epoch, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TANGORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(vit, "_EPOCHS", 1)
        vit.pretrained_vit()
        yield


def load(**options):
    return load_model("vit-digits", kind="classification", num_labels=5, **options)


def encoded(examples, loaded):
    data = encode(examples, loaded.tokenizer, kind="classification", max_length=2)
    return data, collator(loaded.tokenizer, "classification")


def test_pretraining_and_task_share_no_image(digits):
    assert not set(PRETRAINING_DIGITS) & set(TASK_DIGITS)
    seen, _ = read_digits("digits", PRETRAINING_DIGITS)
    adapted = [
        example["pixels"] for split in (digits.train, digits.validation, digits.test) for example in split
    ]
    assert not {str(image.tolist()) for image in seen} & {str(pixels) for pixels in adapted}
    assert len(seen) + len(adapted) == 1797


def test_images_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    expected = load_digits()
    images, classes = read_digits("digits", range(10))
    assert torch.equal(images[:, 0], torch.from_numpy(expected.images).float() / 16)
    assert classes.tolist() == expected.target.tolist()
    assert digits.labels == ("5", "6", "7", "8", "9")
    assert digits.kind == "classification"


def test_permuted_digits_are_all_images_with_the_same_pixels_elsewhere():
    images, classes = read_digits("digits", range(10))
    task = load_task("digits-permuted", num_test=300)
    assert task.labels == tuple(map(str, range(10)))
    found = [example for split in (task.train, task.validation, task.test) for example in split]
    assert len(found) == len({image.numpy().tobytes() for image in images})
    permuted = torch.tensor([example["pixels"] for example in found])
    assert permuted.shape[1:] == images.shape[1:]
    # the order is one and the same: pixel by pixel the two sets have the same sums, in another order
    sums, permuted_sums = (each.double().sum(0).flatten() for each in (images, permuted))
    torch.testing.assert_close(sums.sort().values, permuted_sums.sort().values)
    assert not torch.allclose(sums, permuted_sums)
    by_label = torch.tensor([int(task.labels[example["label"]]) for example in found])
    assert torch.equal(by_label.bincount(), classes.bincount())


def pixels_of(task):
    return torch.tensor([e["pixels"] for split in (task.train, task.validation, task.test) for e in split])


def test_mnist_is_shrunk_as_the_digits_were():
    task = load_task("mnist-5k")
    assert task.labels == tuple(map(str, range(10)))
    images = pixels_of(task)
    assert images.shape == (5000, 1, 8, 8)
    assert images.min() == 0
    assert 0.9 < images.max() <= 1
    # each pixel is the mean of 4 x 4, in a frame of 2: only what MNIST leaves empty itself is empty
    with gzip.open(locate("mnist-5k", packaged_images._MNIST), "rt") as file:
        first = torch.tensor([int(cell) for cell in file.readline().split(",")])
    framed = torch.zeros(32, 32)
    framed[2:30, 2:30] = first[:-1].view(28, 28) / 255
    expected = nn.functional.avg_pool2d(framed[None, None], 4)[0]
    assert min((image - expected).abs().max() for image in images) < 1e-6


def test_textures_are_patches_of_the_photographs():
    task = load_task("textures")
    assert task.labels == ("brick", "grass", "gravel")
    assert pixels_of(task).shape == (768, 1, 8, 8)
    images, numbers = packaged_images.read_textures("textures")
    assert numbers.tolist() == [0] * 256 + [1] * 256 + [2] * 256
    with Image.open(locate("textures", packaged_images._TEXTURES) / "grass.png") as picture:
        photograph = torch.from_numpy(numpy.array(picture.convert("L"), dtype=float))
    expected = photograph[32:64, 64:96].reshape(8, 4, 8, 4).mean((1, 3)) / 255  # row 1, column 2 of 16 x 16
    torch.testing.assert_close(torch.from_numpy(images[256 + 16 + 2]), expected)


def test_pretraining_repeats(digits):
    images, labels = read_digits("digits", PRETRAINING_DIGITS)
    found = []
    for caller in range(2):
        torch.manual_seed(caller)
        assert rng_state_unchanged(
            lambda: found.append(vit.pretrain(vit.SCALER(images[:65]), labels[:65], epochs=1))
        )
    for name, value in found[0].state_dict().items():
        assert torch.equal(found[1].state_dict()[name], value), name
    assert not found[0].training


def test_backbone_is_cached_and_the_head_is_new(cached, monkeypatch):
    first = load().model
    monkeypatch.setattr(vit, "pretrain", None)
    again, other = load().model, load(seed=1).model
    assert isinstance(first, ViTForImageClassification)
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
        assert torch.equal(other.state_dict()[name], value) == (name != "classifier.weight"), name


def test_adapters_leave_the_head_to_be_trained_whole(cached):
    config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(load().model, config)
    assert isinstance(model, PeftModel)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora" not in name} == {
        f"base_model.model.classifier.modules_to_save.default.{name}" for name in ("weight", "bias")
    }
    assert not any("classifier" in name for name in trained if "lora" in name)
    linear = [name for name, module in load().model.named_modules() if isinstance(module, nn.Linear)]
    assert len({name for name in trained if "lora_A" in name}) == len(linear) - 1


def test_images_take_the_way_of_text(cached, digits):
    loaded = load()
    data, collate = encoded(digits.test[:10], loaded)
    batch = collate([data[index] for index in range(10)])
    assert set(batch) == {"pixel_values", "labels"}
    raw = torch.tensor([example["pixels"] for example in digits.test[:10]])
    assert torch.allclose(batch["pixel_values"], 2 * raw - 1)
    measured = predictions(loaded.model, data, collate, kind="classification", batch_size=4)
    own = loaded.model(**batch)
    assert measured["predicted"].tolist() == own.logits.argmax(-1).tolist()
    mean = evaluate(loaded.model, data, collate, kind="classification", batch_size=3)["loss"]
    assert mean == pytest.approx(own.loss.item(), rel=1e-5)


def test_scaler_is_saved_with_the_model(cached, tmp_path):
    loaded = load()
    loaded.model.save_pretrained(tmp_path / "own")
    ImageScaler((0.25,), (0.75,), 8, 8).save_pretrained(tmp_path / "own")
    again = load_model(str(tmp_path / "own"), kind="classification", num_labels=5)
    assert again.tokenizer == ImageScaler((0.25,), (0.75,), 8, 8)
    assert torch.equal(again.model.classifier.weight, loaded.model.classifier.weight)
    (tmp_path / "own" / "preprocessor_config.json").unlink()
    assert load_model(str(tmp_path / "own"), kind="classification", num_labels=5).tokenizer == vit.SCALER


def test_images_of_a_file(cached, digits, tmp_path):
    lines = [{"pixels": example["pixels"], "label": example["label"]} for example in digits.train[:40]]
    path = tmp_path / "images.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = load_task(str(path), num_validation=5, num_test=5)
    assert task.kind == "classification"
    assert len(encoded(task.train, load())[0]) == 30


@pytest.mark.messages
def test_messages(cached, digits, monkeypatch):
    scaler = vit.SCALER
    with pytest.raises(InputError, match="need an image model, such as vit-digits"):
        encode(digits.test[:2], tiny_tokenizer(), kind="classification", max_length=8)
    with pytest.raises(InputError, match="needs image data, such as digits"):
        encode(labelled_examples(), scaler, kind="classification", max_length=8)
    with pytest.raises(InputError, match="image 0 must have the model's 1 x 8 x 8 pixels; got 1 x 1 x 1"):
        encode([{"pixels": [[[0.5]]], "label": 0}], scaler, kind="classification", max_length=8)
    with pytest.raises(InputError, match="kind must be 'classification', got 'causal'"):
        load_task("digits", kind="causal")
    with pytest.raises(InputError, match="model 'vit-digits' is an image model"):
        load_model("vit-digits", kind="causal")
    absent = PackagedFiles("scikit-learn", "1.9.1", "no_such_module", "digits.csv.gz", extra="tasks")
    monkeypatch.setattr("tangora.training.models.digits.DIGITS", absent)
    with pytest.raises(InputError, match=r"not installed; run: pip install 'tangora\[tasks\]'"):
        load_task("digits")
    assert install_command(absent) == "pip install 'tangora[tasks]'"


@pytest.mark.slow
def test_pretraining_learns(digits):
    images, labels = read_digits("digits", PRETRAINING_DIGITS)
    images = vit.SCALER(images)
    model = vit.pretrain(images[:-200], labels[:-200], epochs=20)
    with torch.no_grad():
        right = model(pixel_values=images[-200:]).logits.argmax(-1) == labels[-200:]
    assert right.double().mean() > 0.8  # of other writers; 0.2 by chance


@pytest.mark.slow
def test_pretraining_helps(monkeypatch, tmp_path, digits):
    """Twenty steps from the pretrained weights against twenty from random ones."""
    monkeypatch.setenv("TANGORA_CACHE", str(tmp_path))
    accuracy = {}
    for start in ("pretrained", "random"):
        loaded = load()
        torch.manual_seed(0)
        model = loaded.model if start == "pretrained" else ViTForImageClassification(loaded.model.config)
        data, collate = encoded(digits.train, loaded)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(20):
            batch = collate([data[(16 * step + index) % len(data)] for index in range(16)])
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        test = encoded(digits.test, loaded)
        accuracy[start] = evaluate(model, *test, kind="classification", batch_size=64)["accuracy"]
    assert accuracy["pretrained"] > accuracy["random"] + 0.1


def test_the_card_of_an_adapter_names_the_class_that_loads_its_base(cached, tmp_path):
    model = get_peft_model(load().model, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    save_adapter(model, tmp_path)
    assert "AutoModelForImageClassification" in (tmp_path / "README.md").read_text()
