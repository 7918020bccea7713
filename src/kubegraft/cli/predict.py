"""`kubegraft predict`: what a trained classifier says about some images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from kubegraft.cli.group import DebugOption
from kubegraft.cli.options import SectionedCommand, input_argument, json_option
from kubegraft.cli.output import print_json, stdout_to_stderr
from kubegraft.errors import DataError

if TYPE_CHECKING:
    from kubegraft.export.predict import Prediction

_MOST_OTHERS: Final = 2


@click.command("predict", cls=SectionedCommand)
@input_argument(
    "model",
    "The model/ of a run, the output of `kubegraft export`, a saved_model/ in it, or a .keras file.",
    type=click.Path(exists=True),
)
@input_argument(
    "images",
    "Image files: JPEG, PNG, GIF, BMP, WebP or TIFF.",
    nargs=-1,
    required=True,
    metavar="IMAGE...",
)
@json_option
@DebugOption.decorate
@click.pass_context
def predict(context: click.Context, model: str, images: tuple[str, ...], as_json: bool) -> None:
    """Name the class of some images: one line each, with the probability and the runners-up.

    A file that can't be used as an image is named on stderr, and the exit code is 3; the others are answered.
    """
    from kubegraft.export.predict import predict as run

    with stdout_to_stderr():
        answers = run(model, images)
    if as_json:
        print_json([_document(path, answer) for path, answer in zip(images, answers, strict=True)])
    else:
        _show(images, answers)
    context.exit(DataError.exit_code if any(isinstance(answer, DataError) for answer in answers) else 0)


def _show(images: tuple[str, ...], answers: list[Prediction | DataError]) -> None:
    path_width = max(map(len, images))
    class_width = max(
        (len(answer.class_name) for answer in answers if not isinstance(answer, DataError)), default=0
    )
    for path, answer in zip(images, answers, strict=True):
        if isinstance(answer, DataError):
            click.echo(f"Error: {answer}", err=True)
            continue
        others = ", ".join(f"{name} {share:.3f}" for name, share in answer.top[1 : 1 + _MOST_OTHERS])
        line = f"{path.ljust(path_width)}  {answer.class_name.ljust(class_width)}  {answer.probability:.3f}"
        click.echo(line + (f"  ({others})" if others else ""))


def _document(path: str, answer: Prediction | DataError) -> dict[str, Any]:
    if isinstance(answer, DataError):
        return {"path": path, "error": str(answer)}
    return {
        "path": path,
        "class": answer.class_name,
        "probability": answer.probability,
        "top": [{"class": name, "probability": share} for name, share in answer.top],
    }
