"""The whole pipeline on this machine: the function that is compiled for the cluster, run by `kfp.local`.

Around it: checks before any work, a lock on the output directory, a readable log, an end in good order when
the process is asked to stop, and results at paths that stay the same (`run_results`).
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import kubegraft
from kubegraft import errors, storage
from kubegraft.accelerators import require_accelerators_for_run
from kubegraft.child_processes import StopRequest, stopping_children
from kubegraft.config_file import to_values
from kubegraft.errors import ConfigError, EnvironmentFault, Interrupted, KubegraftError
from kubegraft.fork_server import ForkServer
from kubegraft.preparation import PREPARATION, preparation_arguments, worth_preparing
from kubegraft.processes import ERROR_FILE, RUN_PID_VARIABLE, WORK_DIR_VARIABLE
from kubegraft.reporting import metrics
from kubegraft.reporting.events import RUN_NAME_VARIABLE, log_event, run_name
from kubegraft.run_config import RunConfig, pipeline_parameters
from kubegraft.run_log import RunLog, without_executor_echo
from kubegraft.run_results import (
    RESULTS,
    UNPUBLISHED_FILE,
    find_run_dir,
    publish,
    read_results,
    summarise,
    tidy,
    write_summary,
)
from kubegraft.stage import FRESH_VARIABLE
from kubegraft.stage_processes import stages_forked_by, start_server
from kubegraft.unchanged import unchanged_summary

_LOCK_FILE: Final = ".kubegraft-run"
LOG_FILE: Final = "run.log"
WORK_DIR: Final = "work"
_PREPARATION_LOG: Final = "preparation.log"
_CHECK_TASK: Final = "check-images"
COMPILED_FILES: Final = {"cpu": "transfer_learning.yaml", "gpu": "transfer_learning_gpu.yaml"}
_COMPILED_DIR: Final = Path(kubegraft.__file__).parent / "compiled"


def run_locally(
    run_config: RunConfig,
    output: str | os.PathLike[str],
    *,
    fresh: bool = False,
    publish_uri: str = "",
    if_changed: bool = False,
) -> dict[str, Any]:
    """Run the pipeline here, and publish its report, model and metrics.

    A call that is killed and made again with the same arguments continues where it was.

    Args:
        run_config: What to run.
        output: Directory for everything the run writes; made if need be.
        fresh: Whether to start over instead of continuing or reusing earlier work.
        publish_uri: Path, or `gs://` or `s3://` URI of a folder, that the results are copied to; "" for none.
        if_changed: Whether to do nothing where the run would only repeat the one before (`unchanged`).

    Returns:
        The summary, which is also in `run.json`: paths, accuracies, digests, config. That of the run before, with
        the reason as `skipped`, where there was nothing to do.

    Raises:
        KubegraftError: What a stage raised, or what is wrong before any work.
        KeyboardInterrupt: If the user interrupted the run.
    """
    output_dir = Path(output).absolute()
    with _variables({RUN_NAME_VARIABLE: run_name() or _own_name(output_dir)}), metrics.serving_run():
        check_before_work(run_config, output_dir)
        if publish_uri:
            storage.check_target(output_dir, publish_uri)
        with _locked(output_dir):
            if if_changed and (earlier := unchanged_summary(run_config, output_dir, publish_uri)):
                return earlier
            return _run_and_publish(run_config, output_dir, os.fspath(output), publish_uri, fresh=fresh)


def _run_and_publish(
    run_config: RunConfig, output_dir: Path, output: str, publish_uri: str, *, fresh: bool
) -> dict[str, Any]:
    started = time.monotonic()
    with _ready_for_stages(run_config, output_dir, fresh=fresh) as server:
        pipeline = without_check(without_retries(load_pipeline()))
        run_dir = _run(pipeline, run_config, output_dir, server)
    results = read_results(run_dir)
    publish(run_dir, output_dir)
    summary = summarise(output, results, to_values(run_config), time.monotonic() - started)
    if publish_uri:
        summary["published"] = storage.public_uri(publish_uri)
        # A file of its own: the summary travels too, so it can't say what is yet to be done.
        (output_dir / UNPUBLISHED_FILE).touch()
    write_summary(summary, output_dir)
    if publish_uri:
        storage.publish_tree(output_dir, publish_uri, only=RESULTS)
        (output_dir / UNPUBLISHED_FILE).unlink()
    tidy(run_dir, output_dir, results)
    return summary


def check_before_work(run_config: RunConfig, output_dir: Path) -> None:
    """Raise what would stop the run later: a wrong backbone, input size, weights, source, output or machine.

    Raises:
        ConfigError: If a local source does not exist, the backbone is unknown or does not take the input
            size, or the output holds something else.
        WeightsError: If the backbone's weights can't be had.
        EnvironmentFault: If accelerators were asked for that are not there.
    """
    _check_source(run_config.ingest.source, output_dir)
    _check_output(output_dir)
    check_choices(run_config)
    require_accelerators_for_run()


def check_choices(run_config: RunConfig) -> None:
    """Raise what would stop training later: a wrong backbone, input size, number of blocks or weights.

    Raises:
        ConfigError: If the backbone is unknown, does not take the input size, or has fewer blocks.
        WeightsError: If its weights can't be had.
    """
    from kubegraft.config import AUTO
    from kubegraft.modeling.backbones import get_backbone
    from kubegraft.modeling.weights import check_weights

    head = run_config.head
    backbone = get_backbone(head.backbone)
    if head.input_size != AUTO:
        backbone.check_input_size(head.input_size)
    backbone.check_num_blocks(run_config.fine_tune.num_blocks)
    check_weights(backbone, head.weights, head.weights_sha256)


def _check_source(source: str, output_dir: Path) -> None:
    if storage.is_remote(source):
        return  # also a sample; ingest, which is the first stage, looks
    path = storage.local_path(source).absolute()
    if not path.exists():
        raise ConfigError(
            f"`source` must exist. Received: source={source!r}, which is {str(path)!r}. Check the spelling; "
            "without a folder of your own, sample://digits needs none."
        )
    if path.resolve() in (output_dir.resolve(), *output_dir.resolve().parents):
        raise ConfigError(
            f"`output` must be outside of the images, or the next run would take its files for a class. "
            f"Received: output={str(output_dir)!r}, source={source!r}. Choose another output directory."
        )


def _check_output(output_dir: Path) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"`output` must be a directory. Received: output={str(output_dir)!r}, a file.")
    ours = (output_dir / _LOCK_FILE).exists()
    if output_dir.exists() and not ours and any(output_dir.iterdir()):
        raise ConfigError(
            "`output` must not exist, be empty, or hold an earlier run. Received: "
            f"output={str(output_dir)!r}, which holds other files. Choose another directory."
        )


@contextlib.contextmanager
def _locked(output_dir: Path) -> Iterator[None]:
    """Hold the output directory; the kernel gives the lock back however this process ends."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / _LOCK_FILE).open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise ConfigError(
                f"`output` must not be in use by another run. Received: output={str(output_dir)!r}, in which "
                f"process {lock.read().strip() or '?'} is running. Wait for it, or choose another directory."
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def load_pipeline() -> Callable[..., Any]:
    """Return the pipeline: the function in the checkout, or the packaged YAML that was compiled from it.

    Raises:
        EnvironmentFault: If there is neither.
    """
    if checkout := find_checkout():
        module = import_from_checkout(checkout, "pipelines.transfer_learning")
        pipeline: Callable[..., Any] = module.transfer_learning
        return pipeline
    from kfp import components

    loaded: Callable[..., Any] = components.load_component_from_file(str(packaged_pipeline()))
    return loaded


def import_from_checkout(checkout: Path, name: str) -> Any:
    """Import a module of `pipelines` or `components`, which no wheel contains."""
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(checkout))


def without_retries(pipeline: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a pipeline whose tasks are tried once.

    Retries are for nodes that are lost. On one machine a stage that failed would only fail again, minutes later.
    """
    copied: Any = copy.deepcopy(pipeline)
    for task in copied.component_spec.implementation.graph.root.dag.tasks.values():
        task.ClearField("retry_policy")
    return copied  # type: ignore[no-any-return]


def without_check(pipeline: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a pipeline in which `ingest` comes first.

    Looking at the images before they are ingested is for KFP's cache. Here there is none: stages find their finished
    work themselves, by the digest of what they read.
    """
    copied: Any = copy.deepcopy(pipeline)
    tasks = copied.component_spec.implementation.graph.root.dag.tasks
    del tasks[_CHECK_TASK]
    tasks["ingest"].dependent_tasks.remove(_CHECK_TASK)
    tasks["ingest"].inputs.parameters["images_digest"].runtime_value.constant.string_value = ""
    return copied  # type: ignore[no-any-return]


def packaged_pipeline(profile: str = "cpu") -> Path:
    """Return the path of the compiled pipeline in an installed kubegraft.

    Args:
        profile: `cpu`, or `gpu` for the variant whose training tasks run in the image for GPUs.

    Raises:
        EnvironmentFault: If it is not there.
    """
    path = _COMPILED_DIR / COMPILED_FILES[profile]
    if not path.exists():
        raise EnvironmentFault(
            f"`{path}` must exist in an installed kubegraft. The installation is damaged: do it again."
        )
    return path


def find_checkout() -> Path | None:
    """Return the directory of the source checkout that this kubegraft is imported from, or None."""
    for parent in Path(kubegraft.__file__).resolve().parents:
        if (parent / "pipelines" / "transfer_learning.py").exists() and (parent / "components").is_dir():
            return parent
    return None


@contextlib.contextmanager
def _ready_for_stages(run_config: RunConfig, output_dir: Path, *, fresh: bool) -> Iterator[ForkServer | None]:
    """Set what stages inherit, and start what they are forked from, which first prepares what it can.

    See `fork_server` and `preparation`.
    """
    work_dir = output_dir / WORK_DIR
    with contextlib.ExitStack() as stack:
        stack.enter_context(_variables(_for_stages(work_dir, fresh=fresh)))
        server = start_server()
        if server:
            stack.callback(server.close)
            if worth_preparing(run_config):
                arguments = preparation_arguments(run_config)
                with contextlib.suppress(OSError):  # nothing depends on it
                    work_dir.mkdir(exist_ok=True)
                    server.call_aside(PREPARATION, arguments, os.environ, work_dir / _PREPARATION_LOG)
        yield server


def _run(
    pipeline: Callable[..., Any], run_config: RunConfig, output_dir: Path, server: ForkServer | None
) -> Path:
    from kfp import local

    _hide_folder_named_docker()
    pipeline_root, work_dir = output_dir / "kfp", output_dir / WORK_DIR
    for directory in (pipeline_root, work_dir):
        directory.mkdir(exist_ok=True)
    before = {path.name for path in pipeline_root.iterdir()}
    (work_dir / ERROR_FILE).unlink(missing_ok=True)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(pipeline_root), raise_on_error=True)
    with (
        stages_forked_by(server),
        RunLog(output_dir / LOG_FILE) as log,
        stopping_children() as stop,
        warnings.catch_warnings(),
    ):
        # kfp doubts every image whose name lacks "python", and lists what only a cluster can do.
        warnings.filterwarnings("ignore", module=r"kfp\.local")
        try:
            with contextlib.redirect_stdout(log):
                pipeline(**pipeline_parameters(run_config))
        except RuntimeError as error:
            raise _failure(log, work_dir, stop, error) from error
        if stop.requested:  # in the moment in which the last stage ended: there is still publishing to do
            raise _stopped(stop)
    return find_run_dir(pipeline_root, before)


def _hide_folder_named_docker() -> None:
    """Keep kfp from taking a folder `docker/` on the path, such as this checkout's, for the package it looks for."""
    spec = importlib.util.find_spec("docker") if "docker" not in sys.modules else None
    if spec is not None and spec.origin is None:
        sys.modules["docker"] = None  # type: ignore[assignment]  # importing it then says that it is not there


def _for_stages(work_dir: Path, *, fresh: bool) -> dict[str, str]:
    """Return the variables that stage processes inherit."""
    return {
        WORK_DIR_VARIABLE: str(work_dir),
        RUN_PID_VARIABLE: str(os.getpid()),
        FRESH_VARIABLE: "1" if fresh else "",
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"),
        "PYTHONUNBUFFERED": "1",
        # Large pages for what stages compute with: the frozen pass is 1.1 to 1.25 times as fast.
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
    }


@contextlib.contextmanager
def _variables(changes: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and set them back."""
    earlier = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _own_name(output_dir: Path) -> str:
    """Return a run's name: short, the same for each call on this directory, and another on another one."""
    return f"{output_dir.name}-{hashlib.sha256(os.fsencode(output_dir)).hexdigest()[:6]}"


def _failure(log: RunLog, work_dir: Path, stop: StopRequest, error: RuntimeError) -> BaseException:
    """Return what to raise for a failed run: a stop, a stage's error, or an unexpected end."""
    log.flush()
    if stop.requested:
        return _stopped(stop)
    record = work_dir / ERROR_FILE
    if record.exists():
        log_event("run", "failed", log=str(log.path))
        return _recorded_error(json.loads(record.read_text(encoding="utf-8")))
    print(without_executor_echo(log.tail()), file=sys.stderr)  # noqa: T201 - all that is known
    return KubegraftError(
        f"A stage ended unexpectedly: {_without_colours(str(error))} What it printed is above, and also in "
        f"{log.path}. If it says nothing, the system may have ended it for want of memory."
    )


def _stopped(stop: StopRequest) -> BaseException:
    if stop.interrupted:
        return KeyboardInterrupt()
    return Interrupted("The run was asked to stop. Start it again with the same arguments to continue.")


def _recorded_error(record: dict[str, Any]) -> KubegraftError:
    kind = getattr(errors, str(record["type"]), KubegraftError)
    if not (isinstance(kind, type) and issubclass(kind, KubegraftError)):
        kind = KubegraftError
    return kind(str(record["message"]))


def _without_colours(text: str) -> str:
    import re

    return re.sub(r"\x1b\[\d+m", "", text)
