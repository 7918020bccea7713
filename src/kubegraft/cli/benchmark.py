"""`kubegraft benchmark`: the command that `benchmarks/` of the checkout has, or its copy in the wheel."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kubegraft.local_run import find_checkout, import_from_checkout

if TYPE_CHECKING:
    import click


def _command() -> click.Command:
    checkout = find_checkout()
    module: Any = (
        import_from_checkout(checkout, "benchmarks.__main__")
        if checkout
        else importlib.import_module("kubegraft.benchmarks.__main__")
    )
    command: click.Command = module.benchmark
    return command


benchmark = _command()
