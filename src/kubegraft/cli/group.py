"""How the command line behaves as a whole: lazy subcommands, suggestions, and errors as exit codes."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from typing import Any, Final, NamedTuple, NoReturn

import click

from kubegraft.errors import EnvironmentFault, KubegraftError, suggestion
from kubegraft.processes import refused_by_system

_DEBUG_KEY: Final = "kubegraft.debug"
_INTERRUPTED_EXIT_CODE: Final = 130
# Modules that only some installations have, with the extra of kubegraft that brings each.
_EXTRAS: Final = {
    "tensorflow": "train",
    "keras": "train",
    "PIL": "train",
    "jinja2": "train",
    "sklearn": "train",
    "kfp": "kfp",
    "kfp_server_api": "kfp",
    "kubernetes": "kfp",
    "boto3": "s3",
    "kopf": "operator",
    "aiohttp": "operator",
    "prometheus_client": "operator",
}


class Entry(NamedTuple):
    """One line of `kubegraft --help`."""

    section: str
    module: str
    attribute: str
    summary: str


# In the order of the work. The summaries stand here so that help imports no subcommand.
COMMANDS: Final = {
    "run": Entry("Whole job", "run", "run", "Images to tested classifier in one go."),
    "predict": Entry("Whole job", "predict", "predict", "Name the class of some images."),
    "serve": Entry("Whole job", "serve", "serve", "Answer over HTTP, as TensorFlow Serving does."),
    "ingest": Entry("One stage at a time", "stages", "ingest", "Check and split images, write a dataset."),
    "train-head": Entry("One stage at a time", "stages", "train_head", "Train a head on a frozen backbone."),
    "fine-tune": Entry(
        "One stage at a time", "stages", "fine_tune", "Train the backbone's last blocks further."
    ),
    "evaluate": Entry("One stage at a time", "stages", "evaluate", "Report on the test split."),
    "export": Entry("One stage at a time", "stages", "export", "Write a model for serving, and verify it."),
    "submit": Entry("On a cluster", "kubeflow", "submit", "Run the pipeline on Kubeflow, and watch it."),
    "schedule": Entry("On a cluster", "kubeflow", "schedule", "Run it on Kubeflow again and again."),
    "render": Entry("On a cluster", "render", "render", "Write manifests for a cluster without Kubeflow."),
    "job": Entry("On a cluster", "job", "job", "Run one part of a TransferJob, as its pods do."),
    "fetch": Entry("On a cluster", "fetch", "fetch", "Copy a published folder to this machine."),
    "operator": Entry("On a cluster", "operator", "operator", "Turn TransferJobs into trainings."),
    "bundle": Entry("On a cluster", "bundle", "bundle", "Carry everything to a site without internet."),
    "backbones": Entry("To find your way", "catalogue", "backbones", "List the pretrained backbones."),
    "sample-data": Entry(
        "To find your way", "catalogue", "sample_data", "Write a sample as a folder of images."
    ),
    "cache": Entry("To find your way", "cache", "cache", "Look into the feature cache, verify, prune."),
    "benchmark": Entry(
        "To find your way", "benchmark", "benchmark", "Compare with plain Keras on this machine."
    ),
    "doctor": Entry("To find your way", "machine", "doctor", "Say what this machine has and lacks."),
    "compile": Entry(
        "To find your way", "machine", "compile_pipeline", "Write the pipeline's YAML for Kubeflow."
    ),
}


class DebugOption:
    """`--debug`, which the group and every subcommand accept."""

    @staticmethod
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        """Add the option to a command's function; its value is kept in the context, not passed on."""
        return click.option(
            "--debug",
            is_flag=True,
            expose_value=False,
            is_eager=True,
            envvar="KUBEGRAFT_DEBUG",
            callback=DebugOption._remember,
            help="Show the traceback of an error.",
        )(function)

    @staticmethod
    def is_set(context: click.Context) -> bool:
        """Return whether the option was given, here or to the group."""
        return bool(context.meta.get(_DEBUG_KEY))

    @staticmethod
    def _remember(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            context.meta[_DEBUG_KEY] = True


class WorkflowGroup(click.Group):
    """Group whose subcommands are imported when they are named, and listed in the order of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the subcommands, in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a subcommand, or return None."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module = importlib.import_module(f"kubegraft.cli.{entry.module}")
        command: click.Command = getattr(module, entry.attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand; an unknown one gets a suggestion."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = suggestion(name.replace("_", "-"), COMMANDS)
            ctx.fail(f"No such command {name!r}.{near or ' Known are: ' + ', '.join(COMMANDS) + '.'}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the subcommands by section, without importing them."""
        width = max(map(len, COMMANDS))
        for section in dict.fromkeys(entry.section for entry in COMMANDS.values()):
            rows = [(n.ljust(width), e.summary) for n, e in COMMANDS.items() if e.section == section]
            with formatter.section(section):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; what it raises on purpose becomes one message and its exit code."""
        try:
            return super().invoke(ctx)
        except KubegraftError as error:
            _fail(ctx, error, error.exit_code)
        except KeyboardInterrupt as error:
            _fail(ctx, error, _INTERRUPTED_EXIT_CODE)
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            fault = EnvironmentFault(
                f"`{error.name}` isn't installed, and this command needs it. "
                f"`pip install 'kubegraft[{extra}]'` installs it; `kubegraft doctor` says what is missing."
            )
            _fail(ctx, fault, fault.exit_code)
        except BrokenPipeError:  # whoever read the output has left; click ends quietly
            raise
        except OSError as error:
            refused = refused_by_system(error)
            _fail(ctx, refused, refused.exit_code)


def _fail(ctx: click.Context, error: BaseException, exit_code: int) -> NoReturn:
    if ctx.meta.get(_DEBUG_KEY):
        traceback.print_exc()
    message = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    click.echo(f"Error: {message}", err=True)
    ctx.exit(exit_code)
