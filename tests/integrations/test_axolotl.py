"""The Axolotl plug-in: its options, on a stand-in for the base class; and Axolotl itself where it is installed."""

import importlib
import sys

import pytest
import transformers
import yaml
from pydantic import BaseModel, ValidationError

import tangora
from tangora import InputError
from tangora.init import started_by
from tests.integrations.hosts import (
    RATE,
    assert_served,
    installed,
    sentence,
    stand_in,
    write_base,
    write_rows,
)
from tests.training.trainers import parts

pytestmark = pytest.mark.filterwarnings("ignore")
NAME = "tangora.integrations.axolotl"
CONFIG = {"plugins": [f"{NAME}.TangoraPlugin"], "adapter": "lora", "tangora_recipe": "lora-ga+tangent-muon"}
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


@pytest.fixture
def module(monkeypatch):
    """Import the plug-in on top of a class without anything."""
    stand_in(monkeypatch, axolotl__integrations__base={"BasePlugin": type("BasePlugin", (), {})})
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def test_a_recipe_brings_its_peft_options_and_unfused_layers(module):
    plugin = module.TangoraPlugin()
    cfg = dict(CONFIG)
    plugin.register(cfg)
    assert cfg == CONFIG | dict.fromkeys(KERNELS, False)
    for recipe, options in {
        "tangent": {},
        "rslora": {"peft_use_rslora": True},
        "dora": {"peft_use_dora": True},
    }.items():
        plugin.register(cfg := CONFIG | {"tangora_recipe": recipe})
        assert cfg == CONFIG | {"tangora_recipe": recipe} | options


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tangora_recipe": None}, "needs tangora_recipe"),
        ({"tangora_recipe": "tangnt"}, "did you mean tangent"),
        ({"tangora_lr": 1.0}, "tangora_lr is not an option"),
        ({"optimizer": "muon"}, "optimizer: muon and tangora_recipe both choose"),
        ({"loraplus_lr_ratio": 16.0}, "loraplus_lr_ratio: 16.0 and tangora_recipe"),
        ({"adapter": None}, "needs adapter: lora"),
        ({"tangora_recipe": "full"}, "needs no adapter; got adapter: lora"),
        ({"tangora_recipe": "dora", "peft_use_dora": False}, "needs peft_use_dora: True; got False"),
        ({"lora_qkv_kernel": True}, "needs lora_qkv_kernel: False; got True"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(module, changes, match):
    with pytest.raises(InputError, match=match) as told:
        module.TangoraPlugin().register(CONFIG | changes)
    assert "\n" not in str(told.value)


def test_options_are_a_class_that_axolotl_mixes_into_its_own(module):
    path, _, name = module.TangoraPlugin().get_input_args().rpartition(".")
    assert path == NAME
    mixed = type("AxolotlInputConfig", (type("Base", (BaseModel,), {}), getattr(module, name)), {})
    assert mixed(tangora_recipe="tangent", tangora_head_learning_rate=1e-3).model_dump()
    for wrong in ({"tangora_recipe": "tangnt"}, {"tangora_head_learning_rate": -1}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            mixed(**wrong)


def test_the_trainer_gets_the_recipe_and_axolotls_learning_rate(module, tmp_path):
    plugin, options = module.TangoraPlugin(), parts(tmp_path, learning_rate=5e-5)
    trainer = transformers.Trainer(**options)
    plugin.post_trainer_create({}, trainer)
    assert type(trainer) is transformers.Trainer
    plugin.post_trainer_create({"tangora_recipe": "tangent"}, trainer)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, tangora.TangentAdam)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-5}
    trainer = transformers.Trainer(**parts(tmp_path))
    trainer.args.loraplus_lr_ratio = 16.0  # as Axolotl's arguments have it
    with pytest.raises(InputError, match="loraplus_lr_ratio of"):
        plugin.post_trainer_create({"tangora_recipe": "tangent"}, trainer)


def run_axolotl(monkeypatch, tmp_path, **changes):
    """Train as `axolotl train` does; return base, output and trainer."""
    installed("axolotl")
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    import axolotl.train
    from axolotl.cli.config import load_cfg
    from axolotl.common import datasets

    base, is_dpo = write_base(tmp_path), changes.get("rl") == "dpo"
    texts = [{"text": sentence(number, 6)} for number in range(32)]
    pairs = [
        {"prompt": sentence(n, 3), "chosen": sentence(n + 1, 4), "rejected": sentence(n + 3, 4)}
        for n in range(32)
    ]
    file = write_rows(tmp_path / "data.jsonl", pairs if is_dpo else texts)
    fields = {key: key for key in ("prompt", "chosen", "rejected")}
    formats = {f"field_{key}": key for key in fields} | {f"{key}_format": f"{{{key}}}" for key in fields}
    kind = {"type": formats, "split": "train"} if is_dpo else {"type": "completion"}
    cfg = {
        "base_model": base, "datasets": [{"path": file, "ds_type": "json"} | kind], "dataset_num_proc": 1,
        "dataset_prepared_path": str(tmp_path / "prepared"), "val_set_size": 0, "sequence_len": 32,
        "lora_r": 2, "lora_alpha": 4, "lora_target_linear": True, "micro_batch_size": 4,
        "gradient_accumulation_steps": 1, "max_steps": 3, "learning_rate": RATE, "lr_scheduler": "constant",
        "output_dir": str(tmp_path / "out"), "bf16": False, "fp16": False, "tf32": False, "use_cpu": True,
        "save_strategy": "no", "logging_steps": 1, **CONFIG, **changes,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg))
    made = []
    execute = axolotl.train.execute_training
    monkeypatch.setattr(axolotl.train, "execute_training", lambda c, t, r: (made.append(t), execute(c, t, r)))
    # its files are written by processes that may wait forever beside pytest's threads
    for place in ("axolotl.utils.data.sft", "axolotl.utils.data.rl"):
        monkeypatch.setattr(f"{place}.save_preprocessed_dataset", lambda *_, **__: None, raising=False)
    loaded = load_cfg(str(tmp_path / "config.yaml"))
    load = datasets.load_preference_datasets if is_dpo else datasets.load_datasets
    axolotl.train.train(loaded, load(cfg=loaded))
    return base, tmp_path / "out", made[0]


@pytest.mark.parametrize(
    "changes", [{}, {"sample_packing": True, "attn_implementation": "sdpa"}, {"rl": "dpo"}]
)
def test_axolotl_itself_trains_by_a_recipe(monkeypatch, tmp_path, changes):
    base, out, trainer = run_axolotl(monkeypatch, tmp_path, **changes)
    assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), tangora.TangentMuon)
    assert started_by(trainer.model) == "lora-ga"
    assert trainer.state.global_step == 3
    assert_served(trainer.model, base, out)


def test_axolotl_itself_refuses_what_does_not_fit(monkeypatch, tmp_path):
    for changes in (
        {"tangora_recipe": "tangnt"},
        {"optimizer": "muon"},
        {"tangora_head_learning_rate": -1.0},
    ):
        with pytest.raises(ValueError, match="tang"):
            run_axolotl(monkeypatch, tmp_path, **changes)
