"""The `kubegraft` command: a thin adapter that turns words on a command line into the core's configs.

This module is imported by every call, so it imports nothing heavy; a subcommand's module is imported when it
is named, and TensorFlow or kfp when its work begins.
"""

from __future__ import annotations

import click

from kubegraft import __version__
from kubegraft.cli.group import DebugOption, WorkflowGroup

__all__ = ["main"]


@click.group(
    cls=WorkflowGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""\b
Examples:
  kubegraft run                                  train on scikit-learn's digits, no data needed
  kubegraft run photos/ --output outcome         train on your own folder of <class>/*.jpg
  kubegraft predict outcome/model picture.jpg    ask the classifier
\b
Exit codes say what went wrong (docs/errors.md): 2 an argument, 3 the data, 4 a model, 5 training, ...
""",
)
@click.version_option(__version__, prog_name="kubegraft")
@DebugOption.decorate
def main() -> None:
    """A folder of labelled images in, a tested image classifier out.

    kubegraft puts a new head on a pretrained backbone, trains it, fine-tunes the last blocks, reports on
    images it has never seen, and exports a model that answers with class names.
    """
