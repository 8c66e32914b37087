"""Tables in a terminal: no cell is ever cut. What is too wide for one table goes on in a second one beneath."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

_EDGES = 2  # characters beside the columns of a table
_LONGEST_NAME = 0.5  # share of the width beyond which the names of rows are folded


@dataclass(frozen=True)
class _Column:
    index: int
    least: int
    """Width that splits no word, and no number from its unit."""
    wanted: int
    """Width that wraps nothing."""


@dataclass(frozen=True)
class TerminalTable:
    """A table whose first column names the row, and is repeated where the table is split to fit the terminal."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str | None = None
    wrapped: Sequence[int] = (0,)
    """Columns whose cells may wrap between words."""
    tight: bool = False
    """Whether columns are one character apart instead of two."""

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Draw one table, or several where one is too wide."""
        if self.title:
            yield Text(self.title, style="table.title")
        for columns in self._split(options.max_width - _EDGES - (self._gap - 1)):
            yield self._drawn(columns)
        if self.caption:
            yield Text(self.caption, style="table.caption")

    @property
    def _gap(self) -> int:
        return 1 if self.tight else 2

    def _column(self, index: int) -> _Column:
        header = self.headers[index].splitlines()
        lines = [line for row in self.rows for line in row[index].splitlines()]
        whole = _words(lines) if index in self.wrapped else lines
        least, wanted = (
            max(map(cell_len, texts), default=1) for texts in ([*_words(header), *whole], header + lines)
        )
        return _Column(index, least, wanted)

    def _split(self, room: int) -> Iterator[list[_Column]]:
        # as many columns in each table as have room beside the name
        name, *others = map(self._column, range(len(self.headers)))
        name = _Column(0, min(name.least, max(1, int(room * _LONGEST_NAME))), name.wanted)
        left = room - name.least - self._gap
        shown, used = [], 0
        for column in others:
            least = min(column.least, max(1, left))
            if shown and used + least > left:
                yield self._widened([name, *shown], room)
                shown, used = [], 0
            shown.append(_Column(column.index, least, column.wanted))
            used += least + self._gap
        yield self._widened([name, *shown], room)

    def _widened(self, columns: Sequence[_Column], room: int) -> list[_Column]:
        # what is left of the width goes to the columns that would wrap, the first ones first
        spare = room - sum(column.least + self._gap for column in columns) + self._gap
        found = []
        for column in columns:
            width = min(column.wanted, column.least + max(0, spare))
            spare -= width - column.least
            found.append(_Column(column.index, width, column.wanted))
        return found

    def _drawn(self, columns: Sequence[_Column]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0 if self.tight else (0, 1, 0, 0))
        for column in columns:
            # Text, so that brackets in a name are no markup
            table.add_column(
                Text(self.headers[column.index]),
                justify="right" if column.index else "left",
                overflow="fold",
                width=column.least,
            )
        for row in self.rows:
            table.add_row(*(Text(row[column.index]) for column in columns))
        return table


def _words(lines: Sequence[str]) -> list[str]:
    # a range breaks after its "to", and the letter of an eigenvalue stays with what follows
    kept = [
        line.replace(" to ", "\N{NO-BREAK SPACE}to ").replace("λ ", "λ\N{NO-BREAK SPACE}") for line in lines
    ]
    return [word for line in kept for word in line.split(" ")]
