"""A table of a report, for a page, for the terminal and as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from tangora.report import formats

Value: TypeAlias = float | str | None


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    lines: Sequence[str]
    """All but the first are small print."""
    value: Value = None
    """What it is sorted by; None comes last."""
    kind: str = ""
    """CSS class of the text."""
    more: str = ""
    """Longer text that is shown on demand."""


@dataclass(frozen=True)
class Table:
    """Headers and rows of cells, the first of which names the row; on a page its id is ``<name>-table``."""

    name: str
    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: Sequence[int] = ()
    """Indices of columns that hold words, which are set to the left."""
    sortable: bool = True
    filters: Sequence[str] = ()
    """Headers of columns by which a page's form filters the rows."""

    def choices(self, header: str) -> list[tuple[str, str]]:
        """List the values of a column and how they are written; those of the first keep the order of the rows."""
        index = list(self.headers).index(header)
        found = {str(row[index].value): row[index].lines[0] for row in self.rows}
        return list(found.items()) if index == 0 else sorted(found.items())

    def rich(self, title: str, **options: Any) -> RichTable:
        """Lay the table out for a terminal."""
        rows = [["\n".join(cell.lines) for cell in row] for row in self.rows]
        return terminal_table(title, self.headers, rows, **options)

    def only(self, headers: Mapping[str, str]) -> "Table":
        """Keep some columns, under shorter headers."""
        kept = [index for index, header in enumerate(self.headers) if header in headers]
        return Table(
            self.name,
            self.caption,
            [headers[self.headers[index]] for index in kept],
            [[row[index] for index in kept] for row in self.rows],
        )


def cell(text: str, value: Value = None) -> Cell:
    """Make a cell of one line."""
    return Cell([text], value)


def number_cell(value: float | None, *lines: str) -> Cell:
    """Make a cell of a number, without those of the lines beneath it that say nothing."""
    return Cell([lines[0], *(line for line in lines[1:] if line != formats.MISSING)], value)


def text_table(name: str, caption: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Make a table of plain texts, in an order that says something."""
    return Table(name, caption, headers, [[cell(text) for text in row] for row in rows], sortable=False)


def terminal_table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str | None = None,
    wrapped: Sequence[int] = (0,),
    tight: bool = False,
) -> RichTable:
    """Lay out a table whose first column is a name; in a narrow terminal only some columns wrap."""
    table = RichTable(
        title=Text(title),
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0 if tight else (0, 1, 0, 0),
    )
    for index, header in enumerate(headers):
        table.add_column(
            Text(header),
            justify="right" if index else "left",
            overflow="fold",
            no_wrap=index not in wrapped,
            min_width=None if index or tight else 8,
        )
    for row in rows:
        table.add_row(*(Text(text) for text in row))  # Text, so that brackets in a name are no markup
    return table


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """Write lines of named cells as CSV."""
    names = list(dict.fromkeys(name for cells in lines for name in cells))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
