"""Results of experiments: what survives JSON, and what pictures and pages show of them."""

import html
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from reproductions import EXPERIMENTS
from reproductions.page import bounds_text, cell_text, render_page, summary
from reproductions.result import (
    Check,
    Interval,
    Outcome,
    Record,
    Result,
    Table,
    at_least,
    at_most,
    load_record,
    near,
    outcomes,
    save_record,
)
from tangora._checks import InputError
from tangora.report.drawing.charts import figure_section
from tangora.report.drawing.panels import Figure, Heatmap, Panel, Series
from tangora.report.drawing.pictures import save_pictures
from tests.report.synthetic import HOSTILE

NAN, INF = float("nan"), float("inf")
RECORDED = Path(__file__).parents[2] / "benchmarks" / "reproduce"


def result(**changes):
    curve = Series("fast", [0, 1, 2], [1.0, 0.1, 0.0], low=[0.9, 0.09, 0], high=[1.1, 0.11, 0.01])
    theory = Series(HOSTILE, torch.arange(3), np.array([1.0, NAN, 0.01]), style="dashed")
    heat = Heatmap([0, 1, 2], [0, 1], [[1, 2, INF], [3, 4, 5]], "height")
    values = {
        "findings": ["It works.", HOSTILE],
        "tables": [
            Table(
                "Rates",
                ("method", "rate", "steps"),
                [("fast", 0.512345, 12), (HOSTILE, NAN, None)],
                "Of all.",
            )
        ],
        "figures": [
            Figure(
                "errors",
                "Errors",
                "They fall.",
                [
                    Panel("left", "step", "error", [curve, theory], yscale="log"),
                    Panel("right", "x", "y", [Series("fast", [0, 1], [0, 1], style="points")], heat),
                ],
            ),
            Figure("one", "One", "Alone.", [Panel("p", "N", "e", [curve], xscale="log")]),
        ],
        "checks": [
            Outcome("Rate is near a half.", 0.512345, 0.5, 0.6, "theorem 1"),
            Outcome("Nothing is lost.", 3, None, 2, HOSTILE),
        ],
        "data": {"raw": torch.eye(2), "worst": -INF},
    }
    return Result(**values | changes)


def record(**changes):
    values = {
        "name": "fake",
        "title": f"A fake {HOSTILE}",
        "source": "nowhere",
        "stand_ins": ("Sizes are ours.",),
        "quick": False,
        "command": "python -m reproductions fake --set a='<b>'",
        "settings": {"sizes": [1, 2], "seed": 0},
        "result": result(),
        "seconds": 1.5,
        "versions": {"torch": "2"},
        "machine": "none",
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Record(**values | changes)


def test_result_survives_json():
    adapter = TypeAdapter(Result)
    text = adapter.dump_json(result())
    assert adapter.validate_json(text) == result()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_record_survives_its_file(tmp_path):
    path = save_record(record(), tmp_path / "r.json")
    assert load_record(path) == record()
    # lists of numbers take one line
    assert '"x": [ 0, 1, 2 ]' in path.read_text(encoding="utf-8")


def test_what_is_not_finite_becomes_none():
    series = Series("a", [0, INF, 2], [NAN, 1, -INF])
    assert (series.x, series.y) == ((0, None, 2), (None, 1, None))
    assert result().data == {"raw": [[1.0, 0.0], [0.0, 1.0]], "worst": None}


@pytest.mark.parametrize(
    ("value", "low", "high", "passed"),
    [
        (1, None, 1, True),
        (1.1, None, 1, False),
        (0.9, 1, None, False),
        (1, 1, 1, True),
        (1e9, None, None, True),
        (NAN, None, None, False),
        (INF, 0, None, False),
        (NAN, 0, 1, False),
        (0.5, -INF, INF, True),
    ],
)
def test_check_holds_inside_its_interval_only(value, low, high, passed):
    check = Outcome("c", value, low, high, "s")
    assert check.passed is passed
    assert result(checks=[check]).passed is passed


def test_a_declared_check_says_what_is_expected_and_how_it_is_measured():
    declared = [
        Check("Few.", at_most(3), lambda found: found["count"], "page 1"),
        Check("Many.", at_least(10), lambda found: found["count"], "page 2"),
        Check("About a half.", near(0.5, tolerance=0.25), lambda found: found["rate"], "page 3"),
        Check("Between.", Interval(0, 1), lambda found: found["rate"], "page 4"),
        Check("Lost.", at_most(1), lambda found: found["rate"] * NAN, "page 5"),
    ]
    made = outcomes(declared, {"count": 4, "rate": 0.75})
    assert [check.passed for check in made] == [False, False, True, True, False]
    assert made[2] == Outcome("About a half.", 0.75, 0.25, 0.75, "page 3")
    assert made[4].value is None


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_experiments_are_still_read_and_shown(path):
    read = load_record(path)
    assert read.name == path.stem
    assert read.title in html.unescape(render_page(read))
    assert summary(read)
    # what is read is what is written, but for what is younger than these
    younger = {"model_description": None, "processes": 1, "launcher": None}
    written = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(read.model_dump_json()) == younger | written


def test_recorded_experiments_are_all_there():
    assert {path.stem for path in RECORDED.glob("*.json")} == set(EXPERIMENTS)


@pytest.mark.messages
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Series("a", [1, 2], [1]), "y of series 'a' must have 2 values; got 1"),
        (lambda: Series("a", [1], [1], low=[0]), "both low and high"),
        (lambda: Series("a", [1], ["b"]), "must hold numbers; got 'b'"),
        (lambda: Heatmap([1, 2], [1], [[1]], "h"), "1 rows of 2 values"),
        (lambda: Table("t", ("a", "b"), [(1,)]), "2 cells each"),
        (lambda: Figure("f", "f", "f", []), "must not be empty"),
        (lambda: Outcome("c", 1, NAN, None, "s"), "got NaN"),
        (lambda: result(data={"a": object()}), "must be numbers, texts"),
    ],
)
def test_bad_results_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_pictures_are_written(tmp_path):
    paths = save_pictures(result().figures, tmp_path)
    assert [path.name for path in paths] == ["errors.png", "one.png"]
    for path in paths:
        picture = matplotlib.image.imread(path)
        assert picture.shape[0] > 300
        assert picture.std() > 0.02  # not blank
    wide, narrow = (matplotlib.image.imread(path).shape[1] for path in paths)
    assert wide > narrow


def test_series_look_alike_in_all_panels_of_a_figure():
    left, right = figure_section(result().figures[0]).charts
    of = [
        {trace["line"]["color"] for trace in chart.figure["data"] if trace.get("name") == "fast"}
        for chart in (left, right)
    ]
    assert of[0] == of[1]
    assert len(of[0]) == 1


def test_charts_hold_the_numbers_and_leave_out_what_a_logarithm_cannot_show():
    left, right = figure_section(result().figures[0]).charts
    curve = next(trace for trace in left.figure["data"] if trace.get("name") == "fast")
    assert curve["y"] == [1.0, 0.1, None]
    band = next(trace for trace in left.figure["data"] if trace.get("fill"))
    assert band["y"] == [1.1, 0.11, 0.09, 0.9]
    assert left.figure["layout"]["yaxis"]["type"] == "log"
    assert right.figure["layout"]["yaxis"]["type"] == "linear"
    heat = next(trace for trace in right.figure["data"] if trace["type"] == "heatmap")
    assert heat["z"] == [[1, 2, None], [3, 4, 5]]


def test_page_shows_everything():
    text = render_page(record())
    assert "__HOSTILE__" not in text
    assert HOSTILE not in text.replace(html.escape(HOSTILE), "").replace(str(HOSTILE.encode()), "")
    made = result()
    for table in made.tables:
        for word in (table.title, table.caption, *table.columns):
            assert html.escape(str(word)) in text
        for row in table.rows:
            assert all(str(html_escape(cell_text(cell))) in text for cell in row)
    for check in made.checks:
        assert html_escape(check.claim) in text
        assert html_escape(check.source) in text
    for figure in made.figures:
        assert figure.caption in text
        for number in range(1, len(figure.panels) + 1):
            assert f'id="{figure.name}-{number}"' in text
    for sentence in (*made.findings, *record().stand_ins, record().command):
        assert html_escape(sentence) in text
    assert 'class="yes"' in text
    assert 'class="no"' in text
    assert "http://" not in text.split("<script>")[0]


def html_escape(text):
    from markupsafe import escape

    return str(escape(text))


def test_page_is_the_same_twice():
    assert render_page(record()) == render_page(record())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        (None, "–"),
        (12345, "12345"),
        (12345.6, "12346"),
        (0.51234, "0.512"),
        (-1e-10, "−1e−10"),
        (1.5e7, "1.5e7"),
        (0.0, "0"),
        (True, "True"),
    ],
)
def test_cells(value, text):
    assert cell_text(value) == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (None, 1e-10, "at most 1e−10"),
        (0.9, None, "at least 0.9"),
        (0.9, 1.1, "0.9 to 1.1"),
        (2, 2, "2"),
        (None, None, "finite"),
    ],
)
def test_bounds(low, high, text):
    assert bounds_text(Outcome("c", 1, low, high, "s")) == text


def test_summary_counts():
    assert summary(record()) == "1 of 2 checks disagrees with the source."
    good = Outcome("c", 1, 0, 2, "s")
    assert summary(record(result=result(checks=[good, good]))) == "All 2 checks agree with the source."
    assert summary(record(result=result(checks=[good]))) == "The only check agrees with the source."
    assert "quick size" in summary(record(quick=True))


def test_corrupt_files_are_named(tmp_path):
    path = tmp_path / "r.json"
    with pytest.raises(InputError, match="cannot be read"):
        load_record(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="not valid JSON"):
        load_record(path)
    path.write_text('{"name": 1}', encoding="utf-8")
    with pytest.raises(InputError, match="not a valid reproduction"):
        load_record(path)
