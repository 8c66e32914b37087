"""Merging changes the adapted modules alone, in memory and in files, whatever shares their weights."""

import copy

import pytest
import torch
import transformers as hf
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from tangora import InputError
from tangora.adapters import merged_model, save_merged
from tests.adapters.models import tiny_llama
from tests.models import randomize
from tests.sizes import AUDIO_MODEL, BART, CLIP, GPT2, IMAGE_MODEL, SEGFORMER, T5, TEXT_MODEL
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
]
TOKENS = [3, 5, 8, 13]
IDS = torch.tensor([[3, 5, 8, 13, 21, 4], [8, 3, 9, 11, 5, 13]])
TEXT = {"input_ids": IDS}
PAIR = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
SMALL = {"initializer_range": 0.3}
BERT = TEXT_MODEL | SMALL
SEQ2SEQ = BART | {"pad_token_id": 1, "init_std": 0.3}
WHISPER = SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
WHISPER |= {"bos_token_id": 1, "eos_token_id": 1}
SOUND = torch.linspace(-1, 1, 240).view(2, 120).sin()
IMAGE = {"pixel_values": torch.linspace(-1, 1, 768).view(1, 3, 16, 16).sin()}
MODELS = {
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig, SEQ2SEQ, PAIR),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, T5, PAIR),
    "t5-1.1": (hf.T5ForConditionalGeneration, hf.T5Config, T5 | {"tie_word_embeddings": False}, PAIR),
    "umt5": (hf.UMT5ForConditionalGeneration, hf.UMT5Config, T5, PAIR),
    "marian": (hf.MarianMTModel, hf.MarianConfig, SEQ2SEQ, PAIR),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, GPT2 | SMALL, TEXT),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, BERT | {"tie_word_embeddings": True}, TEXT),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, BERT | {"num_key_value_heads": 1, "head_dim": 8}, TEXT),
    "bert": (hf.BertForMaskedLM, hf.BertConfig, BERT, TEXT),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig,
        WHISPER,
        {"input_features": SOUND.flatten()[:128].view(1, 8, 16), "decoder_input_ids": IDS[:1, :4]},
    ),
    "wav2vec2": (hf.Wav2Vec2ForCTC, hf.Wav2Vec2Config, AUDIO_MODEL, {"input_values": SOUND}),
    "clip": (
        hf.CLIPForImageClassification,
        hf.CLIPConfig,
        CLIP | {"num_labels": 2},
        IMAGE,
    ),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig, IMAGE_MODEL, IMAGE),
    "segformer": (hf.SegformerForImageClassification, hf.SegformerConfig, SEGFORMER, IMAGE),
}


def made(name):
    torch.manual_seed(0)
    kind, config, sizes, _ = MODELS[name]
    return kind(config(**sizes)).double().eval()


def logits(model, name):
    with torch.no_grad():
        return model.eval()(**{key: _double(value) for key, value in MODELS[name][3].items()}).logits


def _double(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def trained(base, config):
    torch.manual_seed(1)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    return model


def check(name, model, folder):
    """The merged model, what its tie_weights leaves, and what both of its files load as."""
    expected, kind = logits(model, name), MODELS[name][0]
    merged = merged_model(model)
    assert_close(logits(merged, name), expected, 1e-10)
    save_merged(model, folder / "merged")
    loaded = kind.from_pretrained(folder / "merged", dtype=torch.float64)
    assert_close(logits(loaded, name), expected, 1e-10)
    merged.tie_weights()
    assert_close(logits(merged, name), expected, 1e-10)
    merged.save_pretrained(folder / "own")
    assert_close(logits(kind.from_pretrained(folder / "own", dtype=torch.float64), name), expected, 1e-10)
    assert torch.equal(logits(model, name), expected)
    return loaded


def lora(*targets, **options):
    return LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), **options)


TABLES = {
    **{
        f"{name}-{table}": (name, lora(table))
        for name in ("bart", "t5", "umt5", "marian")
        for table in ("encoder.embed_tokens", "decoder.embed_tokens", "shared", "lm_head", "embed_tokens")
    },
    **{f"{name}-head": (name, lora("lm_head")) for name in ("gpt2", "llama", "gemma")},
    **{f"{name}-table": (name, lora("embed_tokens")) for name in ("llama", "gemma", "whisper")},
    "t5-1.1-table": ("t5-1.1", lora("encoder.embed_tokens")),
    "t5-1.1-layer": ("t5-1.1", lora("q")),
    "gpt2-table": ("gpt2", lora("wte")),
    "bert-table": ("bert", lora("word_embeddings")),
    "bert-head": ("bert", lora("decoder")),
    "whisper-head": ("whisper", lora("proj_out")),
    "whisper-layer": ("whisper", lora("q_proj")),
    "wav2vec2": ("wav2vec2", lora("q_proj", "lm_head")),
    "clip": ("clip", lora("q_proj")),
    "vit": ("vit", lora("q_proj")),
    "segformer": ("segformer", lora("q_proj")),
    "bart-dora": ("bart", lora("encoder.embed_tokens", "q_proj", use_dora=True)),
    "umt5-dora": ("umt5", lora("lm_head", use_dora=True)),
    "bart-tied": ("bart", lora("embed_tokens", ensure_weight_tying=True)),
    "t5-tied": ("t5", lora("shared", "lm_head", ensure_weight_tying=True)),
    "gpt2-tied": ("gpt2", lora("wte", "lm_head", ensure_weight_tying=True)),
    "bart-whole": ("bart", lora("q_proj", modules_to_save=["lm_head"])),
    "umt5-whole": ("umt5", lora("q", modules_to_save=["encoder.embed_tokens"])),
    "llama-whole": ("llama", lora("q_proj", modules_to_save=["embed_tokens"])),
    "bart-tokens": ("bart", lora("q_proj", trainable_token_indices={"encoder.embed_tokens": TOKENS})),
    "t5-tokens": ("t5", lora("q", trainable_token_indices={"decoder.embed_tokens": TOKENS})),
    "marian-tokens": ("marian", lora("q_proj", trainable_token_indices={"lm_head": TOKENS})),
    "gpt2-tokens": ("gpt2", lora("c_attn", trainable_token_indices={"lm_head": TOKENS})),
}
QUICK = (
    "bart-encoder.embed_tokens",
    "t5-lm_head",
    "umt5-lm_head",
    "gpt2-table",
    "whisper-head",
    "wav2vec2",
    "clip",
)
QUICK += ("bart-tokens", "umt5-whole", "bart-tied")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in TABLES]
)
def test_only_the_adapted_module_changes(case, tmp_path):
    name, config = TABLES[case]
    check(name, trained(made(name), copy.deepcopy(config)), tmp_path)


KINDS = {
    "tokens": ("gpt2", TrainableTokensConfig(target_modules=["wte"], token_indices=TOKENS)),
    "tokens-of-all": ("bart", TrainableTokensConfig(target_modules=["shared"], token_indices=TOKENS)),
    "ia3": ("t5", IA3Config(target_modules=["q"], feedforward_modules=[])),
    "oft": ("llama", OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"])),
    "norms": ("llama", LNTuningConfig(target_modules=["norm"])),
    "vera": ("bart", VeraConfig(r=2, target_modules=["q_proj"])),
}


@pytest.mark.parametrize("case", KINDS)
def test_other_kinds_of_adapters_are_merged_too(case, tmp_path):
    name, config = KINDS[case]
    check(name, trained(made(name), copy.deepcopy(config)), tmp_path)


def test_tables_that_stay_equal_stay_tied(tmp_path):
    for case, config in (
        ("layer", lora("c_attn")),
        ("tokens", lora("c_attn", trainable_token_indices={"wte": TOKENS})),
        ("whole", lora("c_attn", modules_to_save=["lm_head"], ensure_weight_tying=True)),
    ):
        loaded = check("gpt2", trained(made("gpt2"), config), tmp_path / case)
        assert loaded.config.tie_word_embeddings
        assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_the_file_says_that_tables_are_untied_where_nothing_else_depends_on_it(tmp_path):
    for name, table, flag in (("gpt2", "wte", False), ("bart", "shared", False), ("umt5", "shared", True)):
        loaded = check(name, trained(made(name), lora(table)), tmp_path / name)
        assert loaded.config.tie_word_embeddings is flag


# --- models that are no transformers ---


class Two(nn.Module):
    """Two layers with one weight, and a third that is the first one once more."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.c = self.a

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("targets", [["a"], ["b"], ["a", "b"]])
@pytest.mark.parametrize("dora", [False, True])
def test_layers_with_one_weight_and_one_layer_at_two_places(targets, dora):
    model = randomize(
        get_peft_model(Two().double(), lora(*targets, use_dora=dora), autocast_adapter_dtype=False)
    )
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)
    expected = model(x)
    merged = merged_model(model)
    assert_close(merged(x).detach(), expected.detach(), 1e-12)
    assert torch.equal(model(x), expected)
    assert model.get_base_model().c is not merged.c


class Attentions(nn.Module):
    """Layers whose parameters PEFT makes anew at every walk."""

    def __init__(self, number):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(number))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


@pytest.mark.parametrize("targets", [["0"], ["0", "5"], ["1", "2", "3", "4"]])
def test_attention_with_unstable_parameters(targets):
    x = torch.linspace(-1, 1, 80, dtype=torch.float64).view(2, 5, 8).sin()
    model = randomize(get_peft_model(Attentions(6).double(), lora(*targets), autocast_adapter_dtype=False))
    expected = model(x).detach()
    for _ in range(10):
        assert_close(merged_model(model)(x).detach(), expected, 1e-12)
        assert_close(model(x).detach(), expected, 1e-12)


# --- what cannot be written ---


class Custom(hf.PreTrainedModel):
    """A model that uses one module at two places, which no file can tell apart."""

    config_class = hf.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(4, 4, bias=config.num_labels == 3)
        self.second = self.first
        self.post_init()

    def _init_weights(self, module):
        pass


@pytest.mark.messages
def test_a_class_that_would_load_another_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="another second"):
        save_merged(trained(Custom(hf.BertConfig()).double(), lora("first")), tmp_path / "out")
    with pytest.raises(InputError, match=r"cannot save this Custom.*second\.bias"):
        save_merged(trained(Custom(hf.BertConfig(num_labels=3)).double(), lora("first")), tmp_path / "out")
    resized = tiny_llama()
    resized.lm_head = nn.Linear(16, 7, bias=False)
    with pytest.raises(InputError, match=r"another lm_head\.weight"):
        save_merged(trained(resized.double(), lora("q_proj")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.messages
def test_prompts_change_no_weights():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(InputError, match="PROMPT_TUNING"):
        merged_model(get_peft_model(tiny_llama(), config))


@pytest.mark.messages
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same", "dilation": 2},
    ],
)
def test_convolutions_that_their_adapters_do_not_follow_are_refused(kind, options):
    model = get_peft_model(nn.Sequential(kind(3, 4, 3, **options)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(InputError, match=r"base_model\.model\.0 has padding mode"):
        merged_model(model)
