"""`kubegraft submit` and `kubegraft schedule`: runs and recurring runs on Kubeflow Pipelines."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import click

from kubegraft.cli.group import DebugOption
from kubegraft.cli.options import (
    Command,
    SectionedCommand,
    config_options,
    input_argument,
    json_option,
)
from kubegraft.cli.output import print_facts, print_json, print_table, stdout_to_stderr
from kubegraft.cli.placement import cluster_option_group, option_group, placement_options
from kubegraft.run_config import STAGES, RunConfig

if TYPE_CHECKING:
    from kubegraft.kfp_client.connection import Connection
    from kubegraft.kfp_client.placement import Placement
    from kubegraft.submit import Submission

_CONNECTION = "Kubeflow Pipelines"
_ENDPOINT_VARIABLE = "KUBEGRAFT_KFP_ENDPOINT"
_NAMESPACE_VARIABLE = "KUBEGRAFT_KFP_NAMESPACE"
_TOKEN_FILE_VARIABLE = "KUBEGRAFT_KFP_TOKEN_FILE"

_SOURCE = input_argument(
    "source",
    "URI that pods can read: gs://, s3://, https://. Without it the config file's, or sample://digits.",
    required=False,
    metavar="[DATA]",
)


_connection_options = option_group(
    _CONNECTION,
    (
        "--endpoint",
        {
            "default": "",
            "envvar": _ENDPOINT_VARIABLE,
            "metavar": "URL",
            "help": f"API or UI of Kubeflow Pipelines; {_ENDPOINT_VARIABLE} also says it. In a pod the standard one.",
        },
    ),
    ("--ui-url", {"default": "", "metavar": "URL", "help": "UI for links, where it is not the endpoint."}),
    (
        "--namespace",
        {
            "default": "",
            "envvar": _NAMESPACE_VARIABLE,
            "help": f"Your profile's namespace in a multi-user Kubeflow; {_NAMESPACE_VARIABLE} also says it.",
        },
    ),
    (
        "--token-file",
        {
            "default": "",
            "envvar": _TOKEN_FILE_VARIABLE,
            "metavar": "FILE",
            "help": f"Bearer token, read before each call; {_TOKEN_FILE_VARIABLE} also says it.",
        },
    ),
    (
        "--service-account",
        {"is_flag": True, "help": "Use the token that Kubernetes projects into this pod for KFP."},
    ),
    (
        "--iap-client-id",
        {"default": "", "help": "OAuth client id of Google's Identity-Aware Proxy in front of KFP."},
    ),
    ("--ca-file", {"default": "", "metavar": "FILE", "help": "Certificates to trust for https."}),
)

_cluster_options = cluster_option_group(
    ("--pipeline", {"default": "", "metavar": "NAME", "help": "Name of the pipeline; by default its own."}),
    (
        "--experiment",
        {
            "default": "kubegraft",
            "metavar": "NAME",
            "help": "Experiment, made if need be.  [default: kubegraft]",
        },
    ),
    ("--image", {"default": "", "help": "Image of the tasks, with a tag that never moves."}),
    ("--registry", {"default": "", "help": "Registry of the released image, where yours has a copy."}),
    (
        "--gpu-image",
        {"default": "", "metavar": "IMAGE", "help": "Image of training tasks that ask for accelerators."},
    ),
    (
        "--work-claim",
        {
            "default": "",
            "metavar": "NAME",
            "help": "Volume claim, for retries that continue from a checkpoint.",
        },
    ),
    (
        "--secret",
        {
            "default": "",
            "metavar": "NAME",
            "help": "Secret whose keys (AWS_ACCESS_KEY_ID, ...) become variables: credentials of buckets.",
        },
    ),
    ("--pod-service-account", {"default": "", "metavar": "NAME", "help": "Service account of the pods."}),
    ("--pipeline-root", {"default": "", "metavar": "URI", "help": "Where KFP keeps the artifacts."}),
    ("--caching/--no-caching", {"default": True, "help": "Let KFP reuse finished tasks.  [default: on]"}),
)


def _with_connection(function: Command) -> Command:
    """Add the connection's options, received as one `connection`."""

    @functools.wraps(function)
    def connected(
        *,
        endpoint: str,
        ui_url: str,
        namespace: str,
        token_file: str,
        service_account: bool,
        iap_client_id: str,
        ca_file: str,
        **arguments: Any,
    ) -> Any:
        from kubegraft.kfp_client.connection import Connection

        connection = Connection(
            endpoint=endpoint,
            ui_url=ui_url,
            namespace=namespace,
            token_file=token_file,
            service_account=service_account,
            iap_client_id=iap_client_id,
            ca_file=ca_file,
        )
        return function(connection=connection, **arguments)

    return _connection_options(connected)


def _with_submission(function: Command) -> Command:
    """Add the cluster's options and the config's, received as one `submission`."""

    @functools.wraps(function)
    def described(
        *,
        run_config: RunConfig,
        name: str,
        placement: Placement,
        pod_service_account: str,
        **arguments: Any,
    ) -> Any:
        from kubegraft.submit import Submission

        names = (
            "pipeline",
            "experiment",
            "image",
            "registry",
            "gpu_image",
            "work_claim",
            "secret",
            "caching",
        )
        submission = Submission(
            run_config=run_config,
            placement=placement,
            name=name,
            service_account=pod_service_account,
            pipeline_root=arguments.pop("pipeline_root"),
            **{field: arguments.pop(field) for field in names},
        )
        return function(submission=submission, **arguments)

    return _cluster_options(placement_options(config_options(STAGES, flat=True)(described)))


@click.command("submit", cls=SectionedCommand)
@_SOURCE
@click.option("--name", default="", help="First part of the run's name; the content's digest follows.")
@click.option("--again", is_flag=True, help="Start another run although one with the same content is there.")
@click.option("--wait/--no-wait", default=True, help="Watch the run until it ends.  [default: on]")
@click.option(
    "--poll-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    help="Time between two looks at the run.  [default: 5]",
)
@json_option
@_with_connection
@_with_submission
@DebugOption.decorate
def submit(
    connection: Connection,
    submission: Submission,
    again: bool,
    wait: bool,
    poll_seconds: float,
    as_json: bool,
) -> None:
    """Run the pipeline on Kubeflow Pipelines, and watch it.

    Uploads the pipeline as a version that its content names, starts a run with the same config file and flags as
    `kubegraft run`, reports each task, and ends as the run ends. The same call again uploads and starts
    nothing: it finds the run and watches it. Ctrl-c stops watching, not the run.
    """
    from kubegraft.submit import submit as run

    with stdout_to_stderr():
        outcome = run(submission, connection, again=again, wait=wait, poll_seconds=poll_seconds)
    if as_json:
        print_json(outcome)
    else:
        shown = ("name", "version", "experiment", "state", "link")
        print_facts([(name, outcome[name]) for name in shown])


class _ScheduleGroup(click.Group):
    """Group whose subcommands stand in the order of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group("schedule", cls=_ScheduleGroup)
@DebugOption.decorate
def schedule() -> None:
    """Run the pipeline on Kubeflow Pipelines again and again.

    Images that change under the same URI are read again each time; where their digest is what it was, KFP answers all
    later tasks from its cache, so that the run ends at once.
    """


@schedule.command("create", cls=SectionedCommand)
@_SOURCE
@click.option("--name", required=True, help="Name of the schedule, by which it is found again.")
@click.option(
    "--cron",
    default="",
    metavar="'S M H D M W'",
    help="Six fields: second, minute, hour, day of month, month, day of week, in the installation's time zone.",
)
@click.option("--interval", default="", metavar="TIME", help="Instead of --cron: 30m, 12h or 7d.")
@click.option("--pin", is_flag=True, help="Stay with this version of the pipeline; else follow the newest.")
@click.option("--catch-up", is_flag=True, help="Make up for ticks that were missed.")
@json_option
@_with_connection
@_with_submission
@DebugOption.decorate
def create(
    connection: Connection,
    submission: Submission,
    cron: str,
    interval: str,
    pin: bool,
    catch_up: bool,
    as_json: bool,
) -> None:
    """Make a recurring run be as described.

    The same call again changes nothing. A schedule of that name with other content is replaced, and stays paused
    if it was.
    """
    from kubegraft.kfp_client.schedules import parse_interval
    from kubegraft.submit import schedule as run

    seconds = parse_interval(interval) if interval else 0
    with stdout_to_stderr():
        outcome = run(
            submission, connection, cron=cron, interval_seconds=seconds, pinned=pin, catch_up=catch_up
        )
    if as_json:
        print_json(outcome)
    else:
        print_facts([(name, str(value)) for name, value in outcome.items()])


@schedule.command("list", cls=SectionedCommand)
@json_option
@_with_connection
@DebugOption.decorate
def list_schedules(connection: Connection, as_json: bool) -> None:
    """List the recurring runs."""
    from kubegraft.kfp_client.backend import Backend
    from kubegraft.kfp_client.schedules import described

    with stdout_to_stderr():
        rows = [described(run) for run in Backend(connection).recurring_runs()]
    if as_json:
        print_json(rows)
    else:
        header = ("name", "state", "when", "version", "recurring_run_id")
        print_table(header, [[str(row[name]) for name in header] for row in rows])


def _change_command(change: str, summary: str) -> None:
    @schedule.command(change, cls=SectionedCommand, help=summary)
    @input_argument("name", "Name that the schedule was made with.")
    @json_option
    @_with_connection
    @DebugOption.decorate
    def command(connection: Connection, name: str, as_json: bool) -> None:
        from kubegraft.kfp_client.backend import Backend
        from kubegraft.kfp_client.schedules import change_schedule

        with stdout_to_stderr():
            changed = change_schedule(Backend(connection), name, change)
        if as_json:
            print_json({"name": name, "change": change, "changed": changed})
        else:
            click.echo(f"{name}: {change if changed else 'nothing to ' + change}")


_change_command("pause", "Start nothing from a recurring run for now.")
_change_command("resume", "Let a paused recurring run start again.")
_change_command("delete", "Delete a recurring run; runs that it started stay.")
