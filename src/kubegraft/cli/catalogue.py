"""`kubegraft backbones` and `kubegraft sample-data`: what comes with kubegraft."""

from __future__ import annotations

from pathlib import Path

import click

from kubegraft.cli.group import DebugOption
from kubegraft.cli.options import SectionedCommand, input_argument, json_option
from kubegraft.cli.output import print_facts, print_json, print_table, stdout_to_stderr
from kubegraft.errors import ConfigError


@click.command("backbones", cls=SectionedCommand)
@json_option
@DebugOption.decorate
def backbones(as_json: bool) -> None:
    """List the pretrained backbones that --backbone takes.

    Weights: 'packaged' came with the installation, 'cached' were downloaded before, 'download' come from the
    network when first used. Any backbone also takes --weights FILE, and --weights none for random ones.
    """
    from kubegraft.modeling.backbones import backbone_table

    table = backbone_table()
    if as_json:
        print_json(table)
        return
    rows = [
        [
            str(row["name"]),
            f"{int(row['num_parameters']) / 1e6:.1f} M",
            str(row["input_size"]),
            str(row["weights"]),
            str(row["license"]),
        ]
        for row in table
    ]
    print_table(["name", "parameters", "input size", "weights", "license"], rows, right=(1, 2))


@click.command("sample-data", cls=SectionedCommand)
@input_argument("name", "Name of the sample; 'digits' is scikit-learn's handwritten digits.")
@input_argument("directory", "Folder to make.", type=click.Path())
@json_option
@DebugOption.decorate
def sample_data(name: str, directory: str, as_json: bool) -> None:
    """Write a sample dataset as a folder of <class>/*.png, to look at or to try things with."""
    from kubegraft.data.samples import write_sample

    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            "`directory` must not exist or be empty. Received: "
            f"directory={directory!r}, which holds something. Choose another one."
        )
    with stdout_to_stderr():
        write_sample(name, target)
    counts = {
        folder.name: sum(1 for _ in folder.iterdir())
        for folder in sorted(target.iterdir())
        if folder.is_dir()
    }
    if as_json:
        print_json(
            {"name": name, "directory": directory, "classes": counts, "num_images": sum(counts.values())}
        )
        return
    print_facts(
        [
            ("directory", directory),
            ("classes", f"{len(counts)}: {', '.join(counts)}"),
            ("images", str(sum(counts.values()))),
            ("next", f"kubegraft run {directory}"),
        ]
    )
