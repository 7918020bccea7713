"""The stages of a local run as children of a fork server, in place of the processes that `kfp.local` starts.

`kfp.local` starts Python through a shell for each task, which imports kfp and TensorFlow anew. What is called here is
the same: the component's source in a file, and kfp's executor on it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from kubegraft.fork_server import ForkServer
from kubegraft.reporting.events import log_event

# Imported in this order: what is prepared aside needs the first alone, which makes TensorFlow's settings.
_MODULES: Final = (
    "kubegraft.tensorflow_setup",
    "kfp.dsl.executor",
    "kubegraft.data.ingest",
    "kubegraft.training.head",
    "kubegraft.training.fine_tune",
    "kubegraft.evaluation.evaluate",
    "kubegraft.export.export",
)
_EXECUTOR: Final = "kfp.dsl.executor_main"
_SOURCE_FILE: Final = "ephemeral_component.py"

# kfp then imports what a task needs, and nothing that makes pipelines.
_IN_TASK: Final = {"_KFP_RUNTIME": "true"}


class _Component(NamedTuple):
    source: str
    arguments: list[str]


def start_server() -> ForkServer | None:
    """Start what stages are forked from; None where processes can't be forked."""
    return ForkServer.start(_MODULES, _IN_TASK)


@contextlib.contextmanager
def stages_forked_by(server: ForkServer | None) -> Iterator[None]:
    """Within the block, tasks that `kfp.local` runs as processes are children of the server, where they can be.

    Args:
        server: From `start_server`; None leaves everything to kfp.
    """
    from kfp.local import subprocess_task_handler as handler

    # kfp has no place for a runner of one's own. Where a later version has no such function, stages only start slower.
    ordinary: Callable[..., int] | None = getattr(handler, "run_local_subprocess", None)
    if server is None or ordinary is None:
        yield
        return

    def run(full_command: list[str], env_vars: Mapping[str, str] | None = None) -> int:
        component = _component_of(full_command)
        code = _forked(server, component, env_vars or {}) if component else None
        if code is None:
            log_event(
                "run", "started anew", reason="the task could not be forked, so it starts seconds later"
            )
            return ordinary(full_command, env_vars)
        return code

    handler.run_local_subprocess = run
    try:
        yield
    finally:
        handler.run_local_subprocess = ordinary


def _component_of(full_command: list[str]) -> _Component | None:
    """Return what a task's shell command runs; None for another command than that of a lightweight component."""
    for number, part in enumerate(full_command[:-1]):
        if "pip install" in part:
            return None
        if _EXECUTOR in part and _SOURCE_FILE in part:
            return _Component(full_command[number + 1], full_command[number + 2 :])
    return None


def _forked(server: ForkServer, component: _Component, variables: Mapping[str, str]) -> int | None:
    """Run a component, its output printed, and return its exit code; None where the server can't."""
    environment = {**os.environ, **variables, **_IN_TASK}
    with tempfile.TemporaryDirectory(prefix="kubegraft-stage-") as directory:
        path = Path(directory, _SOURCE_FILE)
        path.write_text(component.source, encoding="utf-8")
        arguments = ["--component_module_path", str(path), *component.arguments]
        with server.call(_EXECUTOR, arguments, environment) as call:
            if call is None:
                return None
            for line in call.output:
                print(line, end="")  # noqa: T201 - as kfp does; see `run_log`
            print("\n")  # noqa: T201
            return call.wait()
