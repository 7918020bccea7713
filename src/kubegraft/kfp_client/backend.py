"""The few calls of the KFP API that kubegraft makes: each finds by name before it makes anything.

The generated API (`kfp_server_api`) is called where the SDK insists on more than the backend does, and because the
SDK prints links of its own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, Final

from kubegraft.errors import ClusterError
from kubegraft.kfp_client.connection import Connection, open_client
from kubegraft.kfp_client.package import PipelinePackage

_PAGE_SIZE: Final = 100
_ADVICE: Final = {
    401: "Give --token-file, --service-account or --iap-client-id, as your Kubeflow asks.",
    403: "Ask for the role kubeflow-edit in that namespace, or name yours with --namespace.",
    404: "Check --endpoint: its address may serve something else, or an older Kubeflow Pipelines than 2.",
    409: "Something of that name was made at the same moment; the same call again finds it.",
}


class Backend:
    """One Kubeflow Pipelines installation.

    Attributes:
        connection: How it is reached.
        namespace: Namespace of what is made, or None in a standalone installation.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.reconnect()

    def reconnect(self) -> None:
        """Connect anew, for a token that has expired.

        Raises:
            ClusterError: If the API can't be reached, or refuses.
        """
        with _translated(self.connection):
            self._client = open_client(self.connection)
        self.namespace = self._client.get_user_namespace() or None

    def link(self, kind: str, identifier: str) -> str:
        """Return the UI's page of a run, a recurring run or a pipeline.

        Args:
            kind: `runs`, `recurringrun` or `pipelines`.
            identifier: Its id.
        """
        url = (self.connection.ui_url or self.connection.resolved_endpoint()).rstrip("/")
        return f"{url}/#/{kind}/details/{identifier}"

    def ensure_version(self, name: str, package: PipelinePackage) -> tuple[Any, bool]:
        """Return the pipeline's version with this very content, and whether it was uploaded now.

        Args:
            name: Name of the pipeline, which is made if need be.
            package: What to upload.

        Raises:
            ClusterError: If the API can't be reached, or refuses.
        """
        with _translated(self.connection):
            pipeline_id = self._find_pipeline(name) or self._create_pipeline(name, package)
            if version := self._find_version(pipeline_id, package.version_name):
                return version, False
            with package.as_file() as path:
                uploaded = self._client.pipeline_uploads.upload_pipeline_version(
                    path,
                    name=package.version_name,
                    display_name=package.version_name,
                    pipelineid=pipeline_id,
                    description=package.description,
                )
            return uploaded, True

    def _find_pipeline(self, name: str) -> str | None:
        listed = self._client.pipelines.pipeline_service_list_pipelines(
            filter=_named(name), **self._in_namespace()
        ).pipelines
        return str(listed[0].pipeline_id) if listed else None

    def _create_pipeline(self, name: str, package: PipelinePackage) -> str:
        models = self._client.api_models
        # Without a version: uploading would name the first one after the pipeline, and not after its content.
        made = self._client.pipelines.pipeline_service_create_pipeline(
            models.V2beta1Pipeline(
                name=name, display_name=name, description=package.description, namespace=self.namespace
            )
        )
        return str(made.pipeline_id)

    def _find_version(self, pipeline_id: str, name: str) -> Any | None:
        listed = self._client.pipelines.pipeline_service_list_pipeline_versions(
            pipeline_id, filter=_named(name)
        ).pipeline_versions
        return listed[0] if listed else None

    def ensure_experiment(self, name: str) -> str:
        """Return the id of an experiment, which is made if need be.

        Raises:
            ClusterError: If the API can't be reached, or refuses.
        """
        experiments = self._client.experiments
        with _translated(self.connection):
            listed = experiments.experiment_service_list_experiments(
                filter=_named(name), **self._in_namespace()
            ).experiments
            if listed:
                return str(listed[0].experiment_id)
            wanted = self._client.api_models.V2beta1Experiment(display_name=name, namespace=self.namespace)
            return str(experiments.experiment_service_create_experiment(wanted).experiment_id)

    def runs_named(self, name: str, experiment_id: str) -> list[Any]:
        """Return the runs of that name in an experiment, newest first.

        Raises:
            ClusterError: If the API can't be reached, or refuses.
        """
        with _translated(self.connection):
            listed = self._client.runs.run_service_list_runs(
                experiment_id=experiment_id,
                filter=_named(name),
                sort_by="created_at desc",
                page_size=_PAGE_SIZE,
            )
        return list(listed.runs or ())

    def create_run(self, **fields: Any) -> Any:
        """Start a run; `fields` are those of the API's `V2beta1Run`.

        Raises:
            ClusterError: If the API can't be reached, or refuses.
        """
        models = self._client.api_models
        with _translated(self.connection):
            return self._client.runs.run_service_create_run(models.V2beta1Run(**self._typed(fields)))

    def get_run(self, run_id: str) -> Any:
        """Return a run as it is now.

        Raises:
            ClusterError: If the API can't be reached, or refuses.
        """
        with _translated(self.connection):
            return self._client.runs.run_service_get_run(run_id)

    def recurring_runs(self, name: str = "", experiment_id: str | None = None) -> list[Any]:
        """Return the recurring runs, all or those of one name.

        Raises:
            ClusterError: If the API can't be reached, or refuses.
        """
        scope = {"experiment_id": experiment_id} if experiment_id else self._in_namespace()
        if name:
            scope["filter"] = _named(name)
        with _translated(self.connection):
            return list(
                _pages(
                    lambda token: self._recurring.recurring_run_service_list_recurring_runs(
                        page_token=token, page_size=_PAGE_SIZE, **scope
                    ),
                    "recurring_runs",
                )
            )

    def create_recurring_run(self, **fields: Any) -> Any:
        """Make a recurring run; `fields` are those of the API's `V2beta1RecurringRun`.

        The SDK's `create_recurring_run` insists on a version; the backend takes the newest without one.

        Raises:
            ClusterError: If the API can't be reached, or refuses.
        """
        models = self._client.api_models
        body = models.V2beta1RecurringRun(**self._typed(fields))
        with _translated(self.connection):
            return self._recurring.recurring_run_service_create_recurring_run(body)

    def change_recurring_run(self, recurring_run_id: str, change: str) -> None:
        """Do `enable`, `disable` or `delete`.

        Raises:
            ClusterError: If the API can't be reached, or refuses.
        """
        with _translated(self.connection):
            getattr(self._recurring, f"recurring_run_service_{change}_recurring_run")(recurring_run_id)

    @property
    def _recurring(self) -> Any:
        return self._client.recurring_runs

    def _typed(self, fields: dict[str, Any]) -> dict[str, Any]:
        models = self._client.api_models
        reference = fields.pop("version")
        return {
            **fields,
            "pipeline_version_reference": models.V2beta1PipelineVersionReference(**reference),
            "runtime_config": models.V2beta1RuntimeConfig(**fields.pop("runtime_config")),
        }

    def _in_namespace(self) -> dict[str, Any]:
        return {"namespace": self.namespace} if self.namespace else {}


def _pages(list_page: Callable[[str], Any], attribute: str) -> Iterator[Any]:
    token = ""
    while True:
        page = list_page(token)
        yield from getattr(page, attribute) or ()
        token = page.next_page_token or ""
        if not token:
            return


def _named(name: str) -> str:
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [predicate]})


@contextlib.contextmanager
def _translated(connection: Connection) -> Iterator[None]:
    """Raise what the API or the network says as one message without headers, in which tokens could stand."""
    import kfp_server_api
    import urllib3.exceptions

    try:
        yield
    except kfp_server_api.ApiException as error:
        raise _refused(connection, error) from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise ClusterError(
            f"Kubeflow Pipelines must answer. Received: {type(reason).__name__} at "
            f"{connection.resolved_endpoint()}. Check the network and the port-forward, and try again."
        ) from error


def _refused(connection: Connection, error: Any) -> ClusterError:
    try:
        body = json.loads(error.body)
        said = str(body.get("message") or body.get("error") or error.reason)
    except (TypeError, ValueError, AttributeError):
        said = str(error.reason)
    advice = _ADVICE.get(
        error.status, "Its log, `kubectl logs deployment/ml-pipeline -n kubeflow`, says more."
    )
    refusal = ClusterError(
        f"Kubeflow Pipelines at {connection.resolved_endpoint()} must accept the call. Received: status "
        f"{error.status}: {said}. {advice}"
    )
    refusal.status = error.status
    return refusal
