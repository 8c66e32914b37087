"""No cell of a printed table is ever cut, however narrow the terminal is."""

import pytest

from tangora.report import formats
from tangora.report.comparison.benchmark_table import rich_benchmarks
from tangora.report.comparison.end_points import rich_flatness
from tangora.report.comparison.results_table import rich_table
from tangora.report.statistics.judgement import judge
from tangora.report.terminal_table import TerminalTable
from tests.report.pages import in_terminal
from tests.report.synthetic import make_comparison, make_record, realistic, realistic_judged, realistic_rows
from tests.report.test_benchmark_table import compared
from tests.report.test_flatness import flat, space

WIDTHS = [60, 80, 200]
NAMES = ["lora", "full", "tangent-muon/onesided", "a-recipe-with-a-very-long-name/after"]


def wide(**options):
    headers = ["recipe", *(f"measure number {index}" for index in range(9))]
    rows = [[name, *(f"{2.8e3 * 10**index:.3g} MB" for index in range(9))] for name in NAMES]
    return TerminalTable("A wide table", headers, rows, "How to read it", **options)


def check_whole(table, width):
    text = in_terminal(table, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = text.split()
    for row in table.rows:
        for index, cell in enumerate(row):
            for line in cell.splitlines():
                if index in table.wrapped:
                    assert set(line.split()) <= set(words), (line, text)
                else:
                    assert line in text, (line, text)
    return text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("options", [{}, {"tight": True}, {"wrapped": range(10)}])
def test_every_cell_of_a_wide_table_is_found_whole(width, options):
    table = TerminalTable("", wide().headers, wide().rows[:3], **options)
    check_whole(table, width)


def test_a_split_table_repeats_the_names_and_keeps_the_order_of_its_columns():
    text = in_terminal(wide(), width=80)
    assert text.count("lora ") == text.count("recipe ") > 1
    at = [text.index(cell) for cell in wide().rows[0]]
    assert at == sorted(at)
    assert text.startswith("A wide table")
    assert text.rstrip().endswith("How to read it")
    assert in_terminal(wide(), width=300).count("lora ") == 1


def test_a_name_longer_than_half_the_width_is_folded_and_loses_nothing():
    name = "layers." * 20 + "q_proj"
    text = in_terminal(TerminalTable("", ["layer", "rank"], [[name, "16"]]), width=60)
    assert name in "".join(text.split()).replace("16", "")
    assert "16" in text


def test_nothing_but_the_terminal_limits_a_width():
    assert "1234567890" in "".join(
        in_terminal(TerminalTable("", ["a", "b"], [["x", "1234567890"]]), width=8).split()
    )


def measured():
    runs = [
        make_record(
            name, 1e-4, seed, flatness=flat(seed, gap=0.171, spaces={"weights": space(2.8e3 + 1e5 * seed)})
        )
        for name in ("lora", "tangent-muon/onesided")
        for seed in range(3)
    ]
    return judge(make_comparison(runs))


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_of_a_comparison(width):
    judged = measured()
    check_whole(rich_flatness(judged), width)
    check_whole(rich_benchmarks(judge(compared())), width)
    check_whole(rich_table(judged.rows, judged.comparison), width)
    text = check_whole(rich_table(realistic_rows(), realistic()), width)
    for row in realistic_judged().rows:
        assert formats.seconds(row.seconds) in text
