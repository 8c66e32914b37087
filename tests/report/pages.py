"""What the tests ask of a page, its tags, tables and texts, and of a terminal."""

import io
from html.parser import HTMLParser

from rich.console import Console

VOID = {"meta", "line", "br", "link", "img", "input"}


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


def texts(table):
    """A table as a page shows it: headers and rows."""
    return [list(table.headers), *([cell.lines[0] for cell in row] for row in table.rows)]


def in_terminal(*tables, width=80):
    """What a terminal of some width shows of tables."""
    console = Console(width=width, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.file.getvalue()
