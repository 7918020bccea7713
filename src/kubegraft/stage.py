"""What surrounds the body of every stage: its work directory, lock, reuse, and atomic publication.

A stage is a function of its inputs' digests and its config. `run_stage` turns both into a key, gives the
body a work directory of that key, and publishes what the body wrote by renaming. So a stage that is killed
at any moment and called again finds its own checkpoints and nobody else's, a stage that is finished is not
run again, and nothing is ever half-published.

The work directory is `$KUBEGRAFT_WORK_DIR/<stage>-<key>` where that variable is set (a volume that survives
the process), else a hidden directory beside the output, which is removed at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from kubegraft import __version__
from kubegraft.errors import ConfigError, DataError, ModelError, StorageError
from kubegraft.processes import WORK_DIR_VARIABLE, catch_stop_signals, end_with_run
from kubegraft.reporting import metrics
from kubegraft.reporting.events import log_event

FRESH_VARIABLE: Final = "KUBEGRAFT_FRESH"
RESULT_FILE: Final = "result.json"
# Metrics that say what a call had to do itself: no result, and others where a cache knew more.
WORK_METRICS: Final = ("images_decoded", "features_found", "features_computed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the body of a stage returns.

    Attributes:
        digest: Names the content of the output; equal content has an equal digest on any machine.
        metrics: Scalars for KFP's `Metrics` and for scripts.
        provenance: Digests, versions, seeds and choices that produced the output; JSON scalars.
    """

    digest: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """A published output of a stage.

    Attributes:
        stage: Name of the stage.
        output_dir: Directory that holds the output and `result.json`.
        digest: See `Outcome`.
        metrics: See `Outcome`.
        provenance: See `Outcome`.
        reused: Whether the output was there already, from an earlier call with the same inputs and config.
    """

    stage: str
    output_dir: Path
    digest: str
    metrics: Mapping[str, float]
    provenance: Mapping[str, Any]
    reused: bool = False


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where the body of a stage works.

    Attributes:
        staging: Empty directory; what is in it at the end is the stage's output.
        scratch: Directory for checkpoints, kept from an interrupted call with the same key.
    """

    staging: Path
    scratch: Path


def run_stage(
    stage: str,
    output_dir: str | os.PathLike[str],
    *,
    inputs: Mapping[str, str],
    config: Any,
    body: Callable[[Workspace], Outcome],
    reusable: bool = True,
) -> StageResult:
    """Run `body` once for its inputs and config, and publish what it wrote as `output_dir`.

    Args:
        stage: Name of the stage, for example `train_head`.
        output_dir: Directory to make. It may exist if it is empty or holds this very result.
        inputs: Name -> digest of everything the stage reads.
        config: The stage's frozen dataclass.
        body: Writes the output into `workspace.staging`.
        reusable: Whether a finished output with the same key may be used again. False for a stage whose
            inputs can change under the same key: it runs again, and replaces its own earlier output.

    Returns:
        The published result.

    Raises:
        ConfigError: If `output_dir` holds something else.
    """
    catch_stop_signals()
    end_with_run()
    output_dir = Path(output_dir).resolve()  # "." has no name
    reusable = reusable and not os.environ.get(FRESH_VARIABLE)
    key = _key(stage, inputs, config)
    earlier = _published(output_dir, key)
    if earlier and reusable:
        log_event(stage, "reused", output=str(output_dir))
        return earlier
    if not earlier:
        _require_free(output_dir, stage)
    shared = os.environ.get(WORK_DIR_VARIABLE)
    work_dir = _work_dir(stage, output_dir, key)
    with _locked(work_dir, stage):
        if (earlier := _published(output_dir, key)) and reusable:  # written while this call waited
            return earlier
        _forget_other_calls(work_dir, key)
        finished = work_dir / "output"
        reused = reusable and (finished / RESULT_FILE).exists()
        if reused:
            log_event(stage, "reused", work_dir=str(work_dir))
        else:
            _run_body(stage, key, work_dir, finished, body)
        _publish(finished, output_dir, keep=bool(shared))
        if not shared:
            shutil.rmtree(work_dir)
    return dataclasses.replace(read_result(output_dir), reused=reused)


def read_result(directory: str | os.PathLike[str]) -> StageResult:
    """Return what `result.json` in a stage's output directory says.

    Raises:
        ModelError: If the directory is not the output of a stage.
    """
    path = Path(directory) / RESULT_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return StageResult(
            stage=values["stage"],
            output_dir=Path(directory),
            digest=values["digest"],
            metrics=values["metrics"],
            provenance=values["provenance"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"`{directory}` must be the output directory of a kubegraft stage, with a readable {RESULT_FILE}. "
            f"Received: {type(error).__name__}: {error}. Give the directory that the stage before wrote."
        ) from error


def require_digest(directory: str | os.PathLike[str], digest: str) -> None:
    """Raise DataError if the stage output in `directory` is not the one that `digest` names.

    KFP's cache knows an input by its name only. The digest is passed as a parameter beside it, so that
    changed content is another call; this check makes sure that both speak of the same content.
    """
    found = read_result(directory).digest
    if found != digest:
        raise DataError(
            f"`dataset_digest` must be the digest of the dataset. Received: dataset_digest={digest!r}, but "
            f"{str(directory)!r} holds {found!r}. Pass both from the same ingest task."
        )


def _key(stage: str, inputs: Mapping[str, str], config: Any) -> str:
    identity = {
        "stage": stage,
        "kubegraft": __version__,
        "inputs": dict(inputs),
        "config": dataclasses.asdict(config),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _published(output_dir: Path, key: str) -> StageResult | None:
    try:
        values = json.loads((output_dir / RESULT_FILE).read_text(encoding="utf-8"))
        if values["key"] != key:
            return None
    except (OSError, ValueError, KeyError, TypeError):  # nothing, or something that is not ours
        return None
    return dataclasses.replace(read_result(output_dir), reused=True)


def _require_free(output_dir: Path, stage: str) -> None:
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConfigError(
            f"`output` must not exist, be empty, or hold the result of the same call. Received: "
            f"output={str(output_dir)!r}, which holds something else than this {stage} would write. "
            "Choose another directory, or remove this one."
        )


def _work_dir(stage: str, output_dir: Path, key: str) -> Path:
    shared = os.environ.get(WORK_DIR_VARIABLE)
    return Path(shared) / f"{stage}-{key[:20]}" if shared else _beside(output_dir, "work")


def _beside(output_dir: Path, purpose: str) -> Path:
    """Return a hidden path beside the output that nobody else would use."""
    return output_dir.with_name(f".{output_dir.name}.kubegraft-{purpose}")


def _forget_other_calls(work_dir: Path, key: str) -> None:
    """Remove what a call with other inputs or config left in the work directory of this output."""
    recorded = work_dir / "key"
    if work_dir.exists() and not (recorded.exists() and recorded.read_text() == key):
        shutil.rmtree(work_dir)


@contextlib.contextmanager
def _locked(work_dir: Path, stage: str) -> Iterator[None]:
    """Hold the work directory's lock; the kernel gives it back however this process ends."""
    work_dir.parent.mkdir(parents=True, exist_ok=True)
    lock_path = work_dir.with_name(work_dir.name + ".lock")
    lock = _lock(lock_path, stage)
    try:
        yield
    finally:
        lock_path.unlink(missing_ok=True)
        lock.close()


def _lock(lock_path: Path, stage: str) -> IO[str]:
    while True:
        lock = lock_path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log_event(stage, "waiting", reason="another process runs this very stage", lock=str(lock_path))
            fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if lock_path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                return lock
        lock.close()  # its former holder removed the file: what was locked protects nothing any more


def _run_body(
    stage: str, key: str, work_dir: Path, finished: Path, body: Callable[[Workspace], Outcome]
) -> None:
    workspace = Workspace(staging=work_dir / "staging", scratch=work_dir / "scratch")
    for stale in (workspace.staging, finished):
        shutil.rmtree(stale, ignore_errors=True)
    if os.environ.get(FRESH_VARIABLE):
        shutil.rmtree(workspace.scratch, ignore_errors=True)
    workspace.staging.mkdir(parents=True)
    workspace.scratch.mkdir(exist_ok=True)
    write_atomically(work_dir / "key", key)
    log_event(stage, "started", work_dir=str(work_dir))
    with metrics.watching(stage):
        outcome = body(workspace)
    result = {"stage": stage, "key": key, "kubegraft": __version__, **dataclasses.asdict(outcome)}
    write_atomically(workspace.staging / RESULT_FILE, json.dumps(result, indent=2, sort_keys=True) + "\n")
    workspace.staging.rename(finished)
    shutil.rmtree(workspace.scratch)
    log_event(stage, "finished", **{name: round(value, 6) for name, value in outcome.metrics.items()})


def _publish(finished: Path, output_dir: Path, *, keep: bool) -> None:
    """Make `output_dir` hold what is in `finished`, replacing what is there at once."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    aside, old = _beside(output_dir, "new"), _beside(output_dir, "old")
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    if keep:
        shutil.copytree(finished, aside, copy_function=_link_or_copy)
    else:
        finished.rename(aside)
    if output_dir.exists():
        output_dir.rename(old)
    aside.rename(output_dir)
    shutil.rmtree(old, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
    return target


def work_directory(
    stage: str, output_dir: str | os.PathLike[str], *, inputs: Mapping[str, str], config: Any
) -> Workspace:
    """Return where the body of a stage works that `run_stage` runs in another process, with the same arguments.

    For workers that take part in a stage whose directories another one makes, locks and publishes; they don't write
    to `staging`.
    """
    work_dir = _work_dir(stage, Path(output_dir).resolve(), _key(stage, inputs, config))
    return Workspace(staging=work_dir / "staging", scratch=work_dir / "scratch")


def await_file(path: Path, seconds: float = 60.0) -> None:
    """Return when a file is there that another machine has written; a shared volume shows it after a while.

    Raises:
        StorageError: If it does not appear.
    """
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise StorageError(
                f"`directory` must be a volume that all workers share. Received: {str(path)!r} is not there "
                f"{seconds:g} s after another worker wrote it. Mount the same claim in all pods."
            )
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # noqa: PTH208 - makes a network file system look again
        time.sleep(0.2)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` aside, sync it, then rename it to `path`, so that a reader sees all or nothing."""
    aside = path.with_name(path.name + ".partial")
    data = content.encode() if isinstance(content, str) else content
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
