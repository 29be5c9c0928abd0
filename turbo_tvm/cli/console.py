"""Tables for a terminal, and for a pipe, where nothing may be cut to the width of a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_COLUMNS = 200
_LEAST_COLUMNS = 16


def console(stderr: bool = False) -> Console:
    """Return a console on stdout or stderr."""
    out = Console(stderr=stderr, highlight=False, soft_wrap=False)
    return out if out.is_terminal else Console(stderr=stderr, highlight=False, width=_PIPE_COLUMNS)


def table(title: str, columns: Sequence[str], elastic: str) -> Table:
    """Return an empty table; a column whose name ends in '>' is aligned to the right.

    elastic: the column that is folded where the terminal is narrow; the others keep to one line.
    """
    made = Table(
        title=title or None, title_justify="left", title_style="bold", caption_justify="left", box=box.SIMPLE_HEAD
    )
    for name in columns:
        justify: Literal["right", "left"] = "right" if name.endswith(">") else "left"
        fixed = name != elastic
        width = None if fixed else _LEAST_COLUMNS
        made.add_column(name.rstrip(">"), justify=justify, overflow="fold", no_wrap=fixed, min_width=width)
    return made


def add_row(rows: Table, *cells: str) -> None:
    """Append a row of plain text: cells may come from a file, so neither markup nor control codes take effect."""
    rows.add_row(*map(plain, cells))


def print_table(out: Console, rows: Table) -> None:
    """Print a table and its caption; on a pipe the caption is one line, whatever the width of the table."""
    caption, rows.caption = rows.caption, None
    out.print(rows)
    if caption is not None:
        out.print(Text(f" {caption}", style="table.caption"), soft_wrap=not out.is_terminal)


def print_fields(out: Console, fields: Mapping[str, str]) -> None:
    """Print names and values in two columns, and an empty line."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in fields.items():
        add_row(grid, name, value)
    out.print(grid)
    out.print()


def plain(text: str) -> Text:
    """Return the text without markup, and with the escape of each character that does not print."""
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))
