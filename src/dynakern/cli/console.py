"""What commands share: where they print, and how machines ask for JSON."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["JsonOption", "make_console"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]


def make_console(*, stderr: bool = False) -> Console:
    """Return a console that writes to a terminal as it is and to a pipe without colours or cut cells."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # A pipe has no width of its own: wide enough that no cell of a table is cut there.
    width = None if stream.isatty() else 160
    return Console(stderr=stderr, highlight=False, width=width, no_color=None if stream.isatty() else True)
