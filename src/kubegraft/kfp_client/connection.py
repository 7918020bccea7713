"""How to reach a Kubeflow Pipelines API, and who calls: plain, a token file, a service account, or IAP."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from kubegraft.errors import ClusterError, ConfigError

ENDPOINT_VARIABLE: Final = "KUBEGRAFT_KFP_ENDPOINT"
IN_CLUSTER_ENDPOINT: Final = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
SERVICE_ACCOUNT_TOKEN: Final = "/var/run/secrets/kubeflow/pipelines/token"
_IN_CLUSTER_VARIABLE: Final = "KUBERNETES_SERVICE_HOST"
_CONNECT_SECONDS: Final = 10
_PORTS: Final = {"http": 80, "https": 443}
_PORT_FORWARD: Final = "kubectl port-forward --namespace kubeflow service/ml-pipeline-ui 8080:80"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Where the API is and how to prove who calls. Secrets are read from files, never given as values.

    Attributes:
        endpoint: URL of the API or of the UI, which passes API calls on; "" means the service of a standard
            installation, which only a pod of the same cluster can reach.
        ui_url: URL of the UI for links; "" means the endpoint.
        namespace: Profile's namespace of a multi-user Kubeflow; "" for a standalone one.
        token_file: File with a bearer token, read before each call, so that it may be renewed.
        service_account: Whether to use the token that Kubernetes projects into a pod for KFP.
        iap_client_id: OAuth client id of Google's Identity-Aware Proxy in front of KFP.
        ca_file: Certificates to trust in place of the system's.
    """

    endpoint: str = ""
    ui_url: str = ""
    namespace: str = ""
    token_file: str = ""
    service_account: bool = False
    iap_client_id: str = ""
    ca_file: str = ""

    def __post_init__(self) -> None:
        """Check what is given.

        Raises:
            ConfigError: If the endpoint is no URL, a file is missing, or callers are proved in two ways.
        """
        for name in ("endpoint", "ui_url"):
            _check_url(name, getattr(self, name))
        for name in ("token_file", "ca_file"):
            path = getattr(self, name)
            if path and not Path(path).is_file():
                raise ConfigError(f"`{name}` must name a file. Received: {name}={path!r}. Check the path.")
        ways = {"token_file": self.token_file, "service_account": self.service_account}
        ways["iap_client_id"] = self.iap_client_id
        given = [name for name, value in ways.items() if value]
        if len(given) > 1:
            raise ConfigError(
                f"`{given[0]}` and `{given[1]}` both say who calls, so only one may be given. Received: "
                f"{', '.join(given)}. Leave out what your Kubeflow does not ask for."
            )

    def resolved_endpoint(self, environment: Mapping[str, str] = os.environ) -> str:
        """Return the URL to call.

        Raises:
            ConfigError: If none is given, and this is not a pod.
        """
        if self.endpoint:
            return self.endpoint.rstrip("/")
        if _IN_CLUSTER_VARIABLE in environment:
            return IN_CLUSTER_ENDPOINT
        raise ConfigError(
            "`endpoint` must name a Kubeflow Pipelines API outside of its cluster. Received: endpoint=''. "
            f"Give --endpoint or set {ENDPOINT_VARIABLE}; `{_PORT_FORWARD}` makes one at http://localhost:8080."
        )


def _check_url(name: str, value: str) -> None:
    url = urlsplit(value)
    if value and (url.scheme not in _PORTS or not url.hostname):
        raise ConfigError(
            f"`{name}` must be an http:// or https:// URL. Received: {name}={value!r}. "
            "For example http://localhost:8080."
        )
    if url.password or url.username:
        raise ConfigError(f"`{name}` must not hold a password. Received: one. Use --token-file instead.")


def open_client(connection: Connection) -> Any:
    """Return a `kfp.Client` that answers or fails at once, and writes no file.

    Raises:
        ClusterError: If nothing listens there.
        ConfigError: If no endpoint is known.
    """
    import kfp.client

    class Client(kfp.client.Client):  # type: ignore[misc]
        """Client without the original's five tries and its file in the home directory, which a pod has not."""

        def get_kfp_healthz(self, sleep_duration: int = 5) -> Any:
            return self._healthz_api.healthz_service_get_healthz()

        def set_user_namespace(self, namespace: str) -> None:
            self._context_setting["namespace"] = namespace

    endpoint = connection.resolved_endpoint()
    _check_listening(endpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # "only works with Kubeflow Pipeline v2"
        client = Client(
            host=endpoint,
            ui_host=connection.ui_url or endpoint,
            credentials=_credentials(connection),
            client_id=connection.iap_client_id or None,
            ssl_ca_cert=connection.ca_file or None,
        )
    if connection.namespace:
        client.set_user_namespace(connection.namespace)
    return client


def _credentials(connection: Connection) -> Any:
    token_file = connection.token_file
    if connection.service_account:
        token_file = os.environ.get("KF_PIPELINES_SA_TOKEN_PATH") or SERVICE_ACCOUNT_TOKEN
    if not token_file:
        return None
    if not Path(token_file).is_file():
        raise ConfigError(
            "`service_account` needs a token that Kubernetes projects into this pod with the audience "
            f"pipelines.kubeflow.org. Received: no file at {token_file!r}. See docs/operations.md."
        )
    from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

    return ServiceAccountTokenVolumeCredentials(path=token_file)


def _check_listening(endpoint: str) -> None:
    url = urlsplit(endpoint)
    address = (url.hostname or "", url.port or _PORTS[url.scheme])
    try:
        socket.create_connection(address, timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"`endpoint` must be where Kubeflow Pipelines listens. Received: endpoint={endpoint!r} ({error}). "
            f"If it is a port-forward, start it again: {_PORT_FORWARD}"
        ) from error
