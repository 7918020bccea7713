"""Reading and writing the YAML config file; errors name the line.

Values are read as the text in the file and turned into what their field holds, not into what YAML takes them
for: YAML 1.1 reads `mixed_precision: off` as false, `learning_rate: 1e-3` as text, and a digest of digits
only as a number. The command line reads its flags with the same `value_from_text`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kubegraft.config import AUTO, AUTO_NAME, help_of
from kubegraft.errors import ConfigError, suggestion
from kubegraft.run_config import SHARED, STAGES, RunConfig, parameter_fields, stage_fields

if TYPE_CHECKING:
    import yaml

_TRUTHS: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_HELP_WIDTH: Final = 96


def value_from_text(field: dataclasses.Field[Any], text: str) -> Any:
    """Return what `text` means for a field: a number, true or false, a tuple, or the text itself.

    Text that means nothing is returned as it is, and the dataclass refuses it with its rule.

    Args:
        field: Field of one of the configs in `kubegraft.config`.
        text: For example "1e-3", "auto", "yes", "256,128".
    """
    kind = str(field.type)
    if kind == "bool":
        return _TRUTHS.get(text.strip().lower(), text)
    if kind.startswith("tuple"):
        items = [item.strip() for item in text.strip().strip("[]").split(",") if item.strip()]
        return tuple(_number(item) for item in items) if "int" in kind else tuple(items)
    return text if kind == "str" or text == AUTO_NAME else _number(text)


def _number(text: str) -> int | float | str:
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        return text
    return int(text) if text.strip().lstrip("+-").isdecimal() else number


def load_run_config(path: str | os.PathLike[str]) -> RunConfig:
    """Return the config in a YAML file; what the file leaves out keeps its default.

    Raises:
        ConfigError: If the file can't be read, has an unknown or repeated key, or a value breaks its rule;
            the message names the line.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"`config` must name a readable YAML file. Received: config={str(path)!r} ({error}). "
            "`kubegraft run --print-config` prints one to start from."
        ) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(
            f"{path}, line {line}: this is not valid YAML: {error.problem}. "
            "Indent with spaces and put quotes around text with a colon or a hash in it."
        ) from error
    except yaml.YAMLError as error:  # control characters
        raise ConfigError(f"{path}: this is not valid YAML: {error}. Save it as plain text.") from error
    return _Reader(str(path)).run_config(root)


@dataclasses.dataclass(frozen=True, slots=True)
class _Reader:
    """Turns YAML nodes, which know their line, into configs."""

    path: str

    def run_config(self, root: yaml.Node | None) -> RunConfig:
        values: dict[tuple[str, str], Any] = {}
        sections: dict[str, yaml.Node] = {}
        for key, key_node, node in self._items(root, "the file"):
            if key in SHARED:
                values["", key] = self._value("", key, node)
            elif key in STAGES:
                sections[key] = node
                values |= self._section(key, node)
            else:
                raise self._error(key_node, _unknown_key(key, ""))
        for stage, node in sections.items():
            own = {pair: value for pair, value in values.items() if pair[0] == stage}
            self._checked(node, own)  # rules between the fields of one stage
        return RunConfig().with_values(values)

    def _section(self, stage: str, section: yaml.Node) -> Iterator[tuple[tuple[str, str], Any]]:
        for key, key_node, node in self._items(section, f"`{stage}`"):
            if key not in stage_fields(stage):
                raise self._error(key_node, _unknown_key(key, stage))
            yield (stage, key), self._value(stage, key, node)

    def _items(self, node: yaml.Node | None, what: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        import yaml

        if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"):
            return
        if not isinstance(node, yaml.MappingNode):
            raise self._error(
                node,
                f"{what} must hold `name: value` lines. Received: {_shown(node)}. See docs/operations.md.",
            )
        first_lines: dict[str, int] = {}
        for key_node, value in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else _shown(key_node)
            line = key_node.start_mark.line + 1
            if key in first_lines:
                raise self._error(
                    key_node,
                    f"`{key}` appears a second time, after line {first_lines[key]}; one of the two would be "
                    "ignored. Remove one.",
                )
            first_lines[key] = line
            yield key, key_node, value

    def _value(self, stage: str, name: str, node: yaml.Node) -> Any:
        import yaml

        field = stage_fields(stage)[name]
        if isinstance(node, yaml.SequenceNode) and all(isinstance(n, yaml.ScalarNode) for n in node.value):
            text = ",".join(item.value for item in node.value)
            value = value_from_text(field, text) if str(field.type).startswith("tuple") else f"[{text}]"
        elif not isinstance(node, yaml.ScalarNode):
            raise self._error(node, f"`{name}` must be a single value. Received: {_shown(node)}.")
        elif node.tag == "tag:yaml.org,2002:null":
            raise self._error(
                node, f"`{name}` has no value. Write one, or remove the line to keep the default."
            )
        else:
            value = value_from_text(field, node.value)
        self._checked(node, {(stage, name): value})
        return value

    def _checked(self, node: yaml.Node, values: dict[tuple[str, str], Any]) -> None:
        try:
            RunConfig().with_values(values)
        except ConfigError as error:
            raise self._error(node, str(error)) from error

    def _error(self, node: yaml.Node, message: str) -> ConfigError:
        return ConfigError(f"{self.path}, line {node.start_mark.line + 1}: {message}")


def _unknown_key(key: str, stage: str) -> str:
    where = f"in `{stage}`" if stage else "at the top level"
    known: Iterable[str] = stage_fields(stage) if stage else (*SHARED, *STAGES)
    if stage and key in SHARED:
        return f"`{key}` belongs at the top level: it holds for all stages. Received: {key} {where}."
    if flat := parameter_fields().get(key):
        owner, field = flat
        if owner and field != key:
            return f"`{key}` is written as `{field}` in the section `{owner}`. Received: {key} {where}."
    owners = [f"`{other}`" for other in STAGES if key in stage_fields(other)]
    if owners:
        return f"`{key}` belongs in the section {' or '.join(owners)}. Received: {key} {where}."
    near = suggestion(key, known) or f" Known are: {', '.join(known)}."
    return f"`{key}` is not a known name {where}.{near}"


def _shown(node: yaml.Node) -> str:
    import yaml

    text = str(yaml.serialize(node)).strip().removesuffix("...").strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


def to_values(run_config: RunConfig, stages: Iterable[str] = tuple(STAGES)) -> dict[str, Any]:
    """Return the config as nested plain values, in the config file's names; `auto` for what a recipe chooses.

    Args:
        run_config: Config to describe.
        stages: Sections to include, besides what all stages share.
    """
    values: dict[str, Any] = {name: getattr(run_config, name) for name in SHARED}
    for stage in stages:
        config = getattr(run_config, stage)
        values[stage] = {name: _plain(config, name) for name in stage_fields(stage)}
    return values


def _plain(config: Any, name: str) -> Any:
    value = getattr(config, name)
    if name in config.autos and value == AUTO:
        return AUTO_NAME
    return list(value) if isinstance(value, tuple) else value


def to_yaml(run_config: RunConfig, stages: Iterable[str] = tuple(STAGES)) -> str:
    """Return the config as a YAML file that explains each field, and loads back to the same config.

    Args:
        run_config: Config to write.
        stages: Sections to include, besides what all stages share.
    """
    values = to_values(run_config, stages)
    lines: list[str] = []
    for name in SHARED:
        lines += _entry(help_of(run_config.fine_tune, name), name, values[name], "")
    for stage in stages:
        summary = str(STAGES[stage].__doc__).splitlines()[0]
        lines += ["", f"# {summary}", f"{stage}:"]
        for name, value in values[stage].items():
            lines += _entry(help_of(STAGES[stage], name), name, value, "  ")
    return "\n".join(lines) + "\n"


def _entry(help_text: str, name: str, value: Any, indent: str) -> Iterator[str]:
    import textwrap

    comment = f"{indent}# "
    yield from textwrap.wrap(help_text, _HELP_WIDTH, initial_indent=comment, subsequent_indent=comment)
    yield f"{indent}{name}: {_dumped(value)}"


def _dumped(value: Any) -> str:
    import yaml

    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value)  # valid YAML, and never more than one line
    dumped = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1_000_000)
    return str(dumped).removesuffix("...\n").rstrip()
