"""`kubegraft run`: the whole pipeline on this machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

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
from kubegraft.cli.output import print_facts, print_json, print_table, program, stdout_to_stderr
from kubegraft.errors import ConfigError
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
@cache_options
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print what the run would do, keep and need, from a count of the images; nothing is decoded or written.",
)
@click.option(
    "--num-images",
    type=click.IntRange(min=2),
    help="With --dry-run: plan for so many images instead of DATA's.",
)
@click.option(
    "--num-classes",
    type=click.IntRange(min=2),
    help="With --num-images: plan for so many classes. [default: 10]",
)
@click.option(
    "--memory-gib",
    type=click.FloatRange(min=0, min_open=True),
    help="With --dry-run: plan for so much memory instead of this machine's.",
)
@click.option(
    "--disk-gib",
    type=click.FloatRange(min=0, min_open=True),
    help="With --dry-run: plan for so much free disk instead of this machine's.",
)
@json_option
@config_options(STAGES, flat=True)
@DebugOption.decorate
def run(
    output: str,
    fresh: bool,
    publish_uri: str,
    if_changed: bool,
    dry_run: bool,
    num_images: int | None,
    num_classes: int | None,
    memory_gib: float | None,
    disk_gib: float | None,
    as_json: bool,
    run_config: RunConfig,
) -> None:
    """From a folder of images to a tested classifier: ingest, train, fine-tune, evaluate, export.

    DATA holds train/<class>/*.jpg, with validation/<class>/ and test/<class>/ if you have them, or one folder
    of <class>/*.jpg, which is split into three. Every number that you don't choose is chosen from your data,
    and the report says why. This runs the very pipeline that `kubegraft compile` writes for Kubeflow.
    """
    if dry_run:
        _dry_run(run_config, output, num_images, num_classes, memory_gib, disk_gib, as_json=as_json)
        return
    for name, value in (
        ("num_images", num_images),
        ("num_classes", num_classes),
        ("memory_gib", memory_gib),
        ("disk_gib", disk_gib),
    ):
        if value is not None:
            raise ConfigError(
                f"`{name}` is for --dry-run only. Received: {name}={value!r}. Add --dry-run, or leave it out."
            )
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


def _dry_run(
    run_config: RunConfig,
    output: str,
    num_images: int | None,
    num_classes: int | None,
    memory_gib: float | None,
    disk_gib: float | None,
    *,
    as_json: bool,
) -> None:
    from kubegraft.run_plan import plan_run

    with stdout_to_stderr():
        plan = plan_run(
            run_config,
            Path(output),
            num_images=num_images,
            num_classes=num_classes or 10,
            memory_bytes=int(memory_gib * 2**30) if memory_gib else None,
            disk_bytes=int(disk_gib * 2**30) if disk_gib else None,
        )
    if as_json:
        print_json(plan)
    else:
        _show_plan(plan)


def _show_plan(plan: dict[str, Any]) -> None:
    from kubegraft.activation_plan import shown_bytes

    images, tuned = plan["images"], plan["fine_tune"]
    trials = " then ".join(map(str, tuned["trials"]))
    written = plan["written_before_fine_tuning_bytes"]
    short = ": more than is free" if written > plan["free_disk_bytes"] else ""
    print_facts(
        [
            ("images", ", ".join(f"{number:,} {split}" for split, number in images.items())),
            ("classes", str(plan["num_classes"])),
            *([("shards", shown_bytes(plan["image_bytes"]))] if plan["image_bytes"] else []),
            (
                "machine",
                f"{shown_bytes(plan['memory_bytes'])} of memory, {shown_bytes(plan['free_disk_bytes'])} free on disk",
            ),
            ("backbone", f"{plan['backbone']} at {plan['input_size']} pixels"),
            ("pooled features", f"{shown_bytes(plan['pooled_features_bytes'])} on disk, for the head"),
            ("before fine-tuning", f"{shown_bytes(written)} of shards and features are written{short}"),
            ("fine-tuning", f"{tuned['way']}: {tuned['reason']}"),
            (
                "blocks tried",
                f"{trials}, while they pay on validation" if len(tuned["trials"]) > 1 else trials,
            ),
            ("views", f"{tuned['num_views']} of each training image ({plan['augmentation']})"),
            ("epochs", f"at most {tuned['num_epochs']} a trial"),
            ("activations", f"{shown_bytes(tuned['disk_bytes'])} on disk at most"),
            *([("assumed", plan["assumed"])] if plan["assumed"] else []),
        ]
    )
    click.echo()
    print_table(
        ("blocks", "activations of an image", "bytes", "one view", "all views", "fits"),
        [
            (
                str(row["num_blocks"]),
                str(row["activations"]),
                f"{row['bytes_an_image']:,}",
                shown_bytes(row["bytes_one_view"]),
                shown_bytes(row["bytes_all_views"]),
                str(row["fits"]),
            )
            for row in plan["cuts"]
        ],
        right=(0, 2, 3, 4),
    )


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
