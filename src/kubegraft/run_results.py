"""From the task directories of a finished local run to files at paths that stay the same.

kfp writes to `kfp/<pipeline>-<time>/<task>/<artifact>`. People, scripts and `make` want `report.html`,
`model/` and `metrics.json`; these are hard links or copies, so that they outlive the run's directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kubegraft import __version__
from kubegraft.errors import KubegraftError
from kubegraft.stage import WORK_METRICS, StageResult, read_result, write_atomically
from kubegraft.storage import public_uri

ARTIFACTS: Final[Mapping[str, str]] = {
    "ingest": "ingest/dataset",
    "train_head": "train-head/model",
    "fine_tune": "fine-tune/model",
    "evaluate": "evaluate/evaluation",
    "export": "export/export_model",
}
# Where to find it in a run -> where it is published in the output directory.
_PUBLISHED: Final[Mapping[str, str]] = {
    "ingest/dataset/report.html": "dataset_report.html",
    "evaluate/evaluation/report.html": "report.html",
    "evaluate/evaluation/metrics.json": "metrics.json",
    "export/export_model": "model",
}
SUMMARY_FILE: Final = "run.json"
UNPUBLISHED_FILE: Final = ".kubegraft-unpublished"  # there from when results are new until they are published
RESULTS: Final = (*_PUBLISHED.values(), SUMMARY_FILE)  # what a run comes to; the rest is for the next run
_WORK_DIRS_KEPT: Final = 5
_WORK_DIR: Final = re.compile(r"(?P<stage>[a-z_]+)-[0-9a-f]{20}")


def read_results(run_dir: Path) -> dict[str, StageResult]:
    """Return the result of every stage of a finished run, by stage.

    Raises:
        ModelError: If a stage's output is missing.
    """
    return {stage: read_result(run_dir / path) for stage, path in ARTIFACTS.items()}


def publish(run_dir: Path, output_dir: Path) -> None:
    """Put the report, the model and the metrics of a run at their stable paths."""
    for source, name in _PUBLISHED.items():
        _replace(run_dir / source, output_dir / name)


def _replace(source: Path, target: Path) -> None:
    aside, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    for leftover in (aside, old):
        _remove(leftover)
    if not source.is_dir():
        shutil.copyfile(source, aside)
        aside.replace(target)
        return
    shutil.copytree(source, aside)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tidy(run_dir: Path, output_dir: Path, results: Mapping[str, StageResult]) -> None:
    """Remove the directories of earlier runs, and work directories that have not been used for long.

    The newest run stays, and the five work directories of each stage that were used last, so that going
    back to a config that was tried before is quick, and the output directory does not grow for ever.
    """
    for earlier in run_dir.parent.iterdir():
        if earlier != run_dir and earlier.is_dir():
            shutil.rmtree(earlier)
    by_stage: dict[str, list[Path]] = {}
    work_dir = output_dir / "work"
    for directory in work_dir.iterdir() if work_dir.is_dir() else ():
        if match := _WORK_DIR.fullmatch(directory.name):
            by_stage.setdefault(match["stage"], []).append(directory)
    for stage, directories in by_stage.items():
        if stage in results:
            _mark_used(work_dir, stage, results[stage])
        for old in sorted(directories, key=lambda path: path.stat().st_mtime)[:-_WORK_DIRS_KEPT]:
            shutil.rmtree(old)


def _mark_used(work_dir: Path, stage: str, result: StageResult) -> None:
    key = json.loads((result.output_dir / "result.json").read_text(encoding="utf-8"))["key"]
    with contextlib.suppress(FileNotFoundError):
        os.utime(work_dir / f"{stage}-{key[:20]}")


def summarise(
    output: str, results: Mapping[str, StageResult], config: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Return what a run came to, as JSON values; paths begin as the user gave the output directory.

    Args:
        output: Output directory as the user gave it.
        results: Result of every stage.
        config: The run's config as nested plain values.
        seconds: How long the run took.
    """
    fine_tuned, evaluated = results["fine_tune"].metrics, results["evaluate"].metrics
    return {
        "kubegraft": __version__,
        "output": output,
        "report": os.path.join(output, "report.html"),  # noqa: PTH118 - Path("./x") would drop the "./"
        "dataset_report": os.path.join(output, "dataset_report.html"),  # noqa: PTH118
        "model": os.path.join(output, "model"),  # noqa: PTH118
        "metrics": os.path.join(output, "metrics.json"),  # noqa: PTH118
        "validation_accuracy": {
            "head": fine_tuned["start_validation_accuracy"],
            "fine_tuned": fine_tuned["validation_accuracy"],
        },
        "test": {name: value for name, value in evaluated.items() if name not in WORK_METRICS},
        "kept": results["fine_tune"].provenance.get("kept"),
        "seconds": round(seconds, 1),
        "digests": {stage: result.digest for stage, result in results.items()},
        "config": public_config(config),
    }


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's config, as nested plain values, without what URIs may hold of credentials."""
    return {
        **config,
        "ingest": {**config["ingest"], "source": public_uri(config["ingest"]["source"])},
        "head": {**config["head"], "weights": public_uri(config["head"]["weights"])},
    }


def write_summary(summary: Mapping[str, Any], output_dir: Path) -> None:
    """Write the summary to `run.json`."""
    write_atomically(output_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


def find_run_dir(pipeline_root: Path, before: set[str]) -> Path:
    """Return the one directory in `pipeline_root` that was not there `before`.

    Raises:
        KubegraftError: If there is none or several, which would be a change in kfp.
    """
    new = [path for path in pipeline_root.iterdir() if path.is_dir() and path.name not in before]
    if len(new) != 1:
        raise KubegraftError(
            f"kfp must write one directory for a run. Received: {[path.name for path in new]!r} in "
            f"{str(pipeline_root)!r}. Please report this with the version of kfp."
        )
    return new[0]
