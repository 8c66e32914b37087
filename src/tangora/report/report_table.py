"""A table of a report, for a page, for the terminal and as CSV."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from tangora.report import formats
from tangora.report.terminal_table import TerminalTable

_Value: TypeAlias = float | str | None
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    lines: Sequence[str]
    """All but the first are small print."""
    value: _Value = None
    """Sorting key; None comes last."""
    kind: str = ""
    """CSS class of the text."""
    more: str = ""
    """Longer text that is shown on demand."""


def cell(text: str, *beneath: str, value: _Value = None, kind: str = "", more: str = "") -> Cell:
    """Make a cell, without those of the lines beneath that say nothing; it is sorted by its text or by a value."""
    lines = [text, *(line for line in beneath if line != formats.MISSING)]
    if value is None and text not in {"", formats.MISSING}:
        value = text
    return Cell(lines, value, kind, more)


def number(value: float | None, write: Callable[[float], str], *beneath: str) -> Cell:
    """Make a cell of a number, by which it is sorted."""
    return cell(formats.MISSING if value is None else write(value), *beneath, value=value)


@dataclass(frozen=True)
class Table:
    """Headers and rows of cells, the first of which names the row; on a page its id is ``<name>-table``."""

    name: str
    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: Sequence[str] = ()
    """Headers of columns that hold words, which are set to the left."""
    sortable: bool = True
    filters: Sequence[str] = ()
    """Headers of columns by which a page's form filters the rows."""

    @classmethod
    def of(
        cls,
        name: str,
        caption: str,
        items: Iterable[_Item],
        columns: Mapping[str, Callable[[_Item], Cell | str]],
        **options: Any,
    ) -> "Table":
        """Make a table with a row for each item."""
        rows = [[write(item) for write in columns.values()] for item in items]
        return cls.texts(name, caption, list(columns), rows, **options)

    @classmethod
    def texts(
        cls,
        name: str,
        caption: str,
        headers: Sequence[str],
        rows: Sequence[Sequence[Cell | str]],
        **options: Any,
    ) -> "Table":
        """Make a table of which some cells are mere text."""
        cells = [[cell(one) if isinstance(one, str) else one for one in row] for row in rows]
        return cls(name, caption, headers, cells, **options)

    def choices(self, header: str) -> list[tuple[str, str]]:
        """List the values of a column and how they are written; those of the first keep the order of the rows."""
        index = list(self.headers).index(header)
        found = {str(row[index].value): row[index].lines[0] for row in self.rows}
        return list(found.items()) if index == 0 else sorted(found.items())

    def rich(self, title: str, **options: Any) -> TerminalTable:
        """Lay the table out for a terminal."""
        rows = [["\n".join(cell.lines) for cell in row] for row in self.rows]
        return TerminalTable(title, self.headers, rows, **options)

    def only(self, headers: Mapping[str, str]) -> "Table":
        """Keep some columns, under shorter headers."""
        kept = [index for index, header in enumerate(self.headers) if header in headers]
        return replace(
            self,
            headers=[headers[self.headers[index]] for index in kept],
            rows=[[row[index] for index in kept] for row in self.rows],
        )

    def filled(self) -> "Table":
        """Leave out the columns that are empty."""
        filled = {
            header: header
            for index, header in enumerate(self.headers)
            if any(row[index].lines[0] != formats.MISSING for row in self.rows)
        }
        return self.only(filled)


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """Write lines of named cells as CSV."""
    names = list(dict.fromkeys(name for cells in lines for name in cells))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
