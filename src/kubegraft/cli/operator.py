"""`kubegraft operator`: what turns TransferJobs into distributed training."""

from __future__ import annotations

import os

import click

from kubegraft import __version__
from kubegraft.cli.group import DebugOption
from kubegraft.cli.options import SectionedCommand

_IMAGE_VARIABLE = "KUBEGRAFT_TRAIN_IMAGE"
_IMAGE = f"ghcr.io/kubegraft/kubegraft-train:{__version__}"


@click.group("operator")
@DebugOption.decorate
def operator() -> None:
    """Turn TransferJobs and TransferSchedules into distributed training (docs/operator.md)."""


@operator.command("run", cls=SectionedCommand)
@click.option("--namespace", default="", help="The only namespace to work in.  [default: all]")
@click.option(
    "--image",
    default=_IMAGE,
    envvar=_IMAGE_VARIABLE,
    show_default=True,
    help=f"Image of the pods of jobs that name none; {_IMAGE_VARIABLE} also says it.",
)
@click.option(
    "--service-account", default="kubegraft-task", show_default=True, help="Their service account, likewise."
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port of /metrics, /healthz and /readyz; 0 for any.",
)
@click.option(
    "--lease-namespace",
    default="",
    help="Namespace of the lease, by which one of several replicas works.  [default: the pod's]",
)
@click.option(
    "--lease-seconds",
    type=click.FloatRange(1, 300),
    default=15,
    show_default=True,
    help="For how long others wait for a replica that is gone.",
)
@DebugOption.decorate
def run(
    namespace: str,
    image: str,
    service_account: str,
    metrics_port: int,
    lease_namespace: str,
    lease_seconds: float,
) -> None:
    """Work until SIGTERM: watch TransferJobs, run each as one JobSet, and say in its status how it goes.

    Takes the service account of its pod, or the current context of KUBECONFIG. manifests/operator installs it.
    """
    import asyncio

    from kubegraft.controller.access import find_access
    from kubegraft.controller.operator import Options
    from kubegraft.controller.operator import run as run_operator
    from kubegraft.controller.settings import Settings

    options = Options(
        access=find_access(),
        settings=Settings(image=image, service_account=service_account, namespace=namespace),
        metrics_port=metrics_port,
        lease_namespace=lease_namespace,
        lease_seconds=lease_seconds,
        **({"identity": name} if (name := os.environ.get("POD_NAME")) else {}),
    )
    asyncio.run(run_operator(options))
