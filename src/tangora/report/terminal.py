"""Tables for the terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text


def rich_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Lay out a table whose first column is a name."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for index, header in enumerate(headers):
        table.add_column(
            Text(header),
            justify="right" if index else "left",
            overflow="fold",
            no_wrap=index > 0,
            min_width=8 if index == 0 else None,
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
