"""`kubegraft job prepare|train|finish`: what the pods of a TransferJob run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from kubegraft.cli.group import DebugOption
from kubegraft.cli.options import SectionedCommand


class _JobGroup(click.Group):
    """Group whose subcommands stand in the order of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _job_options(function: Callable[..., Any]) -> Callable[..., Any]:
    config = click.option(
        "--config", "config_path", metavar="FILE", required=True, help="The run's config file."
    )
    directory = click.option(
        "--directory",
        metavar="DIR",
        required=True,
        help="The job's directory, on a volume that all its pods share.",
    )
    return config(directory(function))


@click.group("job", cls=_JobGroup)
@DebugOption.decorate
def job() -> None:
    """Run one part of a TransferJob in this process, as its pods do.

    Each part goes on where it was when it is called again, prints `kubegraft_report` lines and leaves the last one in
    $KUBEGRAFT_TERMINATION_FILE. Exit code 75 means: another worker was lost, start all again.
    """


@job.command("prepare", cls=SectionedCommand)
@_job_options
@DebugOption.decorate
def prepare(config_path: str, directory: str) -> None:
    """Check the config and ingest the images; cheap when that is done."""
    _run("prepare", config_path, directory)


@job.command("train", cls=SectionedCommand)
@_job_options
@DebugOption.decorate
def train(config_path: str, directory: str) -> None:
    """Train head and last blocks, together with the workers that $TF_CONFIG names."""
    _run("train", config_path, directory)


@job.command("finish", cls=SectionedCommand)
@_job_options
@click.option(
    "--publish",
    "publish_uri",
    metavar="URI",
    default="",
    help="Folder (path, gs:// or s3://) that the reports, the model and the metrics are copied to at the end.",
)
@DebugOption.decorate
def finish(config_path: str, directory: str, publish_uri: str) -> None:
    """Evaluate on the test split, export, and publish."""
    _run("finish", config_path, directory, publish_uri)


def _run(part: str, config_path: str, directory: str, publish_uri: str = "") -> NoReturn:
    from kubegraft.worker_job import run_part

    code = run_part(part, config_path, directory, publish_uri)
    sys.stdout.flush()
    sys.stderr.flush()
    # Winding down TensorFlow's part of a cluster takes seconds, or for ever where a worker is lost.
    os._exit(code)
