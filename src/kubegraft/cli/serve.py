"""`kubegraft serve`: a model behind HTTP."""

from __future__ import annotations

import os
import sys

import click

from kubegraft.cli.group import DebugOption
from kubegraft.cli.options import SectionedCommand, input_argument


@click.command("serve", cls=SectionedCommand)
@input_argument(
    "model",
    "The model/ of a run, the output of `kubegraft export`, or a saved_model/ in it; a path, gs:// or s3:// URI.",
)
@click.option("--name", default="kubegraft", show_default=True, help="Name of the model in URLs.")
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on; :: for IPv6 too.")
@click.option("--port", type=int, default=8501, show_default=True, help="TCP port.")
@click.option(
    "--max-body-mib",
    type=click.IntRange(1, 1024),
    default=64,
    show_default=True,
    help="Largest request, in MiB.",
)
@click.option("--max-instances", type=int, default=256, show_default=True, help="Most images of a request.")
@click.option(
    "--concurrency", type=int, default=2, show_default=True, help="Requests that TensorFlow works on at once."
)
@DebugOption.decorate
@click.pass_context
def serve(
    context: click.Context,
    model: str,
    name: str,
    host: str,
    port: int,
    max_body_mib: int,
    max_instances: int,
    concurrency: int,
) -> None:
    """Answer which class images are of, over HTTP, as TensorFlow Serving does.

    For kind, clusters without internet and small loads. POST the bytes of an image, or TensorFlow Serving's JSON,
    to /v1/models/NAME:predict. Ends with exit code 0 on SIGTERM or ctrl-c, after the requests that it is at.
    """
    from kubegraft.serving.serve import serve as run
    from kubegraft.serving.server import ServerOptions

    options = ServerOptions(
        name=name,
        host=host,
        port=port,
        max_body_bytes=max_body_mib * 2**20,
        max_instances=max_instances,
        concurrency=concurrency,
        log_requests=DebugOption.is_set(context),
    )
    run(model, options)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(
        0
    )  # the interpreter would wait for TensorFlow's threads, seconds that a stopping pod may not have
