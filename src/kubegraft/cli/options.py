"""Options that are made from the fields of the configs, so that a new field is a flag without further work.

A flag's default is "not given": `default < --config file < flag`, and only what was given overrides.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from kubegraft import config as choices
from kubegraft.config import AUTO, AUTO_NAME, FineTuneConfig, StageConfig
from kubegraft.errors import ConfigError
from kubegraft.run_config import STAGES, RunConfig, parameter_fields, stage_fields

_TITLES: Final = {
    "": "Shared by all stages",
    "ingest": "Data",
    "head": "Head training",
    "fine_tune": "Fine-tuning",
    "evaluate": "Evaluation",
    "export": "Export",
}
_CHOICES: Final = {
    "head": choices.HEADS,
    "features": choices.FEATURES,
    "solver": choices.SOLVERS,
    "class_weights": choices.CLASS_WEIGHTS,
    "mixed_precision": choices.MIXED_PRECISION,
}
_METAVARS: Final = {"int": "INTEGER", "float": "NUMBER", "str": "TEXT"}
_CACHE_FLAGS: Final = (
    (
        "--cache",
        "KUBEGRAFT_CACHE",
        "LOCATION",
        "Where features are kept for later runs: a directory, a gs:// or s3:// URI, or 'none'.  [default: the user's "
        "cache directory]",
    ),
    (
        "--cache-budget",
        "KUBEGRAFT_CACHE_BUDGET",
        "SIZE",
        "Most that the cache may take on this machine, such as 20GiB.  [default: auto, 50 GiB or a fifth of the disk]",
    ),
)

Command = Callable[..., Any]
if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # generic since click 8.2, and for checkers only


class FieldType(_ParamType):
    """Value of one field of a config, checked by the config's own rules."""

    def __init__(self, config_class: type[StageConfig], field: dataclasses.Field[Any]) -> None:
        self.config_class, self.field = config_class, field
        self.name = field.name

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return what stands for the value in help."""
        if self.name in _CHOICES:
            return f"[{'|'.join(_CHOICES[self.name])}]"
        kind = str(self.field.type)
        return "A,B,..." if kind.startswith("tuple") else _METAVARS.get(kind, "VALUE")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value, or fail with the rule that it breaks."""
        from kubegraft.config_file import value_from_text

        if isinstance(value, str):
            value = value_from_text(self.field, value)
        try:
            return getattr(self.config_class(**{self.name: value}), self.name)
        except ConfigError as error:
            return self.fail(str(error), param, ctx)


class FieldOption(click.Option):
    """Option for one field; `section` is the heading it stands under in help."""

    def __init__(self, declarations: list[str], *, section: str, **attributes: Any) -> None:
        super().__init__(declarations, **attributes)
        self.section = section


class _UnlessPrinting:
    """Makes a required parameter optional beside `--print-config`, which needs no data and writes none."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            return super().process_value(ctx, value)  # type: ignore[misc]
        except click.MissingParameter:
            if ctx.params.get("print_config"):
                return None
            raise


class InputArgument(_UnlessPrinting, click.Argument):
    """Positional argument with a line of help, which click before 8.5 does not have."""

    def __init__(self, declarations: list[str], *, summary: str, **attributes: Any) -> None:
        super().__init__(declarations, **attributes)
        self.summary = summary


class OutputOption(_UnlessPrinting, click.Option):
    """`--output`, required except beside `--print-config`."""


class SectionedCommand(click.Command):
    """Command whose help shows what most people need first, then the fields of each stage."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, InputArgument):
                sections.setdefault("Arguments", []).append((parameter.make_metavar(ctx), parameter.summary))
            elif (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=34)


def config_options(stages: Iterable[str], *, flat: bool) -> Callable[[Command], Command]:
    """Return a decorator that adds `--config`, `--print-config` and a flag for every field of some stages.

    The function receives the result as `run_config`, after the file and the flags; with `--print-config`
    it is not called.

    Args:
        stages: Stages whose fields become flags.
        flat: Whether flags are named like the pipeline's parameters (`--head-learning-rate`), as for a whole
            run, or like the fields (`--learning-rate`), as for one stage.
    """
    sections = tuple(stages)
    flags = {name: pair for name, pair in _flags(sections, flat).items() if pair != ("ingest", "source")}

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def with_run_config(
            *, config_path: str | None, print_config: bool, source: str | None = None, **arguments: Any
        ) -> Any:
            given = {pair: arguments.pop(name) for name, pair in flags.items()}
            given["ingest", "source"] = source
            run_config = _run_config(config_path, given)
            if print_config:
                _print_config(run_config, sections, as_json=bool(arguments.get("as_json")))
                return None
            return function(run_config=run_config, **arguments)

        command: Command = with_run_config
        for name, (stage, field_name) in reversed(flags.items()):
            command = _field_option(name, stage, field_name)(command)
        return _file_options(command)

    return decorate


def _flags(stages: tuple[str, ...], flat: bool) -> Mapping[str, tuple[str, str]]:
    if flat:
        return parameter_fields()
    shared = [name for name in stage_fields("") if any(_has(stage, name) for stage in stages)]
    own = {name: (stage, name) for stage in stages for name in stage_fields(stage)}
    return own | {name: ("", name) for name in shared}


def _has(stage: str, field_name: str) -> bool:
    return field_name in {field.name for field in dataclasses.fields(STAGES[stage])}


def _field_option(name: str, stage: str, field_name: str) -> Callable[[Command], Command]:
    field = stage_fields(stage)[field_name]
    config_class = STAGES[stage] if stage else FineTuneConfig
    flag = f"--{name.replace('_', '-')}"
    attributes: dict[str, Any] = {"default": None, "section": _TITLES[stage]}
    attributes["help"] = f"{field.metadata['help']}  [default: {_shown_default(config_class, field)}]"
    if field.type == "bool":
        negative = f"--no-{name.replace('_', '-')}"
        return click.option(f"{flag}/{negative}", name, cls=FieldOption, is_flag=True, **attributes)
    return click.option(flag, name, cls=FieldOption, type=FieldType(config_class, field), **attributes)


def _shown_default(config_class: type[StageConfig], field: dataclasses.Field[Any]) -> str:
    if field.name in config_class.autos and field.default == AUTO:
        return AUTO_NAME
    if isinstance(field.default, tuple):
        return ",".join(map(str, field.default))
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default) or "''"


def _file_options(function: Command) -> Command:
    function = click.option(
        "--print-config",
        is_flag=True,
        is_eager=True,
        help="Print the resulting config as YAML, and do nothing else.",
    )(function)
    return click.option(
        "--config",
        "config_path",
        metavar="FILE",
        help="YAML file of choices; flags override it. --print-config prints one to start from.",
    )(function)


def _run_config(path: str | None, given: Mapping[tuple[str, str], Any]) -> RunConfig:
    from kubegraft.config_file import load_run_config

    run_config = load_run_config(path) if path is not None else RunConfig()
    return run_config.with_values({pair: value for pair, value in given.items() if value is not None})


def _print_config(run_config: RunConfig, stages: tuple[str, ...], *, as_json: bool) -> None:
    from kubegraft.config_file import to_values, to_yaml

    if as_json:
        from kubegraft.cli.output import print_json

        print_json(to_values(run_config, stages))
    else:
        click.echo(to_yaml(run_config, stages), nl=False)


def input_argument(name: str, summary: str, **attributes: Any) -> Callable[[Command], Command]:
    """Return a decorator that adds a positional argument, required unless `attributes` say otherwise."""
    return click.argument(name, cls=InputArgument, summary=summary, **attributes)


def output_option(help_text: str, **attributes: Any) -> Callable[[Command], Command]:
    """Return a decorator that adds `--output DIR`; required unless `attributes` give a default."""
    attributes = attributes or {"required": True}
    return click.option("--output", "-o", cls=OutputOption, metavar="DIR", help=help_text, **attributes)


def json_option(function: Command) -> Command:
    """Add `--json`, received as `as_json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document; what is for people goes to stderr."
    )(function)


def cache_options(function: Command) -> Command:
    """Add `--cache` and `--cache-budget`. They become environment variables for this call and the stages it starts.

    They are no fields of a config: where features are kept changes no result, and must not change a stage's key.
    """
    for flag, variable, metavar, help_text in reversed(_CACHE_FLAGS):
        function = click.option(
            flag,
            envvar=variable,
            metavar=metavar,
            expose_value=False,
            callback=functools.partial(_set_for_this_call, variable),
            help=help_text,
        )(function)
    return function


def _set_for_this_call(variable: str, ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if not value or value == os.environ.get(variable) or ctx.resilient_parsing:
        return
    earlier = os.environ.get(variable)
    is_path = variable == _CACHE_FLAGS[0][1] and "://" not in value and value != "none"
    os.environ[variable] = str(Path(value).expanduser().absolute()) if is_path else value
    ctx.call_on_close(lambda: _restore(variable, earlier))


def _restore(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value
