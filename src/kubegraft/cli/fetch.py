"""`kubegraft fetch`: a folder from a bucket, whole and verified."""

from __future__ import annotations

import click

from kubegraft.cli.group import DebugOption
from kubegraft.cli.options import SectionedCommand, input_argument, json_option
from kubegraft.cli.output import print_facts, print_json, stdout_to_stderr


@click.command("fetch", cls=SectionedCommand)
@input_argument(
    "uri", "Folder: a path, gs:// or s3://, such as one that `run --publish` wrote.", metavar="URI"
)
@input_argument("directory", "Directory to make.", metavar="DIR")
@click.option(
    "--only", default="", metavar="PATH", help="Fetch this part of the folder, for example model/saved_model."
)
@click.option("--replace", is_flag=True, help="Take the place of what is in DIR.")
@json_option
@DebugOption.decorate
def fetch(uri: str, directory: str, only: str, replace: bool, as_json: bool) -> None:
    """Copy a folder to this machine, all of it or nothing.

    Every file is compared with the checksum that the store keeps, and with its SHA-256 where kubegraft published the
    folder. DIR appears when everything is there; the same call continues one that was interrupted.
    """
    from kubegraft.storage import fetch_whole_tree, public_uri

    with stdout_to_stderr():
        num_files, num_bytes = fetch_whole_tree(uri, directory, part=only, replace=replace)
    if as_json:
        print_json(
            {"uri": public_uri(uri), "directory": directory, "num_files": num_files, "num_bytes": num_bytes}
        )
    else:
        print_facts([("directory", directory), ("files", f"{num_files}, {num_bytes / 1e6:.1f} MB")])
