"""A stage that several workers run together: the chief surrounds it as any stage, the others take part.

The chief alone locks, reuses, writes and publishes. What it finds at the beginning, work to do, a result that is there
already or an error, it tells the others; so they end as it does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kubegraft import errors
from kubegraft.errors import KubegraftError
from kubegraft.processes import catch_stop_signals
from kubegraft.stage import (
    RESULT_FILE,
    Outcome,
    StageResult,
    Workspace,
    await_file,
    read_result,
    run_stage,
    work_directory,
)
from kubegraft.training.cluster_spec import find_cluster
from kubegraft.training.distribution import make_strategy, workers_of
from kubegraft.training.workers import Workers, ending_if_lost


def run_shared_stage(
    stage: str,
    output_dir: str | os.PathLike[str],
    *,
    inputs: Mapping[str, str],
    config: Any,
    body: Callable[[Workspace], Outcome],
) -> StageResult:
    """Run a stage as `stage.run_stage`, together with the workers that `TF_CONFIG` names.

    Args:
        stage: See `stage.run_stage`.
        output_dir: See there; on a volume that all workers share.
        inputs: See there; the same for all workers.
        config: See there; the same for all workers.
        body: See there; called by all workers, of which only the chief writes into `workspace.staging`.

    Raises:
        KubegraftError: What the chief raised before `body`, or what `body` raises.
        PeerLost: If another worker can't be reached any more.
    """
    if find_cluster() is None:
        return run_stage(stage, output_dir, inputs=inputs, config=config, body=body)
    catch_stop_signals()
    workers = workers_of(_strategy(config))
    with ending_if_lost(workers):  # also where it is a variable's first value that does not come
        if not workers.is_chief:
            return _follow(workers, stage, output_dir, inputs, config, body)
        return _Lead(workers, body).run(stage, output_dir, inputs, config)


def _strategy(config: Any) -> Any:
    from kubegraft import tensorflow_setup

    tensorflow_setup.setup(
        config.seed
    )  # before TensorFlow joins the others, which is the first thing it does
    return make_strategy()


class _Lead:
    """The chief's part."""

    def __init__(self, workers: Workers, body: Callable[[Workspace], Outcome]) -> None:
        self._workers, self._body, self._has_told = workers, body, False

    def run(
        self, stage: str, output_dir: str | os.PathLike[str], inputs: Mapping[str, str], config: Any
    ) -> StageResult:
        try:
            result = run_stage(stage, output_dir, inputs=inputs, config=config, body=self._told_body)
        except KubegraftError as error:
            self._tell({"error": type(error).__name__, "message": str(error)})
            raise
        self._tell({"work": False})
        self._workers.barrier()
        return result

    def _told_body(self, workspace: Workspace) -> Outcome:
        self._tell({"work": True})
        return self._body(workspace)

    def _tell(self, what: dict[str, Any]) -> None:
        if not self._has_told:
            self._has_told = True
            self._workers.share(what)


def _follow(
    workers: Workers,
    stage: str,
    output_dir: str | os.PathLike[str],
    inputs: Mapping[str, str],
    config: Any,
    body: Callable[[Workspace], Outcome],
) -> StageResult:
    told = workers.share()
    if "error" in told:
        kind = getattr(errors, told["error"], KubegraftError)
        raise kind(told["message"])
    if told["work"]:
        body(work_directory(stage, output_dir, inputs=inputs, config=config))
    workers.barrier()
    await_file(Path(output_dir) / RESULT_FILE)
    return read_result(output_dir)
