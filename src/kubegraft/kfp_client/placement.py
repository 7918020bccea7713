"""Parameters of a run in a cluster: the same config as a local run, and where its training tasks go."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from kubegraft.cluster_inputs import check_inputs
from kubegraft.errors import ConfigError, suggestion
from kubegraft.run_config import RunConfig, pipeline_parameters

_EFFECTS: Final = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_LABEL: Final = re.compile(r"([\w.-]+/)?[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the two training tasks run; the pipeline's cluster parameters.

    Attributes:
        accelerator_type: Kubernetes resource name of the accelerators.
        accelerator_count: Accelerators for each training task; 0 trains on the CPU.
        node_selector: Labels that their nodes must have.
        tolerations: Taints that they tolerate, as Kubernetes writes them.
    """

    accelerator_type: str = "nvidia.com/gpu"
    accelerator_count: int = 0
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ConfigError: If the number is negative or the type is no resource name.
        """
        if self.accelerator_count < 0:
            raise ConfigError(
                "`accelerator_count` must be 0 or more. Received: "
                f"accelerator_count={self.accelerator_count!r}. 0 trains on the CPU."
            )
        if not _LABEL.fullmatch(self.accelerator_type):
            raise ConfigError(
                "`accelerator_type` must be a Kubernetes resource name. Received: "
                f"accelerator_type={self.accelerator_type!r}. For example nvidia.com/gpu."
            )

    def parameters(self) -> dict[str, Any]:
        """Return the pipeline's cluster parameters."""
        return {
            "accelerator_type": self.accelerator_type,
            "accelerator_count": self.accelerator_count,
            "node_selector": dict(self.node_selector),
            "tolerations": [dict(toleration) for toleration in self.tolerations],
        }


def parse_selector(text: str) -> tuple[str, str]:
    """Return a label and its value from `label=value`.

    Raises:
        ConfigError: If it has another form.
    """
    label, equals, value = text.partition("=")
    if not equals or not _LABEL.fullmatch(label):
        raise ConfigError(
            f"`node_selector` must have the form label=value. Received: node_selector={text!r}. "
            "For example pool=gpu."
        )
    return label, value


def parse_toleration(text: str) -> dict[str, str]:
    """Return a Kubernetes toleration from `key[=value][:effect]`, the form that `kubectl taint` has.

    Raises:
        ConfigError: If it has another form.
    """
    taint, colon, effect = text.partition(":")
    key, equals, value = taint.partition("=")
    if not _LABEL.fullmatch(key) or (colon and effect not in _EFFECTS):
        raise ConfigError(
            "`toleration` must have the form key[=value][:effect] with an effect of "
            f"{', '.join(_EFFECTS)}. Received: toleration={text!r}.{suggestion(effect, _EFFECTS)} "
            "For example nvidia.com/gpu:NoSchedule."
        )
    matched = {"operator": "Equal", "value": value} if equals else {"operator": "Exists"}
    return {"key": key, **matched, **({"effect": effect} if effect else {})}


def run_parameters(run_config: RunConfig, placement: Placement) -> dict[str, Any]:
    """Return every parameter of the pipeline.

    Raises:
        ConfigError: If the backbone is unknown, the images or weights are where no pod can read them, or their
            URI holds a secret.
    """
    check_inputs(run_config, on_volume=False)
    return {**pipeline_parameters(run_config), **placement.parameters()}
