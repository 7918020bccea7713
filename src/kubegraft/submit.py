"""One call from a config to a run, or a recurring run, on Kubeflow Pipelines; the same call twice changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from kubegraft.errors import ConfigError
from kubegraft.kfp_client.backend import Backend
from kubegraft.kfp_client.connection import Connection
from kubegraft.kfp_client.digests import content_digest
from kubegraft.kfp_client.package import PipelinePackage, load_package
from kubegraft.kfp_client.placement import Placement, run_parameters
from kubegraft.kfp_client.schedules import LATEST, Schedule, ensure_schedule
from kubegraft.kfp_client.watching import watch
from kubegraft.reporting.events import log_event
from kubegraft.run_config import RunConfig

_STAGE: Final = "kfp"
_OVER: Final = ("FAILED", "CANCELED")
DEFAULT_EXPERIMENT: Final = "kubegraft"


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What runs on Kubeflow, under which names.

    Attributes:
        run_config: As for a local run.
        placement: Where the training tasks go.
        pipeline: Name of the pipeline in Kubeflow; "" for the one it carries.
        experiment: Experiment of the run, made if need be.
        name: First part of the run's name; "" for the pipeline's. The rest is the content's digest.
        image: Image of the tasks; "" for the released one.
        registry: Registry of that image; "" for the released one's.
        gpu_image: Image of the training tasks where they ask for accelerators; "" for the one beside `image`.
        work_claim: PersistentVolumeClaim of the tasks' work directories; "" for none.
        secret: Secret whose keys become variables of the tasks, for credentials of buckets; "" for none.
        caching: Whether KFP may answer a task from its cache; ingest it never may.
        service_account: Account of the pods; "" for the installation's own.
        pipeline_root: Where artifacts go; "" for the installation's own.
    """

    run_config: RunConfig = field(default_factory=RunConfig)
    placement: Placement = field(default_factory=Placement)
    pipeline: str = ""
    experiment: str = DEFAULT_EXPERIMENT
    name: str = ""
    image: str = ""
    registry: str = ""
    gpu_image: str = ""
    work_claim: str = ""
    secret: str = ""
    caching: bool = True
    service_account: str = ""
    pipeline_root: str = ""

    def package(self) -> PipelinePackage:
        """Return the pipeline to upload; where accelerators are asked for, that of the GPU profile.

        Raises:
            ConfigError: If an image has no tag that stays, or can't be told.
        """
        gpu = self.placement.accelerator_count > 0
        package = load_package("gpu" if gpu else "cpu").with_image(
            image=self.image, registry=self.registry, gpu_image=self.gpu_image if gpu else ""
        )
        package = package.with_work_claim(self.work_claim).with_secret(self.secret)
        return package if self.caching else package.without_caching()


def submit(
    submission: Submission,
    connection: Connection,
    *,
    again: bool = False,
    wait: bool,
    poll_seconds: float = 5,
) -> dict[str, Any]:
    """Upload the pipeline where that very content isn't there, start the run unless it is there, and watch it.

    A run that failed or was cancelled does not count as there.

    Args:
        submission: What to run.
        connection: Where.
        again: Whether to start a run although one with the same content is there.
        wait: Whether to return when the run has ended, and not when it is there.
        poll_seconds: Time between two looks at it.

    Returns:
        `run_id`, `name`, `state`, `link`, `started` (whether it was started now), `version`, `experiment`.

    Raises:
        ConfigError: If something can't run in a cluster.
        ClusterError: If the API can't be reached, or refuses.
        KubegraftError: If the run failed.
    """
    parameters = run_parameters(submission.run_config, submission.placement)
    package = submission.package()
    backend = Backend(connection)
    version = _uploaded(backend, submission, package)
    experiment_id = backend.ensure_experiment(submission.experiment)
    run, started = _ensure_run(backend, submission, package, version, experiment_id, parameters, again=again)
    link = backend.link("runs", run.run_id)
    event = "run started" if started else "run is there already, --again starts another"
    log_event(_STAGE, event, name=run.display_name, link=link)
    if wait:
        run = watch(backend, run.run_id, package.tasks, poll_seconds=poll_seconds)
    return {
        "run_id": run.run_id,
        "name": run.display_name,
        "state": str(run.state),
        "link": link,
        "started": started,
        "version": package.version_name,
        "experiment": submission.experiment,
    }


def _uploaded(backend: Backend, submission: Submission, package: PipelinePackage) -> Any:
    name = submission.pipeline or package.name
    version, uploaded = backend.ensure_version(name, package)
    event = "version uploaded" if uploaded else "version is there already"
    log_event(_STAGE, event, pipeline=name, version=package.version_name)
    return version


def _ensure_run(
    backend: Backend,
    submission: Submission,
    package: PipelinePackage,
    version: Any,
    experiment_id: str,
    parameters: dict[str, Any],
    *,
    again: bool,
) -> tuple[Any, bool]:
    content = (package.version_name, parameters, submission.service_account, submission.pipeline_root)
    name = f"{submission.name or submission.pipeline or package.name}-{content_digest(content)}"
    earlier = [run for run in backend.runs_named(name, experiment_id) if run.state not in _OVER]
    if earlier and not again:
        return earlier[0], False
    run = backend.create_run(
        display_name=name,
        experiment_id=experiment_id,
        service_account=submission.service_account or None,
        version={"pipeline_id": version.pipeline_id, "pipeline_version_id": version.pipeline_version_id},
        runtime_config={"parameters": parameters, "pipeline_root": submission.pipeline_root or None},
    )
    return run, True


def schedule(
    submission: Submission,
    connection: Connection,
    *,
    cron: str = "",
    interval_seconds: int = 0,
    pinned: bool = False,
    catch_up: bool = False,
) -> dict[str, Any]:
    """Upload the pipeline where that very content isn't there, and make its recurring run be as described.

    A schedule that follows the newest version sets only what differs from the pipeline's defaults, so that a version
    with other parameters does not stop it.

    Args:
        submission: What to run; `name` is the recurring run's.
        connection: Where.
        cron: Six fields; "" for an interval.
        interval_seconds: Seconds from start to start; 0 for a cron expression.
        pinned: Whether to stay with this version and not follow the newest.
        catch_up: Whether missed ticks are made up for.

    Returns:
        `recurring_run_id`, `name`, `change` (`created`, `replaced`, `unchanged`), `link`, `version`.

    Raises:
        ConfigError: If something can't run in a cluster, or when to run breaks its rule.
        ClusterError: If the API can't be reached, or refuses.
    """
    if not submission.name:
        raise ConfigError("`name` must name the schedule, to find it again. Received: name=''.")
    parameters = run_parameters(submission.run_config, submission.placement)
    package = submission.package()
    if not pinned:
        defaults = package.defaults
        parameters = {key: value for key, value in parameters.items() if value != defaults.get(key)}
    wanted = {"cron": cron, "interval_seconds": interval_seconds, "catch_up": catch_up}
    Schedule(name=submission.name, pipeline_id="", **wanted)  # type: ignore[arg-type]  # before any call
    backend = Backend(connection)
    version = _uploaded(backend, submission, package)
    made, change = ensure_schedule(
        backend,
        Schedule(
            name=submission.name,
            pipeline_id=version.pipeline_id,
            version_id=version.pipeline_version_id if pinned else LATEST,
            parameters=parameters,
            service_account=submission.service_account,
            pipeline_root=submission.pipeline_root,
            **wanted,  # type: ignore[arg-type]
        ),
        backend.ensure_experiment(submission.experiment),
    )
    return {
        "recurring_run_id": made.recurring_run_id,
        "name": made.display_name,
        "change": change,
        "link": backend.link("recurringrun", made.recurring_run_id),
        "version": package.version_name if pinned else "latest",
    }
