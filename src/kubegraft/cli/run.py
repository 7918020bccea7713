"""`kubegraft run`: the whole pipeline on this machine."""

from __future__ import annotations

import shlex
from typing import Any

import click

from kubegraft.cli.group import DebugOption
from kubegraft.cli.options import SectionedCommand, config_options, input_argument, json_option, output_option
from kubegraft.cli.output import print_facts, print_json, program
from kubegraft.run_config import STAGES, RunConfig


@click.command("run", cls=SectionedCommand)
@input_argument(
    "source",
    "Folder or archive of labelled images, or a URI. Without it the config file's, or sample://digits.",
    required=False,
    metavar="[DATA]",
)
@output_option(
    "Directory for everything the run writes. A rerun with the same arguments continues where it was.",
    default="output",
    show_default=True,
)
@click.option("--fresh", is_flag=True, help="Start over instead of continuing or reusing earlier work.")
@click.option(
    "--publish",
    "publish_uri",
    metavar="URI",
    default="",
    help="Folder (path, gs:// or s3://) that the reports, the model and the metrics are copied to at the end.",
)
@click.option(
    "--if-changed",
    is_flag=True,
    help="End at once where images, config and kubegraft are those of the run before; for schedules.",
)
@json_option
@config_options(STAGES, flat=True)
@DebugOption.decorate
def run(
    output: str, fresh: bool, publish_uri: str, if_changed: bool, as_json: bool, run_config: RunConfig
) -> None:
    """From a folder of images to a tested classifier: ingest, train, fine-tune, evaluate, export.

    DATA holds train/<class>/*.jpg, with validation/<class>/ and test/<class>/ if you have them, or one folder
    of <class>/*.jpg, which is split into three. Every number that you don't choose is chosen from your data,
    and the report says why. This runs the very pipeline that `kubegraft compile` writes for Kubeflow.
    """
    from kubegraft.local_run import run_locally
    from kubegraft.processes import catch_stop_signals

    catch_stop_signals()  # while stages run they are stopped first; before and after, the run ends at once
    summary = run_locally(run_config, output, fresh=fresh, publish_uri=publish_uri, if_changed=if_changed)
    if as_json:
        print_json(summary)
    elif "skipped" in summary:
        print_facts([("nothing to do", summary["skipped"]), ("report", summary["report"])])
    else:
        _show(summary)


def _show(summary: dict[str, Any]) -> None:
    validation, test = summary["validation_accuracy"], summary["test"]
    level = 100 * summary["config"]["evaluate"]["confidence_level"]
    interval = (
        f"  ({level:.4g} % interval {test['test_accuracy_low']:.4f} to {test['test_accuracy_high']:.4f}, "
        f"{test['num_test']:.0f} images)"
    )
    click.echo()
    print_facts(
        [
            ("", f"{'before':>8}  {'after':>8}  fine-tuning"),
            ("validation accuracy", _pair(validation["head"], validation["fine_tuned"])),
            ("test accuracy", _pair(test["reference_test_accuracy"], test["test_accuracy"]) + interval),
            *(
                [("", "fine-tuning found nothing better, so the model before it was kept")]
                * _kept_head(summary)
            ),
            ("report", summary["report"]),
            ("model", summary["model"]),
            ("metrics", summary["metrics"]),
            ("dataset report", summary["dataset_report"]),
            *([("published", summary["published"])] if "published" in summary else []),
            ("took", f"{summary['seconds']:.0f} s"),
            ("next", f"{shlex.quote(program())} predict {shlex.quote(summary['model'])} IMAGE..."),
        ]
    )


def _pair(before: float, after: float) -> str:
    return f"{before:8.4f}  {after:8.4f}"


def _kept_head(summary: dict[str, Any]) -> bool:
    return bool(summary["kept"] == "head")
