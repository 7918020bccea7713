"""`kubegraft predict`: what a trained classifier says about some images."""

from __future__ import annotations

import click

from kubegraft.cli.group import DebugOption
from kubegraft.cli.options import SectionedCommand, input_argument, json_option
from kubegraft.cli.output import print_json, stdout_to_stderr

_MOST_SHOWN = 3


@click.command("predict", cls=SectionedCommand)
@input_argument(
    "model",
    "The model/ of a run, the output of `kubegraft export`, a saved_model/ in it, or a .keras file.",
    type=click.Path(exists=True),
)
@input_argument(
    "images", "Image files: JPEG, PNG, GIF, BMP, WebP or TIFF.", nargs=-1, required=True, metavar="IMAGE..."
)
@json_option
@DebugOption.decorate
def predict(model: str, images: tuple[str, ...], as_json: bool) -> None:
    """Name the class of some images, with the model's probabilities."""
    from kubegraft.export.predict import predict as run

    with stdout_to_stderr():
        predictions = run(model, images)
    if as_json:
        print_json(predictions)
        return
