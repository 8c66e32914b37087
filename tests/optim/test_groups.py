"""What is given to an optimizer: which groups become of it, and the sentence where nothing can."""

import pytest
import torch
import transformers
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

import tangora
from tangora import InputError, LoRAPro, ODELoRA, PreconditionedAdamW, TangentAdam, TangentMuon, find_pairs
from tangora.optim.groups import decay_groups
from tests.models import transformer
from tests.optim.problems import OPTIMIZERS, Training, backward, problem, same, trainable
from tests.optim.zoo import ZOO

pytestmark = [
    pytest.mark.messages,
    pytest.mark.filterwarnings("ignore:step .* changes A of", "ignore:.*groups > 1"),
]
every = pytest.mark.parametrize("optimizer", [TangentAdam, ODELoRA])


@pytest.mark.parametrize("make", ZOO, ids=lambda make: make.__name__)
def test_weight_decay_follows_the_trainers_rule(make):
    torch.manual_seed(0)
    model = make().model
    for thaw in (None, "norm", "bias", "embed"):
        for name, parameter in model.named_parameters():
            if thaw and thaw in name and parameter.is_floating_point():
                parameter.requires_grad_(True)
        decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
        groups = decay_groups(model)
        for group in groups:
            for name in group["names"]:
                assert (group.get("weight_decay") == 0.0) == (name not in decayed), name
        listed = [name for group in groups for name in group["names"]]
        assert sorted(listed) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
        assert all(group["params"] for group in groups)


def mixtral():
    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    return transformers.MixtralForCausalLM(config)


NO_PAIR = {
    "experts alone": (
        lambda: get_peft_model(
            mixtral(), LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
        ),
        "target_parameters.*experts.*AdamW",
    ),
    "adalora": (
        lambda: get_peft_model(transformer("llama"), AdaLoraConfig(target_modules=["q_proj"], total_step=10)),
        "AdaLoRA.*q_proj.*AdamW",
    ),
    "grouped convolution": (
        lambda: get_peft_model(
            nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), LoraConfig(r=2, target_modules=["0"])
        ),
        "groups",
    ),
    "loha": (
        lambda: get_peft_model(transformer("llama"), LoHaConfig(target_modules=["q_proj"])),
        "get_peft_model",
    ),
    "ia3": (
        lambda: get_peft_model(
            transformer("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        ),
        "get_peft_model",
    ),
    "prompt tuning": (
        lambda: get_peft_model(
            transformer("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        ),
        "get_peft_model",
    ),
    "base model": (lambda: transformer("llama"), "get_peft_model.*LlamaForCausalLM"),
    "zero-3": (lambda: partitioned(problem()[0]), "ZeRO-3"),
    "fsdp1": (lambda: FullyShardedDataParallel(nn.Linear(2, 2)), "FSDP1"),
}


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's class, which wants a process group: what is inside has lost its pairs."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def partitioned(model):
    """What DeepSpeed ZeRO-3 leaves: parameters without elements."""
    for parameter in model.parameters():
        parameter.ds_id = 1
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return model


@every
@pytest.mark.parametrize("case", NO_PAIR)
def test_models_without_pairs_say_what_they_have(optimizer, case):
    torch.manual_seed(0)
    make, message = NO_PAIR[case]
    with pytest.raises(InputError, match=f"{optimizer.__name__} found no trainable LoRA pair: .*{message}"):
        optimizer(make(), lr=1e-3)


@every
def test_a_merged_file_loaded_for_inference_says_so(optimizer, tmp_path):
    from peft import PeftModel

    torch.manual_seed(0)
    get_peft_model(transformer("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(transformer("llama"), tmp_path)
    with pytest.raises(InputError, match="is_trainable=True"):
        optimizer(loaded, lr=1e-3)


def test_half_frozen_experts_and_plain_pairs_share_an_optimizer():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    model = get_peft_model(mixtral(), config)
    with pytest.warns(UserWarning, match="target_parameters"):
        optimizer = TangentAdam(model, lr=1e-2)
    ids = torch.arange(8).view(1, 8)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["tangent", "odelora-bug"])
def test_layers_that_never_run_are_named_once(name):
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        state_size=4,
        conv_kernel=3,
        use_mambapy=False,
        pad_token_id=0,
    )
    base = transformers.MambaForCausalLM(config)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["in_proj", "dt_proj"]))
    optimizer, ids = OPTIMIZERS[name](model, lr=1e-3), torch.arange(1, 9).view(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.warns(UserWarning, match="1 of 2 LoRA pairs .*dt_proj"):
        optimizer.step()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()  # a second warning would be an error


def test_pairs_have_a_short_repr():
    assert (
        repr(find_pairs(problem()[0])[2]) == "LoraPair('base_model.model.three', adapter='default', r=2, 4x6)"
    )


@pytest.mark.parametrize(
    ("create", "optimizer", "options"),
    [
        (tangora.create_tangent_adam, TangentAdam, {"retraction": "svd"}),
        (tangora.create_lora_pro, LoRAPro, {"moments": "factor"}),
        (tangora.create_preconditioned_adamw, PreconditionedAdamW, {"damping": 1e-2}),
        (tangora.create_ode_lora, ODELoRA, {"scheme": "euler"}),
    ],
)
def test_factories_make_the_optimizer_of_a_model(create, optimizer, options):
    (model, x, y), (twin, _, _) = problem(), problem()
    one, other = create(model, lr=1e-2, **options), optimizer(twin, lr=1e-2, **options)
    assert type(one) is optimizer
    for each, its in ((model, one), (twin, other)):
        backward(each, x, y)
        its.step()
    assert same(trainable(model), trainable(twin))
    with pytest.raises(InputError, match="PEFT model; got list"):
        create(find_pairs(model), lr=1e-2)
    with pytest.raises(InputError, match="lr"):
        create(model, lr=-1.0)


def rates_of_the_rest(optimizer):
    return {group["lr"] for group in optimizer.param_groups if not group.pairs}


def test_everything_outside_pairs_has_the_rate_of_adamw():
    model, x, y = problem()
    pairs, head = find_pairs(model), list(model.base_model.model.head.parameters())
    made = {
        "a model": TangentMuon(model, adamw_lr=1e-5),
        "one group": TangentMuon([{"pairs": pairs, "params": head, "lr": 0.01}], adamw_lr=1e-5),
        "a group added later": TangentMuon(pairs, adamw_lr=1e-5),
    }
    made["a group added later"].add_param_group({"params": head})
    for optimizer in made.values():
        assert rates_of_the_rest(optimizer) == {1e-5}
        assert [len(group.pairs) for group in optimizer.param_groups if group.pairs] == [3]
        before = [p.detach().clone() for p in head]
        backward(model, x, y)
        optimizer.step()
        assert max((p - q).abs().max() for p, q in zip(head, before, strict=True)) < 1.1e-5
    own = TangentMuon([{"pairs": pairs}, {"params": head, "lr": 3e-4}], adamw_lr=1e-5)
    assert rates_of_the_rest(own) == {3e-4}


def test_a_factor_without_its_partner_has_the_rate_of_adamw():
    model, _, _ = problem()
    pairs = find_pairs(model)
    pairs[0].A.requires_grad_(False)
    with pytest.warns(UserWarning, match="AdamW trains the other"):
        optimizer = TangentMuon(pairs, adamw_lr=1e-5)
    assert rates_of_the_rest(optimizer) == {1e-5}
    assert any(
        pairs[0].B is p for group in optimizer.param_groups if not group.pairs for p in group["params"]
    )


def test_a_bad_rate_of_adamw_is_refused_where_nothing_takes_it():
    model, _, _ = problem()
    for bad in (-1.0, float("nan"), "x"):
        with pytest.raises(InputError):
            TangentMuon(find_pairs(model), adamw_lr=bad)


def test_sparse_gradients_are_refused():
    run = Training("tangent-muon")
    run.backward()
    bias = run.model.base_model.model.head.modules_to_save["default"].bias
    bias.grad = bias.grad.to_sparse()
    with pytest.raises(InputError, match="sparse"):
        run.optimizer.step()
