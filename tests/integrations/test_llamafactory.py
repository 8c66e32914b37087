"""LLaMA-Factory by a recipe: options, on stand-ins for its modules; and both its versions where they are installed."""

import json
import sys

import pytest
import torch
import transformers
import yaml

import tangora
from tangora import InputError
from tangora.adapters import has_offset
from tangora.init import started_by
from tangora.integrations import llamafactory
from tests.integrations.hosts import (
    RATE,
    assert_served,
    installed,
    sentence,
    stand_in,
    write_base,
    write_rows,
)
from tests.training.trainers import assert_equal, parts, weights, with_lora

pytestmark = pytest.mark.filterwarnings("ignore")
GIVEN = {"tangora_recipe": "tangent", "learning_rate": RATE}


class Theirs(transformers.Trainer):
    """What LLaMA-Factory v0 has of its own."""


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Put stand-ins in the place of v0; return what was trained, by options."""
    found = []

    def run_exp(args, callbacks=None):
        # looked up when it is called, as v0's workflows do
        trainer = sys.modules["llamafactory.train.sft.workflow"].CustomSeq2SeqTrainer(**parts(tmp_path))
        found.append((args, trainer))
        trainer.train()

    stand_in(
        monkeypatch,
        llamafactory__hparams={"read_args": lambda args: args},
        llamafactory__train__tuner={"run_exp": run_exp},
        llamafactory__train__sft__workflow={"CustomSeq2SeqTrainer": Theirs},
    )
    return found


def test_the_trainer_of_a_stage_trains_by_the_recipe_and_only_then(trained):
    given = dict(GIVEN)
    llamafactory.train(given)
    assert given == GIVEN
    ((args, trainer),) = trained
    assert args == {"learning_rate": RATE}
    assert isinstance(trainer, Theirs)
    assert isinstance(trainer.optimizer.optimizer, tangora.TangentAdam)
    assert sys.modules["llamafactory.train.sft.workflow"].CustomSeq2SeqTrainer is Theirs


def test_a_recipe_brings_its_peft_options(trained):
    with pytest.raises(
        InputError, match="needs an adapter with use_dora=True"
    ):  # the stand-in ignores the option
        llamafactory.train(GIVEN | {"tangora_recipe": "dora"})
    with pytest.raises(InputError, match="needs use_dora: True; got False"):
        llamafactory.train(GIVEN | {"tangora_recipe": "dora", "use_dora": False})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tangora_recipe": None}, "tangora_recipe is missing"),
        ({"tangora_recipe": "tangnt"}, "did you mean tangent"),
        ({"tangora_lr": 1}, "tangora_lr is not an option"),
        ({"stage": "ppo"}, "stage must be one of pt, sft, rm, dpo, kto with a recipe; got ppo"),
        ({"use_mca": True}, "use_mca does not use the trainer"),
        ({"finetuning_type": "oft"}, "does not fit finetuning_type oft"),
        ({"tangora_recipe": "full"}, "full does not fit finetuning_type lora"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(trained, changes, match):
    with pytest.raises(InputError, match=match) as told:
        llamafactory.train(GIVEN | changes)
    assert "\n" not in str(told.value)
    assert not trained


def test_engines_chosen_by_the_environment_are_refused(trained, monkeypatch):
    monkeypatch.setenv("USE_RAY", "1")
    with pytest.raises(InputError, match="use_ray does not use the trainer"):
        llamafactory.train(GIVEN)


@pytest.mark.parametrize("version", ["0", "1"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a YAML file"),
        (["none.yaml"], "there is no file none.yaml"),
        (["run.yaml"], "LLaMA-Factory is not installed; run: pip install llamafactory"),
    ],
)
def test_the_command_ends_with_one_line(monkeypatch, tmp_path, capsys, version, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(GIVEN))
    monkeypatch.setenv("USE_V1", version)
    monkeypatch.setattr(sys, "argv", ["llamafactory", *arguments])
    monkeypatch.setattr(llamafactory, "import_module", missing)
    with pytest.raises(SystemExit) as ended:
        llamafactory.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1


def missing(name):
    raise ModuleNotFoundError(name=name)


CONFIG = {"name": "tangora", "recipe": "orthogonal+tangent", "lr": "1e-2", "weight_decay": 0.1}


def test_v1_makes_the_optimizer_and_the_initialization(tmp_path):
    model, other = with_lora(), with_lora()
    other.load_state_dict(model.state_dict())
    optimizer = llamafactory._optimizer(model, CONFIG | {"seed": 3})
    assert isinstance(optimizer, tangora.TangentAdam)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    assert started_by(model) == "orthogonal"
    tangora.recipe("orthogonal+tangent").initialize(other, seed=3)
    assert_equal(weights(model), weights(other))
    heads = llamafactory._optimizer(with_lora(), CONFIG | {"recipe": "tangent", "head_lr": 1e-4})
    assert {group["lr"] for group in heads.param_groups} == {1e-2, 1e-4}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lr": None}, "optim_config.lr: input should be a valid number"),
        ({"lr": 0}, "optim_config.lr: input should be greater than 0"),
        ({"beta": 0.9}, "optim_config.beta: extra inputs are not permitted; it takes name, recipe, lr"),
        ({"recipe": "tangnt"}, "did you mean tangent"),
        ({"recipe": "lora-ga+tangent"}, "gives its optimizers no data"),
        ({"recipe": "odelora-heun"}, "several gradients per step"),
        ({"recipe": "dora"}, "use_dora=True"),
    ],
)
def test_v1_refuses_what_does_not_fit(changes, match):
    with pytest.raises(InputError, match=match):
        llamafactory._optimizer(with_lora(), CONFIG | changes)


def test_v1_needs_an_adapter():
    with pytest.raises(InputError, match="Linear has none"):
        llamafactory._optimizer(torch.nn.Linear(2, 2), CONFIG)


def instructions(stage):
    answers = {"dpo": ("chosen", "rejected")}.get(stage, ("output",))
    return [
        {"instruction": sentence(number, 3), "input": ""}
        | {key: sentence(number + 2 + index, 4) for index, key in enumerate(answers)}
        for number in range(32)
    ]


@pytest.mark.parametrize(
    ("stage", "recipe"), [("sft", "lora-ga+tangent-muon"), ("dpo", "orthogonal+tangent")]
)
def test_v0_itself_trains_by_a_recipe(monkeypatch, tmp_path, stage, recipe):
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    installed("llamafactory.train.tuner")
    base = write_base(tmp_path)
    (tmp_path / "data.json").write_text(json.dumps(instructions(stage)))
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    info = {"file_name": "data.json"} | ({"ranking": True, "columns": columns} if stage == "dpo" else {})
    (tmp_path / "dataset_info.json").write_text(json.dumps({"tiny": info}))
    config = {
        "model_name_or_path": base, "stage": stage, "do_train": True, "finetuning_type": "lora", "lora_rank": 2,
        "lora_target": "all", "dataset": "tiny", "dataset_dir": str(tmp_path), "template": "default",
        "cutoff_len": 64, "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "max_steps": 3,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "disable_gradient_checkpointing": True, "tangora_recipe": recipe,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    made = []
    apply = tangora.apply_recipe
    monkeypatch.setattr(tangora, "apply_recipe", lambda *a, **k: made.append(apply(*a, **k)) or made[-1])
    monkeypatch.setattr(sys, "argv", ["llamafactory", str(tmp_path / "config.yaml")])
    llamafactory.main()
    (trainer,) = made
    assert started_by(trainer.model) == tangora.recipe(recipe).start
    assert trainer.state.global_step == 3
    assert_served(trainer.model, base, tmp_path / "out")


def run_v1(monkeypatch, tmp_path, base, out, **changes):
    from llamafactory.v1.trainers import sft_trainer

    rows = [
        {"messages": [
            {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": float(role == "assistant")}
            for role, text in (("user", sentence(number, 3)), ("assistant", sentence(number + 2, 4)))
        ]}
        for number in range(16)
    ]  # fmt: skip
    config = {
        "model": base, "template": "chatml", "train_dataset": write_rows(tmp_path / "rows.jsonl", rows),
        "peft_config": {"name": "lora", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0}, "output_dir": str(out),
        "micro_batch_size": 4, "cutoff_len": 64, "max_steps": 4, "bf16": False, "batching_workers": 0,
        "enable_activation_checkpointing": False, "optim_config": dict(CONFIG), "learning_rate": RATE,
    } | changes  # fmt: skip
    (tmp_path / "v1.yaml").write_text(yaml.safe_dump(config))
    made = []
    fit = sft_trainer.SFTTrainer.fit
    monkeypatch.setattr(
        sft_trainer.SFTTrainer, "fit", lambda self: (made.append((self, self.global_step)), fit(self))
    )
    monkeypatch.setattr(sys, "argv", ["llamafactory", str(tmp_path / "v1.yaml")])
    monkeypatch.setenv("USE_V1", "1")
    llamafactory.main()
    return made[0]


def test_v1_itself_trains_by_a_recipe_and_resumes(monkeypatch, tmp_path):
    installed("llamafactory.v1.trainers.sft_trainer")
    base = write_base(tmp_path)
    whole, _ = run_v1(monkeypatch, tmp_path, base, tmp_path / "out", save_steps=2)
    assert isinstance(whole.optimizer, tangora.TangentAdam)
    assert has_offset(whole.model, "default")
    assert_served(whole.model, base, tmp_path / "out")
    again = {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2")}
    resumed, begun = run_v1(monkeypatch, tmp_path, base, tmp_path / "resumed", **again)
    assert begun == 2
    assert_equal(weights(whole.model), weights(resumed.model))
