"""What the pods of a TransferJob run: prepare, train (on several workers), finish, in one directory that all share.

Each part can be killed at any moment and called again: it goes on, or ends at once where its work is done. What a part
came to and how it ended is reported (`job_report`), for the controller.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from kubegraft import __version__
from kubegraft.config_file import load_run_config, to_values
from kubegraft.errors import Interrupted, KubegraftError, PeerLost
from kubegraft.job_reporter import Reporter
from kubegraft.processes import (
    before_stopping,
    catch_stop_signals,
    refused_by_system,
    watching_for_stop,
)
from kubegraft.reporting import progress
from kubegraft.reporting.events import log_event
from kubegraft.run_config import RunConfig
from kubegraft.run_results import ARTIFACTS, RESULTS, publish, read_results, summarise, write_summary
from kubegraft.stage import RESULT_FILE, await_file, read_result, write_atomically

PARTS: Final = ("prepare", "train", "finish")
_PREPARED_FILE: Final = "prepared.json"
_TRAINED_FILE: Final = "trained.json"
# The chief has the coordination service: it leaves when the others have.
_LAST_TO_LEAVE_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class _Job:
    """A job's directory, config and reports."""

    directory: Path
    config: RunConfig
    reporter: Reporter

    def output(self, stage: str) -> Path:
        """Return where a stage's output is."""
        return self.directory / ARTIFACTS[stage]

    def is_done(self, marker: str, identity: str) -> bool:
        """Return whether a part of this very job has ended well before."""
        try:
            found = json.loads((self.directory / marker).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(found == {"identity": identity})

    def mark_done(self, marker: str, identity: str) -> None:
        """Remember that a part has ended well."""
        write_atomically(self.directory / marker, json.dumps({"identity": identity}) + "\n")


def run_part(part: str, config_path: str, directory: str, publish_uri: str = "") -> int:
    """Run one part of a job, and return the process's exit code; it has been reported.

    Args:
        part: One of `PARTS`.
        config_path: The run's config file.
        directory: The job's directory, on a volume that all its pods share.
        publish_uri: Where `finish` publishes to; "" for nowhere.
    """
    parts: dict[str, Callable[[_Job], None]] = {
        "prepare": _prepare,
        "train": _train,
        "finish": lambda job: _finish(job, publish_uri),
    }
    catch_stop_signals()
    reporter = Reporter(speaks=part != "train" or _task_index() == 0)
    before_stopping(lambda: reporter.fail(Interrupted.exit_code, "Interrupted", "asked to stop (SIGTERM)"))
    progress.observers.append(reporter.observe)
    try:
        with watching_for_stop(), _refusals():
            Path(directory).mkdir(parents=True, exist_ok=True)
            parts[part](_Job(Path(directory), load_run_config(config_path), reporter))
    except KubegraftError as error:
        _report_error(reporter, part, error)
        return error.exit_code
    except Exception as error:  # the pod's last word must say it, whatever it is
        traceback.print_exc()
        reporter.fail(KubegraftError.exit_code, "", f"{type(error).__name__}: {error}")
        return KubegraftError.exit_code
    finally:
        progress.observers.remove(reporter.observe)
        before_stopping(None)
    return 0


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Raise what the system refused, a full disk for example, as a StorageError."""
    try:
        yield
    except OSError as error:
        raise refused_by_system(error) from error


def _report_error(reporter: Reporter, part: str, error: KubegraftError) -> None:
    if os.environ.get("KUBEGRAFT_DEBUG"):
        traceback.print_exc()
    kind = type(error).__name__
    log_event(part, "failed", type=kind, exit_code=error.exit_code, retryable=error.retryable)
    print(f"Error: {error}", file=sys.stderr, flush=True)  # noqa: T201
    reporter.fail(error.exit_code, kind, str(error))


def _task_index() -> int:
    from kubegraft.training.cluster_spec import find_cluster

    try:
        cluster = find_cluster()
    except KubegraftError:
        return 0  # said when the part begins
    return cluster.index if cluster else 0


def _identity(*values: Any) -> str:
    return hashlib.sha256(json.dumps([__version__, *values], sort_keys=True).encode()).hexdigest()


def _prepare(job: _Job) -> None:
    """Check the choices and ingest the images, unless that is done."""
    job.reporter.begin("ingest")
    identity = _identity(asdict(job.config.ingest))
    if not job.is_done(_PREPARED_FILE, identity):
        from kubegraft.data.ingest import ingest
        from kubegraft.local_run import check_choices

        check_choices(job.config)
        ingest(job.output("ingest"), job.config.ingest)
        job.mark_done(_PREPARED_FILE, identity)
    job.reporter.done(dataset_digest=read_result(job.output("ingest")).digest)


def _train(job: _Job) -> None:
    """Train the head, then the backbone's last blocks; with the workers that `TF_CONFIG` names, if any."""
    from kubegraft.training.cluster_spec import find_cluster

    cluster = find_cluster()
    await_file(job.output("ingest") / RESULT_FILE)
    dataset_digest = read_result(job.output("ingest")).digest
    identity = _identity(dataset_digest, asdict(job.config.head), asdict(job.config.fine_tune))
    if job.is_done(_TRAINED_FILE, identity):
        job.reporter.begin("fine_tune")
        job.reporter.finish(read_result(job.output("fine_tune")).metrics)
        job.reporter.done(dataset_digest=dataset_digest)
        return
    if cluster:
        _join(job)
    _train_stages(job)
    is_chief = not cluster or cluster.index == 0
    if is_chief:
        job.mark_done(_TRAINED_FILE, identity)
    job.reporter.done(dataset_digest=dataset_digest)
    if cluster and is_chief:
        time.sleep(_LAST_TO_LEAVE_SECONDS)


def _join(job: _Job) -> None:
    """Join the other workers; one that never comes is reported, although nothing of Python's runs then."""
    from kubegraft import tensorflow_setup
    from kubegraft.training.distribution import make_strategy
    from kubegraft.training.watchdog import WATCHDOG

    code, kind = PeerLost.exit_code, PeerLost.__name__
    WATCHDOG.last_words = lambda reason: job.reporter.fail(
        code, kind, f"The watchdog ended this worker: {reason}."
    )
    job.reporter.foretell(code, kind, "Not all workers came in time. Their own logs and events say why.")
    tensorflow_setup.setup(job.config.head.seed)
    make_strategy()
    job.reporter.take_back()


def _train_stages(job: _Job) -> None:
    from kubegraft.training.fine_tune import fine_tune
    from kubegraft.training.head import train_head

    dataset, head = job.output("ingest"), job.output("train_head")
    job.reporter.begin("train_head")
    job.reporter.finish(train_head(dataset, head, job.config.head, job.config.fine_tune).metrics)
    job.reporter.begin("fine_tune")
    job.reporter.finish(fine_tune(dataset, head, job.output("fine_tune"), job.config.fine_tune).metrics)


def _finish(job: _Job, publish_uri: str) -> None:
    """Evaluate, export and publish."""
    from kubegraft import storage
    from kubegraft.evaluation.evaluate import evaluate
    from kubegraft.export.export import export

    started = time.monotonic()
    if publish_uri:
        storage.check_target(job.directory, publish_uri)
    dataset, model, evaluation = (job.output(stage) for stage in ("ingest", "fine_tune", "evaluate"))
    job.reporter.begin("evaluate")
    result = evaluate(dataset, model, evaluation, job.config.evaluate, job.output("train_head"))
    job.reporter.finish({**read_result(model).metrics, **result.metrics})
    job.reporter.begin("export")
    export(dataset, model, evaluation, job.output("export"), job.config.export)
    publish(job.directory, job.directory)
    seconds = time.monotonic() - started
    results = read_results(job.directory)
    write_summary(summarise(str(job.directory), results, to_values(job.config), seconds), job.directory)
    if publish_uri:
        storage.publish_tree(job.directory, publish_uri, only=RESULTS)
    model_uri = f"{publish_uri.rstrip('/')}/model" if publish_uri else str(job.directory / "model")
    job.reporter.done(model_uri=model_uri, dataset_digest=results["ingest"].digest)
