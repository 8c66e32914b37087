"""Models that no file of one adapter describes are refused."""

import pytest
import torch
import torch.distributed as dist
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from torch.distributed.fsdp import fully_shard

from tangora import InputError
from tangora.adapters import initial_factors, load_adapter, merged_model, save_adapter, save_merged
from tests.adapters.models import tiny_llama
from tests.models import randomize
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT"),
]


def lora(*targets):
    return LoraConfig(r=2, target_modules=list(targets or ["q_proj"]))


def prompts():
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


def ia3(*targets):
    return IA3Config(target_modules=list(targets), feedforward_modules=[])


def in_place(first, second, *names):
    """The second adapter over a base whose layers the first one has replaced."""
    base = tiny_llama()
    get_peft_model(base, first, *names[:1])
    return get_peft_model(base, second, *names[1:])


def injected():
    base = tiny_llama()
    inject_adapter_in_model(lora(), base)
    return get_peft_model(base, lora("v_proj"))


WHOLE = {
    "lora-in-lora": lambda: get_peft_model(get_peft_model(tiny_llama(), lora()), lora()),
    "prompts-in-lora": lambda: get_peft_model(get_peft_model(tiny_llama(), prompts()), lora()),
    "lora-in-prompts": lambda: get_peft_model(get_peft_model(tiny_llama(), lora()), prompts()),
}
LAYERS = {
    "same-name": lambda: in_place(lora(), lora("v_proj")),
    "other-kind": lambda: in_place(lora(), ia3("v_proj")),
    "other-kind-same-layer": lambda: in_place(lora(), ia3("q_proj")),
    "lora-over-ia3": lambda: in_place(ia3("q_proj"), lora("q_proj")),
    "prompts-over-layers": lambda: in_place(lora(), prompts()),
    "injected": injected,
}


@pytest.mark.messages
@pytest.mark.parametrize("case", [*WHOLE, *LAYERS])
def test_adapters_under_an_adapter_are_refused(case, tmp_path):
    model = (WHOLE | LAYERS)[case]()
    where = "itself a PeftModel" if case in WHOLE else r"another adapter at .*q_proj"
    for act in (
        lambda: save_adapter(model, tmp_path / "a"),
        lambda: save_merged(model, tmp_path / "a"),
        lambda: merged_model(model),
        lambda: initial_factors(model),
    ):
        with pytest.raises(InputError, match=where):
            act()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.messages
def test_mixed_models_are_refused(tmp_path):
    with pytest.raises(InputError, match="mixed"):
        save_adapter(get_peft_model(tiny_llama(), lora(), mixed=True), tmp_path / "a")


@pytest.mark.parametrize(
    "make",
    [
        lambda: in_place(lora(), lora("v_proj"), "first", "second"),  # PEFT has switched the first one off
        lambda: in_place(prompts(), lora()),
        lambda: get_peft_model(
            tiny_llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
        ),
    ],
)
def test_what_only_looks_like_it_is_saved(make, tmp_path):
    model, ids = randomize(make()), torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert_close(
            load_adapter(tiny_llama(), save_adapter(model, tmp_path / "a"))(ids).logits, expected, 1e-6
        )
        assert_close(merged_model(model)(ids).logits, expected, 1e-5)


# --- sharded models ---


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.messages
def test_factors_of_another_process_are_refused(tmp_path):
    model = get_peft_model(tiny_llama(), lora())
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"]
    layer.weight.ds_id = 0  # as ZeRO-3 marks what it has partitioned
    with pytest.raises(InputError, match=r"q_proj\.lora_B\.default\.weight is sharded"):
        save_adapter(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.messages
def test_plain_factors_over_a_sharded_base_are_saved_and_not_merged(group, tmp_path):
    model = randomize(get_peft_model(tiny_llama(), lora()))
    expected = {key: value.clone() for key, value in model.state_dict().items() if "lora_" in key}
    trained = {parameter for key, parameter in model.named_parameters() if "lora_" in key}
    fully_shard(model, mesh=group, ignored_params=trained)
    loaded = load_adapter(tiny_llama(), save_adapter(model, tmp_path / "a")).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    with pytest.raises(InputError, match=r"embed_tokens\.weight is sharded"):
        merged_model(model)
