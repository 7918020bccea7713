"""OpenAPI schemas of the config's stages, made from their dataclasses: fields, help, ranges, defaults, choices.

A custom resource is checked by the API server, which knows this schema and nothing of Python; so what the
dataclasses refuse should be refused here already, and what they say should be said here. `rules` adds what holds
between fields. Everything is bounded, or the server could not bound the cost of the rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kubegraft.config import (
    AUTO,
    AUTO_NAME,
    CLASS_WEIGHTS,
    EXPORT_FORMATS,
    FEATURES,
    HEADS,
    MIXED_PRECISION,
    SOLVERS,
    TRANSFORMS,
    StageConfig,
)
from kubegraft.controller.rules import Rule, rule
from kubegraft.run_config import STAGES, stage_fields

Schema = dict[str, Any]

MAX_URI: Final = 1024
_MAX_TEXT: Final = 253
_MAX_LIST: Final = 8
_MAX_UNITS: Final = 65536
_SEED_RANGE: Final = (0, 2**31 - 1, False)
_TRANSFORM: Final = f"({'|'.join(TRANSFORMS)})"
_CHOICES: Final[Mapping[str, Sequence[str]]] = {
    "head": HEADS,
    "features": FEATURES,
    "solver": SOLVERS,
    "class_weights": CLASS_WEIGHTS,
    "mixed_precision": MIXED_PRECISION,
}
# Field -> what its text must match, and what is said of text that does not.
_PATTERNS: Final[Mapping[str, tuple[str, str]]] = {
    "augmentation": (
        rf"^({AUTO_NAME}|none|{_TRANSFORM}( *, *{_TRANSFORM})*)$",
        f"`augmentation` must be 'auto', 'none', or transforms with commas between: {', '.join(TRANSFORMS)}.",
    ),
    "backbone": (
        "^[a-z][a-z0-9_]*$",
        "`backbone` must be a name that `kubegraft backbones` lists, such as efficientnet_lite0.",
    ),
    "weights_sha256": (
        "^([0-9a-fA-F]{64})?$",
        "`weights_sha256` must be 64 hex digits, as `sha256sum FILE` prints them.",
    ),
}
_LENGTHS: Final[Mapping[str, int]] = {
    "source": MAX_URI,
    "weights": MAX_URI,
    "backbone": 64,
    "augmentation": 128,
}


def text(
    help_text: str,
    *,
    default: str | None = None,
    length: int = _MAX_TEXT,
    pattern: str = "",
    otherwise: str = "",
) -> Schema:
    """Return the schema of bounded text.

    Args:
        help_text: What the field means.
        default: None makes the field optional, without a value.
        length: Most characters.
        pattern: Regular expression that the text must match.
        otherwise: What is said of text that does not, instead of the expression; no quotes in the pattern then.
    """
    schema: Schema = {"type": "string", "description": help_text, "maxLength": length}
    if pattern and otherwise:
        schema["x-kubernetes-validations"] = [rule(f"self.matches(r'{pattern}')", otherwise).manifest()]
    elif pattern:
        schema["pattern"] = pattern
    return _with_default(schema, default)


def integer(help_text: str, low: int, high: int, default: int | None = None) -> Schema:
    """Return the schema of a whole number from `low` to `high`."""
    schema: Schema = {
        "type": "integer",
        "format": "int64" if high > 2**31 - 1 else "int32",
        "description": help_text,
        "minimum": low,
        "maximum": high,
    }
    return _with_default(schema, default)


def structure(help_text: str, properties: Mapping[str, Schema], **more: Any) -> Schema:
    """Return the schema of an object with these properties; `more` are further keywords."""
    return {"type": "object", "description": help_text, **more, "properties": dict(properties)}


def _with_default(schema: Schema, default: Any) -> Schema:
    return schema if default is None else {**schema, "default": default}


def config_properties() -> dict[str, Schema]:
    """Return the schemas of all that the config file holds, in its order: shared fields, then one object a stage."""
    properties = {name: _field_schema(field, STAGES["fine_tune"]) for name, field in stage_fields("").items()}
    return {**properties, **{stage: _stage_schema(stage) for stage in STAGES}}


def _stage_schema(stage: str) -> Schema:
    config = STAGES[stage]
    fields = {name: _field_schema(field, config) for name, field in stage_fields(stage).items()}
    return structure(str(config.__doc__).splitlines()[0], fields, default={})


def _field_schema(field: dataclasses.Field[Any], config: type[StageConfig]) -> Schema:
    kind = str(field.type)
    help_text = str(field.metadata["help"])
    if kind.startswith("tuple"):
        return _list_schema(field, help_text)
    if kind == "bool":
        return {"type": "boolean", "description": help_text, "default": field.default}
    if kind in ("int", "float"):
        return _number_schema(field, config)
    schema = text(
        help_text,
        default=str(field.default),
        length=_LENGTHS.get(field.name, _MAX_TEXT),
        pattern=_PATTERNS.get(field.name, ("", ""))[0],
        otherwise=_PATTERNS.get(field.name, ("", ""))[1],
    )
    if field.name in _CHOICES:
        schema["enum"] = list(_CHOICES[field.name])
    return schema


def _list_schema(field: dataclasses.Field[Any], help_text: str) -> Schema:
    items: Schema = (
        {"type": "integer", "format": "int32", "minimum": 1, "maximum": _MAX_UNITS}
        if "int" in str(field.type)
        else {"type": "string", "enum": list(EXPORT_FORMATS), "maxLength": 32}
    )
    named = items["type"] == "string"
    return {
        "type": "array",
        "description": help_text,
        "default": list(field.default),  # type: ignore[arg-type]
        "maxItems": len(EXPORT_FORMATS) if named else _MAX_LIST,
        **({"minItems": 1} if named else {}),
        "x-kubernetes-list-type": "set" if named else "atomic",
        "items": items,
    }


def _number_schema(field: dataclasses.Field[Any], config: type[StageConfig]) -> Schema:
    """Return a number's schema; where a recipe may choose, -1 is allowed beside the range."""
    low, high, open_low = {"seed": _SEED_RANGE, **config.ranges}[field.name]
    whole = str(field.type) == "int"
    auto = field.name in config.autos
    schema: Schema = {
        "type": "integer" if whole else "number",
        "format": "int64" if whole else "double",
        "description": str(field.metadata["help"]),
        "default": field.default if whole else _plain(field.default),
        "minimum": AUTO if auto else low,
        "maximum": _plain(high),
    }
    if open_low and not auto:
        schema["exclusiveMinimum"] = True
    if auto and (rules := _auto_rule(field.name, low, open_low, whole=whole)):
        schema["x-kubernetes-validations"] = [rules.manifest()]
    return schema


def _plain(number: Any) -> int | float:
    """Return a number as JSON has it: whole ones without a fraction."""
    return int(number) if number == int(number) else float(number)


def _auto_rule(name: str, low: float, open_low: bool, *, whole: bool) -> Rule | None:
    if whole and low == 0:
        return None  # there is no whole number between -1 and 0
    auto, lowest = (str(AUTO), f"{low:g}") if whole else (f"{float(AUTO)}", f"{float(low)}")
    sign, words = (">", "above") if open_low else (">=", "at least")
    return rule(
        f"self == {auto} || self {sign} {lowest}",
        f"`{name}` must be {words} {low:g}, or {AUTO} to let the recipe choose.",
    )
