"""Merging changes the adapted modules and nothing else, in memory and in the file."""

import copy

import pytest
import torch
import transformers as T
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from tangora import InputError
from tangora.adapters import load_adapter, merged_model, save_adapter, save_merged
from tests.adapters.tied import (
    SHARING,
    TABLES,
    TOKENS,
    WITHOUT_EMBEDDINGS,
    assert_same,
    made,
    output,
    trained,
)

pytestmark = [
    # PEFT warns of tied weights, and transformers of files whose tables differ although their class ties them
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:.*tied.*"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
]
ATTENTION = ["q_proj", "q", "query", "c_attn"]
KINDS = {
    "lora": lambda table: LoraConfig(r=2, lora_alpha=4, target_modules=[table]),
    "dora": lambda table: LoraConfig(r=2, lora_alpha=4, target_modules=[table], use_dora=True),
    "trainable-tokens": lambda table: LoraConfig(
        r=2, target_modules=list(ATTENTION), trainable_token_indices={table: TOKENS}
    ),
    "modules-to-save": lambda table: LoraConfig(r=2, target_modules=list(ATTENTION), modules_to_save=[table]),
}
TIED = [(name, table, kind) for name in SHARING for table in TABLES[name] for kind in KINDS if kind != "dora"]
TIED += [("llama", "embed_tokens", "dora"), ("bart", "lm_head", "dora")]


@pytest.mark.parametrize(("name", "table", "kind"), TIED)
def test_a_shared_table(name, table, kind, tmp_path):
    model = trained(get_peft_model(made(name), KINDS[kind](table)))
    before = output(model)
    merged = merged_model(model)
    assert_same(output(merged), before)
    save_merged(model, tmp_path / "merged")
    assert_same(output(type(merged).from_pretrained(tmp_path / "merged")), before)
    assert torch.equal(output(model), before)  # the given model is as it was
    with model.disable_adapter():
        assert torch.equal(output(model), output(made(name)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_decoders_say_in_their_config_that_the_head_is_its_own(name, tmp_path):
    model = trained(get_peft_model(made(name), KINDS["lora"](TABLES[name][0])))
    save_merged(model, tmp_path / "merged")
    assert not T.AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings
    plain = trained(get_peft_model(made(name), LoraConfig(r=2, target_modules=ATTENTION)))
    save_merged(plain, tmp_path / "plain")
    assert T.AutoConfig.from_pretrained(tmp_path / "plain").tie_word_embeddings


class Shared(nn.Module):
    """A weight in two modules, a module under two names, or both."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        if kind == "weight":
            self.b.weight = self.a.weight
        elif kind == "module":
            self.b = self.a
        elif kind == "all":
            self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("kind", ["weight", "module", "all"])
@pytest.mark.parametrize("targets", [["a"], ["b"], ["a", "b"]])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_linear_layers_that_share_a_weight(kind, targets, options):
    if kind == "module":
        targets = ["a"]  # PEFT sees a module once
    model = trained(get_peft_model(Shared(kind), LoraConfig(r=2, target_modules=targets, **options)))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    before = model(x)
    assert_same(merged_model(model)(x), before)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", WITHOUT_EMBEDDINGS)
def test_models_without_input_embeddings(name, tmp_path):
    make, shapes = WITHOUT_EMBEDDINGS[name]
    torch.manual_seed(0)
    model = make().eval()
    inputs = {key: torch.randn(*shape) for key, shape in shapes.items()}
    layer = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "classifier" not in n)
    model = trained(get_peft_model(model, LoraConfig(r=2, target_modules=[layer])))
    before = output(model, inputs)
    merged = merged_model(model)
    assert_same(output(merged, inputs), before)
    save_merged(model, tmp_path / "merged")
    assert_same(output(type(merged).from_pretrained(tmp_path / "merged"), inputs), before)


class Attentions(nn.Module):
    """Layers whose parameters PEFT makes anew whenever they are listed."""

    def __init__(self, bias):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(8, 2, batch_first=True, bias=bias) for _ in range(6)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("targets", [["0"], ["0", "5"], ["0", "1", "2", "3"]])
def test_multihead_attention(bias, targets):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
    for _ in range(8):  # which memory is given out again is a matter of chance
        model = trained(get_peft_model(Attentions(bias), LoraConfig(r=2, target_modules=targets)))
        before = model(x)
        assert_same(merged_model(model)(x), before)
        assert_same(copy.deepcopy(model).merge_and_unload(safe_merge=True)(x), before)


@pytest.mark.parametrize("name", ["gpt2", "bart", "t5", "umt5", "marian", "llama", "gemma2", "opt"])
def test_adapters_that_peft_ties(name, tmp_path):
    for table in TABLES[name]:
        config = LoraConfig(r=2, lora_alpha=4, target_modules=[table], ensure_weight_tying=True)
        try:
            model = trained(get_peft_model(made(name), config))
        except (
            NoMatchingPeftModuleError
        ):  # PEFT finds nothing to adapt where a tied table is targeted by its other name
            continue
        before = output(model)
        save_adapter(model, tmp_path / table)
        for load in (load_adapter, PeftModel.from_pretrained):
            assert_same(output(load(made(name), tmp_path / table)), before)
        assert_same(output(merged_model(model)), before)


@pytest.mark.messages
def test_a_peft_model_inside_another_is_refused(tmp_path):
    def lora(base, *targets):
        return get_peft_model(base, LoraConfig(r=2, target_modules=list(targets)))

    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for model in (
        lora(lora(made("llama"), "q_proj"), "q_proj"),
        lora(lora(made("llama"), "q_proj"), "v_proj"),
        lora(get_peft_model(made("llama"), prompts), "q_proj"),
    ):
        for write in (save_adapter, save_merged, lambda each, _: merged_model(each)):
            with pytest.raises(InputError, match=r"base_model\.model is a PeftModel"):
                write(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_wrapped_models(name, tmp_path):
    model = trained(get_peft_model(made(name), LoraConfig(r=2, target_modules=["q_proj"])))
    before = output(model)
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert_same(output(merged_model(wrapped)), before)
        save_adapter(wrapped, tmp_path / "adapter")
        save_merged(wrapped, tmp_path / "merged")
        assert_same(output(load_adapter(made(name), tmp_path / "adapter")), before)


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
