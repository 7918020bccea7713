"""Whether the images of a config have changed since a run: `python -m kubegraft.look --config FILE --directory DIR`.

What the looks of a TransferSchedule run (`controller.data_look`). The images are read as by `ingest`; the report has
their digest, and as `changed_fraction` how many differ from those of the digest that is known. For that, each look
leaves the list of images in its directory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from kubegraft.config_file import load_run_config
from kubegraft.data.ingest import ingest
from kubegraft.data.manifest import read_images
from kubegraft.errors import KubegraftError
from kubegraft.job_report import Report
from kubegraft.job_reporter import termination_file
from kubegraft.processes import catch_stop_signals, exit_on_error, refused_by_system
from kubegraft.run_config import RunConfig
from kubegraft.stage import write_atomically

Image = tuple[str, str, str]  # split, class, SHA-256


def look(run_config: RunConfig, directory: Path, known_digest: str) -> Report:
    """Return the digest of the images and the fraction of them that differs from the known ones.

    Args:
        run_config: Where the images are and how they are split.
        directory: Where the lists of earlier looks are; the images are read into a folder of it for the while.
        known_digest: Digest of the last run's data; "" for none. Where its list is missing, all counts as changed.

    Raises:
        KubegraftError: As `ingest`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    scratch = directory / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        result = ingest(scratch / "dataset", run_config.ingest)
        images = sorted((each.split, each.label, each.sha256) for each in read_images(scratch / "dataset"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    known = images if known_digest == result.digest else _read_list(directory, known_digest)
    fraction = 1.0 if known is None else changed_fraction(known, images)
    _keep_list(directory, result.digest, images, known_digest)
    return Report(
        stage="ingest",
        progress=100,
        done=True,
        dataset_digest=result.digest,
        metrics={"changed_fraction": fraction},
    )


def changed_fraction(before: Iterable[Image], after: Iterable[Image]) -> float:
    """Return the fraction of images that are new, gone, or in another class or split; an exchange counts once.

    Args:
        before: Images of one dataset; the same image may be there several times.
        after: Images of the other.
    """
    old, new = Counter(before), Counter(after)
    changed = max((new - old).total(), (old - new).total())
    return changed / max(old.total(), new.total(), 1)


def _list_path(directory: Path, digest: str) -> Path:
    return directory / f"{digest}.json"


def _read_list(directory: Path, digest: str) -> list[Image] | None:
    try:
        listed = json.loads(_list_path(directory, digest).read_text(encoding="utf-8"))
        return [(split, label, sha256) for split, label, sha256 in listed]
    except (OSError, ValueError, TypeError):
        return None


def _keep_list(directory: Path, digest: str, images: Sequence[Image], known_digest: str) -> None:
    """Leave the list, and of those before only the one that the next look may compare with."""
    write_atomically(_list_path(directory, digest), json.dumps(images) + "\n")
    for path in directory.glob("*.json"):
        if path.stem not in (digest, known_digest):
            path.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Look, and leave the report as the pod's last word."""
    parser = argparse.ArgumentParser(prog="python -m kubegraft.look")
    parser.add_argument("--config", required=True, help="the config file")
    parser.add_argument("--directory", required=True, type=Path, help="where lists of images are kept")
    parser.add_argument("--known", default="", help="digest of the last run's data")
    options = parser.parse_args(arguments)
    catch_stop_signals()
    with exit_on_error("look"):
        try:
            report = look(load_run_config(options.config), options.directory, options.known)
        except (KubegraftError, OSError) as caught:
            error = caught if isinstance(caught, KubegraftError) else refused_by_system(caught)
            _say(
                Report(
                    stage="ingest", error=type(error).__name__, message=str(error), exit_code=error.exit_code
                )
            )
            raise error from caught
        _say(report)


def _say(report: Report) -> None:
    sys.stdout.write(report.to_json() + "\n")
    if path := termination_file():
        path.write_text(report.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
