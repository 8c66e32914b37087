"""The command line: help with examples, and one line with exit code 2 for everything a user can get wrong."""

import subprocess
import sys
from importlib.metadata import version

import pytest

from tangora import recipes
from tests.experiments.small import write_classifier

pytestmark = pytest.mark.messages


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command line in this process; return exit code, output and errors."""
    from tangora import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tangora", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


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


def test_curvature_of_a_run_and_report(call, small, tmp_path, monkeypatch):
    # pictures take most of the time
    monkeypatch.setattr(
        "tangora.experiments.curvature.measure.save_curvature_pictures", lambda _record, _folder: []
    )
    assert call("train", *flags(small), "--recipe", "lora", "--output", tmp_path / "run")[0] == 0
    few = ["--num-examples", 4, "--max-products", 4, "--top", 1, "--steps", 2, "--trace-products", 6]
    arguments = [*few, "--radius", 0, "--output", tmp_path / "out"]
    code, out, err = call("curvature", tmp_path / "run", *arguments)
    assert code == 0, err
    assert "tangent space" in out
    assert "must not be compared" in " ".join(out.split())
    page = (tmp_path / "out" / "curvature.html").read_bytes()
    (tmp_path / "out" / "curvature.html").unlink()
    code, again, _ = call("report", tmp_path / "out")
    assert code == 0
    assert (tmp_path / "out" / "curvature.html").read_bytes() == page
    assert "tangent space" in again


def test_curvature_names_what_is_wrong(call, small, tmp_path):
    code, _, err = call(
        "curvature", small["model"], "--data", small["data"], "--over", "tangnt", "--output", tmp_path
    )
    assert code == 2
    assert "over must be one of" in err
    assert err.count("\n") == 1
    code, _, err = call("curvature", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert code == 2
    assert "nowhere" in err


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


def test_list_names_every_recipe(call):
    code, out, _ = call("list")
    assert code == 0
    assert all(entry.name in out for entry in recipes())


@pytest.mark.parametrize("command", ["train", "compare", "curvature", "report", "list"])
def test_help_has_an_example(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "Example" in out


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


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty"),
        ('{"text": "the cat", "label": 1}\n{"text": \n', ":2"),
        ('{"text": "the cat", "label": 1}\n[1, 2]\n', ":2"),
        ('{"text": "the cat", "label": 1}\n{"text": "no label"}\n', ":2"),
    ],
)
def test_malformed_data_names_file_and_line(call, small, tmp_path, content, expected):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    code, _, err = call("train", *flags(small, data=path), "--output", tmp_path / "out")
    assert code == 2
    assert "bad.jsonl" in err
    assert expected in err
    assert err.count("\n") == 1


def test_bad_yaml(call, tmp_path):
    (tmp_path / "a.yaml").write_text("stepz: 3\n")
    code, _, err = call("train", "--config", tmp_path / "a.yaml", "--output", tmp_path / "out")
    assert code == 2
    assert "unknown key 'stepz'" in err
    assert "steps" in err
    (tmp_path / "b.yaml").write_text("steps: [1\n")
    code, _, err = call("train", "--config", tmp_path / "b.yaml", "--output", tmp_path / "out")
    assert code == 2
    assert "b.yaml:" in err


def test_output_folder_of_another_configuration(call, small, tmp_path):
    assert call("train", *flags(small), "--output", tmp_path / "out")[0] == 0
    code, _, err = call("train", *flags(small, steps=3), "--output", tmp_path / "out")
    assert code == 2
    assert "belongs to another configuration: steps is 2 there and 3 here" in err


def test_a_comparison_with_an_unknown_recipe(call, small, tmp_path):
    code, _, err = call("compare", *flags(small), "--recipes", "lora,lorra", "--output", tmp_path / "out")
    assert code == 2
    assert "lorra" in err


@pytest.mark.slow
def test_the_module_prints_no_traceback(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "tangora.cli", "train", "--recipe", "none", "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
