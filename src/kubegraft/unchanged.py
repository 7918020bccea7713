"""Whether a run would only repeat an earlier one: the same images, config and kubegraft (`kubegraft run --if-changed`).

For runs that are started by a clock. What is cheap to compare is compared first; the images are read last, in a
process of their own, whose memory is free again when training begins.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kubegraft import __version__, storage
from kubegraft.child_processes import stopping_children
from kubegraft.config_file import to_values, to_yaml
from kubegraft.errors import Interrupted, KubegraftError, StorageError
from kubegraft.reporting.events import log_event
from kubegraft.run_config import RunConfig
from kubegraft.run_results import SUMMARY_FILE, UNPUBLISHED_FILE, public_config

_STAGE: Final = "run"


def unchanged_summary(
    run_config: RunConfig, output_dir: Path, publish_uri: str = ""
) -> dict[str, Any] | None:
    """Return the summary of the earlier run that this one would repeat, with the reason as `skipped`, or None.

    Args:
        run_config: What would run.
        output_dir: Where the earlier run may have left its summary.
        publish_uri: Where else; a pod's own disk is empty each time.

    Raises:
        Interrupted: If the process was asked to stop.
        KeyboardInterrupt: If the user interrupted it.
    """
    summary = _earlier_summary(output_dir, publish_uri)
    if summary is None:
        log_event(_STAGE, "due", reason="no earlier run is here")
        return None
    if difference := _difference(summary, run_config, publish_uri):
        log_event(_STAGE, "due", reason=difference)
        return None
    digest = _digest_now(run_config, output_dir)
    if digest != summary["digests"]["ingest"]:
        log_event(_STAGE, "due", reason="the images have changed" if digest else "the images can't be read")
        return None
    reason = f"the images have the digest of the run before, {digest[:16]}, and the config is the same"
    log_event(_STAGE, "unchanged", reason=reason)
    return {**summary, "skipped": reason}


def _earlier_summary(output_dir: Path, publish_uri: str) -> dict[str, Any] | None:
    local = output_dir / SUMMARY_FILE
    if local.exists() and (output_dir / "model").is_dir():
        summary = _read(local)
        if summary and (output_dir / UNPUBLISHED_FILE).exists():
            return {**summary, "published": ""}  # that run ended before its results were there
        return summary
    if not publish_uri:
        return None
    with tempfile.TemporaryDirectory() as directory:
        fetched = Path(directory, "published")
        if not storage.exists(f"{publish_uri.rstrip('/')}/{SUMMARY_FILE}"):
            return None
        try:
            storage.fetch_whole_tree(publish_uri, fetched, part=SUMMARY_FILE)
        except StorageError:  # a publication that was broken off, which the run mends
            return None
        return _read(fetched / SUMMARY_FILE)


def _read(path: Path) -> dict[str, Any] | None:
    """Return a summary, or None for a file that is none: then the run is due, and writes it anew."""
    with contextlib.suppress(OSError, ValueError):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(summary, dict) and "ingest" in summary.get("digests", {}):
            return summary
    return None


def _difference(summary: Mapping[str, Any], run_config: RunConfig, publish_uri: str) -> str:
    values = public_config(to_values(run_config))
    if summary.get("kubegraft") != __version__:
        return f"the run before was by kubegraft {summary.get('kubegraft')}"
    if summary.get("config") != json.loads(json.dumps(values)):
        return "the config has changed"
    if publish_uri and summary.get("published") != storage.public_uri(publish_uri):
        return "the run before was not published there"
    return ""


def _digest_now(run_config: RunConfig, output_dir: Path) -> str:
    """Return the dataset's digest as the stage `ingest` finds it, or "" if that fails: the run will say why."""
    check_dir = output_dir / "work" / "check"
    shutil.rmtree(check_dir, ignore_errors=True)
    check_dir.mkdir(parents=True)
    config_path = check_dir / "run.yaml"
    config_path.write_text(to_yaml(run_config, ["ingest"]), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "kubegraft", "ingest", "--json", "--config", str(config_path)]
    command += ["--output", str(check_dir / "dataset")]
    try:
        with stopping_children() as stop:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if stop.interrupted:
            raise KeyboardInterrupt
        if stop.requested:
            raise Interrupted("The run was asked to stop. Start it again with the same arguments.")
        return _printed_digest(done.stdout) if done.returncode == 0 else ""
    finally:
        shutil.rmtree(check_dir, ignore_errors=True)


def _printed_digest(document: str) -> str:
    try:
        return str(json.loads(document)["digest"])
    except (ValueError, KeyError) as error:
        raise KubegraftError(
            "`kubegraft ingest --json` must print its digest. Received: "
            f"{document[:80]!r}. Please report this."
        ) from error
