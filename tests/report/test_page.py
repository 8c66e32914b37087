import json
from html.parser import HTMLParser

import pytest
from plotly.offline import get_plotlyjs

from tangora._checks import InputError
from tangora.report import formats, render_page, verdict, write_page
from tests.report.synthetic import HOSTILE, diverged, make_comparison, make_record, realistic, realistic_rows

VOID = {"meta", "line", "br", "link", "img"}


class Page(HTMLParser):
    """What the tests ask of a page: its tags, its tables, the text of each element with an id."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.tables, self.scripts, self.text = [], [], {}, [], []
        self.table = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = self.tables.setdefault(dict(attrs)["id"], [])
        elif tag == "tr":
            self.table.append([])
        elif tag in {"td", "th"}:
            self.table[-1].append("")
        elif tag == "br":
            self.table[-1][-1] += "\n"
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif {"td", "th"} & set(self.open):
            self.table[-1][-1] += data
        self.text.append(data)


@pytest.fixture(scope="module")
def text():
    return render_page(realistic())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_nothing_is_loaded_from_anywhere(page):
    loading = {"src", "href", "srcset", "data", "action", "xlink:href", "poster"}
    assert [tag for tag in page.tags if loading & set(tag[1])] == []
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_no_address_outside_plotly(text):
    assert text.count(get_plotlyjs()) == 1
    rest = text.replace(get_plotlyjs(), "")
    assert "http://" not in rest
    assert "https://" not in rest
    assert "@import" not in rest


def test_elements_are_closed_and_ids_are_unique(page):
    assert page.open == []
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    labels = {attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs}
    assert labels <= set(ids)


def test_the_table_shows_the_summary(page):
    header, *lines = page.tables["results-table"]
    rows = realistic_rows()
    assert [line[0] for line in lines] == [row.recipe for row in rows]
    for line, row in zip(lines, rows, strict=True):
        cells = dict(zip(header, line, strict=True))
        assert cells["test accuracy"] == f"{formats.metric(row.test)}\n{formats.interval(row.interval)}"
        assert cells["vs lora"].split("\n")[0] == formats.difference(row.difference)
        assert cells["gap closed"] == formats.share(row.gap_closed)
        assert cells["learning rate"].split()[0] == formats.learning_rate(row.learning_rate)
        assert cells["optimizer step"] == formats.milliseconds(row.step_milliseconds)
    assert "peak memory" not in header  # not measured by any run


def test_the_verdict_comes_first(text):
    places = [text.index(part) for part in (verdict(realistic_rows())[0], "results-table", "runs-table")]
    assert places == sorted(places)


def test_every_run_is_listed_with_its_error(page):
    _, *lines = page.tables["runs-table"]
    assert len(lines) == len(realistic().records)
    (failed,) = [line for line in lines if line[4] == "failed"]
    assert "RuntimeError: out of memory" in failed[-1]
    assert "Traceback" in failed[-1]
    assert sum(line[5] == "yes" for line in lines) == sum(row.num_seeds for row in realistic_rows())


def test_what_is_needed_to_repeat_it(page):
    shown = "".join(page.text)
    for part in ("tangora compare --preset quickstart", "training.steps", "2.13.0", "two cores", "abc123"):
        assert part in shown


def test_figures_are_there(page):
    figures = [json.loads(script) for script in page.scripts[:3]]
    assert all(figure["data"] for figure in figures)
    described = [attrs for _, attrs in page.tags if attrs.get("class") == "plot"]
    assert [attrs["id"] for attrs in described] == ["loss", "sweep", "time"]
    assert all(attrs["aria-label"] for attrs in described)


def test_hostile_text_stays_text():
    record = make_record(
        HOSTILE,
        machine=HOSTILE,
        error=f"</script>{HOSTILE}",
        settings={HOSTILE: "</pre><script>"},
        versions={HOSTILE: HOSTILE},
        commit=HOSTILE,
    )
    hostile = {"title": HOSTILE, "command": HOSTILE, "settings": {HOSTILE: HOSTILE}, "metric": "accuracy"}
    text = render_page(make_comparison([record, make_record()], **hostile))
    assert "<script>alert" not in text
    page = Page(text)
    assert page.open == []
    assert len(page.scripts) == 5
    assert HOSTILE in page.tables["results-table"][1] + page.tables["results-table"][2]
    assert [tag for tag, attrs in page.tags if any(name.startswith("on") for name in attrs)] == []


def test_a_hostile_metric_stays_text():
    metric = "<b>m</b>"
    record = make_record(metrics={"validation": {metric: 0.5}, "test": {metric: 0.5}})
    assert metric not in render_page(make_comparison([record], metric=metric)).replace(get_plotlyjs(), "")


def test_rendering_twice_gives_the_same_bytes(tmp_path, text):
    assert write_page(realistic(), tmp_path / "page.html").read_bytes() == text.encode()


@pytest.mark.parametrize(
    "records",
    [[make_record()], [diverged("lora", 1e-4)], [make_record(versions={}, commit=None, settings={})]],
)
def test_little_is_enough(records):
    assert Page(render_page(make_comparison(records, settings={}))).open == []


def test_a_long_error_is_cut_but_kept():
    error = "x" * 500
    text = render_page(make_comparison([make_record(), make_record("full", status="failed", error=error)]))
    assert "x" * 120 + "…" in text
    assert error in text


def test_nothing_is_written_without_records(tmp_path):
    with pytest.raises(InputError):
        write_page(make_comparison([]), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
