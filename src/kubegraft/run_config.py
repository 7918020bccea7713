"""The choices of a whole run: one config for each stage, what they share, and their names elsewhere.

The config file, the command line and the pipeline's parameters are three spellings of a `RunConfig`. The
file nests fields by stage (`head: {learning_rate: ...}`), a pipeline parameter is one flat name
(`head_learning_rate`); `parameter_fields` is the only place that knows how one becomes the other.
The file itself is read and written by `config_file`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kubegraft.config import (
    AUTO_NAME,
    EvaluateConfig,
    ExportConfig,
    FineTuneConfig,
    HeadConfig,
    IngestConfig,
    StageConfig,
)
from kubegraft.errors import ConfigError, suggestion

STAGES: Final[Mapping[str, type[StageConfig]]] = {
    "ingest": IngestConfig,
    "head": HeadConfig,
    "fine_tune": FineTuneConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}
# Chosen once for the whole run and copied into every stage that has the field.
SHARED: Final = ("seed", "mixed_precision")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What a user may choose for a whole run.

    Attributes:
        seed: Seed of every stage; it replaces what the stages' own configs say.
        mixed_precision: Likewise, for the two stages that train.
        ingest: Where the images are and how they are split.
        head: Which backbone and head, and how the head is trained.
        fine_tune: Which last blocks are trained further, and how.
        evaluate: How the test split is reported.
        export: Which files are written for serving.
    """

    seed: int = 0
    mixed_precision: str = AUTO_NAME
    ingest: IngestConfig = dataclasses.field(default_factory=IngestConfig)
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    fine_tune: FineTuneConfig = dataclasses.field(default_factory=FineTuneConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        """Copy the shared choices into the stages, whose own rules check them.

        Raises:
            ConfigError: If a shared choice breaks its rule.
        """
        for stage in STAGES:
            config = getattr(self, stage)
            shared = {name: getattr(self, name) for name in SHARED if hasattr(config, name)}
            object.__setattr__(self, stage, dataclasses.replace(config, **shared))
        object.__setattr__(self, "seed", self.ingest.seed)  # as coerced by the stage

    def with_values(self, values: Mapping[tuple[str, str], Any]) -> RunConfig:
        """Return this config with some fields replaced.

        Args:
            values: New values by (stage, field); the stage of a shared field is "".

        Raises:
            ConfigError: If the result breaks a rule.
        """
        changes: dict[str, Any] = {field: value for (stage, field), value in values.items() if not stage}
        for stage in STAGES:
            replaced = {field: value for (owner, field), value in values.items() if owner == stage}
            changes[stage] = dataclasses.replace(getattr(self, stage), **replaced)
        return dataclasses.replace(self, **changes)

    def value(self, stage: str, field: str) -> Any:
        """Return one choice; `stage` is "" for a shared one."""
        return getattr(getattr(self, stage) if stage else self, field)


def stage_fields(stage: str) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields that are chosen for one stage alone, in order; `stage` "" names the shared ones."""
    if not stage:
        shared = {field.name: field for field in dataclasses.fields(FineTuneConfig)}
        return {name: shared[name] for name in SHARED}
    return {field.name: field for field in dataclasses.fields(STAGES[stage]) if field.name not in SHARED}


@functools.cache
def parameter_fields() -> Mapping[str, tuple[str, str]]:
    """Return (stage, field) of every pipeline parameter, in order; the stage of a shared one is "".

    A field keeps its name where only one stage has it; else the stage's name is put before it.
    """
    owners: dict[str, list[str]] = {}
    for stage in ("", *STAGES):
        for field in stage_fields(stage):
            owners.setdefault(field, []).append(stage)
    return {
        field if len(owners[field]) == 1 else f"{stage}_{field}": (stage, field)
        for stage in ("", *STAGES)
        for field in stage_fields(stage)
    }


def pipeline_parameters(run_config: RunConfig) -> dict[str, Any]:
    """Return the arguments of the `transfer_learning` pipeline: KFP scalars, tuples as lists."""
    parameters = {}
    for name, (stage, field) in parameter_fields().items():
        value = run_config.value(stage, field)
        parameters[name] = list(value) if isinstance(value, tuple) else value
    return parameters


def from_parameters(parameters: Mapping[str, Any]) -> RunConfig:
    """Return the config that some pipeline parameters mean; what is absent keeps its default.

    Raises:
        ConfigError: If a name is unknown, or a value breaks its rule.
    """
    known = parameter_fields()
    for name in parameters:
        if name not in known:
            raise ConfigError(
                f"`{name}` is not a parameter of the transfer_learning pipeline."
                f"{suggestion(name, known)} Received: {name}={parameters[name]!r}."
            )
    return RunConfig().with_values({known[name]: value for name, value in parameters.items()})
