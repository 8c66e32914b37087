"""Results of experiments: what survives JSON, and what pictures and pages show of them."""

import html
import json
from dataclasses import asdict

import matplotlib.image
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from tangora._checks import InputError
from tangora.report.drawing.charts import charts
from tangora.report.reproduction import (
    Check,
    Figure,
    Heatmap,
    Panel,
    ReproductionRecord,
    Result,
    Series,
    Table,
    load_reproduction,
    outcome,
    render_reproduction,
    save_pictures,
)
from tangora.report.reproduction.record import save_reproduction
from tangora.report.reproduction.tables import bounds_text, cell_text
from tests.report.synthetic import HOSTILE

NAN, INF = float("nan"), float("inf")


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
            Check("Rate is near a half.", 0.512345, 0.5, 0.6, "theorem 1"),
            Check("Nothing is lost.", 3, None, 2, HOSTILE),
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
        "command": "tangora reproduce fake --set a='<b>'",
        "settings": {"sizes": [1, 2], "seed": 0},
        "result": result(),
        "seconds": 1.5,
        "versions": {"torch": "2"},
        "machine": "none",
        "created": "2026-01-01T00:00:00+00:00",
    }
    return ReproductionRecord(**values | changes)


def test_result_survives_json():
    adapter = TypeAdapter(Result)
    text = adapter.dump_json(result())
    assert adapter.validate_json(text) == result()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert json.loads(text) == json.loads(json.dumps(asdict(result())))


def test_record_survives_its_file(tmp_path):
    path = save_reproduction(record(), tmp_path / "r.json")
    assert load_reproduction(path) == record()
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
    check = Check("c", value, low, high, "s")
    assert check.passed is passed
    assert result(checks=[check]).passed is passed


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
        (lambda: Check("c", 1, NAN, None, "s"), "got NaN"),
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
    left, right = charts(result().figures[0])
    of = [
        {trace["line"]["color"] for trace in chart.figure["data"] if trace.get("name") == "fast"}
        for chart in (left, right)
    ]
    assert of[0] == of[1]
    assert len(of[0]) == 1


def test_charts_hold_the_numbers_and_leave_out_what_a_logarithm_cannot_show():
    left, right = charts(result().figures[0])
    curve = next(trace for trace in left.figure["data"] if trace.get("name") == "fast")
    assert curve["y"] == [1.0, 0.1, None]
    band = next(trace for trace in left.figure["data"] if trace.get("fill"))
    assert band["y"] == [1.1, 0.11, 0.09, 0.9]
    assert left.figure["layout"]["yaxis"]["type"] == "log"
    assert right.figure["layout"]["yaxis"]["type"] == "linear"
    heat = next(trace for trace in right.figure["data"] if trace["type"] == "heatmap")
    assert heat["z"] == [[1, 2, None], [3, 4, 5]]


def test_page_shows_everything():
    text = render_reproduction(record())
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
    assert render_reproduction(record()) == render_reproduction(record())


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
    assert bounds_text(Check("c", 1, low, high, "s")) == text


def test_outcome_counts():
    assert outcome(record()) == "1 of 2 checks disagrees with the source."
    good = Check("c", 1, 0, 2, "s")
    assert outcome(record(result=result(checks=[good, good]))) == "All 2 checks agree with the source."
    assert outcome(record(result=result(checks=[good]))) == "The only check agrees with the source."
    assert "quick size" in outcome(record(quick=True))


def test_corrupt_files_are_named(tmp_path):
    path = tmp_path / "r.json"
    with pytest.raises(InputError, match="cannot be read"):
        load_reproduction(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="not valid JSON"):
        load_reproduction(path)
    path.write_text('{"name": 1}', encoding="utf-8")
    with pytest.raises(InputError, match="no valid reproduction"):
        load_reproduction(path)
