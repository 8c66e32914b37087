"""The distribution: complete, small, and honest about what it needs."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import tangora

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = {"bitsandbytes", "reasoning_gym", "sklearn", "tensorboard", "trl", "ray", "submitit"}
HOSTS = {"axolotl", "llamafactory"}  # which a plug-in runs in, and does not install


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements):
    return {normal(Requirement(each).name) for each in requirements}


def imported():
    """Return the top-level packages that a file of the package imports anywhere, but tangora and Python's own."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - {"tangora"} - sys.stdlib_module_names


def test_everything_imported_is_declared():
    homes = packages_distributions()
    needed, extra = declared(PROJECT["dependencies"]), set()
    for requirements in PROJECT["optional-dependencies"].values():
        extra |= declared(requirements)
    for package in imported() - HOSTS:
        names = {normal(name) for name in homes.get(package, [package])}
        assert names & (needed | extra if package in OPTIONAL else needed), package


def test_the_citation_names_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == PROJECT["version"]
    assert cited["license"] == PROJECT["license"]


def test_the_lowest_versions_are_those_that_are_declared():
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = {
        normal(pin.name): pin for pin in (Requirement(line) for line in lines if not line.startswith("#"))
    }
    for requirement in map(Requirement, PROJECT["dependencies"]):
        pin = lowest[normal(requirement.name)]
        version = str(pin.specifier).removeprefix("==")
        assert requirement.specifier.contains(version), requirement
        floor = str(requirement.specifier).removeprefix(">=")
        assert version == floor or version.startswith(f"{floor}."), requirement


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    for name in ("src", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    build = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        str(tmp_path),
    ]
    subprocess.run(build, check=True, capture_output=True)
    distributions = sorted((tmp_path / "dist").iterdir())
    assert [path.name.endswith(".tar.gz") for path in distributions].count(True) == 1
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, distributions)], check=True)
    wheel = next(path for path in distributions if path.suffix == ".whl")
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if ".dist-info/" not in name]
        metadata = message_from_bytes(files.read(next(n for n in files.namelist() if n.endswith("METADATA"))))
    there = {
        path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*") if path.is_file()
    }
    assert set(names) == {name for name in there if "__pycache__" not in name}
    assert "tangora/py.typed" in names
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_package_knows_its_version():
    assert tangora.__version__ == PROJECT["version"]
