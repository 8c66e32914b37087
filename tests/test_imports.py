"""What is imported, and when: an optimizer loads no plots, the command line no torch, and all of it is declared."""

import ast
import importlib.metadata
import json
import os
import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tangora

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src" / "tangora").rglob("*.py"))
SLOW = ("torch", "transformers", "peft", "datasets", "plotly", "matplotlib", "scipy", "pandas")


def run_fresh(code, *arguments):
    """Run Python code in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr
    return done


def in_fresh_process(code, *arguments):
    """Return what the code prints last, as JSON says it."""
    return json.loads(run_fresh(code, *arguments).stdout.splitlines()[-1])


def test_importing_tangora_loads_no_torch():
    loaded = in_fresh_process("import tangora, sys, json; print(json.dumps([*sys.modules]))")
    assert not set(SLOW) & set(loaded)


OPTIMIZER = """
import json, sys, torch, transformers, peft
config = transformers.LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
)
model = peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(target_modules=["q_proj"]))
before = set(sys.modules)
import tangora
tangora.TangentAdam(model, lr=1e-3)
tangora.recipe("lora+").create_optimizer(model, 1e-3)
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def test_an_optimizer_loads_no_plots_no_data_sets_and_no_command_line():
    loaded = set(in_fresh_process(OPTIMIZER))
    assert "tangora" in loaded
    unwanted = {
        "plotly",
        "jinja2",
        "datasets",
        "pyarrow",
        "pandas",
        "matplotlib",
        "rich",
        "typer",
        "pydantic",
    }
    assert not unwanted & loaded


NAMES = """
import json, logging
import tangora
import tangora.recipes.table  # must not hide the function of this name
from tangora import *  # loads PEFT, and with it bitsandbytes
names = [tangora.recipes()[0].name, tangora.curvature.Hessian.__name__, TangentAdam.__name__, tangora.train.__name__,
         tangora.optim.TangentAdam is tangora.TangentAdam is TangentAdam]
log = logging.getLogger("bitsandbytes.backends.cpu.ops")
log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "No module named 'kernels'")
log.warning("Failed to load the library")
print(json.dumps(names))
"""


def test_names_are_found_in_a_fresh_process_and_missing_kernels_of_bitsandbytes_are_no_news():
    done = run_fresh(NAMES)
    assert json.loads(done.stdout.splitlines()[-1]) == ["full", "Hessian", "TangentAdam", "train", True]
    assert done.stderr.splitlines() == ["Failed to load the library"]


COMMANDS = ("train", "compare", "diagnose", "curvature", "export", "report", "list")
QUICK = {
    "": (0, []),
    "--help": (0, ["--help"]),
    "--version": (0, ["--version"]),
    "list": (0, ["list"]),
    **{f"{command} --help": (0, [command, "--help"]) for command in COMMANDS},
    "unknown command": (2, ["trian"]),
    "unknown flag": (2, ["train", "--stepz", "3", "--output", "out"]),
    "missing flag": (2, ["train"]),
    "word for a number": (2, ["train", "--steps", "many", "--output", "out"]),
    "number out of range": (2, ["train", "--rank", "0", "--output", "out"]),
    "unknown schedule": (2, ["train", "--schedule", "stairs", "--output", "out"]),
    "unknown recipe": (2, ["train", "--recipe", "tangnt", "--output", "out"]),
    "unknown recipes": (2, ["compare", "--recipes", "lora,lorra", "--output", "out"]),
    "bad rates": (2, ["compare", "--recipes", "lora", "--learning-rates", "1e-3,fast", "--output", "out"]),
    "unknown preset": (2, ["compare", "--preset", "quick", "--output", "out"]),
    "no stand-in": (2, ["compare", "--recipes", "lora", "--tiny", "--output", "out"]),
    "missing plan": (2, ["compare", "nowhere.yaml", "--output", "out"]),
    "missing config": (2, ["train", "--config", "nowhere.yaml", "--output", "out"]),
    "missing rank plan": (2, ["train", "--rank-plan", "nowhere.json", "--output", "out"]),
    "unknown start": (2, ["diagnose", "--starts", "lora,lorra", "--output", "out"]),
    "unknown space": (2, ["curvature", "run", "--over", "tangnt", "--output", "out"]),
    "missing data": (2, ["train", "--data", "nowhere.csv", "--output", "out"]),
    "missing test data": (2, ["train", "--test-data", "./nowhere", "--output", "out"]),
    "missing model": (2, ["compare", "--recipes", "lora", "--model", "./nowhere", "--output", "out"]),
    "missing model file": (2, ["diagnose", "--model", "nowhere.gguf", "--output", "out"]),
    "missing adapter": (2, ["diagnose", "--adapter", "nowhere", "--output", "out"]),
    "missing source": (2, ["curvature", "./nowhere", "--output", "out"]),
    "missing reference": (2, ["train", "--reference", "nowhere", "--measure-every", "1", "--output", "out"]),
    "missing run": (2, ["export", "nowhere", "--output", "out"]),
    "missing folder": (2, ["report", "nowhere"]),
    "moved command": (2, ["reproduce", "toy"]),
    "no memory": (2, ["compare", "--recipes", "lora", "--max-memory", "-1", "--output", "out"]),
    "no rank": (2, ["export", "run", "--rank", "0", "--output", "out"]),
    "folder without a model": (2, ["train", "--model", "./tests", "--output", "out"]),
    "folder without an adapter": (2, ["curvature", "minilm-l6", "--adapter", "tests", "--output", "out"]),
    "folder without a run": (2, ["train", "--reference", "tests", "--measure-every", "1", "--output", "out"]),
}
CALLS = """
import contextlib, io, json, sys
from tangora import cli
found = {}
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv = ["tangora", *arguments]
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    found[name] = [code, [*sys.modules], errors.getvalue()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def called():
    return in_fresh_process(CALLS, json.dumps({name: arguments for name, (_, arguments) in QUICK.items()}))


@pytest.mark.parametrize("name", QUICK)
def test_help_lists_and_errors_of_arguments_need_no_torch(called, name):
    code, loaded, errors = called[name]
    # without arguments the help is shown, with the exit code that click gives it
    assert code == QUICK[name][0] or name == ""
    assert "Traceback" not in errors
    assert not set(SLOW) & set(loaded)


def test_every_command_is_among_them():
    from tangora import cli

    shown = {command.name for command in cli.app.registered_commands if not command.hidden}
    assert shown == set(COMMANDS)


def exports(path):
    """Return names by module, as type checkers read them in an ``__init__.py``."""
    body = ast.parse(path.read_text()).body
    (block,) = (
        node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    return {(node.module, alias.name) for node in block.body for alias in node.names}


def test_type_checkers_and_python_know_the_same_exports():
    written = exports(ROOT / "src" / "tangora" / "__init__.py") - {("tangora", "curvature")}
    assert {(module, name) for name, module in tangora._HOMES.items()} == written
    eager = {"curvature", "InputError", "Recipe", "recipe", "recipes"}
    assert {name for _, name in written} | eager == set(tangora.__all__)


@pytest.mark.parametrize("name", tangora.__all__)
def test_every_export_is_itself(name):
    value = getattr(tangora, name)
    assert name in dir(tangora)
    if name != "curvature":
        assert getattr(sys.modules[value.__module__], name) is value
        assert pickle.loads(pickle.dumps(value)) is value


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="TangentAdamm"):
        tangora.TangentAdamm  # noqa: B018
    with pytest.raises(ImportError, match="TangentAdamm"):
        from tangora import TangentAdamm  # noqa: F401  # pyright: ignore[reportAttributeAccessIssue]


def imported(path):
    """Return the top names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).split(".")[0])
    return names - set(sys.stdlib_module_names) - {"tangora"}


def test_every_imported_package_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        line for extra, lines in project["optional-dependencies"].items() if extra != "dev" for line in lines
    ]
    declared = {normal(re.split(r"[<>=!~\[; ]", line)[0]) for line in [*project["dependencies"], *extras]}
    distributions = importlib.metadata.packages_distributions()
    # plug-ins are imported by the package that they are named after
    packages = set().union(
        *(imported(path) - ({path.stem} if path.parent.name == "integrations" else set()) for path in SOURCES)
    )
    assert {"numpy", "torch", "yaml"} <= packages
    missing = {name for name in packages if not declared & set(map(normal, distributions.get(name, [name])))}
    assert not missing


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_plug_ins_are_imported_by_their_packages_alone():
    importing = re.compile(r"^\s*(from|import) tangora(\.| import )integrations\b", re.MULTILINE)
    assert [path for path in SOURCES if importing.search(path.read_text())] == []


@pytest.mark.parametrize("package", ["peft.tuners", "bitsandbytes"])
def test_only_adapters_read_layer_types(package):
    importing = re.compile(rf"^\s*(from|import) {re.escape(package)}\b", re.MULTILINE)
    readers = {path for path in SOURCES if importing.search(path.read_text())}
    assert {path.relative_to(ROOT / "src" / "tangora").parts[0] for path in readers} <= {"adapters"}
