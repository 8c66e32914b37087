"""CLIP as a classifier: its logits are CLIP's own, only its vision model learns, and plain PEFT reads what is saved."""

import re

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoModelForImageClassification, CLIPModel

from tangora import load_adapter, load_model, recipe, save_adapter, save_merged
from tangora._checks import InputError
from tangora.training.models.clip import PROMPTS, PromptedCLIPForImageClassification, class_words
from tests.models import clip_tokenizer, randomize, tiny_clip, with_lora
from tests.training.tiny import picture, rng_state_unchanged, write_clip

LABELS = ["red_cat", "GreenDog", "sea"]
WORDS = ["red cat", "Green Dog", "sea"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def pixels():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def load(published, **options):
    return load_model(published, kind="classification", **{"labels": LABELS} | options)


def clip_logits(clip, pixels, prompts=PROMPTS):
    """CLIP's own logits, averaged over the templates as in its paper: embeddings, not probabilities."""
    tokenizer, rows = clip_tokenizer(), []
    for words in WORDS:
        inputs = tokenizer([prompt.format(words) for prompt in prompts], padding=True, return_tensors="pt")
        outputs = clip(pixel_values=pixels, **inputs)
        rows.append(normalize(outputs.text_embeds.mean(0), dim=0))
    return clip.logit_scale.exp() * outputs.image_embeds @ torch.stack(rows).T


@pytest.mark.parametrize("prompts", [PROMPTS, ("a {}.", "the blue {} + sun", "{} 7")])
def test_logits_are_clips(published, pixels, prompts):
    model = load(published, class_prompts=list(prompts)).model
    assert isinstance(model, PromptedCLIPForImageClassification)
    expected = clip_logits(tiny_clip(), pixels, prompts)
    torch.testing.assert_close(model(pixels).logits, expected)
    labels = torch.tensor([0, 2, 1, 1])
    loss = nn.functional.cross_entropy(expected, labels)
    torch.testing.assert_close(model(pixels, labels=labels).loss, loss)


def test_one_template_gives_logits_per_image(published, pixels):
    texts = clip_tokenizer()([f"a photo of a {words}." for words in WORDS], padding=True, return_tensors="pt")
    expected = tiny_clip()(pixel_values=pixels, **texts).logits_per_image
    torch.testing.assert_close(
        load(published, class_prompts="a photo of a {}.").model(pixels).logits, expected
    )
    torch.testing.assert_close(load(published).model(pixels).logits, expected)


def test_class_names_become_words():
    assert [class_words(label) for label in LABELS] == WORDS
    # CLIP's own names of classes stay as they are
    for name in ("highway or road", "end / de-restriction of 80 kph speed limit", "2012 BMW M3 coupe", "7"):
        assert class_words(name) == name


def test_only_the_vision_model_has_parameters(published, pixels):
    model = load(published).model
    assert all(name.startswith("vision_model.") for name, _ in model.named_parameters())
    frozen = {"text_embeddings", "logit_scale", "visual_projection.weight"}
    assert {name for name, _ in model.named_buffers()} >= frozen
    before = {name: value.clone() for name, value in model.state_dict().items() if name in frozen}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(pixels, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_adapters_are_in_the_vision_model_alone(published):
    model = load(published).model
    layers = sum(isinstance(module, nn.Linear) for module in model.modules())
    adapted = recipe("lora").prepare(
        model, r=2, lora_alpha=4, task_type="SEQ_CLS", total_steps=1, seed=0, target_modules="all-linear"
    )
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert all(".vision_model.encoder." in name and "lora" in name for name in trained)
    assert len(trained) == 2 * layers == 2 * 2 * 6


def test_loading_is_repeatable_and_leaves_the_random_state(published):
    found = []
    for caller in range(2):
        torch.manual_seed(caller)
        assert rng_state_unchanged(lambda: found.append(load(published).model))
    for name, value in found[0].state_dict().items():
        assert torch.equal(found[1].state_dict()[name], value), name
    assert not found[0].training


@pytest.fixture
def trained(published):
    """An adapter that changes every layer."""
    return randomize(with_lora(load(published).model, task_type="SEQ_CLS"), seed=1)


def test_adapter_fits_the_classifier_and_clip_itself(published, trained, pixels, tmp_path):
    expected = trained(pixel_values=pixels).logits
    assert not torch.allclose(expected, load(published).model(pixels).logits)
    saved = save_adapter(trained, tmp_path / "adapter")
    again = load_adapter(load(published).model, saved)
    torch.testing.assert_close(again(pixel_values=pixels).logits, expected)
    # as it is published, with its text model: the texts are those of the untouched model
    clip = load_adapter(CLIPModel.from_pretrained(published), saved).get_base_model()
    torch.testing.assert_close(clip_logits(clip.eval(), pixels), expected)


def test_card_has_code_that_needs_no_tangora(published, trained, tmp_path):
    loaded = load(published)
    adapter = save_adapter(trained, tmp_path / "adapter", tokenizer=loaded.tokenizer).path
    picture(3, 1).save(tmp_path / "image.png")
    card = (adapter / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    assert "tangora" not in code[1]
    script = code[1].replace("path or name of this adapter", str(adapter))
    script = script.replace("an image", str(tmp_path / "image.png"))
    script = script.replace("path or name of the base model", published)
    said = []
    exec(script, {"print": said.append})
    with Image.open(tmp_path / "image.png") as image:
        logits = trained(pixel_values=loaded.tokenizer.prepared(image)[None]).logits
    assert said == [[WORDS[int(logits.argmax())]]]


def test_saved_classifier_is_the_same_model(published, pixels, tmp_path):
    loaded = load(published, class_prompts=["a {}.", "the {}"])
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    expected = loaded.model(pixels).logits
    for again in (
        load_model(str(tmp_path), kind="classification", labels=LABELS),
        load_model(str(tmp_path), kind="classification", num_labels=3, class_prompts=["a {}.", "the {}"]),
    ):
        assert torch.equal(again.model(pixels).logits, expected)
        assert again.model.config.id2label == dict(enumerate(LABELS))
        assert again.tokenizer == loaded.tokenizer
    auto = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(auto, PromptedCLIPForImageClassification)
    assert torch.equal(auto.eval()(pixels).logits, expected)


def test_merged_model_loads(published, trained, pixels, tmp_path):
    expected = trained(pixel_values=pixels).logits
    save_merged(trained, tmp_path / "merged")
    load(published).tokenizer.save_pretrained(tmp_path / "merged")
    merged = load_model(str(tmp_path / "merged"), kind="classification", labels=LABELS).model
    assert (load(published).model(pixels).logits - expected).abs().max() > 0.1
    torch.testing.assert_close(
        merged(pixels).logits, expected, rtol=1e-3, atol=1e-3
    )  # summed in another order


def test_quantized_models_have_the_same_classes(published, pixels):
    pytest.importorskip("bitsandbytes")
    whole, small = load(published).model, load(published, quantize_to=torch.device("cpu")).model
    assert {type(m).__name__ for m in small.modules() if isinstance(m, nn.Linear)} == {"Linear4bit"}
    assert torch.equal(small.text_embeddings, whole.text_embeddings)
    assert torch.equal(small.visual_projection.weight, whole.visual_projection.weight)
    logits, expected = small(pixels).logits, whole(pixels).logits
    assert not torch.equal(logits, expected)
    assert torch.corrcoef(torch.stack([logits.flatten(), expected.flatten()]))[0, 1] > 0.8


def test_without_embedded_classes_no_logit_is_a_number(published, pixels):
    config = load(published).model.config
    bare = PromptedCLIPForImageClassification.from_pretrained(published, config=config).eval()
    assert bare(pixels).logits.isnan().all()


@pytest.mark.messages
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": None, "num_labels": 3}, "needs labels"),
        ({"kind": "causal", "labels": None}, "image model"),
        ({"class_prompts": "a photo"}, "one {} for the class.*got 'a photo'"),
        ({"class_prompts": ["{} or {}"]}, "got '{} or {}'"),
        ({"class_prompts": "{} of {0}"}, r"got '{} of \{0\}'"),
        ({"class_prompts": []}, "prompts must be"),
        ({"class_prompts": 3}, "prompts must be"),
    ],
)
def test_what_clip_cannot_be_loaded_with(published, options, message):
    with pytest.raises(InputError, match=message):
        load_model(published, **{"kind": "classification", "labels": LABELS} | options)


@pytest.mark.messages
def test_a_saved_classifier_keeps_its_classes(published, tmp_path):
    loaded = load(published)
    loaded.model.save_pretrained(tmp_path)
    for options in (
        {"labels": ["one", "two", "three"]},
        {"num_labels": 4},
        {"labels": LABELS, "class_prompts": "a {}"},
    ):
        with pytest.raises(InputError, match="load the CLIP model that it comes from"):
            load_model(str(tmp_path), kind="classification", **options)


@pytest.mark.messages
def test_parts_of_clip_are_refused(published, tmp_path):
    clip = tiny_clip()
    state = {key: value for key, value in clip.state_dict().items() if not key.startswith("text_model")}
    clip.save_pretrained(tmp_path, state_dict=state)
    clip_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks .* weights of a CLIP model, such as text_model"):
        load_model(str(tmp_path), kind="classification", labels=LABELS)


@pytest.mark.messages
def test_prompts_are_for_clip(tmp_path):
    with pytest.raises(InputError, match="class_prompts are for CLIP models"):
        load_model("minilm-l6", kind="classification", num_labels=2, class_prompts="a {}")
