"""The house stays small and easy to find one's way in: sizes of files, names that mean one thing."""

import ast
from collections import Counter
from pathlib import Path
from statistics import median

import tangora

SRC = Path(tangora.__file__).parent
FILES = [path for path in SRC.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
LENGTHS = {path: path.read_text(encoding="utf-8").count("\n") for path in FILES}


def test_files_are_short():
    assert {str(path): length for path, length in LENGTHS.items() if length > 400} == {}
    assert median(LENGTHS.values()) <= 160


def test_file_names_are_unique():
    counted = Counter(path.name for path in FILES)
    assert [name for name, number in counted.items() if number > 1] == []


def test_public_classes_have_one_meaning():
    defined = Counter(
        node.name
        for path in FILES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, number in defined.items() if number > 1] == []
