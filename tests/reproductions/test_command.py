"""``python -m reproductions``: what it writes, says and ends with. The experiment here is made up and takes no time."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import reproductions
from reproductions import EXPERIMENTS, Experiment
from reproductions.__main__ import PAGE, RECORD, main, module_of, settings_of
from reproductions.result import Check, Result, Table, at_most, load_record, outcomes
from tangora._checks import InputError
from tangora.experiments.values import Settings
from tangora.report.drawing.panels import Figure, Panel, Series

ROOT = Path(__file__).parents[2]


class FakeSettings(Settings):
    seed: int = 0
    bound: float = 1.0
    size: int = 10


def fake_run(settings, progress):
    progress(1, 1)
    figure = Figure("curve", "Curve", "A curve.", [Panel("p", "x", "y", [Series("a", [1, 2], [3, 4])])])
    table = Table("Numbers", ("name", "value"), [("size", settings.size)])
    check = Check("The seed is small.", at_most(settings.bound), lambda seed: seed, "nowhere")
    checks = outcomes([check], settings.seed)
    return Result([f"The seed is {settings.seed}."], [table], [figure], checks, {"bound": float("inf")})


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """Add an experiment."""
    monkeypatch.setitem(reproductions.EXPERIMENTS, "fake", Experiment("A fake", "nowhere", "no time"))
    module = SimpleNamespace(
        Settings=FakeSettings, QUICK={"size": 2}, STAND_INS=("All of it.",), run=fake_run
    )
    monkeypatch.setitem(sys.modules, "reproductions.fake", module)
    return module


@pytest.fixture
def call(capsys):
    """Call the command line; return exit code, output and errors."""

    def run(*arguments):
        code = main([*map(str, arguments)])
        captured = capsys.readouterr()
        return code, " ".join(captured.out.split()), captured.err

    return run


def test_run_leaves_record_page_and_pictures(call, tmp_path):
    code, out, err = call("fake", "--output", tmp_path / "out")
    assert code == 0, err
    assert "The seed is 0." in out
    assert "The seed is small." in out
    assert "The only check agrees with the source." in out
    record = load_record(tmp_path / "out" / RECORD)
    assert record.name == "fake"
    assert record.settings == {"seed": 0, "bound": 1.0, "size": 10}
    assert record.command.startswith("python -m reproductions fake")
    assert record.versions["torch"]
    assert record.stand_ins == ("All of it.",)
    assert record.result.data == {"bound": None}
    assert (tmp_path / "out" / PAGE).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_failed_check_of_a_full_run_gives_exit_code_1(call, tmp_path):
    code, out, _ = call("fake", "--seed", 5, "--output", tmp_path / "full")
    assert code == 1
    assert "1 of 1 check disagrees with the source." in out
    # what was found is kept all the same
    assert not load_record(tmp_path / "full" / RECORD).result.passed


def test_failed_check_of_a_quick_run_is_said_only(call, tmp_path):
    code, out, _ = call("fake", "--seed", 5, "--quick", "--output", tmp_path / "quick")
    assert code == 0
    assert "disagrees" in out
    assert "quick size" in out
    assert load_record(tmp_path / "quick" / RECORD).quick


def test_settings_change_quick_and_defaults():
    assert settings_of("fake", {}).size == 10
    assert settings_of("fake", {}, quick=True).size == 2
    assert settings_of("fake", {"size": 7}, quick=True, seed=3) == FakeSettings(seed=3, size=7)


def test_set_reads_numbers_and_lists(call, tmp_path):
    assert call("fake", "--set", "seed=5", "--set", "bound=1e1", "-o", tmp_path)[0] == 0
    record = load_record(tmp_path / RECORD)
    assert (record.settings["seed"], record.settings["bound"]) == (5, 10.0)
    assert settings_of("linear-shift", {"conditions": [1, "1e2"]}).conditions == (1.0, 100.0)


@pytest.mark.messages
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toi"], "did you mean"),
        (["nothing-like-it"], "fake"),
        (["fake", "toy"], "unrecognized arguments: toy"),
        (["fake", "--sed", "1"], "unrecognized arguments: --sed"),
        (["fake", "--seed", "one"], "invalid int value: 'one'"),
        (["fake", "--seed", "99999999999999999999"], "seed must be at most"),
        (["toy", "--seed", "-1"], "greater than or equal to 0; got -1"),
        (["fake", "--set", "speed=1"], "allowed: seed, bound, size"),
        (["fake", "--set", "seed=true"], "seed cannot be a boolean"),
        (["fake", "--set", "size"], "KEY=VALUE"),
        (["fake", "--set", "size=[1"], "YAML"),
        (["fake", "--set", "size=many"], "size"),
        (["pinn", "--set", "stepz=3"], "unknown key 'stepz'"),
        (["width", "--set", "widths=[1]"], "two different positive numbers"),
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_2(call, tmp_path, arguments, message):
    code, out, err = call(*arguments, "--output", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_folder_of_other_settings_or_of_something_else_is_refused(call, tmp_path):
    assert call("fake", "--output", tmp_path / "out")[0] == 0
    code, _, err = call("fake", "--seed", 1, "--output", tmp_path / "out")
    assert code == 2
    assert "seed is 0 there and 1 here" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert call("fake", "--output", tmp_path / "mine")[0] == 2
    assert call("fake", "--output", tmp_path / "mine" / "thesis.tex")[0] == 2


def test_seed_needs_a_setting(fake):
    class Seedless(Settings):
        size: int = 1

    fake.Settings = Seedless
    with pytest.raises(InputError, match="takes no seed; allowed: size"):
        settings_of("fake", {}, seed=1)


def test_experiments_are_listed_without_torch():
    code = (
        "import sys; from reproductions.__main__ import main; code = main([]); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "False\n"
    listed = " ".join(done.stdout.split())
    for name, each in EXPERIMENTS.items():
        if name != "fake":
            assert all(text in listed for text in (name, each.title, each.source, each.duration))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_described(name):
    entry, module = EXPERIMENTS[name], module_of(name)
    assert entry.title
    assert entry.source
    assert entry.duration
    assert isinstance(settings_of(name, {}, quick=True, seed=3), Settings)
    assert all(field.description for field in module.Settings.model_fields.values())
    assert all(sentence.endswith(".") for sentence in module.STAND_INS)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_quick_run_of_every_experiment(call, tmp_path, name):
    code, out, err = call(name, "--quick", "--seed", 3, "--output", tmp_path)
    assert code == 0, err
    record = load_record(tmp_path / RECORD)
    assert record.result.checks
    assert all(sentence.split()[0] in out for sentence in record.result.findings)
    assert {f"{figure.name}.png" for figure in record.result.figures} == {
        path.name for path in tmp_path.glob("*.png")
    }
    # every number is strict JSON
    text = (tmp_path / RECORD).read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
