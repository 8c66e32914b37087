"""The documentation site: everything exported has a place on it."""

import ast
import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

import tangora
from tangora import curvature

API = Path(__file__).parent.parent / "docs" / "api"


def test_everything_exported_is_on_a_page_of_the_reference_once():
    placed = re.findall(
        r"^::: (\S+)$", "\n".join(page.read_text() for page in API.glob("*.md")), re.MULTILINE
    )
    objects = [resolve_name(name) for name in placed]
    assert len(objects) == len({id(each) for each in objects})
    exported = [getattr(tangora, name) for name in tangora.__all__ if name != "curvature"]
    exported += [getattr(curvature, name) for name in curvature.__all__]
    assert [each for each in exported if not any(each is one for one in objects)] == []


def test_the_reference_shows_no_module_in_place_of_a_function_with_its_name():
    griffe = pytest.importorskip("griffe", reason="needs the extra docs")
    package = griffe.load(
        "tangora", search_paths=[Path(tangora.__file__).parent.parent], resolve_aliases=True
    )
    placed = re.findall(
        r"^::: tangora\.(\S+)$", "\n".join(page.read_text() for page in API.glob("*.md")), re.MULTILINE
    )
    assert [name for name in placed if package[name].is_module] == []


def test_troubleshooting_quotes_messages_as_they_are():
    said = [
        node.value
        for path in Path(tangora.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    page = (API.parent / "answers" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    parts = [
        part.strip() for row in rows for quote in re.findall(r"`([^`]+)`", row) for part in quote.split("…")
    ]
    assert len(rows) > 60
    assert [part for part in parts if not any(part in text for text in said)] == []


def test_lists_are_lists():
    markdown = pytest.importorskip("markdown", reason="needs the extra docs")
    pages = {page: page.read_text() for page in API.parent.rglob("*.md")}
    texts = {
        page: markdown.markdown(text, extensions=["tables", "fenced_code"]) for page, text in pages.items()
    }
    paragraphs = [
        (page.name, part) for page, text in texts.items() for part in re.findall(r"(?s)<p>(.*?)</p>", text)
    ]
    assert [each for each in paragraphs if re.search(r"\n(- |\d+\. )", each[1])] == []
