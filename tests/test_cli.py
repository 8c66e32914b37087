"""The command line: help with examples, and one line with exit code 2 for everything a user can get wrong."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tangora import recipes
from tangora._names import DATA, MODELS
from tangora.experiments.comparison.plan import CompareSettings
from tangora.experiments.measurement_settings import CurvatureSettings, DiagnoseSettings
from tangora.experiments.settings import RunSettings
from tangora.experiments.settings_files import PRESETS, preset
from tests.experiments.small import write_classifier

pytestmark = pytest.mark.messages


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("cli"))


def flags(small, **changes):
    values = {**small, "steps": 2, "batch_size": 4, **changes}
    return [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def test_version(call):
    assert call("--version")[:2] == (0, f"tangora {version('tangora')}\n")


def test_train_prints_what_it_wrote(call, small, tmp_path):
    code, out, err = call("train", *flags(small), "--recipe", "tangent", "--output", tmp_path / "out")
    assert code == 0, err
    assert "accuracy" in out
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_compare_and_report(call, small, tmp_path):
    arguments = ["--recipes", "lora,tangent", "--learning-rates", "1e-3", "--seeds", "0"]
    code, out, err = call("compare", *flags(small), *arguments, "--output", tmp_path / "out")
    assert code == 0, err
    assert "report.html" in out.replace("\n", "")
    assert "largest difference" in out
    assert call("report", tmp_path / "out")[0] == 0


@pytest.fixture
def plan(small, tmp_path):
    """A plan that cannot be run here, and its stand-in."""
    shared = {"recipes": ["lora", "tangent"], "seeds": [0], "model": "someone/large", "data": "someone/data"}
    paper = {"source": "a paper", "results": {"one": {"lora": 12.5, "tangent": 77.25}}, "notes": "of old"}
    tiny = small | {"kind": None, "steps": 2, "batch_size": 4, "learning_rates": [1e-3], "recipes": ["lora"]}
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(shared | {"tasks": {"one": {"kind": "causal"}}, "paper": paper, "tiny": tiny}))
    return path


def test_a_dry_run_prints_and_touches_nothing(call, plan, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call("compare", plan, "--dry-run", "--output", tmp_path / "out")
    assert code == 0, err
    assert sorted(tmp_path.rglob("*")) == before
    for shown in ("someone/large", "someone/data", "12.5", "77.25", "a paper", "unknown"):
        assert shown in " ".join(out.split())
    code, out, err = call("compare", plan, "--tiny", "--dry-run", "--output", tmp_path / "o")
    assert code == 0, err
    assert sorted(tmp_path.rglob("*")) == before
    assert not any(shown in out for shown in ("someone/large", "12.5", "unknown", "tangent"))


def test_a_dry_run_names_what_is_measured_besides(call, small, tmp_path):
    arguments = ["compare", *flags(small), "--recipes=lora", "--dry-run", "--output", tmp_path / "out"]
    assert "measured" not in call(*arguments)[1]
    code, out, err = call(*arguments, "--curvature", "--curvature-every=7", "--measure-every=9")
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("measured")]
    assert "trajectory every 9 steps" in line
    assert "curvature every 7 steps (about 52 Hessian-vector products" in line
    assert "curvature at the end (about 32 Hessian-vector products" in line


def test_a_stand_in_runs_without_published_results(call, plan, tmp_path):
    code, out, err = call("compare", plan, "--tiny", "--output", tmp_path / "out")
    assert code == 0, err
    assert "lora" in out
    comparison = json.loads((tmp_path / "out" / "one" / "comparison.json").read_text())
    assert (comparison["paper"], comparison["settings"]["steps"]) == (None, 2)
    assert "77.25" not in (tmp_path / "out" / "report.html").read_text()


def test_published_results_are_kept_with_a_comparison(call, small, plan, tmp_path):
    values = small | {"paper": json.loads(plan.read_text())["paper"], "recipes": ["lora"], "seeds": [0]}
    plan.write_text(json.dumps(values | {"steps": 2, "batch_size": 4, "learning_rates": [1e-3]}))
    code, _, err = call("compare", plan, "--output", tmp_path / "out")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["paper"]["results"] == {
        "one": {"lora": 12.5, "tangent": 77.25}
    }
    assert "paper" not in json.loads((tmp_path / "out" / "settings.json").read_text())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "77.25" in page
    (tmp_path / "out" / "report.html").unlink()
    assert call("report", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "report.html").read_text() == page


def test_a_stand_in_that_is_not_there_is_one_line(call, tmp_path):
    code, _, err = call("compare", "--recipes", "lora", "--tiny", "--output", tmp_path / "out")
    assert code == 2
    assert "tiny needs a block" in err
    assert not (tmp_path / "out").exists()


def test_curvature_of_a_run_and_report(call, small, tmp_path, monkeypatch):
    # pictures take most of the time
    monkeypatch.setattr(
        "tangora.experiments.curvature.measurement.save_curvature_pictures", lambda _record, _folder: []
    )
    assert call("train", *flags(small), "--recipe", "lora", "--output", tmp_path / "run")[0] == 0
    few = ["--num-examples", 4, "--max-products", 4, "--top", 1, "--steps", 2, "--trace-products", 6]
    arguments = [*few, "--radius", 0, "--output", tmp_path / "out"]
    code, out, err = call("curvature", tmp_path / "run", *arguments)
    assert code == 0, err
    assert "tangent space" in out
    assert "Do not compare" in " ".join(out.split())
    page = (tmp_path / "out" / "curvature.html").read_bytes()
    (tmp_path / "out" / "curvature.html").unlink()
    code, again, _ = call("report", tmp_path / "out")
    assert code == 0
    assert (tmp_path / "out" / "curvature.html").read_bytes() == page
    assert "tangent space" in again


def test_a_comparison_with_curvature_prints_the_end_points(call, small, tmp_path):
    arguments = ["--recipes", "lora", "--learning-rates", "1e-3", "--seeds", "0", "--curvature"]
    few = ["--curvature-examples", 4]
    code, out, err = call("compare", *flags(small), *arguments, *few, "--output", tmp_path / "out")
    assert code == 0, err
    assert "End points" in out
    assert "factors" not in out


def test_config_file_and_flags(call, small, tmp_path):
    lines = [f"{key}: {value}" for key, value in small.items()]
    (tmp_path / "run.yaml").write_text("\n".join([*lines, "steps: 50", "batch_size: 4", "recipe: lora"]))
    code, out, err = call(
        "train", "--config", tmp_path / "run.yaml", "--steps", 2, "--output", tmp_path / "out"
    )
    assert code == 0, err
    assert "lora, learning rate" in out


# --- what there is ---


def test_list_names_everything_in_eighty_columns(call, monkeypatch):
    from tangora.cli.output import console

    monkeypatch.setattr(console, "width", 80)
    code, out, _ = call("list")
    lines = out.splitlines()
    assert code == 0
    assert max(map(len, lines)) <= 80
    names = [line.split()[0] for line in lines if line[:1].strip()]
    for name in (*(entry.name for entry in recipes()), *MODELS, *DATA, *PRESETS):
        assert names.count(name) == 1, name
    assert f"{len(recipes())} recipes" in lines[0]
    assert all(name in out for name in ("SmolLM2-135M-Instruct", "Q4_1"))


def test_every_recipe_is_listed_by_what_it_changes():
    from tangora.cli.pages import group_of

    groups = {}
    for entry in recipes():
        groups.setdefault(group_of(entry), set()).add(entry.name)
    by_name = {name: heading for heading, names in groups.items() for name in names}
    assert {"lora", "dora", "rslora", "adalora"} == groups[by_name["lora"]]
    assert {"tangent", "lora-pro", "p-lora", "lora+", "odelora-bug"} <= groups[by_name["tangent"]]
    assert {"pissa", "lora-ga", "orthogonal", "one-step"} <= groups[by_name["pissa"]]
    assert {"lora-ga+tangent", "lora-one"} <= groups[by_name["lora-ga+pro"]]
    assert {"full", "full-muon"} == groups[by_name["full"]]


def test_models_and_data_are_those_that_can_be_loaded():
    from tangora.training.data.generated import PREFIX
    from tangora.training.data.sources import BUILT_IN_DATA
    from tangora.training.models.base_model import PACKAGED_MODELS

    assert set(MODELS) == set(PACKAGED_MODELS)
    assert set(DATA) == {*BUILT_IN_DATA, PREFIX}


TENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
WORDS = [
    "no",
    *["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    *TENS.split(),
    "twenty",
]
WORDS += [f"twenty-{word}" for word in WORDS[1:10]] + ["thirty"]


def counted(text):
    """Return the numbers of recipes that a text states."""
    found = re.findall(r"\b([\w-]+) (?:named )?recipes\b", text.lower())
    return [
        WORDS.index(word) if word in WORDS else int(word)
        for word in found
        if word in WORDS or word.isdecimal()
    ]


def test_counts_of_recipes_are_those_of_the_table():
    root = Path(__file__).parent.parent
    assert counted("Twenty-five recipes, and 3 recipes; other recipes") == [25, 3]
    for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        for line in path.read_text(encoding="utf-8").splitlines():
            named = re.match(r"\| `([\w-]+)` \|", line)
            is_preset = named is not None and named[1] in PRESETS
            allowed = len(preset(named[1])["recipes"]) if is_preset else len(recipes())
            assert set(counted(line)) <= {allowed}, (path, line)


# --- help ---

FLAGS = {
    "train": RunSettings,
    "compare": CompareSettings,
    "diagnose": DiagnoseSettings,
    "curvature": CurvatureSettings,
}
COMMANDS = (*FLAGS, "export", "report", "list")


def help_of(call, monkeypatch, command):
    """Return the lines of a command's help in 80 columns, and what each heading has under it."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    code, out, _ = call(command, "--help")
    assert code == 0
    lines, panels = out.splitlines(), {}
    for line in lines:
        if heading := re.match(r"╭─ ([^─]+) ─", line):
            panels[heading[1]] = []
        elif flag := re.match(r"│ [* ]{0,4}(--[\w-]+)", line):
            list(panels.values())[-1].append(flag[1])
    return lines, panels


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_fits(call, monkeypatch, command):
    lines, panels = help_of(call, monkeypatch, command)
    assert any("Example" in line for line in lines)
    assert max(map(len, lines)) <= 80
    assert "Options" not in panels  # every flag has a heading
    # what is explained keeps room to be read
    rows = [line for line in lines if re.match(r"│ [* ]{0,4}--", line)]
    assert all(len(re.split(r"  +", row.strip("│ "))[-1]) > 5 for row in rows)


@pytest.mark.parametrize("command", FLAGS)
def test_every_setting_has_one_flag_under_one_heading(call, monkeypatch, command):
    _, panels = help_of(call, monkeypatch, command)
    shown = [flag for flags in panels.values() for flag in flags]
    known = FLAGS[command].model_fields
    fields = {key for key in known if not known[key].exclude} - {"source"}
    assert sorted({f"--{key.replace('_', '-')}" for key in fields}) == sorted(
        set(shown) & {f"--{key.replace('_', '-')}" for key in fields}
    )
    assert len(shown) == len(set(shown))
    assert not [flag for flag in shown if flag.startswith("--no-")]


def test_headings_hold_what_belongs_there(call, monkeypatch):
    _, panels = help_of(call, monkeypatch, "train")
    assert {"--rank", "--alpha", "--lora-dropout", "--target-modules"} <= {*panels["Adapter"]}
    assert {"--learning-rate", "--epochs", "--steps", "--schedule", "--clip"} <= {*panels["Optimization"]}
    assert {"--model", "--data", "--max-length", "--load-in-4bit"} <= {*panels["Model and data"]}
    assert {"--output", "--config", "--device", "--help"} <= {*panels["Output and resources"]}
    assert next(iter(panels)) == "Method"


def test_help_shows_choices_and_readable_defaults(call, monkeypatch):
    def text(command):
        lines, _ = help_of(call, monkeypatch, command)
        return " ".join(" ".join(line.strip("│") for line in lines).split())

    assert "One of linear, cosine, constant. Default: linear." in text("train")
    assert "One of classification, causal." in text("train")
    assert "One of accuracy, loss, exact_match." in text("compare")
    assert "see tangora list" in text("train")
    assert "<bool>" not in text("train")
    assert "Default: lora,orthogonal,pissa,lora-ga,lora-one." in text("diagnose")
    assert "Default: 0,1,2." in text("compare")
    for command in FLAGS:
        assert not re.search(r"Default: (None|False|Pydantic|\[)", text(command))


@pytest.mark.parametrize("settings", [*FLAGS.values()])
def test_descriptions_use_the_names_of_the_field(settings):
    known = {
        "alpha": "lora_alpha",
        "clip": "max_grad_norm",
        "accumulate": "gradient_accumulation_steps",
        "warmup": "warmup_ratio",
        "schedule": "lr_scheduler_type",
        "steps": "max_steps",
        "max_length": "max_seq_length",
    }
    for key, field in settings.model_fields.items():
        assert str(field.description).endswith("."), key
        if key in known and known[key] in settings.aliases:
            assert known[key] in field.description


# --- other names ---

SAME = [
    ("--r", 3, "--rank"),
    ("--lora-r", 3, "--rank"),
    ("--lora_alpha", 3.0, "--alpha"),
    ("--max-steps", 1, "--steps"),
    ("--num_train_epochs", 0.1, "--epochs"),
    ("--per-device-train-batch-size", 2, "--batch-size"),
    ("--gradient-accumulation-steps", 2, "--accumulate"),
    ("--lr-scheduler-type", "cosine", "--schedule"),
    ("--warmup-ratio", 0.5, "--warmup"),
    ("--max_grad_norm", 0.5, "--clip"),
    ("--max-seq-length", 8, "--max-length"),
    ("--lr", 0.1, "--learning-rate"),
]


@pytest.fixture
def seen(call, monkeypatch):
    """Call a command that does nothing; return the settings that it would have used."""

    def run(*arguments):
        found = []

        def stop(settings, *_, **__):
            found.append(settings)
            raise SystemExit(0)

        monkeypatch.setattr("tangora.experiments.train.train", stop)
        monkeypatch.setattr("tangora.experiments.compare.compare", stop)
        code, _, err = call(*arguments)
        assert code == 0, err
        return found[0]

    return run


@pytest.mark.parametrize(("other", "value", "own"), SAME)
def test_names_of_hugging_face_mean_the_same(seen, call, tmp_path, other, value, own):
    key, alias = own.strip("-").replace("-", "_"), other.strip("-").replace("-", "_")
    settings = seen("train", other, value, "--output", tmp_path / "out")
    assert getattr(settings, key) == value
    assert settings == seen("train", own, value, "--output", tmp_path / "out")
    (tmp_path / "run.yaml").write_text(f"{alias}: {value}\n")
    from_file = ["train", "--config", tmp_path / "run.yaml", "--output", tmp_path / "out"]
    assert settings == seen(*from_file)
    # a flag wins over the file, whichever name each uses
    assert seen(*from_file, own, value) == settings
    code, _, err = call("train", own, value, other, value, "--output", tmp_path / "out")
    assert code == 2
    assert err.count("\n") == 1
    assert f"{key} and {alias} are the same setting" in err


def test_a_comparison_takes_the_names_of_a_single_run(seen, tmp_path):
    settings = seen("compare", "--recipe", "lora", "--lr", "1e-3", "--seed", 7, "--output", tmp_path / "out")
    assert (settings.recipes, settings.seeds) == (["lora"], [7])
    assert settings.learning_rates == {"lora": [1e-3]}


def test_switches_have_an_opposite(seen, call, tmp_path):
    (tmp_path / "run.yaml").write_text("forgetting: true\ncurvature: true\n")
    arguments = ["train", "--config", tmp_path / "run.yaml", "--output", tmp_path / "out"]
    assert seen(*arguments).forgetting
    settings = seen(*arguments, "--no-forgetting", "--gradient-checkpointing")
    assert (settings.forgetting, settings.curvature, settings.gradient_checkpointing) == (False, True, True)
    code, _, err = call(*arguments, "--no-curvature", "--curvature")
    assert code == 2
    assert "--curvature and --no-curvature exclude each other" in err


# --- errors of flags ---

WRONG = {
    "unknown flag": (
        ["train", "--learning-rte", "1"],
        "no option --learning-rte",
        "did you mean --learning-rate?",
    ),
    "unknown flag with underscores": (["train", "--warm_up", "1"], "no option --warm-up", "--warmup"),
    "unknown short flag": (["train", "-x"], "no option -x", "--help"),
    "unknown command": (["trian"], "no command 'trian'", "did you mean train?"),
    "no output": (["train"], "needs --output", "output folder"),
    "no argument": (["export", "--output", "o"], "needs RUN", "tangora train"),
    "no value": (["train", "--steps"], "--steps needs a value", ""),
    "word for a number": (
        ["train", "--steps", "many", "-o", "o"],
        "--steps must be a whole number",
        "got 'many'",
    ),
    "part for a number": (
        ["train", "--steps", "1.5", "-o", "o"],
        "--steps must be a whole number",
        "got '1.5'",
    ),
    "word for a rate": (["train", "--lr", "fast", "-o", "o"], "--lr must be a number", "got 'fast'"),
    "out of range": (["export", "run", "--rank", "0", "-o", "o"], "--rank", "got '0'"),
    "choice": (
        ["train", "--schedule", "consine", "-o", "o"],
        "linear, cosine, constant",
        "did you mean cosine?",
    ),
    "value of a switch": (
        ["train", "--exact-match", "true", "-o", "o"],
        "takes no value",
        "--no-exact-match",
    ),
    "value of a switch with =": (
        ["train", "--exact-match=true", "-o", "o"],
        "--exact-match takes no value",
        "",
    ),
    "value of a lone switch": (
        ["export", "r", "--merge", "yes", "-o", "o"],
        "--merge takes no value",
        "'yes'",
    ),
    "one too many": (["train", "lora", "-o", "o"], "takes no further argument", "got 'lora'"),
    "nothing to compare": (["compare", "-o", "o"], "recipes must be given", "tangora list"),
    "durations": (["train", "--steps", "3", "--epochs", "1", "-o", "o"], "exclude each other", "epochs = 1"),
    "device": (["train", "--device", "gpu", "-o", "o"], "cpu, cuda, cuda:N or mps", "got 'gpu'"),
    "moved command": (
        ["reproduce", "toy", "--quick", "--set", "steps=3"],
        "tangora reproduce is no longer",
        "python -m reproductions NAME",
    ),
    "uniform model": (["export", "r", "--merge", "--uniform", "-o", "o"], "--uniform", "--merge"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_of_flags_are_one_line(call, case):
    arguments, *expected = WRONG[case]
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert all(text in err for text in expected), err


def test_a_key_of_a_file_is_guessed_like_a_flag(call, tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rte: 1\n")
    code, _, err = call("train", "--config", tmp_path / "a.yaml", "--output", tmp_path / "out")
    assert code == 2
    assert "unknown key 'learning_rte' (did you mean learning_rate?)" in err


@pytest.mark.parametrize(
    ("arguments", "wrong", "right"),
    [
        (["train", "--data", "nws.csv", "--output", "out"], "nws.csv", "news.csv"),
        (["train", "--model", "./modle", "--output", "out"], "./modle", "./model"),
        (["train", "--config", "set.yaml", "--output", "out"], "set.yaml", "sets.yaml"),
        (["train", "--rank-plan", "in/plan.jsn", "--output", "out"], "in/plan.jsn", "in/plan.json"),
        (["diagnose", "--adapter", "mdel", "--output", "out"], "mdel", "model"),
        (["compare", "set.yaml", "--output", "out"], "set.yaml", "sets.yaml"),
        (["export", "modle", "--output", "out"], "modle", "model"),
        (["report", "modle"], "modle", "model"),
    ],
)
def test_a_mistyped_path_is_guessed(call, monkeypatch, tmp_path, arguments, wrong, right):
    monkeypatch.chdir(tmp_path)
    for name in ("news.csv", "model/config.json", "sets.yaml", "in/plan.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    code, _, err = call(*arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert wrong in err
    assert f"(did you mean {right}?)" in err


# --- completion ---

COMPLETE = """
import json, sys
try:
    from tangora import cli
    cli.main()
finally:
    print(json.dumps("torch" in sys.modules))
"""


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("train --rec", {"--recipe"}),
        ("train --recipe odelora-", {"odelora-euler", "odelora-heun", "odelora-rk4", "odelora-bug"}),
        (
            "compare --recipes full,lora-g",
            {"full,lora-ga" + end for end in ("", "+pro", "+tangent", "+tangent-muon")},
        ),
        ("train --schedule co", {"cosine", "constant"}),
        ("train --model smol", {"smollm2-135m"}),
        (
            "compare --preset paper-",
            {"paper-chat", "paper-clip", "paper-code", "paper-commonsense", "paper-glue", "paper-math"},
        ),
        ("rep", {"report"}),  # not the command that has moved
        ("train --gradient-", {"--gradient-checkpointing"}),
    ],
)
def test_completion_knows_names_and_needs_no_torch(typed, expected):
    words = f"tangora {typed}"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[0] = 'tangora'\n{COMPLETE}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {
            "_TANGORA_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
            "PYTHONPATH": str(Path(__file__).parent.parent / "src"),
        },
    )
    *offered, loaded = done.stdout.splitlines()
    assert {line.split(",", 1)[1] if line.startswith("plain,") else line for line in offered} == expected, (
        done
    )
    assert not json.loads(loaded)


def test_an_adapter_for_readers_with_one_alpha(call, small, tmp_path):
    plan = {"r": 2, "lora_alpha": 4, "rank_pattern": {"query": 1}, "alpha_pattern": {"query": 4}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    arguments = [*flags(small), "--recipe", "lora", "--rank-plan", tmp_path / "plan.json"]
    code, _, err = call("train", *arguments, "--output", tmp_path / "run")
    assert code == 0, err
    code, _, err = call("export", tmp_path / "run", "--uniform", "--output", tmp_path / "out")
    assert code == 0, err
    found = {
        folder: json.loads((tmp_path / folder / "adapter_config.json").read_text())["rank_pattern"]
        for folder in ("run/adapter", "out")
    }
    assert found["run/adapter"]
    assert not found["out"]


BAD = {
    "recipe": (["--recipe", "tangnt"], "recipe must be one of", "did you mean tangent?"),
    "model": (["--model", "minilm-l7"], "minilm-l7", "minilm-l6"),
    "data": (["--data", "bbc-new"], "bbc-new", "bbc-news"),
    "column": (["--label-column", "sentiment"], "sentiment", "label"),
    "learning rate": (["--learning-rate", "-1"], "learning_rate", "greater than 0; got -1"),
    "steps": (["--steps", "0"], "steps", "greater than or equal to 1; got 0"),
    "rank": (["--rank", "500"], "rank must be at most", "got 500"),
    "schedule": (
        ["--schedule", "stairs"],
        "schedule",
        "must be one of linear, cosine, constant; got 'stairs'",
    ),
    "task": (["--data", "reasoning-gym:chain_sums"], "chain_sums", "chain_sum"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags_end_with_one_line_and_code_2(call, small, tmp_path, case):
    arguments, *expected = BAD[case]
    code, _, err = call("train", *flags(small), *arguments, "--output", tmp_path / "out")
    assert code == 2
    assert err.count("\n") == 1
    assert all(text in err for text in expected), err
