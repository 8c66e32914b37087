import csv

import pytest

from tangora.report import TimeSplit, formats, rich_table, summarize, write_csv
from tangora.report.comparison.costs import costs_table
from tests.report.pages import in_terminal
from tests.report.synthetic import diverged, make_comparison, make_record, realistic, realistic_rows


def rendered(comparison, width, rows=None):
    return in_terminal(rich_table(rows or summarize(comparison), comparison), width=width)


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_shows_the_numbers_and_what_was_compared(width):
    text = rendered(realistic(), width, realistic_rows())
    assert max(map(len, text.splitlines())) <= width
    assert all(word in text for word in ("MiniLM on BBC News", "200 test", "seeds: 3"))
    for row in realistic_rows():
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{row.recipe} "))
        assert formats.metric(row.test) in line
        assert formats.learning_rate(row.learning_rate) in line
        assert width == 80 or formats.interval(row.interval) in line


def test_terminal_does_not_read_markup_in_names():
    metrics = {split: {"[/m]": 0.5} for split in ("validation", "test")}
    text = rendered(make_comparison([make_record("[red]x[/nope]", metrics=metrics)], metric="[/m]"), 160)
    assert "[red]x[/nope]" in text
    assert "[/m]" in text


def test_times_are_medians_with_ranges():
    def run(seed, seconds, optimizer):
        time = TimeSplit(start=0, forward_backward=seconds, optimizer=optimizer, evaluation=0)
        return make_record(seed=seed, time=time)

    (row,) = summarize(make_comparison([run(0, 7.0, 0.4), run(1, 20.0, 0.8), run(2, 70.0, 80.0)]))
    assert (row.seconds, row.seconds_range) == (20.8, (7.4, 150.0))
    assert (row.step_milliseconds, row.step_milliseconds_range) == (200.0, (100.0, 20_000.0))
    (cells,) = costs_table([row]).rows
    assert cells[1].lines == ["20.8 s", "7.4 s to 2 min 30 s"]
    (row,) = summarize(make_comparison([run(0, 7.0, 0.4)]))
    assert costs_table([row]).rows[0][1].lines == ["7.4 s"]


def test_csv_is_unrounded(tmp_path):
    rows = summarize(make_comparison([make_record(test=1 / 3), diverged("x", 1.0)]))
    with write_csv(rows, tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [line["recipe"] for line in read] == ["lora", "x"]
    assert float(read[0]["test"]) == 1 / 3
    assert float(read[0]["seconds_forward_backward"]) == 8.0
    assert float(read[0]["seconds_range_high"]) == float(read[0]["seconds"])
    assert read[1]["test"] == read[1]["seconds_start"] == read[1]["interval_low"] == ""


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formats.metric(0.96204), "0.9620"),
        (formats.metric(1234.5), "1234.50"),
        (formats.metric(None), "–"),
        (formats.metric(float("nan")), "nan"),
        (formats.difference(-0.003), "−0.0030"),
        (formats.difference(-1e-9), "+0.0000"),
        (formats.interval((-0.1, 0.2), sign=True), "−0.1000 to +0.2000"),
        (formats.learning_rate(2e-4), "2e-4"),
        (formats.learning_rate(1.25e-5), "1.25e-5"),
        (formats.learning_rate(0.05), "0.05"),
        (formats.seconds(0.0421), "0.042 s"),
        (formats.seconds(38.04), "38.0 s"),
        (formats.seconds(245.0), "4 min 05 s"),
        (formats.seconds(7800.0), "2 h 10 min"),
        (formats.size(0), "0 B"),
        (formats.size(1_234_567), "1.2 MB"),
        (formats.size(999_999), "1.0 MB"),
        (formats.size(5 * 10**15), "5000 TB"),
        (formats.count(250_000), "250 k"),
        (formats.count(12), "12"),
        (formats.share(0.627), "63 %"),
        (formats.share(-0.1), "−10 %"),
        (formats.listing(["a"]), "a"),
        (formats.listing(["a", "b", "c"]), "a, b and c"),
        (formats.plural(1, "seed"), "1 seed"),
    ],
)
def test_formats(written, expected):
    assert written == expected
