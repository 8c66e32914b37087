"""What all pages have in common: nothing from outside, proper HTML, names that stay text, equal bytes."""

from dataclasses import replace

import pytest

from tangora._checks import InputError
from tangora.report import (
    load_diagnosis,
    render_diagnosis,
    render_page,
    save_json,
    write_diagnosis,
    write_page,
    write_study,
)
from tangora.report.curvature import load_curvature, render_curvature, write_curvature
from tangora.report.layout import packed_plotly
from tests.report.pages import Page
from tests.report.synthetic import HOSTILE, make_comparison, make_record, realistic
from tests.report.test_curvature_page import layers, whole
from tests.report.test_curvature_page import record as curvature_record
from tests.report.test_diagnosis_page import diagnosis
from tests.report.test_diagnosis_page import record as diagnosis_record

LOADING = {"src", "href", "srcset", "data", "action", "xlink:href", "poster"}
HOSTILE_FIELDS = {"title": HOSTILE, "command": HOSTILE, "settings": {HOSTILE: "</pre><script>"}}
HOSTILE_ORIGIN = {"machine": HOSTILE, "commit": HOSTILE, "versions": {HOSTILE: HOSTILE}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module", params=["comparison", "study", "diagnosis", "curvature"])
def text(request, folder):
    if request.param == "study":
        return write_study({"a": realistic()}, folder / "report.html", "Title", "tangora run it").read_text()
    made = {
        "comparison": lambda: render_page(realistic()),
        "diagnosis": lambda: render_diagnosis(diagnosis_record()),
        "curvature": lambda: render_curvature(whole()),
    }
    return made[request.param]()


def test_nothing_is_loaded_from_anywhere(text):
    page = Page(text)
    loading = [(tag, attrs) for tag, attrs in page.tags if LOADING & set(attrs)]
    assert all(
        tag == "a" and attrs["href"].startswith(("data:text/csv", "a/report")) for tag, attrs in loading
    )
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert text.count(packed_plotly()) == 1
    rest = text.replace(packed_plotly(), "")
    assert not any(word in rest for word in ("http://", "https://", "@import"))


def test_elements_are_closed_and_labelled(text):
    page = Page(text)
    assert page.open == []
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs} <= set(ids)
    assert {attrs["for"] for tag, attrs in page.tags if tag == "label"} <= set(ids)
    assert all(attrs["aria-label"] for _, attrs in page.tags if attrs.get("class") == "plot")


def test_the_command_is_there(text):
    assert "tangora " in "".join(Page(text).text).split("How to repeat it")[1]


@pytest.mark.parametrize("record", [realistic().records[0], diagnosis_record(), whole()])
def test_what_is_needed_to_repeat_it(record):
    settings = {"nested": {"key": "value"}, "unset": None}
    record = record.model_copy(update={"settings": settings})
    if hasattr(record, "recipe"):
        shown = render_page(make_comparison([record], settings=settings))
    else:
        shown = (render_diagnosis if hasattr(record, "diagnosis") else render_curvature)(record)
    parts = ("nested.key", ">value<", record.machine, record.commit, *record.versions.values())
    assert all(part in shown for part in parts)
    assert ">null<" not in shown


def hostile_pages():
    names = [f"layers.{index}.{HOSTILE.replace('.', '')}" for index in range(2)] + ["%{x}</script>"]
    run = make_record(
        HOSTILE, error=f"</script>{HOSTILE}", settings=HOSTILE_FIELDS["settings"], **HOSTILE_ORIGIN
    )
    yield render_page(make_comparison([run, make_record()], **HOSTILE_FIELDS)), "results-table"
    skipped = diagnosis(names, skipped={HOSTILE: HOSTILE})
    yield render_diagnosis(diagnosis_record(skipped, **HOSTILE_FIELDS, **HOSTILE_ORIGIN)), "layers-table"
    named = [replace(layer, name=name) for layer, name in zip(layers(), names, strict=False)]
    yield (
        render_curvature(whole().model_copy(update={"layers": named} | HOSTILE_FIELDS | HOSTILE_ORIGIN)),
        "layer-numbers-table",
    )


@pytest.mark.parametrize(("text", "table"), hostile_pages(), ids=["comparison", "diagnosis", "curvature"])
def test_hostile_text_stays_text(text, table):
    assert "<script>alert" not in text
    page = Page(text)
    assert page.open == []
    assert len(page.scripts) == sum(attrs.get("class") == "plot" for _, attrs in page.tags) + 2
    assert any("<script>" in cell for row in page.tables[table] for cell in row)
    assert [tag for tag, attrs in page.tags if any(name.startswith("on") for name in attrs)] == []


RECORDS = {
    "diagnosis": (diagnosis_record(), load_diagnosis, render_diagnosis, write_diagnosis),
    "curvature": (curvature_record(), load_curvature, render_curvature, write_curvature),
}


def test_a_comparison_gives_the_same_bytes_again(tmp_path):
    assert write_page(realistic(), tmp_path / "page.html").read_bytes() == render_page(realistic()).encode()


@pytest.mark.parametrize(("record", "load", "render", "write"), RECORDS.values(), ids=RECORDS)
def test_a_record_gives_the_same_page_again(record, load, render, write, tmp_path):
    path = save_json(record, tmp_path / "record.json")
    assert load(path) == record
    assert write(load(path), tmp_path / "page.html").read_bytes() == render(record).encode()
    for content, word in (("{}", "not a valid"), ("{", "not valid JSON"), (None, "cannot be read")):
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(InputError, match=word):
            load(path)
