"""The examples: scripts run as they are, on a tiny model; configurations train in the packages that read them."""

import runpy
import sys
from pathlib import Path

import pytest
import yaml

import tangora
from tests.integrations import hosts

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")


def run(monkeypatch, path, *arguments):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / path), run_name="__main__")


@pytest.mark.parametrize(
    ("script", "package"), [("trl_sft", "trl"), ("trl_dpo", "trl"), ("unsloth_sft", "unsloth")]
)
def test_a_script_runs(monkeypatch, tmp_path, script, package):
    if package == "trl" and not hosts.has_trl():
        pytest.skip("no trl>=1.16")
    hosts.installed(package)
    base, out = hosts.write_base(tmp_path), tmp_path / "out"
    held = run(
        monkeypatch, f"{script}.py", "--model", base, "--output", out, "--steps", 2, "--learning-rate", 0.01
    )
    trainer = held["trainer"]
    assert trainer.state.global_step == 2
    assert trainer.recipe is tangora.recipe(held["options"].recipe)
    # Unsloth rounds the base to bfloat16
    assert (out / "adapter" / "adapter_config.json").is_file()
    if package == "trl":
        hosts.assert_served(trainer.model, base, out / "adapter")


def read(name):
    return yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))


def test_configurations_name_what_there_is():
    for name in ("axolotl.yaml", "llamafactory.yaml"):
        assert tangora.recipe(read(name)["tangora_recipe"])
    assert read("axolotl.yaml")["plugins"] == ["tangora.integrations.axolotl.TangoraPlugin"]
    from tangora.integrations.llamafactory import OptimConfig

    config = OptimConfig(**read("llamafactory_v1.yaml")["optim_config"])
    assert not tangora.recipe(config.recipe).reads_gradients
    paths = [read("axolotl.yaml")["datasets"][0]["path"], read("llamafactory_v1.yaml")["train_dataset"]]
    paths += [read("data/llamafactory_v1.yaml")["sums"]["path"], read("llamafactory.yaml")["dataset_dir"]]
    assert all((ROOT / path).exists() for path in paths)


def test_axolotl_itself_takes_the_configuration(monkeypatch, tmp_path):
    hosts.installed("axolotl")
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.chdir(ROOT)
    from axolotl.cli.config import load_cfg

    config = read("axolotl.yaml") | {
        "base_model": hosts.write_base(tmp_path),
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "axolotl.yaml"
    path.write_text(yaml.safe_dump(config | {"bf16": False}))
    loaded = load_cfg(str(path))
    assert loaded.tangora_recipe == config["tangora_recipe"]
    assert loaded.lora_mlp_kernel is False


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_llamafactory_itself_trains_by_the_configuration(monkeypatch, tmp_path, version):
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    hosts.installed("llamafactory.train.tuner")
    from tangora.integrations import llamafactory

    monkeypatch.chdir(ROOT)
    base, out = hosts.write_base(tmp_path), tmp_path / "out"
    more = {"max_steps": 1, "output_dir": str(out)}
    if version == "v0":
        config = read("llamafactory.yaml") | more
        config |= {"model_name_or_path": base, "use_cpu": True, "disable_gradient_checkpointing": True}
    else:
        monkeypatch.setenv("USE_V1", "1")
        config = read("llamafactory_v1.yaml") | more | {"model": base, "bf16": False, "batching_workers": 0}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["llamafactory", str(path)])
    llamafactory.main()
    assert (out / "adapter_config.json").is_file()
