"""A saved adapter gives the same logits on the original base, with nothing but PEFT."""

import copy
import os

import pytest
import torch
import yaml
from peft import IA3Config, KasaConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora import preprocess_loraga
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaForCausalLM

from tangora import InputError, find_pairs
from tangora.adapters import (
    attach_offset,
    folder,
    initial_factors,
    load_adapter,
    merged_model,
    save,
    save_adapter,
    save_merged,
)
from tangora.adapters.saved_factors import truncate
from tests.adapters.models import IDS, LinearAndExperts, logits, tiny_llama, train, updates
from tests.cases import combinations
from tests.models import Holder, randomize, tiny_tokenizer
from tests.tolerances import assert_close

# PEFT says so whenever an embedding is adapted
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")

PATTERNS = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 20}}
CONFIGS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "patterns-rslora": {**PATTERNS, "use_rslora": True},
    "dora": {"use_dora": True},
    "lora-bias": {"lora_bias": True, "target_modules": ["one", "two"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora-embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "modules-to-save": {"modules_to_save": ["lm_head"]},
    "olora": {"init_lora_weights": "olora"},
    "olora-spelled-otherwise": {"init_lora_weights": "OLoRA"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-niter": {"init_lora_weights": "pissa_niter_4"},
    "pissa-rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa-patterns": {"init_lora_weights": "pissa", **PATTERNS},
    "pissa-patterns-rslora": {"init_lora_weights": "pissa", **PATTERNS, "use_rslora": True},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True},
    "pissa-embedding": {"init_lora_weights": "pissa", "target_modules": ["embed_tokens", "q_proj"]},
    "pissa-modules-to-save": {"init_lora_weights": "pissa", "modules_to_save": ["lm_head"]},
    "kasa": {"kasa_config": KasaConfig()},
}
MUTATING = [name for name in CONFIGS if name.startswith(("olora", "pissa"))]


class Biased(nn.Module):
    """Layers with a bias, which tiny Llama has none of."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.one, self.two = nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, input_ids):
        return self.two(torch.tanh(self.one(self.embed(input_ids))))


def base_of(name):
    return Biased() if name == "lora-bias" else tiny_llama()


def adapted(name="lora", adapter="default", **config):
    torch.manual_seed(0)
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **CONFIGS[name], **config}
    return get_peft_model(base_of(name), LoraConfig(**options), adapter_name=adapter)


def saved(tmp_path, name, adapter="default"):
    model = adapted(name, adapter)
    initial = initial_factors(model)
    train(model)
    return model, save_adapter(model, tmp_path / "adapter", initial=initial).path


# --- what is saved is what was trained ---


@pytest.mark.filterwarnings("ignore:.*rslora.*")
@pytest.mark.filterwarnings("ignore:.*lora_B.bias")  # PEFT takes a bias for a factor that was not gathered
# another name is another folder inside PEFT's, which no start cares about
@pytest.mark.parametrize(
    ("name", "adapter"),
    combinations(
        CONFIGS,
        ["default", "other"],
        quick=lambda name, adapter: (
            adapter == "default" or name in ("lora", "embedding", "pissa-modules-to-save")
        ),
    ),
)
def test_the_adapter_on_the_original_base_gives_the_same_logits(name, adapter, tmp_path):
    model, path = saved(tmp_path, name, adapter)
    assert path == tmp_path / "adapter"
    base = base_of(name)
    plain = logits(base)
    expected = logits(model)
    assert (expected - plain).abs().max() > 1e-3
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(path))
    assert_close(logits(loaded), expected, 1e-6)
    assert_close(logits(load_adapter(base, path)), expected, 1e-6)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # PEFT's hook on a first layer
def test_a_gradient_start_with_convolutions_that_peft_leaves_alone(tmp_path):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.linear = nn.Conv1d(1, 8, 3, padding=1), nn.Linear(8, 4)

        def forward(self, input_ids):
            return self.linear(self.conv(input_ids[:, None, :] / 8).mT)

    model, config = (
        Small(),
        LoraConfig(
            r=2, target_modules=["conv", "linear"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
        ),
    )
    preprocess_loraga(model, config, lambda: model(input_ids=IDS).square().mean().backward())
    model = get_peft_model(model, config)
    initial = initial_factors(model)
    train(model)
    path = save_adapter(model, tmp_path / "adapter", initial=initial)
    assert_close(logits(load_adapter(Small(), path)), logits(model), 1e-6)


def test_initial_factors_are_copies_of_the_factors_alone():
    model = adapted("pissa-embedding")
    initial = initial_factors(model)
    kept = {name: tensor.clone() for name, tensor in initial.items()}
    assert len(initial) == 4
    train(model)
    assert all(torch.equal(kept[name], tensor) for name, tensor in initial.items())


def test_only_the_active_adapter_is_saved(tmp_path):
    model = train(adapted())
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"]))
    model.set_adapter("second")
    train(model)
    path = save_adapter(model, tmp_path / "adapter")
    assert len(load_file(path.path / "adapter_model.safetensors")) == 2
    assert_close(logits(load_adapter(tiny_llama(), path)), logits(model), 1e-6)


def test_saving_changes_nothing_in_the_model(tmp_path):
    model = adapted("pissa")
    initial = initial_factors(model)
    before = {name: tensor.clone() for name, tensor in train(model).state_dict().items()}
    save_adapter(model, tmp_path / "adapter", initial=initial)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.peft_config["default"].init_lora_weights == "pissa"
    assert not model.peft_config["default"].inference_mode


# --- compression ---


def with_offset(name="lora", **config):
    model = adapted(name, **config)
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for pair in find_pairs(model):
        for parameter in (pair.A, pair.B):
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        A, B = pair.factors()
        factors[pair.name] = (B + 0.3 * torch.randn(B.shape, generator=generator), A)
    attach_offset(model, "default", factors)
    return train(model).double()


COMPRESSED = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 20}},
    "patterns-rslora": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 20}, "use_rslora": True},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules-to-save": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.filterwarnings("ignore:.*rslora.*")
@pytest.mark.parametrize(
    ("name", "rank"),
    combinations(
        COMPRESSED, [1, 3, 6], quick=lambda name, rank: rank == 3 or name in ("lora", "patterns-rslora")
    ),
)
def test_compression_is_the_truncated_svd_and_says_what_it_lost(name, rank, tmp_path):
    model = with_offset(name, **COMPRESSED[name])
    result = save_adapter(model, tmp_path / "adapter", rank=rank)
    again = PeftModel.from_pretrained(tiny_llama().double(), str(result), autocast_adapter_dtype=False)
    lost, total, worst = 0.0, 0.0, {}
    for (layer, update), pair in zip(updates(model).items(), find_pairs(model), strict=True):
        (cut,) = (other for other in find_pairs(again) if other.name == layer)
        own = min(rank, 2 * pair.shape[2])
        assert cut.shape[2] == own
        assert cut.scaling == pytest.approx(pair.scaling, rel=1e-14)
        U, values, Vh = torch.linalg.svd(update)
        assert_close(cut.delta_weight().detach(), (U[:, :own] * values[:own]) @ Vh[:own], 1e-10)
        error = float(values[own:].square().sum())
        lost, total = lost + error, total + float(update.square().sum())
        worst[layer] = (error / float(update.square().sum())) ** 0.5
    # singular values that are zero in exact arithmetic are not in floating point
    assert result.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-9, abs=1e-12)
    assert result.worst_error == pytest.approx(max(worst.values()), rel=1e-9, abs=1e-12)
    assert result.rank == max(min(rank, 2 * pair.shape[2]) for pair in find_pairs(model))
    if rank == 6:  # nothing is cut at rank 4, so that everything is as without a rank
        keep = [pair.name for pair in find_pairs(model) if 2 * pair.shape[2] <= rank]
        exact = load_file(save_adapter(model, tmp_path / "exact").path / "adapter_model.safetensors")
        cut = load_file(result.path / "adapter_model.safetensors")
        assert all(
            torch.equal(cut[key], value) for key, value in exact.items() if key.startswith(tuple(keep))
        )
    for key in ("lm_head", "magnitude"):
        held = {k: v for k, v in again.state_dict().items() if key in k}
        assert all(torch.equal(value, model.state_dict()[k]) for k, value in held.items())


@pytest.mark.parametrize("shape", [(30, 20, 4), (3, 20, 8), (20, 3, 8), (1, 1, 1), (5, 5, 5)])
def test_truncation_needs_the_factors_alone(shape):
    m, n, r = shape
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((m, r), (r, n)))
    U, values, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    for rank in (1, 2, r):
        B_k, A_k, found = truncate(B, A, rank)
        assert (B_k.shape, A_k.shape) == ((m, rank), (rank, n))
        assert_close(B_k @ A_k, (U[:, :rank] * values[:rank]) @ Vh[:rank], 1e-12)
        assert_close(B_k.T @ B_k, A_k @ A_k.T, 1e-12)  # balanced
        size = min(len(found), len(values))
        assert_close(found[:size], values[:size], 1e-12)


def test_convolutions_and_started_models_are_compressed(tmp_path):
    torch.manual_seed(0)
    base = Holder(nn.Conv2d(3, 5, (3, 2)).double())
    config = LoraConfig(r=3, target_modules=["it"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    result = save_adapter(model, tmp_path / "conv", rank=1)
    again = PeftModel.from_pretrained(base, str(result), autocast_adapter_dtype=False)
    U, values, Vh = torch.linalg.svd(find_pairs(model)[0].delta_weight().detach())
    assert_close(find_pairs(again)[0].delta_weight().detach(), values[0] * U[:, :1] @ Vh[:1], 1e-10)
    assert result.relative_error == pytest.approx(float(values[1:].norm() / values.norm()))
    model = adapted("pissa")
    initial = initial_factors(model)
    train(model)
    full, cut = (save_adapter(model, tmp_path / str(rank), initial=initial, rank=rank) for rank in (4, 2))
    assert (full.rank, full.relative_error, cut.rank) == (4, 0.0, 2)
    assert_close(logits(load_adapter(tiny_llama(), full)), logits(model), 1e-6)
    before = updates(load_adapter(tiny_llama(), full))
    after = updates(load_adapter(tiny_llama(), cut))
    lost = sum(float((before[key] - after[key]).square().sum()) for key in before)
    total = sum(float(before[key].square().sum()) for key in before)
    assert cut.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_tied_adapters_are_compressed_alike(tmp_path):
    targets = ["embed_tokens", "lm_head"]
    config = LoraConfig(r=3, target_modules=targets, ensure_weight_tying=True)
    model = randomize(get_peft_model(tiny_llama(tie_word_embeddings=True), config))
    result = save_adapter(model, tmp_path / "adapter", rank=1)
    again = load_adapter(tiny_llama(tie_word_embeddings=True), result)
    (pair,), (cut,) = find_pairs(model), find_pairs(again)
    U, values, Vh = torch.linalg.svd(pair.delta_weight().detach())
    assert_close(cut.delta_weight().detach(), values[0] * U[:, :1] @ Vh[:1], 1e-5)


@pytest.mark.messages
def test_ranks_that_cannot_be_had_are_refused(tmp_path):
    for bad, message in ((0, r"rank must be a number in \[1"), (1.5, "rank must be a whole number")):
        with pytest.raises(InputError, match=message):
            save_adapter(adapted(), tmp_path / "adapter", rank=bad)
    with pytest.raises(InputError, match=r"rank must be left out, because .*q_proj is no plain pair: Kasa"):
        save_adapter(adapted("kasa"), tmp_path / "adapter", rank=1)
    assert list(tmp_path.iterdir()) == []


# --- what is written beside the weights ---


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.filterwarnings("ignore:Could not find a config file in someone/some-model")
def test_the_card_says_what_is_known_and_no_path(tmp_path):
    model = with_offset(task_type="CAUSAL_LM")
    model.peft_config["default"].base_model_name_or_path = "someone/some-model"
    facts = {
        "recipe": "lora-ga",
        "seed": 3,
        "learning rate": 2e-5,
        "data": tmp_path / "secret" / "train.jsonl",
        "note": f"read from {tmp_path}/secret/train.jsonl | see https://example.org/a/b",
        "versions": {"transformers": "5"},
        "betas": (0.9, 0.999),
    }
    text = (save_adapter(model, tmp_path / "a", card=facts, rank=1).path / "README.md").read_text()
    data = front_matter(text)
    assert data["library_name"] == "peft"
    assert data["base_model"] == "someone/some-model"
    assert {"lora", "tangora"} <= set(data["tags"])
    assert str(tmp_path) not in text
    for line in (
        "| recipe | lora-ga |",
        "| learning rate | 2e-05 |",
        "| data | train.jsonl |",
        "| note | read from train.jsonl \\| see https://example.org/a/b |",
        "| versions: transformers | 5 |",
        "| betas | 0.9, 0.999 |",
        "Cut to rank 1 by singular values",
        'AutoModelForCausalLM.from_pretrained("someone/some-model")',
    ):
        assert line in text
    assert "More Information Needed" not in text


def test_the_card_of_a_classifier_gives_its_head_the_right_shape_and_no_folder(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=20, num_labels=5, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    text = (save_adapter(model, tmp_path / "adapter").path / "README.md").read_text()
    assert str(tmp_path) not in text
    assert "# LoRA adapter for BertForSequenceClassification (base)" in text
    assert str(tmp_path) not in (tmp_path / "adapter" / "base_config" / "config.json").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace("path or name of the base model", str(tmp_path / "base"))
    scope: dict = {}
    exec(code.replace("path or name of this adapter", str(tmp_path / "adapter")), scope)
    assert isinstance(scope["model"], PeftModel)
    assert scope["model"].config.num_labels == 5


def test_a_tokenizer_is_saved_with_an_adapter_and_never_lost(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side, tokenizer.chat_template = "left", "{{ messages[0].content }}"
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear"))
    for _ in range(2):  # it may be replaced by another
        save_adapter(model, tmp_path / "a", tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (again.padding_side, again.chat_template) == (tokenizer.padding_side, tokenizer.chat_template)
    with pytest.raises(InputError, match=r"holds .* beside the adapter, which would be lost"):
        save_adapter(model, tmp_path / "a")


@pytest.mark.parametrize("adapter", ["default", "other"])
def test_every_folder_has_a_card_and_safetensors_alone(adapter, tmp_path):
    _, path = saved(tmp_path, "lora", adapter)
    names = {entry.name for entry in path.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    text = (path / "README.md").read_text()
    assert "Exact: the trained factors" in text
    assert "base_model" not in front_matter(text)


def test_what_is_saved_is_a_path(tmp_path):
    result = save_adapter(with_offset(), tmp_path / "adapter")
    assert os.fspath(result) == str(result) == str(tmp_path / "adapter")
    assert (result.rank, result.relative_error, result.worst_layer) == (4, 0.0, None)
    assert PeftModel.from_pretrained(tiny_llama(), result.path)


@pytest.mark.messages
def test_a_scaling_that_no_file_can_hold_is_refused(tmp_path):
    model = adapted()
    find_pairs(model)[0].layer.set_scale("default", 0.5)
    with pytest.raises(InputError, match=r"scaling of .*q_proj must be 3, .* got 1\.5: undo set_scale"):
        save_adapter(model, tmp_path / "adapter")
    find_pairs(model)[0].layer.unscale_layer()
    save_adapter(model, tmp_path / "adapter")


@pytest.mark.messages
def test_a_start_is_only_for_changed_bases(tmp_path):
    with pytest.raises(
        InputError, match="initial must be empty, because the initialization True left the base weights"
    ):
        save_adapter(adapted(), tmp_path / "adapter", initial=initial_factors(adapted("pissa")))


# --- merged models ---


@pytest.mark.parametrize("name", ["lora", "dora", "embedding", "modules-to-save", "patterns"])
def test_merged_models_need_nothing_and_leave_the_trained_one_alone(name, tmp_path):
    model = with_offset(name)
    expected = logits(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert_close(logits(merged_model(model)), expected, 1e-12)
    path = save_merged(model, tmp_path / "merged")
    assert save_merged(model, path) == path  # replaces what it wrote
    assert_close(logits(LlamaForCausalLM.from_pretrained(path, dtype=torch.float64)), expected, 1e-12)
    assert {entry.name for entry in path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(logits(model), expected)
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]


@pytest.mark.messages
@pytest.mark.filterwarnings("ignore:Merge lora module")
def test_what_cannot_be_merged_is_refused(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    holder = Holder(bitsandbytes.nn.Linear4bit(64, 32, bias=False).to("cpu"))
    holder.is_loaded_in_4bit = True
    quantized = get_peft_model(holder, LoraConfig(r=2, target_modules=["it"]))
    with pytest.raises(InputError, match="a quantized base cannot be merged"):
        merged_model(quantized)
    with pytest.raises(InputError, match="must be a PeftModel"):
        save_merged(tiny_llama(), tmp_path / "merged")
    with pytest.raises(InputError, match="needs a transformers model as base; got Biased"):
        save_merged(adapted("lora-bias"), tmp_path / "merged")
    model = adapted()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years")
    with pytest.raises(InputError, match="is no model folder"):
        save_merged(model, tmp_path / "thesis")
    model.merge_adapter()
    with pytest.raises(InputError, match="is merged into"):
        save_merged(model, tmp_path / "merged")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis"]


# --- folders ---


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    model = train(adapted())
    (tmp_path / "empty").mkdir()
    assert load_adapter(tiny_llama(), save_adapter(model, tmp_path / "empty"))
    assert load_adapter(tiny_llama(), save_adapter(model, str(tmp_path / "some" / "where")))


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        save_adapter(train(adapted()), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "adapter_config.json").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "real"]


def test_the_folder_has_ordinary_permissions(tmp_path):
    _, path = saved(tmp_path, "lora")
    (tmp_path / "ordinary").mkdir()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.messages
def test_a_folder_with_something_else_is_refused_and_kept(tmp_path):
    model = train(adapted())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years")
    with pytest.raises(InputError, match="exists and is no adapter folder; choose another path"):
        save_adapter(model, tmp_path / "thesis")
    with pytest.raises(InputError, match="is no adapter folder"):
        save_adapter(model, tmp_path / "thesis" / "chapter.tex")
    checkpoint = save_adapter(model, tmp_path / "checkpoint").path
    (checkpoint / "optimizer.pt").write_text("state")
    with pytest.raises(InputError, match=r"holds optimizer\.pt beside the adapter, which would be lost"):
        save_adapter(model, checkpoint)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years"
    assert (checkpoint / "optimizer.pt").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "thesis"]


@pytest.mark.parametrize("where", ["_write", "with_initial", "model_card", "replace_folder"])
@pytest.mark.parametrize("existing", [False, True])
def test_nothing_half_written_is_left_when_saving_fails(where, existing, tmp_path, monkeypatch):
    target = tmp_path / "adapter"
    if existing:
        save_adapter(train(adapted()), target)
    held = {entry.name: entry.read_bytes() for entry in target.iterdir()} if existing else None
    model = adapted("pissa")
    initial = initial_factors(model)
    original = getattr(save, where)

    def fail(*arguments, **options):
        if where != "replace_folder":
            original(*arguments, **options)
        raise OSError("disk full")

    monkeypatch.setattr(save, where, fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, target, initial=initial)
    assert [entry.name for entry in tmp_path.iterdir()] == (["adapter"] if existing else [])
    if existing:
        assert {entry.name: entry.read_bytes() for entry in target.iterdir()} == held


def test_the_old_adapter_comes_back_when_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    target = save_adapter(train(adapted()), tmp_path / "adapter").path
    held = {entry.name: entry.read_bytes() for entry in target.iterdir()}
    rename = folder.Path.rename

    def fail(source, destination):
        if source.name == "new":  # leaves its scratch place
            raise OSError("disk full")
        return rename(source, destination)

    monkeypatch.setattr(folder.Path, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(train(adapted()), target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]
    assert {entry.name: entry.read_bytes() for entry in target.iterdir()} == held


# --- errors ---


@pytest.mark.messages
@pytest.mark.parametrize("name", MUTATING)
@pytest.mark.filterwarnings("ignore:.*rslora.*")
def test_a_changed_base_needs_its_start(name, tmp_path):
    with pytest.raises(InputError, match="changed the base weights: pass initial=initial_factors"):
        save_adapter(adapted(name), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.messages
def test_the_start_of_another_model_is_refused(tmp_path):
    model = adapted("pissa")
    for other in (adapted("pissa", r=3), adapted("pissa", target_modules=["k_proj"])):
        with pytest.raises(InputError, match=r"initial holds no factors of .*q_proj"):
            save_adapter(model, tmp_path / "adapter", initial=initial_factors(other))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.messages
def test_a_changed_base_with_experts_is_refused(tmp_path):
    config = LoraConfig(
        r=2,
        target_modules=["linear"],
        target_parameters=["experts.weight"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    model = get_peft_model(LinearAndExperts(), config)
    with pytest.raises(InputError, match="cannot be saved together with target_parameters"):
        save_adapter(model, tmp_path / "adapter", initial=initial_factors(model))


@pytest.mark.messages
def test_what_is_no_model_with_one_active_adapter_is_refused(tmp_path):
    with pytest.raises(InputError, match="must be a PeftModel; got Biased"):
        save_adapter(Biased(), tmp_path / "adapter")
    model = adapted()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(InputError, match="one active adapter; got default, second"):
        save_adapter(model, tmp_path / "adapter")


@pytest.mark.messages
def test_a_missing_adapter_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no adapter \(adapter_config.json is missing\)"):
        load_adapter(tiny_llama(), tmp_path)
    with pytest.raises(InputError, match="holds no adapter"):
        load_adapter(tiny_llama(), tmp_path / "nowhere")


def started_llama(dtype):
    options = {"r": 4, "target_modules": ["q_proj"]}
    model = get_peft_model(tiny_llama(), LoraConfig(**options), autocast_adapter_dtype=False)
    randomize(model).to(dtype)
    factors = {pair.name: tuple(f.detach().clone() for f in (pair.B, pair.A)) for pair in find_pairs(model)}
    attach_offset(model, "default", factors)
    return model


def saved_factors(model, pair, folder):
    tensors = load_file(save_adapter(model, folder).path / "adapter_model.safetensors")
    found = {key.split(".lora_")[1][0]: value for key, value in tensors.items() if pair.name in key}
    return found["B"].double(), found["A"].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_much_smaller_than_its_start_keeps_its_digits(tmp_path, dtype):
    model = started_llama(dtype)
    (pair, *_) = find_pairs(model)
    with torch.no_grad():
        for factor in (pair.A, pair.B):
            factor.add_(torch.randn(factor.shape, dtype=dtype), alpha=2**-8)
    (B, A), (B0, A0) = ((f.detach().double() for f in each) for each in ((pair.B, pair.A), pair.offset()))
    exact = B @ A - B0 @ A0
    B_saved, A_saved = saved_factors(model, pair, tmp_path / "out")
    if dtype == torch.float32:  # balanced factors of the difference itself: nothing is left to cancel
        assert B_saved.norm() * A_saved.norm() <= 8**0.5 * exact.norm() * (1 + 1e-6)
        assert_close(B_saved @ A_saved, exact, 1e-6)
    else:  # such factors would have to be rounded; the stack has every bit
        assert torch.equal(B_saved, torch.cat([B, -B0], dim=1))
        assert torch.equal(A_saved, torch.cat([A, A0]))


def test_a_start_that_was_not_trained_is_not_saved_as_zeros(tmp_path):
    model = started_llama(torch.float32)
    (pair, *_) = find_pairs(model)
    B, A = saved_factors(model, pair, tmp_path / "out")
    assert A.any(1).all()
    assert (B @ A).norm() <= 1e-6 * B.norm() * A.norm()


def test_a_rank_for_an_adapter_without_pairs_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(InputError, match=r"this adapter \(IA3\) holds no LoRA pair; got 1"):
        save_adapter(model, tmp_path / "out", rank=1)
