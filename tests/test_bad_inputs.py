"""Hundreds of bad inputs: each ends with exit code 2 and one line, and leaves every file as it was.

The cases are generated from lists of bad values, files and folders, each given to every command that could meet it, and
from pairs of them drawn with a fixed seed. ``{name}`` stands for a file or folder of `world`.
"""

import itertools
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from tangora import cli
from tangora.experiments.diagnose_task import diagnose_task
from tangora.experiments.measurement_settings import DiagnoseSettings
from tangora.experiments.settings import RunSettings
from tangora.experiments.train import train
from tests.experiments.small import after_step, ctrl_c, write_classifier, write_generator
from tests.models import tiny_bert, tiny_tokenizer

pytestmark = [
    pytest.mark.messages,
    pytest.mark.filterwarnings("ignore"),
]

SIZES = ["--num-train=40", "--num-validation=10", "--num-test=10"]
QUICK = ["--steps=2", "--batch-size=4", "--rank=2"]
DATA = ["--model={model}", "--data={data}"]
SWEEP = ["--recipes=lora,tangent", "--learning-rates=1e-3", "--seeds=0"]
COMMANDS = {
    "train": ["train", *DATA, *SIZES, *QUICK],
    "compare": ["compare", *DATA, *SIZES, *QUICK, *SWEEP],
    "diagnose": ["diagnose", *DATA, *SIZES, "--num-examples=4", "--num-held-out=4", "--rank=2"],
    "curvature": ["curvature", "{model}", "--data={data}", *SIZES, "--num-examples=4"],
}
CAUSAL = ["--model={generator}", "--data={sums}", "--num-train=40", "--num-validation=10", "--num-test=10"]


def numbers():
    """Numbers out of range, that are none, or that no tensor holds."""
    whole = ["0", "-1", "99999999999999999999"]
    real = ["-1", "nan", "inf", "-inf", "1e300"]
    flags = {
        "train": (
            "steps batch-size accumulate rank num-train num-validation save-every",
            "learning-rate alpha weight-decay clip head-learning-rate warmup epochs lora-dropout",
        ),
        "compare": ("steps rank sweep-seeds halving jobs", "alpha clip max-hours max-memory"),
        "diagnose": ("num-examples rank budget-rank batch-size", "alpha"),
        "curvature": ("num-examples batch-size top probes landscape-points", "radius tolerance"),
    }
    for command, (wholes, reals) in flags.items():
        for flag, value in [
            *itertools.product(wholes.split(), whole),
            *itertools.product(reals.split(), real),
        ]:
            if (flag, value) in {("jobs", whole[-1]), ("save-every", whole[-1])}:
                continue
            yield command, [f"--{flag}={value}"]
    for command, value in itertools.product(COMMANDS, ["1.5", "many", ""]):  # for every flag the same
        yield command, [f"--rank={value}" if command != "curvature" else f"--top={value}"]
        yield command, [f"--alpha={value}x" if command != "curvature" else f"--radius={value}x"]
    for command, value in itertools.product(
        COMMANDS, ["-1", "4294967296", "99999999999999999999", "one", "0.5"]
    ):
        yield command, [f"--{'seeds' if command == 'compare' else 'seed'}={value}"]


def lists():
    """Lists with something twice, nothing, or what is none of it; names that there are not."""
    for value in ("lora,lora", "lora,lorra", "", ",", "lora,", "tangent@gauge=none", "lora@", "lora@rank=3"):
        yield "compare", [f"--recipes={value}"]
        if value != "lora,lora":
            yield "train", [f"--recipe={value}"]
    for value in ("0,0", "0,-1", "0,a", "", "0,,1", "0,4294967296"):
        yield "compare", [f"--seeds={value}"]
    for value in ("1e-3,1e-3", "1e-3,0.001", "nan", "1e-3,inf", "0", "-1e-3", "", "a,b", "1e-3,1.0000001e-3"):
        yield "compare", [f"--learning-rates={value}"]
    targets = "nothing q_proj,v_proj query,q_proj query, [ ( LayerNorm encoder .* classifier"
    for value in (*targets.split(), ""):
        for command in ("train", "compare", "diagnose"):
            yield command, [f"--target-modules={value}"]
    for value in ("orthogonl", "", "pissa,pissb"):
        yield "diagnose", [f"--starts={value}"]
    for value in ("tangnt", "", "factors", "tangent"):
        yield "curvature", [f"--over={value}"]
    for value in ("nothing", "*.layers.77.*", ""):
        yield "curvature", [f"--layers={value}"]


EITHER = """
--rank=1000
--exact-match
--forgetting
--curvature --curvature-layers=nothing
--curvature-layers=*
--start-examples=100000
--measure-every=1 --measure-gradient=100000
--measure-gradient=4
--curvature --curvature-examples=100000
--num-test=100000
--num-train=100000
--text-column=nowhere
--label-column=nowhere
--kind=causal
--kind=regression
--dtype=float8
--schedule=stairs
--report-to=nobody
--device=tpu
--stepz=3
--steps
--curvature=3
more
--epochs=1 --steps=2
--rank-plan={nowhere}
--rank-plan={data}
--rank-plan={broken_plan}
"""
OTHERS = """
train --recipe=full --dtype=bfloat16
train --recipe=full --rank-plan={plan}
train --reference={run}
train --measure-every=1 --reference={run}
train --measure-every=1 --reference={nowhere}
compare --judge-by=exact_match
compare --sweep-seeds=5
compare --halving=2 --extend=1
compare --tasks=one
compare --preset=nothing
diagnose --num-examples=1000
diagnose --num-held-out=1000
diagnose --rank=1000
curvature --num-examples=100000
curvature --per-batch --num-examples=4 --batch-size=8
curvature --split=all
"""


def what_cannot_work():
    """What could be found out only after the work, or would have no effect."""
    for command, line in itertools.product(("train", "compare"), EITHER.strip().splitlines()):
        yield command, line.split()
    for command in ("train", "compare"):
        yield command, [*CAUSAL, "--head-learning-rate=1e-3"]
    for line in OTHERS.strip().splitlines():
        command, *arguments = line.split()
        yield command, arguments


def files():
    """Models, adapters, data and settings that are not there, damaged, or something else."""
    places = "{nowhere} {data} {empty_folder} {no_weights} {cut_weights} {bad_config} {adapter} {pipe} a/b/c"
    models = [*places.split(), "~no-such-user/model", "x" * 5000, ""]
    for command, model in itertools.product(("train", "compare", "diagnose"), models):
        yield command, [f"--model={model}"]
    for name in (*CONFIGS, "folder_weights", "loop_weights", "pickled_junk"):
        yield "train", [f"--model={{{name}}}"]
    places = (
        "{nowhere} {empty} {header} {broken_json} {binary} {one_class} {empty_folder} {pipe} {texts_pipe}"
    )
    more = "{texts_folder} {texts_dangling} {empty_first_line} ~no-such-user/x.csv ./x.parquet"
    for command, data in itertools.product(
        COMMANDS, [*places.split(), *more.split(), "x" * 5000 + ".csv", ""]
    ):
        yield command, [f"--data={data}"]
    for command in ("train", "compare"):
        for data in ("nowhere", "broken_json"):
            yield command, [f"--test-data={{{data}}}"]
    adapters = (
        "nowhere empty_folder no_adapter_weights cut_adapter bad_adapter wide_adapter other_base huge_adapter"
    )
    for adapter in [*adapters.split(), "pattern_adapter"]:
        yield "diagnose", [f"--adapter={{{adapter}}}"]
        yield "curvature", [f"--adapter={{{adapter}}}"]
    for command, name in itertools.product(COMMANDS, YAML):
        yield command, [f"--config={{{name}}}"]
    for command, name in itertools.product(COMMANDS, ("nowhere", "empty_folder", "binary", "cut_weights")):
        yield command, [f"--config={{{name}}}"]


CONFIGS = {
    "config_text": {"hidden_size": "x"},
    "config_zero": {"num_attention_heads": 0},
    "config_huge": {"vocab_size": 10**10},
    "config_dtype": {"dtype": "float7"},
    "config_quantized": {"quantization_config": {"quant_method": "awq"}},
    "config_quantization": {"quantization_config": 3},
    "config_pad": {"pad_token_id": 9999},
    "config_unknown": {"model_type": "foobar"},
    "config_activation": {"hidden_act": "nope"},
}
"""What stands in a model's config.json in place of what is right."""


YAML = {
    "yaml_boolean": "max_length: true\n",
    "yaml_unknown": "stepz: 3\n",
    "yaml_list": "- 1\n- 2\n",
    "yaml_text": "steps\n",
    "yaml_open": "steps: [1\n",
    "yaml_number_key": "1: 2\n",
    "yaml_null_key": "null: 2\n",
    "yaml_mapping": "max_length: {a: 1}\n",
    "yaml_word": "max_length: many\n",
    "yaml_date": "max_length: 2024-13-45\n",
    "yaml_inf": "max_length: .inf\n",
    "yaml_tag": "max_length: !!python/object:os.system {}\n",
    "yaml_tab": "max_length:\t- 1\n\t- 2\n",
    "yaml_control": "max_length: \x01\n",
    "yaml_empty": "",
    "yaml_twice": "max_length: 16\nmax_length: 17\n",
    "yaml_huge": "max_length: 999999999999999999999999\n",
}


_PLACES = """{data} {data}/x /proc/nothing/x /proc/x /sys/x /dev/null /dev/null/x {foreign} {dangling} {link_to_file}
{long_name} {bad_settings} {empty_settings} {list_settings} . {model}"""
OUTPUTS = [*_PLACES.split(), ""]
OF = {"train": "run", "compare": "comparison", "diagnose": "diagnosis"}


def outputs():
    """Places where nothing can be written, or that belong to something else."""
    for command, output in itertools.product(COMMANDS, OUTPUTS):
        yield command, [f"--output={output}"]
    for command, (owner, folder) in itertools.product(COMMANDS, OF.items()):
        yield command, [f"--output={{{folder}}}", *([] if command != owner else ["--num-test=11"])]
    yield "train", ["--output={run}", "--data={changed}"]
    for name in ("checkpoint_adapter", "checkpoint_state", "checkpoint_optimizer", "metrics"):
        yield "train", [f"--output={{cut_{name}}}", "--recipe=lora", "--save-every=1"]
    yield "train", ["--data={texts}", "--output={texts}/out"]


def other_commands():
    """Runs, folders and experiments of the commands that take few settings."""
    whole = "nowhere data empty_folder foreign comparison diagnosis full_run bad_settings"
    damaged = "bad_config cut no_weights bad_settings list_settings other_base not_finite bad_tokenizer pipe"
    runs = [*whole.split(), *(f"run_{how}" for how in damaged.split())]
    for run in runs:
        yield "export", [f"{{{run}}}", "--output={out}"]
        yield "export", [f"{{{run}}}", "--merge", "--output={out}"]
    for run in ("nowhere", "foreign", "run_bad_config", "run_cut", "run_no_weights", "run_bad_settings"):
        yield "curvature-run", [f"{{{run}}}", "--output={out}"]
    yield "curvature-run", ["{run}", "--adapter={adapter}", "--output={out}"]
    for output in (*OUTPUTS, "{adapter}", "{run}", "{empty_folder}/../run/adapter"):
        yield "export", ["{run}", f"--output={output}"]
        yield "export", ["{run}", "--rank=1", f"--output={output}"]
    for rank in ("0", "-1", "x", "1.5"):
        yield "export", ["{run}", f"--rank={rank}", "--output={out}"]
    folders = "nowhere data empty_folder foreign run bad_comparison mixed bad_records diagnosis"
    for folder in folders.split():
        yield "report", [f"{{{folder}}}"]


def plans():
    """Plans of several tasks, one of which is wrong."""
    for name, folder in itertools.product(PLANS, ("{out}",)):
        yield "plan", [f"{{{name}}}", f"--output={folder}"]
    for output in (*OUTPUTS, "{run}", "{comparison}"):
        yield "plan", ["{plan_good}", f"--output={output}"]


PLANS = {
    "plan_targets": "tasks: {a: {}, b: {target_modules: nothing}}",
    "plan_rank": "tasks: {a: {}, b: {rank: 1000}}",
    "plan_rates": "tasks: {a: {}, b: {learning_rates: {lora: [.nan]}}}",
    "plan_rates_true": "tasks: {a: {}, b: {learning_rates: {lora: [true]}}}",
    "plan_seeds": "tasks: {a: {}, b: {seeds: [-1]}}",
    "plan_seeds_true": "tasks: {a: {}, b: {seeds: [true]}}",
    "plan_data": "tasks: {a: {}, b: {data: ./nowhere.csv}}",
    "plan_size": "tasks: {a: {}, b: {num_test: 100000}}",
    "plan_recipe": "tasks: {a: {}, b: {recipes: [lora, lorra]}}",
    "plan_option": "tasks: {a: {}, b: {exact_match: true}}",
    "plan_names": "tasks: {a: {}, ../b: {}}",
    "plan_list": "tasks: [a, b]",
    "plan_none": "tasks: {}",
    "plan_twice": "tasks: {a: {}, a: {steps: 3}}",
    "plan_file": "tasks: {report.html: {}}",
    "plan_ranks": "tasks: {a: {rank_plan: {a: 1}}}",
    "plan_empty": "tasks: {a: 1}",
}


def drawn(count):
    """Draw pairs of bad inputs for one command."""
    singles = {}
    for command, arguments in [*numbers(), *lists(), *what_cannot_work(), *files()]:
        singles.setdefault(command, []).append(arguments)
    draw = random.Random(17)
    for _ in range(count):
        command = draw.choice(sorted(singles))
        one, other = draw.sample(singles[command], 2)
        yield command, [*one, *other]


CASES = [
    *numbers(),
    *lists(),
    *what_cannot_work(),
    *files(),
    *outputs(),
    *other_commands(),
    *plans(),
    *drawn(60),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Everything that cases name, in one folder."""
    root = tmp_path_factory.mktemp("world")
    small = write_classifier(root)
    settings = {**small, "num_train": 40, "num_validation": 10, "num_test": 10, "steps": 2, "batch_size": 4}
    places = {"root": root, "model": root / "model", "data": root / "data.jsonl", "out": root / "out"}
    train_in_part(RunSettings(**settings, recipe="lora", save_every=1), root / "part")
    for name, recipe in (("run", "lora"), ("full_run", "full")):
        train(RunSettings(**settings, recipe=recipe), root / name)
    sizes = {key: settings[key] for key in ("model", "data", "num_train", "num_validation", "num_test")}
    diagnose_task(DiagnoseSettings(**sizes, num_examples=4, num_held_out=4, rank=2), root / "diagnosis")
    (root / "causal").mkdir()
    write_generator(root / "causal")
    places |= {"generator": root / "causal" / "model", "sums": root / "causal" / "sums.jsonl"}
    _write_comparison(root, settings)
    _write_damaged(root)
    _write_damaged_models(root)
    _write_texts(root, settings)
    names = [path.name for path in root.iterdir()]
    places |= {name.partition(".")[0]: root / name for name in names if name.partition(".")[0] not in places}
    places |= {"nowhere": root / "nowhere" / "at-all.csv", "adapter": root / "run" / "adapter"}
    names = {name: str(path) for name, path in places.items()} | {"long_name": str(root / ("x" * 300))}
    return SimpleNamespace(root=root, names=names, contents=contents(root))


def train_in_part(settings, folder):
    with pytest.raises(KeyboardInterrupt):
        train(settings, folder, progress=after_step(2, ctrl_c))


def _write_comparison(root, settings):
    # as two runs of `tangora compare` leave it
    record = json.loads((root / "run" / "record.json").read_text())
    shared = {
        "title": "one",
        "command": "x",
        "metric": "accuracy",
        "higher_is_better": True,
        "settings": {},
        "created": "2026-01-01T00:00:00",
    }
    for name, prints in (
        ("comparison", "aa"),
        ("mixed", "ab"),
        ("bad_records", "aa"),
        ("bad_comparison", "aa"),
    ):
        folder = root / name
        (folder / "records").mkdir(parents=True)
        kept = {"recipes": ["lora"], "seeds": [0, 1], "learning_rates": {}} | settings
        (folder / "settings.json").write_text(json.dumps(kept))
        (folder / "comparison.json").write_text(json.dumps({"schema_version": 3} | shared))
        for seed, letter in enumerate(prints):
            own = {"id": f"lora-{seed}", "seed": seed, "settings": {"data_fingerprint": letter * 64}}
            (folder / "records" / f"lora-{seed}.json").write_text(json.dumps(record | own))
    (root / "bad_records" / "records" / "lora-0.json").write_text('{"schema_version": 3, "id"')
    (root / "bad_comparison" / "comparison.json").write_text("[]")


def _write_damaged(root):
    checkpoint = Path("checkpoints", "checkpoint-1")
    for name, path in {
        "cut_checkpoint_adapter": checkpoint / "adapter_model.safetensors",
        "cut_checkpoint_state": checkpoint / "trainer_state.json",
        "cut_checkpoint_optimizer": checkpoint / "optimizer.pt",
        "cut_metrics": Path("metrics.jsonl"),
    }.items():
        shutil.copytree(root / "part", root / name)
        (root / name / path).write_text("{\n{\n")
    for how in ("bad_config", "cut", "no_weights", "bad_settings", "list_settings", "other_base"):
        shutil.copytree(root / "run", root / f"run_{how}")
    for name, run in (
        ("bad_adapter", "run_bad_config"),
        ("cut_adapter", "run_cut"),
        ("no_adapter_weights", "run_no_weights"),
    ):
        folder = root / run / "adapter"
        if "config" in run:
            (folder / "adapter_config.json").write_text('{"peft_type": "LO')
        elif "cut" in run:
            _cut(folder / "adapter_model.safetensors")
        else:
            (folder / "adapter_model.safetensors").unlink()
        shutil.copytree(folder, root / name)
    (root / "run_bad_settings" / "settings.json").write_text("{")
    (root / "run_list_settings" / "settings.json").write_text("[1]")
    for name, change in (
        ("other_base", {"target_modules": ["q_proj"]}),
        ("wide_adapter", {"r": 3}),
        ("huge_adapter", {"r": 10**10}),
        ("pattern_adapter", {"target_modules": "("}),
    ):
        shutil.copytree(root / "run" / "adapter", root / name)
        path = root / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    shutil.copy(root / "other_base" / "adapter_config.json", root / "run_other_base" / "adapter")
    _write_damaged_runs(root)
    for name in ("no_weights", "cut_weights", "bad_config"):
        shutil.copytree(root / "model", root / name)
    (root / "no_weights" / "model.safetensors").unlink()
    _cut(root / "cut_weights" / "model.safetensors")
    (root / "bad_config" / "config.json").write_text('{"model_type"')
    for name, text in (("bad_settings", "{"), ("empty_settings", ""), ("list_settings", "[]")):
        (root / name).mkdir()
        (root / name / "settings.json").write_text(text)
        (root / name / "record.json").write_text("{}")


def _write_damaged_runs(root):
    for name in ("run_not_finite", "run_bad_tokenizer", "run_pipe"):
        shutil.copytree(root / "run", root / name)
    weights = root / "run_not_finite" / "adapter" / "adapter_model.safetensors"
    save_file({key: value * math.nan for key, value in load_file(weights).items()}, weights)
    (root / "run_bad_tokenizer" / "adapter" / "tokenizer.json").write_text("{")
    (root / "run_pipe" / "adapter" / "adapter_config.json").unlink()
    os.mkfifo(root / "run_pipe" / "adapter" / "adapter_config.json")


def _write_damaged_models(root):
    for name in (*CONFIGS, "folder_weights", "loop_weights", "pickled_junk"):
        shutil.copytree(root / "model", root / name)
        config = root / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | CONFIGS.get(name, {})))
        if name not in CONFIGS:
            (root / name / "model.safetensors").unlink()
    (root / "folder_weights" / "model.safetensors").mkdir()
    (root / "loop_weights" / "model.safetensors").symlink_to(root / "loop_weights" / "model.safetensors")
    (root / "pickled_junk" / "pytorch_model.bin").write_bytes(b"junk")


def _write_texts(root, settings):
    (root / "empty_folder").mkdir()
    (root / "foreign").mkdir()
    (root / "foreign" / "thesis.tex").write_text("years of work")
    for label, word in itertools.product(("red", "blue"), "0123456789"):
        (root / "texts" / label).mkdir(parents=True, exist_ok=True)
        for other in "0123456789":
            (root / "texts" / label / f"{word}{other}.txt").write_text(f"{label} {word} {other}")
    for name in ("texts_pipe", "texts_folder", "texts_dangling"):
        shutil.copytree(root / "texts", root / name)
    os.mkfifo(root / "texts_pipe" / "red" / "x.txt")
    (root / "texts_folder" / "red" / "x.txt").mkdir()
    (root / "texts_dangling" / "red" / "x.txt").symlink_to(root / "nothing-there")
    os.mkfifo(root / "pipe.csv")
    (root / "empty_first_line.csv").write_text("\n\ntext,label\na,b\n")
    (root / "empty.csv").write_text("")
    (root / "header.csv").write_text("text,label\n")
    (root / "broken_json.jsonl").write_text('{"text": "a cat", "label": 1}\n{"text": \n')
    (root / "binary.csv").write_bytes(bytes(range(128, 256)))
    (root / "one_class.csv").write_text(
        "text,label\n" + "".join(f"{a} {b},1\n" for a in "0123456789" for b in "0123456789")
    )
    rows = (root / "data.jsonl").read_text().splitlines()
    (root / "changed.jsonl").write_text("\n".join(rows[1:]))
    (root / "plan.json").write_text(json.dumps({"rank_pattern": {}, "alpha_pattern": {}}))
    (root / "broken_plan.json").write_text(
        json.dumps({"rank_pattern": {"query": "two"}, "alpha_pattern": {}})
    )
    (root / "dangling").symlink_to(root / "nothing-there")
    (root / "link_to_file").symlink_to(root / "data.jsonl")
    for name, text in YAML.items():
        (root / f"{name}.yaml").write_text(text)
    shared = {**settings, "recipes": ["lora"], "learning_rates": {"lora": [1e-3]}, "seeds": [0]}
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in shared.items())
    for name, tasks in (PLANS | {"plan_good": "tasks: {a: {}, b: {}}"}).items():
        (root / f"{name}.yaml").write_text(f"{lines}{tasks}\n")
    tiny_bert(num_hidden_layers=1).save_pretrained(root / "twin")
    tiny_tokenizer().save_pretrained(root / "twin")


def _cut(path):
    path.write_bytes(path.read_bytes()[:100])


def contents(root):
    """Return every folder below one, and every file with what any writing to it would change."""
    found = {}
    for folder, names, files in os.walk(root):
        found[folder] = sorted(names)
        for name in files:
            state = os.lstat(path := os.path.join(folder, name))
            found[path] = (state.st_ino, state.st_size, state.st_ctime_ns)
    return found


def command_line(command, arguments):
    if command in COMMANDS:
        given = [*COMMANDS[command], *arguments]
        return given if any(part.startswith("--output") for part in arguments) else [*given, "--output={out}"]
    words = {"curvature-run": "curvature", "plan": "compare"}
    return [words.get(command, command), *arguments]


def label(case):
    command, arguments = case
    return f"{command} {' '.join(arguments)}".replace("{", "").replace("}", "")


def test_there_are_enough_cases():
    assert len({label(case) for case in CASES}) >= 300


@pytest.mark.parametrize("case", CASES, ids=label)
def test_bad_input_is_one_line_and_leaves_nothing(world, case, monkeypatch, capfd):
    monkeypatch.chdir(world.root / "foreign")
    line = [part.format(**world.names) for part in command_line(*case)]
    monkeypatch.setattr(sys, "argv", ["tangora", *line])
    with pytest.raises(SystemExit) as end:
        cli.main()
    err = capfd.readouterr().err
    assert end.value.code == 2, err
    before, world.contents = world.contents, contents(world.root)
    assert world.contents == before
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
