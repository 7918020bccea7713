"""What the commands print: results for people or for scripts on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click


def program() -> str:
    """Return how the user can call this program: its name, or the path it was called by if it is not on PATH."""
    called = Path(sys.argv[0])
    return "kubegraft" if shutil.which("kubegraft") or called.name != "kubegraft" else str(called)


def print_json(document: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_facts(rows: Sequence[tuple[str, str]]) -> None:
    """Print aligned `name  value` lines."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name.ljust(width)}  {value}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print aligned columns.

    Args:
        header: Names of the columns.
        rows: Cells, as many a row as there are columns.
        right: Indices of the columns that are aligned on the right.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what the core or a library prints to stderr, so that stdout holds the result and nothing else."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
