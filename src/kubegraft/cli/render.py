"""`kubegraft render`: manifests for a cluster without Kubeflow."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kubegraft.cli.group import DebugOption
from kubegraft.cli.options import Command, SectionedCommand, config_options, input_argument
from kubegraft.cli.placement import cluster_option_group, placement_options
from kubegraft.run_config import STAGES, RunConfig

if TYPE_CHECKING:
    from kubegraft.kfp_client.placement import Placement
    from kubegraft.rendering.pods import Accelerators, Manifest, Setting

_SOURCE = input_argument(
    "source",
    "URI, or absolute path in the pod, such as /workspace/photos. Without it the config file's, or sample://digits.",
    required=False,
    metavar="[DATA]",
)
_OUTPUT = click.option("--output", "-o", metavar="FILE", help="File to write; without it stdout.")

_setting_options = cluster_option_group(
    ("--name", {"default": "kubegraft", "help": "Name of what is rendered.  [default: kubegraft]"}),
    ("--namespace", {"default": "", "help": "Namespace; without it kubectl's."}),
    (
        "--claim",
        {"default": "kubegraft-work", "help": "Claim of the volume; '' for none.  [default: kubegraft-work]"},
    ),
    ("--pod-service-account", {"default": "", "metavar": "NAME", "help": "Service account of the pods."}),
    (
        "--cpu",
        {"default": "", "metavar": "QUANTITY", "help": "CPU limit.  [default: 4; serving 2; reader 500m]"},
    ),
    (
        "--memory",
        {
            "default": "",
            "metavar": "QUANTITY",
            "help": "Memory limit.  [default: 8Gi; serving 2Gi; reader 128Mi]",
        },
    ),
)
_image_only_options = cluster_option_group(
    (
        "--image",
        {
            "default": "",
            "help": "Image of the task, with a tag that never moves.",
        },
    ),
    (
        "--registry",
        {
            "default": "",
            "help": "Registry of the released image, where yours has a copy.",
        },
    ),
)
_result_options = cluster_option_group(
    (
        "--publish",
        {
            "default": "",
            "metavar": "URI",
            "help": "Folder in a bucket for the results; with it, --claim '' does without a volume.",
        },
    ),
    (
        "--secret",
        {
            "default": "",
            "help": "Secret whose keys become variables: credentials of a bucket with the images.",
        },
    ),
    ("--metrics", {"is_flag": True, "help": "Serve metrics for Prometheus on port 9090 of the pod."}),
)


@click.group("render")
@DebugOption.decorate
def render() -> None:
    """Write manifests for a cluster without Kubeflow.

    They use the namespace, account, volume claim and network policies that an overlay of manifests/ makes.
    """


def _with_setting(function: Command) -> Command:
    """Add the options of a task's pod, received as `setting` and `accelerators`."""

    @functools.wraps(function)
    def described(
        *,
        name: str,
        namespace: str,
        claim: str,
        pod_service_account: str,
        cpu: str,
        memory: str,
        image: str,
        registry: str,
        secret: str,
        publish: str,
        metrics: bool,
        placement: Placement,
        **arguments: Any,
    ) -> Any:
        from kubegraft.kfp_client.package import released_image
        from kubegraft.rendering.pods import Accelerators, Setting

        setting = Setting(
            name=name,
            namespace=namespace,
            claim=claim,
            image=released_image(image=image, registry=registry, gpu=placement.accelerator_count > 0),
            service_account=pod_service_account or "kubegraft-task",
            cpu=cpu or "4",
            memory=memory or "8Gi",
            secret=secret,
            publish_uri=publish,
            metrics=metrics,
        )
        accelerators = Accelerators(
            resource=placement.accelerator_type,
            count=placement.accelerator_count,
            node_selector=placement.node_selector,
            tolerations=placement.tolerations,
        )
        return function(setting=setting, accelerators=accelerators, **arguments)

    return _setting_options(_image_only_options(_result_options(placement_options(described))))


@render.command("job", cls=SectionedCommand)
@_SOURCE
@_OUTPUT
@_with_setting
@config_options(STAGES, flat=True)
@DebugOption.decorate
def job(setting: Setting, accelerators: Accelerators, run_config: RunConfig, output: str | None) -> None:
    """A Job that runs the whole pipeline in one pod.

    The config file and flags are those of `kubegraft run`; they travel in a ConfigMap. Results stay on the volume, in a
    directory with the job's name, and a pod that is lost is followed by one that continues.
    """
    from kubegraft.rendering.jobs import render_job

    _write(render_job(run_config, setting, accelerators), output)


@render.command("cronjob", cls=SectionedCommand)
@_SOURCE
@_OUTPUT
@click.option("--cron", required=True, metavar="'M H D M W'", help="Five fields, as Kubernetes has them.")
@click.option("--time-zone", default="Etc/UTC", help="Time zone of --cron.  [default: Etc/UTC]")
@_with_setting
@config_options(STAGES, flat=True)
@DebugOption.decorate
def cronjob(
    setting: Setting,
    accelerators: Accelerators,
    run_config: RunConfig,
    output: str | None,
    cron: str,
    time_zone: str,
) -> None:
    """A CronJob that retrains when the images have changed.

    A tick whose images have the digest of the run before ends at once, green, and its log says why.
    """
    from kubegraft.rendering.jobs import render_cron_job

    _write(render_cron_job(run_config, setting, accelerators, cron=cron, time_zone=time_zone), output)


@render.command("serving", cls=SectionedCommand)
@click.option(
    "--run",
    "run_name",
    default="",
    help="Name of the job whose model on the volume is served.  [default: kubegraft]",
)
@click.option(
    "--model",
    "model_uri",
    default="",
    metavar="URI",
    help="Instead of the volume: gs:// or s3:// folder that `run --publish` wrote; each pod fetches it at its start.",
)
@click.option(
    "--server",
    type=click.Choice(("tf-serving", "kubegraft", "kserve")),
    default="tf-serving",
    help="TensorFlow Serving or kubegraft's own server, a Deployment and a Service; or KServe's InferenceService.  "
    "[default: tf-serving]",
)
@click.option(
    "--image", default="", help="Image of the server.  [default: TensorFlow Serving's, or the tasks']"
)
@click.option(
    "--task-image",
    default="",
    help="Image of the tasks, which fetches --model and has kubegraft's own server.",
)
@click.option(
    "--registry",
    default="",
    help="Registry of the released image of the tasks, where yours has a copy.",
)
@click.option(
    "--secret", default="", help="Secret whose keys become variables: credentials of --model's bucket."
)
@_OUTPUT
@_setting_options
@DebugOption.decorate
def serving(
    run_name: str,
    model_uri: str,
    server: str,
    image: str,
    task_image: str,
    registry: str,
    secret: str,
    output: str | None,
    name: str,
    namespace: str,
    claim: str,
    pod_service_account: str,
    cpu: str,
    memory: str,
) -> None:
    """A server that answers about raw image bytes with the exported model."""
    from kubegraft.errors import ConfigError
    from kubegraft.kfp_client.package import check_image, released_image
    from kubegraft.rendering.pods import Setting
    from kubegraft.rendering.serving import SERVING_IMAGE, ServedModel, render_serving

    if image:
        check_image(image)
    if run_name and model_uri:
        raise ConfigError(
            f"`run` and `model` exclude each other. Received: run={run_name!r}, model={model_uri!r}. A model is "
            "on the volume or in a bucket."
        )
    model = ServedModel(
        run_name=run_name or "kubegraft",
        uri=model_uri,
        fetch_image=released_image(image=task_image, registry=registry),
        secret=secret,
    )
    setting = Setting(
        name=name,
        namespace=namespace,
        claim=claim,
        image=image or (model.fetch_image if server == "kubegraft" else SERVING_IMAGE),
        service_account=pod_service_account or "kubegraft-serving",
        cpu=cpu or "2",
        memory=memory or "2Gi",
    )
    _write(render_serving(setting, server, model), output)


@render.command("reader", cls=SectionedCommand)
@_OUTPUT
@_setting_options
@_image_only_options
@DebugOption.decorate
def reader(
    output: str | None,
    name: str,
    namespace: str,
    claim: str,
    pod_service_account: str,
    cpu: str,
    memory: str,
    image: str,
    registry: str,
) -> None:
    """A pod with the volume, from which `kubectl cp` takes what a run left there.

    It is named NAME-reader, has the volume at /workspace, and ends by itself after an hour.
    """
    from kubegraft.kfp_client.package import released_image
    from kubegraft.rendering.pods import Setting
    from kubegraft.rendering.reader import render_reader

    setting = Setting(
        name=name,
        namespace=namespace,
        claim=claim,
        image=released_image(image=image, registry=registry),
        service_account=pod_service_account or "kubegraft-task",
        cpu=cpu or "500m",
        memory=memory or "128Mi",
    )
    _write(render_reader(setting), output)


def _write(manifests: list[Manifest], output: str | None) -> None:
    from kubegraft.rendering.documents import to_documents

    text = to_documents(manifests)
    if output is None:
        click.echo(text, nl=False)
    else:
        Path(output).write_text(text, encoding="utf-8")
        click.echo(output)
