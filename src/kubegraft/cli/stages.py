"""`kubegraft ingest`, `train-head`, `fine-tune`, `evaluate`, `export`: one stage, on directories."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from kubegraft.cli.group import DebugOption
from kubegraft.cli.options import (
    SectionedCommand,
    cache_options,
    config_options,
    input_argument,
    json_option,
    output_option,
)
from kubegraft.cli.output import print_facts, print_json, program, stdout_to_stderr
from kubegraft.run_config import RunConfig

if TYPE_CHECKING:
    from kubegraft.stage import StageResult

_DIRECTORY = click.Path(exists=True, file_okay=False)
_DATASET = input_argument("dataset", "Output directory of `kubegraft ingest`.", type=_DIRECTORY)
_OUTPUT = output_option("Directory to make. A rerun with the same arguments continues or reuses it.")


@click.command("ingest", cls=SectionedCommand)
@input_argument(
    "source",
    "Folder or archive of labelled images, or a URI. Without it the config file's, or sample://digits.",
    required=False,
)
@_OUTPUT
@json_option
@config_options(["ingest"], flat=False)
@DebugOption.decorate
def ingest(output: str, run_config: RunConfig, as_json: bool) -> None:
    """Check and split images, and write them as a dataset.

    SOURCE holds train/<class>/*.jpg, with validation/<class>/ and test/<class>/ if you have them, or one
    folder of <class>/*.jpg, which is split into three. Files that can't be used are set aside and listed with
    the reason in report.html.
    """
    from kubegraft.data.ingest import ingest as run

    with stdout_to_stderr():
        result = run(output, run_config.ingest)
    _show(result, output, as_json, [program(), "train-head", output, "--output", "MODEL_DIR"])


@click.command("train-head", cls=SectionedCommand)
@_DATASET
@_OUTPUT
@cache_options
@json_option
@config_options(["head"], flat=False)
@DebugOption.decorate
def train_head(dataset: str, output: str, run_config: RunConfig, as_json: bool) -> None:
    """Train a new head on a frozen pretrained backbone."""
    from kubegraft.training.head import train_head as run

    with stdout_to_stderr():
        result = run(dataset, output, run_config.head)
    _show(result, output, as_json, [program(), "fine-tune", dataset, output, "--output", "TUNED_DIR"])


@click.command("fine-tune", cls=SectionedCommand)
@_DATASET
@input_argument("model", "Output directory of `kubegraft train-head`.", type=_DIRECTORY)
@_OUTPUT
@cache_options
@json_option
@config_options(["fine_tune"], flat=False)
@DebugOption.decorate
def fine_tune(dataset: str, model: str, output: str, run_config: RunConfig, as_json: bool) -> None:
    """Train the last blocks of the backbone further, at a lower rate.

    The result is never worse on the validation split than MODEL: if no epoch beats it by
    more than luck, it is kept.
    """
    from kubegraft.training.fine_tune import fine_tune as run

    with stdout_to_stderr():
        result = run(dataset, model, output, run_config.fine_tune)
    following = [program(), "evaluate", dataset, output, "--reference", model, "--output", "REPORT_DIR"]
    _show(result, output, as_json, following)


@click.command("evaluate", cls=SectionedCommand)
@_DATASET
@input_argument("model", "Output directory of `kubegraft fine-tune` or `train-head`.", type=_DIRECTORY)
@click.option(
    "--reference", type=_DIRECTORY, metavar="MODEL", help="Model to compare with, such as before fine-tuning."
)
@_OUTPUT
@json_option
@config_options(["evaluate"], flat=False)
@DebugOption.decorate
def evaluate(
    dataset: str, model: str, reference: str | None, output: str, run_config: RunConfig, as_json: bool
) -> None:
    """Report how the model does on the test split, which nothing else uses."""
    from kubegraft.evaluation.evaluate import evaluate as run

    with stdout_to_stderr():
        result = run(dataset, model, output, run_config.evaluate, reference)
    following = [program(), "export", dataset, model, "--evaluation", output, "--output", "EXPORT_DIR"]
    _show(result, output, as_json, following)


@click.command("export", cls=SectionedCommand)
@_DATASET
@input_argument("model", "Output directory of `kubegraft fine-tune` or `train-head`.", type=_DIRECTORY)
@click.option(
    "--evaluation", type=_DIRECTORY, metavar="DIR", help="Output of `kubegraft evaluate`, to travel along."
)
@_OUTPUT
@json_option
@config_options(["export"], flat=False)
@DebugOption.decorate
def export(
    dataset: str, model: str, evaluation: str | None, output: str, run_config: RunConfig, as_json: bool
) -> None:
    """Write the model for serving, and prove in a fresh process that it answers the same."""
    from kubegraft.export.export import export as run

    with stdout_to_stderr():
        result = run(dataset, model, evaluation, output, run_config.export)
    _show(result, output, as_json, [program(), "predict", output, "IMAGE"])


def _show(result: StageResult, output: str, as_json: bool, following: list[str]) -> None:
    if as_json:
        print_json(_document(result, output))
        return
    rows = [("output", output + ("  (was there already)" if result.reused else ""))]
    if (result.output_dir / "report.html").exists():
        rows.append(("report", str(result.output_dir / "report.html")))
    rows += [(name, f"{value:.6g}") for name, value in result.metrics.items()]
    print_facts([*rows, ("next", shlex.join(following))])


def _document(result: StageResult, output: str) -> Mapping[str, Any]:
    return {
        "stage": result.stage,
        "output": output,
        "digest": result.digest,
        "metrics": dict(result.metrics),
        "provenance": dict(result.provenance),
        "reused": result.reused,
    }
