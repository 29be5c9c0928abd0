"""Tables on a terminal and on a pipe: nothing is cut, captions do not wrap on a pipe, no markup takes effect."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from turbo_tvm.cli.console import add_row, plain, print_fields, print_table, table

CAPTION = "a caption that is much longer than the table above it, which has two narrow columns only"


def printed(draw, width: int = 200, terminal: bool = False) -> str:
    out = io.StringIO()
    draw(Console(file=out, width=width, force_terminal=terminal, color_system=None, highlight=False))
    return out.getvalue()


def small():
    rows = table("Title", ["name", "size>"], "name")
    add_row(rows, "[red]a[/]", "1 B")
    rows.caption = CAPTION
    return rows


@pytest.mark.parametrize("width", [40, 200])
def test_a_caption_is_one_line_on_a_pipe(width):
    text = printed(lambda out: print_table(out, small()), width)
    assert CAPTION in text and text.index("[red]a[/]") < text.index(CAPTION)


def test_a_caption_wraps_on_a_terminal():
    text = printed(lambda out: print_table(out, small()), width=40, terminal=True)
    assert CAPTION not in text and " ".join(text.split()).endswith(CAPTION)


def test_only_the_elastic_column_is_folded():
    rows = table("", ["name", "kernel"], "kernel")
    add_row(rows, "a name that stays on one line", "k" * 60)
    text = printed(lambda out: print_table(out, rows), width=50)
    assert "a name that stays on one line" in text and text.count("k") > 60  # with the header


def test_fields_and_what_does_not_print():
    text = printed(lambda out: print_fields(out, {"name": "a\x1b[31m\nb"}))
    assert "a\\x1b[31m\\nb" in text and "\x1b" not in text
    assert plain("[bold]x[/]").plain == "[bold]x[/]"
